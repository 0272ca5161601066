# Every function in one image; what a container runs is its command. The version of Rust is
# Cargo.toml's rust-version.

FROM rust:1.95-slim-bookworm AS build
WORKDIR /src
COPY . .
# A function's folder has the name of its binary. The target folder is a cache and not in the layer,
# so they are copied out.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --release --locked --workspace --exclude bench --exclude import --exclude audit --exclude demo --bins \
    && mkdir /functions \
    && for function in functions/*/; do cp "target/release/$(basename "$function")" /functions/; done

FROM debian:bookworm-slim
# For servers reached over TLS.
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/
COPY --from=build /functions/ /usr/local/bin/
USER 65532:65532
