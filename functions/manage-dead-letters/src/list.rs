//! Lists one page of dead letters, by id.

use sqlx::postgres::PgRow;
use sqlx::{Postgres, QueryBuilder, Row};
use time::OffsetDateTime;

use crate::time_limit;
use base::error::{Code, Error, Result};
use base::seq::Seq;
use base::time::unix_ms;
use protocol::dead_letters::{
    DeadLetter, DeadLetterId, DeadLetterOutcome, DeadLetterPage, ListDeadLetters, OutcomeFilter,
    SubjectPattern,
};
use service::ctx::Ctx;
use service::request::{Reply, Request};
use timeline::chat::Chat;

/// The part of `max_payload` that is reserved for the reply's headers and the protocol.
pub const HEADER_ROOM: usize = 2 * 1024;

/// The columns of a dead letter without its bytes.
macro_rules! columns {
    () => {
        "id, seq, subject, reason, detail, octet_length(payload)::bigint as bytes, received_at,
         stored_at, outcome, outcome_at, outcome_seq"
    };
}
pub(crate) use columns;

/// `deadletters.list`
pub async fn list(
    ctx: Ctx<Chat>,
    request: Request<ListDeadLetters>,
) -> Result<Reply<DeadLetterPage>> {
    let found = ctx.database().run(time_limit(&ctx), async |connection| {
        let rows = query(&request.body).build().fetch_all(connection).await?;
        rows.iter()
            .map(from_row)
            .collect::<Result<Vec<DeadLetter>, sqlx::Error>>()
    });
    let mut letters = found.await?;
    let wanted = usize::try_from(request.body.limit).unwrap_or(usize::MAX);
    let more = letters.len() > wanted;
    letters.truncate(wanted);
    encode(
        &letters,
        more,
        ctx.nats().client().server_info().max_payload,
    )
}

/// Built for each request, because PostgreSQL uses a partial index only for a condition that is
/// written out. One dead letter more than wanted shows whether there are more.
fn query(request: &ListDeadLetters) -> QueryBuilder<Postgres> {
    let mut query = QueryBuilder::new(concat!(
        "select ",
        columns!(),
        " from dead_letters where id > "
    ));
    query.push_bind(request.after);
    match request.outcome {
        OutcomeFilter::All => {}
        OutcomeFilter::Waiting => _ = query.push(" and outcome is null"),
        OutcomeFilter::Only(outcome) => {
            _ = query.push(" and outcome = ").push_bind(outcome.as_str())
        }
    }
    if let Some(reason) = request.reason {
        query.push(" and reason = ").push_bind(reason.as_str());
    }
    if let Some(pattern) = &request.subject {
        query.push(" and subject ~ ").push_bind(regex(pattern));
    }
    query
        .push(" order by id limit ")
        .push_bind(i64::from(request.limit) + 1);
    query
}

/// The pattern as an anchored regular expression of PostgreSQL, in which only the wildcards are
/// special.
fn regex(pattern: &SubjectPattern) -> String {
    let token = |token: &str| match token {
        "*" => r"[^.]+".to_owned(),
        // Always the last token.
        ">" => ".+".to_owned(),
        name => name
            .chars()
            .flat_map(|c| {
                r".^$*+?()[]{}|\"
                    .contains(c)
                    .then_some('\\')
                    .into_iter()
                    .chain([c])
            })
            .collect(),
    };
    let tokens: Vec<String> = pattern.tokens().map(token).collect();
    format!("^{}$", tokens.join(r"\."))
}

/// A dead letter from a row of [`columns!`].
pub fn from_row(row: &PgRow) -> Result<DeadLetter, sqlx::Error> {
    let outcome: Option<String> = row.try_get("outcome")?;
    Ok(DeadLetter {
        // Identities begin at 1.
        id: DeadLetterId::new(row.try_get("id")?).ok_or(sqlx::Error::RowNotFound)?,
        seq: Seq::from_i64(row.try_get("seq")?),
        subject: row.try_get("subject")?,
        reason: row.try_get("reason")?,
        detail: row.try_get("detail")?,
        bytes: row.try_get::<i64, _>("bytes")?.unsigned_abs(),
        received_at: unix_ms(row.try_get("received_at")?),
        stored_at: unix_ms(row.try_get("stored_at")?),
        outcome: outcome.as_deref().and_then(DeadLetterOutcome::parse),
        outcome_seq: row
            .try_get::<Option<i64>, _>("outcome_seq")?
            .map(Seq::from_i64),
        outcome_at: row
            .try_get::<Option<OffsetDateTime>, _>("outcome_at")?
            .map(unix_ms),
    })
}

/// Encodes the page, and ends it early if it would exceed `max_payload` bytes: subjects can be
/// long.
fn encode(
    letters: &[DeadLetter],
    mut more: bool,
    max_payload: usize,
) -> Result<Reply<DeadLetterPage>> {
    let room = max_payload.saturating_sub(HEADER_ROOM);
    let mut body = br#"{"letters":["#.to_vec();
    for (number, dead_letter) in letters.iter().enumerate() {
        let written = serde_json::to_vec(dead_letter).map_err(Error::internal)?;
        if body.len() + written.len() + 1 > room {
            if number == 0 {
                let reason = format!(
                    "dead letter {} is larger than the server's max_payload lets a reply be; list \
                     after it",
                    dead_letter.id
                );
                return Err(Error::new(Code::TooLarge, reason));
            }
            more = true;
            break;
        }
        if number > 0 {
            body.push(b',');
        }
        body.extend_from_slice(&written);
    }
    body.extend_from_slice(format!(r#"],"more":{more}}}"#).as_bytes());
    Ok(Reply::encoded(body.into(), Vec::new()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_wildcards_are_special() {
        let regex = |pattern| regex(&SubjectPattern::parse(pattern).unwrap());
        assert_eq!(regex("chat.*"), r"^chat\.[^.]+$");
        assert_eq!(regex("dm.*.>"), r"^dm\.[^.]+\..+$");
        assert_eq!(regex("chat.a*"), r"^chat\.a\*$");
        assert_eq!(
            regex(r"chat.(a|b)[c]{2}^$?+\d"),
            r"^chat\.\(a\|b\)\[c\]\{2\}\^\$\?\+\\d$"
        );
    }
}
