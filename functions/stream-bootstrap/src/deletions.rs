//! Deletions that wait to be appended again above the fence, and the messages they are about.
//!
//! A deletion names its message by position, too. When the message gets a new one, the deletion has to follow it, or
//! the text would come back: the id of a message without one of its own is made from the position.

use std::collections::HashMap;

use sqlx::postgres::PgConnection;

use crate::trouble::Trouble;
use base::seq::Seq;
use protocol::change::Change;
use protocol::message::derived_id;
use protocol::reason::Reason;
use protocol::subject::CHANGES;

const WAITING: &str = "
    select id, seq, subject, payload from dead_letters where reason = $1 and outcome is null and starts_with(subject, $2)
     order by id";

const REWRITE: &str = "
    update dead_letters set payload = $2 where id = $1";

/// The waiting deletions, by the position of their message in the log it was taken from.
pub struct Deletions(HashMap<Seq, Vec<(i64, Change)>>);

/// A message that is appended again, as its deletion knows it.
#[derive(Debug)]
pub struct Moved<'a> {
    /// As stored: `general`, `dm.alice.bob`.
    pub room: &'a str,
    /// Who wrote it.
    pub sender: &'a str,
    /// The sender's own id, where there is one.
    pub id: Option<&'a str>,
    /// Where it was.
    pub from: Seq,
    /// When the log received it there, in Unix milliseconds.
    pub received_ms: i64,
}

impl Deletions {
    /// Reads the waiting ones; nobody adds any while the lock is held.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn waiting(connection: &mut PgConnection) -> Result<Deletions, sqlx::Error> {
        let letters: Vec<(i64, i64, String, Vec<u8>)> = sqlx::query_as(WAITING)
            .bind(Reason::BelowFence.as_str())
            .bind(CHANGES.trim_end_matches('>'))
            .fetch_all(connection)
            .await?;
        let mut deletions: HashMap<Seq, Vec<(i64, Change)>> = HashMap::new();
        for (letter, seq, subject, payload) in letters {
            // Of this log or of an earlier one; what is no deletion is set aside by whoever stores.
            if let Ok(change) = Change::parse(&subject, &payload, Seq::from_i64(seq), 0) {
                deletions
                    .entry(change.deletion.target)
                    .or_default()
                    .push((letter, change));
            }
        }
        Ok(Deletions(deletions))
    }

    /// Whether some deletion waits for this message.
    pub fn concern(&self, moved: &Moved<'_>) -> bool {
        self.of(moved).next().is_some()
    }

    /// Turns the deletions of the message to its new place; whether there were any.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn follow(
        &self,
        connection: &mut PgConnection,
        moved: &Moved<'_>,
        to: Seq,
        received_ms: i64,
    ) -> Result<bool, Trouble> {
        let mut any = false;
        for (letter, change) in self.of(moved) {
            let mut deletion = change.deletion.clone();
            deletion.target = to;
            deletion.received = received_ms;
            if deletion.derived {
                deletion.id = derived_id(to);
            }
            let payload = serde_json::to_vec(&deletion).map_err(|error| {
                Trouble::Refused(format!("a deletion cannot be written: {error}"))
            })?;
            sqlx::query(REWRITE)
                .bind(letter)
                .bind(payload)
                .execute(&mut *connection)
                .await?;
            any = true;
        }
        Ok(any)
    }

    /// Letters may wait from two logs, with another message in the same place: the time of receipt tells them apart.
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
