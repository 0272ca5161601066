# The verbs of this project. `just` lists them; on a fresh machine `./dev VERB` installs what they
# need first.

set shell := ["bash", "-euo", "pipefail", "-c"]
set positional-arguments

dev := quote(justfile_directory() / "dev")

# This list
default:
    @just --justfile {{ quote(justfile()) }} --list --unsorted

# Everything in Docker, with traces in Jaeger; returns when all of it is healthy
up:
    #!/usr/bin/env bash
    set -euo pipefail
    ./dev passwords .env
    if ! docker compose up --build --detach --wait --wait-timeout 300; then exec ./dev explain-docker; fi
    echo "Jaeger, with the traces: http://$(docker compose port jaeger 16686)"
    echo "NATS: nats://$(docker compose port nats 4222), users in nats/accounts.conf, their passwords in .env"
    echo "As the operator: just nats micro ls"

# End what `just up` started; the data stays in its volumes
down:
    docker compose down

# Everything on this machine without Docker, until Ctrl-C
dev:
    ./dev up

# Every test, on real servers that the tests start themselves; with ARGS, cargo test with them
test *ARGS:
    #!/usr/bin/env bash
    set -euo pipefail
    if (($#)); then
      cargo build --workspace --bins --locked
      exec cargo test --workspace --locked "$@"
    fi
    # Binaries and tests together: built apart, the tests' own dependencies change features of sqlx,
    # async-nats and others, and those and everything above them are compiled twice.
    cargo build --workspace --bins --tests --locked
    # Tests mostly wait for servers, and cargo runs one test program after the other: here two run
    # side by side, those that take longest first. More than two break deadlines that are promises.
    programs=$(cargo test --workspace --locked --no-run 2>&1 | tee /dev/stderr | sed -n 's/^ *Executable.*(\(.*\))$/\1/p')
    long='/(enforce_retention|stream_bootstrap|senders|send_message|relay_outbox)-'
    programs=$(grep -E "$long" <<<"$programs"; grep -vE "$long" <<<"$programs")
    one='out=$("$1" 2>&1); code=$?; printf "\n%s\n%s\n" "$1" "$out"; exit $code'
    export SCROLLBACK_SKIP_BUILD=1
    xargs -P 2 -I {} sh -c "$one" sh {} <<<"$programs"
    exec cargo test --workspace --locked --doc

# Formatting and clippy
check:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets --locked -- -D warnings

# check, and licences, advisories and shell scripts as far as their tools are installed
lint: check
    if command -v cargo-deny >/dev/null; then cargo deny check; else echo "no cargo-deny here: licences and advisories not checked"; fi
    if command -v shellcheck >/dev/null; then shellcheck dev .ci/run bench/slow-flush; else echo "no shellcheck here: scripts not checked"; fi

# What has to pass before a change lands
ci: check test

# Measured here: footprint, ingest, history, send, direct, expiry, or those named; --quick is short
bench *ARGS:
    cargo bench --locked --package bench -- "$@"

# The nats CLI as the operator (or --as USER), on whichever stack is up: just nats micro ls
[no-cd]
nats *ARGS:
    @{{ dev }} nats "$@"

# Publish JSON lines into the log that is up: .jsonl, .jsonl.gz, - for standard input
[no-cd]
import +FILES:
    @{{ dev }} import "$@"

# Store the log again from sequence FROM on (0: from its first), wait for it, and audit
[no-cd]
replay FROM:
    @{{ dev }} replay "$1"

# Look up every message of the log in PostgreSQL; exit code 1 when one is missing
[no-cd]
audit:
    @{{ dev }} audit

# Run N replicas of the function NAME, on whichever stack is up
[no-cd]
scale NAME N:
    @{{ dev }} scale "$1" "$2"

# Follow the logs of what is up: all, or the NAMES given
logs *NAMES:
    #!/usr/bin/env bash
    set -euo pipefail
    if ! ./dev status >/dev/null; then exec docker compose logs --follow --tail 20 "$@"; fi
    cd .scrollback/logs
    if (($#)); then exec tail -n 20 -F "${@/%/.log}"; else exec tail -n 20 -F ./*.log; fi

# psql on the database that is up
[no-cd]
psql *ARGS:
    @{{ dev }} psql "$@"
