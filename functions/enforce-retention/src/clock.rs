//! Compares PostgreSQL's clock, by which messages expire, with NATS' clock, which is their time of
//! receipt.
//!
//! A host whose clock jumps weeks ahead would expire everything in one pass. So NATS' time is
//! written to PostgreSQL, where `believed_now()` limits every reader to it, and nothing is deleted
//! while the two clocks differ by more than the tolerance. If both run on one host and it jumps,
//! that cannot be distinguished from a host that was suspended.

use sqlx::postgres::PgConnection;

use crate::budget::StreamStatus;
use crate::lock::database_error;
use crate::state::State;
use base::error::{Code, Error, Result};
use service::ctx::Ctx;

/// Written only when it changes by more than 30 s, because it need not be exact.
const SET_NATS_TIME: &str = "
    insert into log_clock (at, tolerance)
    values (to_timestamp($1::double precision / 1000), make_interval(hours => $2))
    on conflict (only_row) do update set at = excluded.at, tolerance = excluded.tolerance
     where abs(extract(epoch from log_clock.at - excluded.at)) > 30
        or log_clock.tolerance <> excluded.tolerance";

/// PostgreSQL's time, and when NATS received the newest stored message; in Unix milliseconds.
const TIMES: &str = "
    select floor(extract(epoch from now()) * 1000)::bigint,
           (select floor(extract(epoch from received_at) * 1000)::bigint
              from messages order by seq desc limit 1)";

const HOUR_MS: u64 = 60 * 60 * 1_000;

/// How far PostgreSQL's clock is ahead of NATS'; negative when it is behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offset {
    ms: i64,
}

impl Offset {
    /// `newest_ms` is when NATS received the newest stored message. If PostgreSQL's clock is before
    /// that, it is behind.
    fn new(postgres_ms: i64, nats_ms: i64, newest_ms: Option<i64>) -> Offset {
        let behind_newest = newest_ms
            .map(|newest_ms| postgres_ms.saturating_sub(newest_ms))
            .filter(|ms| *ms < 0);
        let ms = postgres_ms.saturating_sub(nats_ms);
        Offset {
            ms: behind_newest
                .filter(|behind| behind.unsigned_abs() > ms.unsigned_abs())
                .unwrap_or(ms),
        }
    }

    /// The difference for the gauge.
    pub fn seconds_apart(self) -> u64 {
        self.ms.unsigned_abs() / 1_000
    }

    /// # Errors
    /// 503 if the clocks differ by more than `hours`.
    pub fn within(self, hours: u32) -> Result<()> {
        if self.ms.unsigned_abs() <= u64::from(hours) * HOUR_MS {
            return Ok(());
        }
        let apart = self.ms.unsigned_abs() / HOUR_MS;
        let direction = if self.ms > 0 { "ahead of" } else { "behind" };
        Err(Error::new(
            Code::Unavailable,
            format!(
                "PostgreSQL's clock is {apart} hours {direction} NATS': no expired message is \
                 deleted until they agree; set the clock of the host that is wrong \
                 (CLOCK_TOLERANCE_HOURS is {hours})"
            ),
        ))
    }
}

/// Writes NATS' time to PostgreSQL, where every reader finds it; returns how far PostgreSQL's clock
/// is ahead.
///
/// # Errors
/// A server does not answer.
pub async fn synchronize(ctx: &Ctx<State>) -> Result<Offset> {
    let nats_ms = StreamStatus::read(ctx).await?.now_ms;
    let hours = i32::try_from(ctx.settings.clock_tolerance_hours).unwrap_or(i32::MAX);
    let times = ctx
        .chat
        .database()
        .run(ctx.settings().request_deadline(), async |connection| {
            sqlx::query(SET_NATS_TIME)
                .bind(nats_ms as f64)
                .bind(hours)
                .execute(&mut *connection)
                .await?;
            sqlx::query_as::<_, (i64, Option<i64>)>(TIMES)
                .fetch_one(connection)
                .await
        });
    let (postgres_ms, newest_ms) = times.await?;
    Ok(Offset::new(postgres_ms, nats_ms, newest_ms))
}

/// In the transaction of a step: makes sure that what it calls expired is expired by NATS' clock,
/// too.
///
/// # Errors
/// 503 if the clocks differ too much; or a server does not answer.
pub async fn check(ctx: &Ctx<State>, connection: &mut PgConnection) -> Result<()> {
    let nats_ms = StreamStatus::read(ctx).await?.now_ms;
    let (postgres_ms, newest_ms) = sqlx::query_as(TIMES)
        .fetch_one(connection)
        .await
        .map_err(database_error)?;
    Offset::new(postgres_ms, nats_ms, newest_ms).within(ctx.settings.clock_tolerance_hours)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: i64 = HOUR_MS as i64;

    #[test]
    fn clocks_agree_within_hours_and_neither_way_beyond() {
        for (postgres, nats, newest, agree) in [
            (0, 0, None, true),
            (6 * HOUR, 0, Some(-90 * HOUR), true),
            (7 * HOUR, 0, None, false),
            (0, 7 * HOUR, None, false),
            // A message was received in the future of PostgreSQL.
            (0, 0, Some(7 * HOUR), false),
            (0, 0, Some(5 * HOUR), true),
        ] {
            let offset = Offset::new(postgres, nats, newest);
            assert_eq!(offset.within(6).is_ok(), agree, "{offset:?}");
        }
        let line = Offset::new(40 * 24 * HOUR, 0, None)
            .within(6)
            .unwrap_err()
            .to_string();
        assert!(line.contains("960 hours ahead of NATS'"), "{line}");
        let line = Offset::new(0, 0, Some(48 * HOUR))
            .within(6)
            .unwrap_err()
            .to_string();
        assert!(line.contains("48 hours behind NATS'"), "{line}");
    }
}
