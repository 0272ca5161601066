//! `demo`: messages sent, read, stored, told of, deleted, delivered, and the services that did it, each step with the command a
//! person would type.

mod ask;
mod people;
mod rely;
mod services;
mod show;

use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Deserialize;
use serde_json::json;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use ask::{answer, ask};
use base::error::Fatal;
use jetstream::append::PublishAck;
use nats::connection::{Connection, connect};
use nats::settings::NatsSettings;
use protocol::endpoints::HISTORY;
use protocol::header;
use protocol::history::Source;
use protocol::message::Message;
use protocol::name::Room;
use protocol::subject::STREAM;
use service::config::Vars;
use service::function::Identity;
use service::telemetry::{Telemetry, new_instance_id};

const STORED_WITHIN: Duration = Duration::from_secs(30);
const POLL_INTERVAL: Duration = Duration::from_millis(20);
const PAGE: u32 = 10;

const IDENTITY: Identity = Identity {
    name: "demo",
    version: env!("CARGO_PKG_VERSION"),
    description: "Sends messages, reads them back, shows who did it.",
};

const HELP: &str = "\
Sends messages, reads them back, waits until they are stored, syncs, deletes one, has two people write and read, and lists
the services found.

usage: demo [ROOM]   (general)

Configuration comes from the environment:
  NATS_URL                      nats://127.0.0.1:4222; several, separated by commas
  NATS_USER, NATS_PASS          a trusted publisher; or NATS_CREDS, a credentials file
  OPERATOR_USER, OPERATOR_PASS  who may look for services; without them that step is left out
  OTEL_*                        the standard variables; with them, sending, storing and reading stand in one trace";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let room = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => "general",
        ["--help" | "-h"] => {
            println!("{HELP}");
            return ExitCode::SUCCESS;
        }
        [room] if !room.starts_with('-') => room,
        _ => {
            eprintln!("usage: demo [ROOM]   (demo --help says more)");
            return ExitCode::from(2);
        }
    };
    let room = match Room::parse(room) {
        Ok(room) => room,
        Err(refusal) => {
            eprintln!("demo: {}", refusal.reason);
            return ExitCode::from(2);
        }
    };
    match run(&room) {
        Ok(()) => ExitCode::SUCCESS,
        Err(fatal) => {
            eprintln!("demo: {fatal}");
            ExitCode::FAILURE
        }
    }
}

fn run(room: &Room) -> Result<(), Fatal> {
    let vars = Vars::from_env()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .map_err(|error| Fatal::new(format!("no tokio runtime: {error}")))?;
    let (telemetry, outcome) = runtime.block_on(async {
        match Telemetry::start(&IDENTITY, &new_instance_id()) {
            Ok(telemetry) => (telemetry, demonstrate(&vars, room).await),
            Err(fatal) => (Telemetry::default(), Err(fatal)),
        }
    });
    telemetry.stop();
    outcome
}

/// `OPERATOR_USER`, `OPERATOR_PASS`.
#[derive(Deserialize)]
struct OperatorSettings {
    operator_user: Option<String>,
    operator_pass: Option<String>,
}

async fn demonstrate(vars: &Vars, room: &Room) -> Result<(), Fatal> {
    let (nats, operator): (NatsSettings, OperatorSettings) = (vars.read()?, vars.read()?);
    let stop = CancellationToken::new();
    let publisher = connect(&nats, IDENTITY.name, &stop).await?;
    let root = tracing::info_span!("demo");
    let steps = async {
        send_and_read(&publisher, room).await?;
        // The admin room takes messages from trusted publishers only.
        if room.as_str() != Room::ADMIN {
            rely::demonstrate(&publisher, room).await?;
        }
        people::demonstrate(&publisher).await
    };
    steps.instrument(root).await?;
    if operator.operator_user.is_some() {
        let operator = NatsSettings {
            nats_user: operator.operator_user,
            nats_pass: operator.operator_pass,
            nats_creds: None,
            ..nats
        };
        let operator = connect(&operator, IDENTITY.name, &stop).await?;
        println!(
            "12. Who did this? Every copy of every function answers for itself.\n   $ nats micro ls; nats micro stats persist-message\n"
        );
        services::list(operator.client()).await?;
    }
    Ok(())
}

