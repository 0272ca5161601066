//! Receipts in a round. They have no sequence in the stream, so the watermark says nothing about
//! them: a row is published when all messages it is about are published, and then deleted. If the
//! round fails between the two, it is published again.

use std::collections::HashSet;

use sqlx::postgres::PgConnection;
use time::OffsetDateTime;

use crate::error::Error;
use crate::publish::{Outgoing, Publisher};
use base::seq::Seq;
use base::time::rfc3339;
use protocol::event::{Event, ReceiptEvent};

/// Rows of one round; each holds the receipts of one advance of a cursor.
const MAX_ROWS: i64 = 256;
/// Events of one round; a first row with more is published all the same.
const MAX_EVENTS: i64 = 2_000;

const DUE: &str = include_str!("receipts_due.sql");

/// Deletes published rows.
pub const DELETE_PUBLISHED: &str = "
    delete from outbox using unnest($1::bigint[]) as published (id) where outbox.id = published.id";

/// Publishes the receipts about messages up to `through`, all of which are published; returns how
/// many. `watermark` is written into the events, so that the stream's last event says up to where
/// messages are published, as the events of messages do.
///
/// # Errors
/// A server does not answer, or refuses.
pub async fn relay(
    connection: &mut PgConnection,
    publisher: &mut Publisher,
    watermark: Seq,
    through: Seq,
) -> Result<u64, Error> {
    type Row = (i64, OffsetDateTime, String, String, String, i64);
    let rows: Vec<Row> = sqlx::query_as(DUE)
        .bind(through.as_i64())
        .bind(MAX_ROWS)
        .bind(MAX_EVENTS)
        .fetch_all(&mut *connection)
        .await?;
    let ids: HashSet<i64> = rows.iter().map(|row| row.0).collect();
    let mut outgoing = Vec::with_capacity(rows.len());
    for (id, created_at, kind, user, room, through) in rows {
        let time = rfc3339(created_at)
            .ok_or_else(|| Error::Publish(format!("row {id} has no valid time")))?;
        let receipt = ReceiptEvent {
            user,
            room,
            through: Seq::from_i64(through),
        };
        let event = if kind == "read" {
            Event::Read(receipt)
        } else {
            Event::Delivered(receipt)
        };
        outgoing.push(Outgoing::new(&event, &time, None)?.published_through(watermark));
    }
    publisher.publish(&outgoing).await?;
    sqlx::query(DELETE_PUBLISHED)
        .bind(ids.into_iter().collect::<Vec<i64>>())
        .execute(connection)
        .await?;
    Ok(outgoing.len() as u64)
}
