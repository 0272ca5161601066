//! Handles the batches that the consumer delivers: parses, stores, traces, counts.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use tracing::field::Empty;
use tracing::{Instrument, Span};

use crate::Shared;
use crate::batch::Batch;
use crate::writer::{FIRST_PAUSE, LONGEST_PAUSE, STORE_DEADLINE, Writer, Written};
use base::backoff::Backoff;
use base::error::Fatal;
use base::log_once::LogOnce;
use jetstream::consumer::{Delivery, Outcome, PullConsumer};
use nats::trace::{link, remote_parent};
use protocol::subject::{STREAM, WORKER, subject_template};
use service::ctx::Ctx;
use service::meter::Meter;

/// Consumes the stream until the process is asked to stop.
pub async fn persist_messages(ctx: Ctx<Shared>, meter: Meter) -> Result<(), Fatal> {
    if !check_encoding(&ctx).await? {
        return Ok(());
    }
    let consumer = ctx.chat.consumer(ctx.batch, ctx.stuck_after);
    consumer
        .run(|deliveries| handle(ctx.clone(), consumer.clone(), meter.clone(), deliveries))
        .await
}

/// Waits until PostgreSQL answers and checks that its encoding can hold every character; false when
/// asked to stop first.
async fn check_encoding(ctx: &Ctx<Shared>) -> Result<bool, Fatal> {
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    let mut log = LogOnce::default();
    loop {
        let database = ctx.chat.database();
        let checked = database
            .run(STORE_DEADLINE, postgres::encoding::encoding_refusal)
            .await;
        let error = match checked {
            Ok(None) => return Ok(true),
            Ok(Some(refusal)) => return Err(Fatal::new(refusal)),
            Err(error) => error,
        };
        if log.is_news(&error.to_string()) {
            tracing::warn!(
                %error,
                "PostgreSQL does not answer; waiting for it. Nothing is lost: the stream keeps the \
                 messages"
            );
        }
        tokio::select! {
            () = tokio::time::sleep(backoff.next_pause()) => {}
            () = ctx.stop().cancelled() => return Ok(false),
        }
    }
}

/// Stores one batch, however long the database takes.
async fn handle(
    ctx: Ctx<Shared>,
    consumer: PullConsumer,
    meter: Meter,
    deliveries: Arc<[Delivery]>,
) -> Outcome {
    let begun = Instant::now();
    let receive = receive_span(deliveries.len());
    let processing = process_spans(&receive, &deliveries);
    let batch = Batch::parse(&deliveries, ctx.chat.limits());
    let redelivered = batch.redelivered;
    let mismatched = batch.mismatched;
    let writer = Writer::new(&ctx, &consumer, &deliveries);
    let Some(written) = writer.write(batch).instrument(receive).await else {
        return Outcome::Abandoned;
    };
    mark_failed(&processing, &written);
    for (_, reason) in &written.dead_letters {
        meter.refused(format!("422:{reason}"));
    }
    meter.count("duplicates", written.duplicates);
    meter.count("redelivered", redelivered);
    // Operators know it by this name.
    meter.count("contradicted", mismatched);
    meter.count("changes", written.changes);
    meter.handled(deliveries.len() as u64, begun.elapsed());
    Outcome::Processed
}

fn receive_span(messages: usize) -> Span {
    tracing::info_span!(
        parent: None,
        "receive",
        otel.name = format!("receive {STREAM}"),
        otel.kind = "consumer",
        messaging.system = "nats",
        messaging.operation.name = "receive",
        messaging.destination.name = STREAM,
        messaging.consumer.group.name = WORKER,
        messaging.batch.message_count = messages,
    )
}

/// The spans of sampled messages, by sequence.
fn process_spans(receive: &Span, deliveries: &[Delivery]) -> HashMap<i64, Span> {
    let spans = deliveries.iter().filter_map(|delivery| {
        let span = process_span(receive, delivery)?;
        Some((delivery.message.seq.as_i64(), span))
    });
    spans.collect()
}

/// A sampled message gets a span in its sender's trace, and the batch's span a link to it.
fn process_span(receive: &Span, delivery: &Delivery) -> Option<Span> {
    let message = &delivery.message;
    let headers = message.headers.as_ref();
    if !link(receive, headers) {
        return None;
    }
    let template = subject_template(&message.subject);
    let span = tracing::info_span!(
        parent: None,
        "process",
        otel.name = format!("process {template}"),
        otel.kind = "consumer",
        otel.status_code = Empty,
        error.r#type = Empty,
        messaging.system = "nats",
        messaging.operation.name = "process",
        messaging.destination.name = message.subject,
        messaging.destination.template = template,
        scrollback.seq = message.seq.get(),
    );
    remote_parent(&span, headers);
    Some(span)
}

fn mark_failed(processing: &HashMap<i64, Span>, written: &Written) {
    for (seq, reason) in &written.dead_letters {
        if let Some(span) = processing.get(seq) {
            span.record("otel.status_code", "ERROR");
            span.record("error.type", reason.as_str());
        }
    }
}
