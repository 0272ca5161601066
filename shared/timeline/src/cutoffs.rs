//! Expiry: since when the messages of a conversation count.

use std::collections::HashMap;

use sqlx::postgres::PgConnection;

/// The cutoff of each room, from the table `retention`; null where nothing expires.
const CUTOFFS: &str = "select name, cutoff_ms(name) from unnest($1::text[]) as asked (name)";

/// The cutoff of each conversation, in Unix milliseconds: what the stream received then or before
/// has expired. Conversations in which nothing expires have none.
#[derive(Debug, Clone, Default)]
pub struct Cutoffs(HashMap<String, i64>);

impl Cutoffs {
    /// Of one conversation; `None` where nothing expires.
    pub fn of_one(room: &str, cutoff_ms: Option<i64>) -> Cutoffs {
        Cutoffs::from_iter([(room.to_owned(), cutoff_ms)])
    }

    /// Loads the cutoffs of `rooms` from the projection.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn load(
        connection: &mut PgConnection,
        rooms: &[&str],
    ) -> Result<Cutoffs, sqlx::Error> {
        if rooms.is_empty() {
            return Ok(Cutoffs::default());
        }
        let cutoffs: Vec<(String, Option<i64>)> = sqlx::query_as(CUTOFFS)
            .bind(rooms)
            .fetch_all(connection)
            .await?;
        Ok(cutoffs.into_iter().collect())
    }

    /// Whether a message of `room` that the stream received at `received_ms` has expired.
    pub fn is_expired(&self, room: &str, received_ms: i64) -> bool {
        self.0
            .get(room)
            .is_some_and(|cutoff_ms| received_ms <= *cutoff_ms)
    }
}

impl FromIterator<(String, Option<i64>)> for Cutoffs {
    fn from_iter<I: IntoIterator<Item = (String, Option<i64>)>>(cutoffs: I) -> Cutoffs {
        Cutoffs(
            cutoffs
                .into_iter()
                .filter_map(|(room, cutoff_ms)| Some((room, cutoff_ms?)))
                .collect(),
        )
    }
}
