//! When senders and recipients were last seen, in table `users`. A user costs one row per minute
//! and not one per message, because we remember for a minute whom we have recorded. After that
//! minute the database is asked again, which also restores the rows of a database that was emptied
//! meanwhile.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use sqlx::postgres::PgConnection;

use crate::batch::Batch;

/// How long a recorded user counts as seen.
const INTERVAL: Duration = Duration::from_secs(60);
/// Users remembered, some ten megabytes of names; beyond that all are recorded again.
const MAX_REMEMBERED: usize = 100_000;

/// The caller sorts the names, so that two replicas never deadlock.
const RECORD: &str = "
    insert into users (name) select unnest($1::text[])
    on conflict (name) do update set last_seen = now()
     where users.last_seen < now() - interval '1 minute'";

/// Whom this replica has recorded, and when.
#[derive(Debug, Default)]
pub struct LastSeen(Mutex<HashMap<String, Instant>>);

impl LastSeen {
    /// Records every user of the batch who was not recorded within the last minute.
    ///
    /// # Errors
    /// They are not recorded; a second attempt records them.
    pub async fn record(
        &self,
        connection: &mut PgConnection,
        batch: &Batch,
    ) -> Result<(), sqlx::Error> {
        let now = Instant::now();
        let names = self.due(batch, now);
        if names.is_empty() {
            return Ok(());
        }
        sqlx::query(RECORD).bind(&names).execute(connection).await?;
        let mut recorded = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if recorded.len() + names.len() > MAX_REMEMBERED {
            recorded.clear();
        }
        recorded.extend(names.into_iter().map(|name| (name.to_owned(), now)));
        Ok(())
    }

    fn due<'a>(&self, batch: &'a Batch, now: Instant) -> Vec<&'a str> {
        let recorded = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut due = BTreeSet::new();
        for row in &batch.rows {
            let users = [Some(row.message.user.as_str()), row.message.to.as_deref()];
            due.extend(users.into_iter().flatten());
        }
        let is_due = |name: &&str| {
            let at = recorded.get(*name);
            at.is_none_or(|at| now.duration_since(*at) >= INTERVAL)
        };
        due.into_iter().filter(is_due).collect()
    }
}
