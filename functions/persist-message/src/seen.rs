//! Who was seen: senders and recipients, in `users`. Remembered here for a minute, so that a user costs one row in the database a minute,
//! not one a message; after that minute they are looked up again, also for a database that was emptied meanwhile.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use sqlx::postgres::PgConnection;

use crate::batch::Batch;

/// How long somebody counts as seen.
const MINUTE: Duration = Duration::from_secs(60);
/// Remembered at once, some ten megabytes of names; beyond that everybody is looked up again.
const REMEMBERED: usize = 100_000;

/// Sorted by whoever asks, so that two copies never wait for each other crosswise.
const SEEN: &str = "
    insert into users (name) select unnest($1::text[])
    on conflict (name) do update set last_seen = now() where users.last_seen < now() - interval '1 minute'";

/// Whom this copy has seen, and when it said so.
#[derive(Debug, Default)]
pub struct Seen(Mutex<HashMap<String, Instant>>);

impl Seen {
    /// Notes everybody in the batch who was not noted within the last minute.
    ///
    /// # Errors
    /// They are not noted; a second attempt will.
    pub async fn note(
        &self,
        connection: &mut PgConnection,
        batch: &Batch,
    ) -> Result<(), sqlx::Error> {
        let now = Instant::now();
        let names = self.due(batch, now);
        if names.is_empty() {
            return Ok(());
        }
        sqlx::query(SEEN).bind(&names).execute(connection).await?;
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.len() + names.len() > REMEMBERED {
            seen.clear();
        }
        seen.extend(names.into_iter().map(|name| (name.to_owned(), now)));
        Ok(())
    }

    fn due<'a>(&self, batch: &'a Batch, now: Instant) -> Vec<&'a str> {
        let seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let people = batch
            .rows
            .iter()
            .flat_map(|row| [Some(row.message.user.as_str()), row.message.to.as_deref()])
            .flatten();
        let due = people.filter(|name| {
            seen.get(*name)
                .is_none_or(|at| now.duration_since(*at) >= MINUTE)
        });
        due.collect::<BTreeSet<&str>>().into_iter().collect()
    }
}