async fn send_and_read(publisher: &Connection, room: &Room) -> Result<(), Fatal> {
    let subject = room.append_subject(IDENTITY.name);
    let body = json!({
        "user": "demo", "text": "Hello from the demonstration", "timestamp": now_ms(),
        "id": format!("demo-{}-{}", now_ms(), std::process::id()),
    });
    println!(
        "1. Send a message to {subject}, as a request: JetStream answers when the message is on disk."
    );
    println!("   $ nats req {subject} '{body}'");
    let send = tracing::info_span!(
        "send",
        otel.name = format!("send {}", protocol::subject::subject_template(&subject)),
        otel.kind = "producer",
        messaging.system = "nats",
        messaging.operation.name = "send",
        messaging.operation.r#type = "send",
        messaging.destination.name = subject,
        messaging.message.id = tracing::field::Empty,
    );
    let ack = ask(
        publisher,
        &subject,
        &body.to_string(),
        &send,
        "the log; stream-bootstrap makes it",
    )
    .await?;
    let ack: PublishAck = serde_json::from_slice(&ack.payload)
        .map_err(|_| Fatal::new("what answers is not JetStream"))?;
    let seq = match ack {
        PublishAck {
            stream,
            seq,
            error: None,
            ..
        } if stream == STREAM => seq,
        PublishAck { error, .. } => {
            let why = error.map(|error| error.description).unwrap_or_default();
            return Err(Fatal::new(format!(
                "JetStream did not take the message: {why}"
            )));
        }
    };
    send.record("messaging.message.id", seq.get());
    drop(send);
    println!("   acknowledged: sequence {seq} of {STREAM}\n");

    println!(
        "2. Read the room. History holds what was acknowledged before it was asked, stored or not."
    );
    println!(
        "   $ nats req {} '{{\"limit\":{PAGE}}}'",
        HISTORY.subject(&[room.as_str()])
    );
    let page = history(publisher, room, &json!({"limit": PAGE})).await?;
    if !page.messages.iter().any(|message| message.seq == seq) {
        return Err(Fatal::new(format!(
            "the page does not hold sequence {seq}, which was acknowledged: this should never happen"
        )));
    }
    println!("   {}", page.headers());
    show::messages(&page.messages);
    println!();

    println!("3. Wait until the message is in PostgreSQL: then the log is no longer asked for it.");
    println!(
        "   $ nats req {} '{{\"after\":{},\"limit\":1}}'",
        HISTORY.subject(&[room.as_str()]),
        seq.previous()
    );
    let begun = Instant::now();
    loop {
        let page = history(
            publisher,
            room,
            &json!({"after": seq.previous(), "limit": 1}),
        )
        .await?;
        if page.source == Source::Index
            && page
                .messages
                .first()
                .is_some_and(|message| message.seq == seq)
        {
            println!(
                "   {}   after {} ms\n",
                page.headers(),
                begun.elapsed().as_millis()
            );
            return Ok(());
        }
        if begun.elapsed() > STORED_WITHIN {
            return Err(Fatal::new(format!(
                "not stored within {} s (source {}): does persist-message run, and PostgreSQL? The message is safe in the log",
                STORED_WITHIN.as_secs(),
                page.source.as_str()
            )));
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// One page as it came.
struct Answered {
    messages: Vec<Message>,
    source: Source,
    through: String,
    more: String,
}

impl Answered {
    fn headers(&self) -> String {
        format!(
            "{}: {}   {}: {}   {}: {}",
            header::SOURCE,
            self.source.as_str(),
            header::THROUGH,
            self.through,
            header::MORE,
            self.more
        )
    }
}

async fn history(
    publisher: &Connection,
    room: &Room,
    body: &serde_json::Value,
) -> Result<Answered, Fatal> {
    let subject = HISTORY.subject(&[room.as_str()]);
    let reply = answer(publisher, &subject, body, "get-history").await?;
    let header = |name: &str| {
        reply
            .headers
            .as_ref()
            .and_then(|headers| headers.get(name))
            .map(|value| value.as_str().to_owned())
    };
    let unreadable = || Fatal::new(format!("the answer to {subject} is not a page of history"));
    Ok(Answered {
        messages: serde_json::from_slice(&reply.payload).map_err(|_| unreadable())?,
        source: header(header::SOURCE)
            .and_then(|source| Source::parse(&source))
            .ok_or_else(unreadable)?,
        through: header(header::THROUGH).ok_or_else(unreadable)?,
        more: header(header::MORE).ok_or_else(unreadable)?,
    })
}

fn now_ms() -> u128 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |now| now.as_millis())
}
