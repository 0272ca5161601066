//! Salvaged deletions, and the messages they are about.
//!
//! A deletion names its message by sequence. When the message is appended again at a new sequence,
//! the deletion has to name that one. Otherwise the text would come back, because the id of a
//! message without a client-supplied one is derived from its sequence.

use std::collections::HashMap;

use sqlx::postgres::PgConnection;

use crate::error::Error;
use base::seq::Seq;
use protocol::change::Change;
use protocol::message::derived_id;
use protocol::reason::Reason;
use protocol::subject::CHANGES;

const WAITING: &str = "
    select id, seq, subject, payload from dead_letters
     where reason = $1 and outcome is null and starts_with(subject, $2)
     order by id";

const REWRITE: &str = "
    update dead_letters set payload = $2 where id = $1";

/// The waiting deletions with the number of their dead letter, by the sequence that their message
/// had in the stream it was salvaged from.
pub struct Deletions(HashMap<Seq, Vec<(i64, Change)>>);

/// A message that is appended again, as its deletion knows it.
#[derive(Debug)]
pub struct Moved<'a> {
    /// As stored: `general`, `dm.alice.bob`.
    pub room: &'a str,
    /// Its author.
    pub sender: &'a str,
    /// The client-supplied id, if there is one.
    pub id: Option<&'a str>,
    /// Its old sequence.
    pub from: Seq,
    /// When the stream received it at the old sequence, in Unix milliseconds.
    pub received_ms: i64,
}

impl Deletions {
    /// Reads the waiting ones. None are added while the caller holds the lock.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn waiting(connection: &mut PgConnection) -> Result<Deletions, sqlx::Error> {
        let dead_letters: Vec<(i64, i64, String, Vec<u8>)> = sqlx::query_as(WAITING)
            .bind(Reason::BelowFence.as_str())
            .bind(CHANGES.trim_end_matches('>'))
            .fetch_all(connection)
            .await?;
        let mut deletions: HashMap<Seq, Vec<(i64, Change)>> = HashMap::new();
        for (dead_letter, seq, subject, payload) in dead_letters {
            // What cannot be parsed is appended as it is; persist-message dead-letters it then.
            if let Ok(change) = Change::parse(&subject, &payload, Seq::from_i64(seq), 0) {
                deletions
                    .entry(change.deletion.target)
                    .or_default()
                    .push((dead_letter, change));
            }
        }
        Ok(Deletions(deletions))
    }

    /// Whether a deletion of this message waits.
    pub fn include(&self, moved: &Moved<'_>) -> bool {
        self.of(moved).next().is_some()
    }

    /// Rewrites the deletions of the message so that they name its new sequence.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn rewrite(
        &self,
        connection: &mut PgConnection,
        moved: &Moved<'_>,
        to: Seq,
        received_ms: i64,
    ) -> Result<(), Error> {
        for (dead_letter, change) in self.of(moved) {
            let mut deletion = change.deletion.clone();
            deletion.target = to;
            deletion.received = received_ms;
            if deletion.derived {
                deletion.id = derived_id(to);
            }
            let payload = serde_json::to_vec(&deletion).map_err(|error| {
                Error::Refused(format!("a deletion cannot be written: {error}"))
            })?;
            sqlx::query(REWRITE)
                .bind(dead_letter)
                .bind(payload)
                .execute(&mut *connection)
                .await?;
        }
        Ok(())
    }

    /// Dead letters of two streams may wait, with different messages at the same sequence. The time
    /// of receipt distinguishes them.
    fn of<'a>(&'a self, moved: &'a Moved<'_>) -> impl Iterator<Item = &'a (i64, Change)> {
        self.0.get(&moved.from).into_iter().flatten().filter(
            |(_, Change { room, deletion, .. })| {
                let same_id = if deletion.derived {
                    moved.id.is_none()
                } else {
                    moved.id == Some(deletion.id.as_str())
                };
                same_id
                    && room == moved.room
                    && deletion.user == moved.sender
                    && deletion.received == moved.received_ms
            },
        )
    }
}
