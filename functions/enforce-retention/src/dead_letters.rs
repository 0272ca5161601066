//! The dead letters of one user.

use std::time::Duration;

use serde_json::Value;
use sqlx::postgres::PgConnection;

use crate::state::State;
use postgres::error::DatabaseError;
use protocol::subject::StreamSubject;
use service::ctx::Ctx;

/// Dead letters read together; each may hold a text of 64 KiB, and often more.
const CHUNK: usize = 200;

const NEXT: &str = "
    select id, subject, payload from dead_letters
     where id > $1 and outcome is distinct from 'erased' order by id limit 200";

const ERASE: &str = "
    update dead_letters set headers = '', payload = '', outcome = 'erased', outcome_at = now()
     where id = any($1)";

/// Whether `user` wrote this, as far as it can be found out: a payload that is not JSON names
/// nobody.
pub fn is_by(user: &str, subject: &str, payload: &[u8]) -> bool {
    if let Ok(StreamSubject::Direct { from, .. }) = StreamSubject::parse(subject) {
        return from == user;
    }
    let body: Value = serde_json::from_slice(payload).unwrap_or_default();
    body.get("user").and_then(Value::as_str) == Some(user)
}

/// Erases, or only counts, those of the next dead letters after number `after` that `user` wrote.
/// Returns how many, and the number after which to continue.
///
/// # Errors
/// The database does not answer within `limit`.
pub async fn erase(
    ctx: &Ctx<State>,
    user: &str,
    after: i64,
    dry_run: bool,
    limit: Duration,
) -> Result<(u64, Option<i64>), DatabaseError> {
    ctx.chat
        .database()
        .run(limit, async |connection: &mut PgConnection| {
            let dead_letters: Vec<(i64, String, Vec<u8>)> = sqlx::query_as(NEXT)
                .bind(after)
                .fetch_all(&mut *connection)
                .await?;
            let theirs: Vec<i64> = dead_letters
                .iter()
                .filter(|(_, subject, payload)| is_by(user, subject, payload))
                .map(|(id, ..)| *id)
                .collect();
            if !theirs.is_empty() && !dry_run {
                sqlx::query(ERASE).bind(&theirs).execute(connection).await?;
            }
            let next = dead_letters
                .last()
                .filter(|_| dead_letters.len() == CHUNK)
                .map(|(id, ..)| *id);
            Ok((theirs.len() as u64, next))
        })
        .await
}

#[cfg(test)]
mod tests {
    use super::is_by;

    #[test]
    fn the_subject_or_the_payload_names_the_author() {
        assert!(is_by("ann", "chat.general", br#"{"user":"\u0061nn"}"#));
        assert!(is_by("ann", "dm.ann.bob", b"no json"));
        assert!(!is_by("ann", "dm.bob.ann", br#"{"user":"ann"}"#));
        assert!(!is_by("ann", "chat.general", b"ann"));
        assert!(!is_by("ann", "chat.general", br#"{"text":"ann"}"#));
    }
}
