//! What cannot be stored, and whose it is.

use std::time::Duration;

use serde_json::Value;
use sqlx::postgres::PgConnection;

use crate::Own;
use postgres::error::DatabaseError;
use protocol::subject::StreamSubject;
use service::ctx::Ctx;

/// Letters looked at together, 64 KiB of text each and often more.
const CHUNK: usize = 200;

const LETTERS: &str = "
    select id, subject, payload from dead_letters where id > $1 and outcome is distinct from 'erased' order by id limit 200";

const EMPTY: &str = "
    update dead_letters set headers = '', payload = '', outcome = 'erased', outcome_at = now() where id = any($1)";

/// Whether this was written by `user`, as far as it can be told: what is no JSON names nobody.
pub fn is_by(user: &str, subject: &str, payload: &[u8]) -> bool {
    if let Ok(StreamSubject::Direct { from, .. }) = StreamSubject::parse(subject) {
        return from == user;
    }
    let body: Value = serde_json::from_slice(payload).unwrap_or_default();
    body.get("user").and_then(Value::as_str) == Some(user)
}

/// Empties the letters of `user` behind the letter `after`, some at a time, or counts them; how many, and where to go on.
///
/// # Errors
/// The database does not answer in `limit`.
pub async fn empty(
    ctx: &Ctx<Own>,
    user: &str,
    after: i64,
    dry_run: bool,
    limit: Duration,
) -> Result<(u64, Option<i64>), DatabaseError> {
    ctx.chat
        .database()
        .run(limit, async |connection: &mut PgConnection| {
            let letters: Vec<(i64, String, Vec<u8>)> = sqlx::query_as(LETTERS)
                .bind(after)
                .fetch_all(&mut *connection)
                .await?;
            let theirs: Vec<i64> = letters
                .iter()
                .filter(|(_, subject, payload)| is_by(user, subject, payload))
                .map(|(id, ..)| *id)
                .collect();
            if !theirs.is_empty() && !dry_run {
                sqlx::query(EMPTY).bind(&theirs).execute(connection).await?;
            }
            let next = letters
                .last()
                .filter(|_| letters.len() == CHUNK)
                .map(|(id, ..)| *id);
            Ok((theirs.len() as u64, next))
        })
        .await
}

#[cfg(test)]
mod tests {
    use super::is_by;

    #[test]
    fn a_letter_says_whose_it_is() {
        assert!(is_by("ann", "chat.general", br#"{"user":"\u0061nn"}"#));
        assert!(is_by("ann", "dm.ann.bob", b"no json"));
        assert!(!is_by("ann", "dm.bob.ann", br#"{"user":"ann"}"#));
        assert!(!is_by("ann", "chat.general", b"ann"));
        assert!(!is_by("ann", "chat.general", br#"{"text":"ann"}"#));
    }
}
