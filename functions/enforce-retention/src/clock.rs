//! Whether PostgreSQL's clock, by which messages expire, and NATS' clock, by which they are received, agree.
//!
//! A host that comes back weeks ahead would expire everything in one pass. So NATS' time is noted in PostgreSQL, where
//! `believed_now()` holds every reader to it, and nothing is swept while the two clocks are further apart than is tolerated.
//! When both run on one host and it jumps, nobody can tell that from a host that was asleep.

use sqlx::postgres::PgConnection;

use crate::Own;
use crate::alone::refused;
use crate::budget::Look;
use base::error::{Code, Error, Result};
use service::ctx::Ctx;

/// Written once a minute at most: it need not be exact.
const NOTE: &str = "
    insert into log_clock (at, tolerance) values (to_timestamp($1::double precision / 1000), make_interval(hours => $2))
    on conflict (only_row) do update set at = excluded.at, tolerance = excluded.tolerance
     where abs(extract(epoch from log_clock.at - excluded.at)) > 30 or log_clock.tolerance <> excluded.tolerance";

/// PostgreSQL's time, and when NATS received the newest message that is stored; in Unix milliseconds.
const LOOK: &str = "
    select floor(extract(epoch from now()) * 1000)::bigint,
           (select floor(extract(epoch from received_at) * 1000)::bigint from messages order by seq desc limit 1)";

const HOUR_MS: u64 = 60 * 60 * 1_000;

/// How far PostgreSQL's clock is ahead of NATS'; negative when it is behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ahead {
    ms: i64,
}

impl Ahead {
    /// `newest` is when the newest message was received: PostgreSQL is behind if that is yet to come.
    fn new(postgres_ms: i64, nats_ms: i64, newest_ms: Option<i64>) -> Ahead {
        let behind_newest = newest_ms
            .map(|newest_ms| postgres_ms.saturating_sub(newest_ms))
            .filter(|ms| *ms < 0);
        let ms = postgres_ms.saturating_sub(nats_ms);
        Ahead {
            ms: behind_newest
                .filter(|behind| behind.unsigned_abs() > ms.unsigned_abs())
                .unwrap_or(ms),
        }
    }

    /// For the gauge.
    pub fn seconds_apart(self) -> u64 {
        self.ms.unsigned_abs() / 1_000
    }

    /// # Errors
    /// 503 when they are further apart than `hours`.
    pub fn within(self, hours: u32) -> Result<()> {
        if self.ms.unsigned_abs() <= u64::from(hours) * HOUR_MS {
            return Ok(());
        }
        let (apart, way) = (
            self.ms.unsigned_abs() / HOUR_MS,
            if self.ms > 0 { "ahead of" } else { "behind" },
        );
        Err(Error::new(
            Code::Unavailable,
            format!(
                "PostgreSQL's clock is {apart} hours {way} NATS': nothing expires by it, and nothing is swept until they agree; \
                 set the clock of the host that is wrong (CLOCK_TOLERANCE_HOURS is {hours})"
            ),
        ))
    }
}

/// Notes NATS' clock where every reader finds it; how far PostgreSQL's is ahead.
///
/// # Errors
/// A server does not answer.
pub async fn note(ctx: &Ctx<Own>) -> Result<Ahead> {
    let (look, hours) = (Look::now(ctx).await?, ctx.settings.clock_tolerance_hours);
    let hours = i32::try_from(hours).unwrap_or(i32::MAX);
    let nats_ms = look.now_ms;
    let looked = ctx
        .chat
        .database()
        .run(ctx.settings().request_deadline(), async |connection| {
            sqlx::query(NOTE)
                .bind(nats_ms as f64)
                .bind(hours)
                .execute(&mut *connection)
                .await?;
            sqlx::query_as::<_, (i64, Option<i64>)>(LOOK)
                .fetch_one(connection)
                .await
        });
    let (postgres_ms, newest_ms) = looked.await?;
    Ok(Ahead::new(postgres_ms, nats_ms, newest_ms))
}

/// In the transaction of a step: whether what it calls expired is expired by NATS' clock, too.
///
/// # Errors
/// 503 when the clocks are too far apart; or a server does not answer.
pub async fn agree(ctx: &Ctx<Own>, connection: &mut PgConnection) -> Result<()> {
    let look = Look::now(ctx).await?;
    let (postgres_ms, newest_ms) = sqlx::query_as(LOOK)
        .fetch_one(connection)
        .await
        .map_err(refused)?;
    Ahead::new(postgres_ms, look.now_ms, newest_ms).within(ctx.settings.clock_tolerance_hours)
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
            // What is to come was received already.
            (0, 0, Some(7 * HOUR), false),
            (0, 0, Some(5 * HOUR), true),
        ] {
            let ahead = Ahead::new(postgres, nats, newest);
            assert_eq!(ahead.within(6).is_ok(), agree, "{ahead:?}");
        }
        let line = Ahead::new(40 * 24 * HOUR, 0, None)
            .within(6)
            .unwrap_err()
            .to_string();
        assert!(line.contains("960 hours ahead of NATS'"), "{line}");
        let line = Ahead::new(0, 0, Some(48 * HOUR))
            .within(6)
            .unwrap_err()
            .to_string();
        assert!(line.contains("48 hours behind NATS'"), "{line}");
    }
}
