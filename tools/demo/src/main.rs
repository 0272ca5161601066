//! `demo`: sends, reads, stores, deletes and delivers messages, and lists the services that did it,
//! each step with the command a user would type.

mod participants;
mod report;
mod request;
mod room;
mod services;

use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clap::Parser;
use secrecy::SecretString;
use serde_json::json;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, Span};

use base::error::Fatal;
use jetstream::publish::parse_ack;
use nats::connection::{Connection, connect};
use nats::settings::NatsSettings;
use nats::span::send_span;
use protocol::endpoints::HISTORY;
use protocol::header;
use protocol::history::Source;
use protocol::message::Message;
use protocol::name::Room;
use protocol::subject::STREAM;
use request::{request_raw, request_until_answered};
use service::config::{NatsVariables, Vars};
use service::function::Identity;
use service::telemetry::{Telemetry, new_instance_id};

const STORED_WITHIN: Duration = Duration::from_secs(30);
const POLL_INTERVAL: Duration = Duration::from_millis(20);
const PAGE: u32 = 10;

const IDENTITY: Identity = Identity {
    project: protocol::PROJECT,
    name: "demo",
    version: env!("CARGO_PKG_VERSION"),
    description: "Sends messages, reads them back, shows who did it.",
};

const ENVIRONMENT: &str = "\
Configuration comes from the environment:
  NATS_URL                      nats://127.0.0.1:4222; several, separated by commas
  NATS_USER, NATS_PASS          a trusted publisher; or NATS_CREDS, a credentials file
  OPERATOR_USER, OPERATOR_PASS  who may list services; without them that step is left out
  OTEL_*                        the standard variables; with them, all steps are one trace";

/// Sends messages, reads them back, waits until they are stored, syncs, deletes one, has two users
/// write and read, and lists the services found.
#[derive(Debug, Parser)]
#[command(name = "demo", version, after_help = ENVIRONMENT)]
struct Arguments {
    /// The room to use
    #[arg(default_value = "general", value_parser = parse_room)]
    room: Room,
}

fn parse_room(name: &str) -> Result<Room, String> {
    Room::parse(name).map_err(|refusal| refusal.reason)
}

fn main() -> ExitCode {
    match run(&Arguments::parse().room) {
        Ok(()) => ExitCode::SUCCESS,
        Err(fatal) => {
            eprintln!("demo: {fatal}");
            ExitCode::FAILURE
        }
    }
}

fn run(room: &Room) -> Result<(), Fatal> {
    let vars = Vars::from_env();
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

service::settings! {
    /// Who may ask functions how they are.
    struct OperatorSettings {
        /// The operator's user.
        operator_user: Option<SecretString>;
        /// Its password.
        operator_pass: Option<SecretString>;
    }
}

async fn demonstrate(vars: &Vars, room: &Room) -> Result<(), Fatal> {
    let nats = NatsSettings::from(vars.read::<NatsVariables>()?);
    let operator: OperatorSettings = vars.read()?;
    let stop = CancellationToken::new();
    let publisher = connect(&nats, IDENTITY.name, &stop).await?;
    let root = tracing::info_span!("demo");
    let steps = async {
        send_and_read(&publisher, room).await?;
        // The admin room takes messages from trusted publishers only.
        if room.as_str() != Room::ADMIN {
            room::demonstrate(&publisher, room).await?;
        }
        participants::demonstrate(&publisher).await
    };
    steps.instrument(root).await?;
    if operator.operator_user.is_some() {
        let operator = NatsSettings {
            user: operator.operator_user,
            password: operator.operator_pass,
            credentials: None,
            ..nats
        };
        let operator = connect(&operator, IDENTITY.name, &stop).await?;
        println!(
            "12. Who did this? Every replica of every function answers for itself.\n   $ ./dev \
             nats micro ls; ./dev nats micro stats persist-message\n"
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
        "1. Send a message to {subject}, as a request: JetStream answers when the message is on \
         disk."
    );
    println!("   $ ./dev nats --as publisher req {subject} '{body}'");
    let template = protocol::subject::subject_template(&subject);
    let send = send_span(&Span::current(), &subject, template);
    let ack = request_until_answered(
        publisher,
        &subject,
        &body.to_string(),
        &send,
        "the stream; stream-bootstrap creates it",
    )
    .await?;
    let ack = parse_ack(&ack.payload)
        .map_err(|error| Fatal::new(format!("the message was not stored: {error}")))?;
    if ack.stream != STREAM {
        return Err(Fatal::new(format!(
            "stream {} stored the message, not {STREAM}",
            ack.stream
        )));
    }
    let seq = ack.seq;
    send.record("messaging.message.id", seq.get());
    drop(send);
    println!("   acknowledged: sequence {seq} of {STREAM}\n");

    println!(
        "2. Read the room. History contains every message acknowledged before the request, stored \
         or not."
    );
    println!(
        "   $ ./dev nats --as publisher req {} '{{\"limit\":{PAGE}}}'",
        HISTORY.subject(&[room.as_str()])
    );
    let page = history(publisher, room, &json!({"limit": PAGE})).await?;
    if !page.messages.iter().any(|message| message.seq == seq) {
        return Err(Fatal::new(format!(
            "the page does not contain sequence {seq}, which was acknowledged: this should never \
             happen"
        )));
    }
    println!("   {}", page.headers());
    report::print_messages(&page.messages);
    println!();

    println!(
        "3. Wait until the message is in PostgreSQL: then the stream is no longer needed for it."
    );
    println!(
        "   $ ./dev nats --as publisher req {} '{{\"after\":{},\"limit\":1}}'",
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
        if page.source == Source::Projection
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
                "not stored within {} s (source {}): are persist-message and PostgreSQL running? \
                 The message is safe in the stream",
                STORED_WITHIN.as_secs(),
                page.source.as_str()
            )));
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// One page as it came.
struct HistoryPage {
    messages: Vec<Message>,
    source: Source,
    through: String,
    more: String,
}

impl HistoryPage {
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
) -> Result<HistoryPage, Fatal> {
    let subject = HISTORY.subject(&[room.as_str()]);
    let reply = request_raw(publisher, &subject, body, "get-history").await?;
    let header = |name: &str| {
        reply
            .headers
            .as_ref()
            .and_then(|headers| headers.get(name))
            .map(|value| value.as_str().to_owned())
    };
    let unparseable = || Fatal::new(format!("the reply to {subject} is not a page of history"));
    Ok(HistoryPage {
        messages: serde_json::from_slice(&reply.payload).map_err(|_| unparseable())?,
        source: header(header::SOURCE)
            .and_then(|source| Source::parse(&source))
            .ok_or_else(unparseable)?,
        through: header(header::THROUGH).ok_or_else(unparseable)?,
        more: header(header::MORE).ok_or_else(unparseable)?,
    })
}

fn now_ms() -> u128 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |now| now.as_millis())
}
