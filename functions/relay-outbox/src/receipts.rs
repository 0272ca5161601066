//! Receipts in a round. They have no position in the log, so the watermark says nothing about them: a row is told when all it is about
//! is told, and then leaves. Should the round fail between the two, it is told again.

use std::collections::HashSet;

use sqlx::postgres::PgConnection;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::publish::{Outgoing, Publisher};
use crate::trouble::Trouble;
use base::seq::Seq;
use protocol::event::{Event, ReceiptEvent};

/// Rows of one round; each holds the receipts of one move of a mark.
const ROWS: i64 = 256;
/// Events of one round; a first row with more is taken all the same.
const EVENTS: i64 = 2_000;

/// In the order in which the marks moved; but nobody waits for one that is about something not told yet.
const TAKEN: &str = r#"
    select taken.id, created_at, kind, "user", room, through
      from (select id, first_seq, created_at, receipts,
                   sum(jsonb_array_length(receipts)) over w - jsonb_array_length(receipts) < $3 as fits
              from (select id, first_seq, created_at, receipts from outbox
                     where receipts is not null and first_seq <= $1 order by id limit $2) as due
            window w as (order by id)) as taken,
           jsonb_to_recordset(receipts) as receipt (kind text, "user" text, room text, through bigint)
     where fits order by taken.id"#;

pub const DONE: &str =
    "delete from outbox using unnest($1::bigint[]) as told (id) where outbox.id = told.id";

/// Publishes the receipts about what lies up to `through`, all of which is told; how many. `told` is written into the events, so that
/// the last one in the stream says up to where messages are told, as theirs do.
///
/// # Errors
/// A server does not answer, or refuses.
pub async fn relay(
    connection: &mut PgConnection,
    publisher: &mut Publisher,
    told: Seq,
    through: Seq,
) -> Result<u64, Trouble> {
    type Row = (i64, OffsetDateTime, String, String, String, i64);
    let rows: Vec<Row> = sqlx::query_as(TAKEN)
        .bind(through.as_i64())
        .bind(ROWS)
        .bind(EVENTS)
        .fetch_all(&mut *connection)
        .await?;
    let taken: HashSet<i64> = rows.iter().map(|row| row.0).collect();
    let mut outgoing = Vec::with_capacity(rows.len());
    for (_, created_at, kind, user, room, through) in rows {
        let time = created_at
            .format(&Rfc3339)
            .map_err(|error| Trouble::Publish(error.to_string()))?;
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
        outgoing.push(Outgoing::new(&event, &time, None)?.after(told));
    }
    publisher.publish(&outgoing).await?;
    sqlx::query(DONE)
        .bind(taken.into_iter().collect::<Vec<i64>>())
        .execute(connection)
        .await?;
    Ok(outgoing.len() as u64)
}
