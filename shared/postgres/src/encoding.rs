//! The database's encoding: a message may have any character, so the database must store all of
//! them.

use sqlx::postgres::PgConnection;

/// The only encoding that has every character and checks what it is given: `SQL_ASCII` stores any
/// bytes unchecked.
const ENCODING: &str = "UTF8";

/// Why the database cannot store every message, and what to do; `None` when it can. Asked once, at
/// the start, because an encoding never changes. Without this, every message with a character that
/// the encoding lacks would become a dead letter.
///
/// # Errors
/// The database does not answer.
pub async fn encoding_refusal(
    connection: &mut PgConnection,
) -> Result<Option<String>, sqlx::Error> {
    let (name, encoding): (String, String) =
        sqlx::query_as("select current_database()::text, current_setting('server_encoding')")
            .fetch_one(connection)
            .await?;
    if encoding == ENCODING {
        return Ok(None);
    }
    Ok(Some(format!(
        "the database {name} has the encoding {encoding}, which does not hold every character that \
         a message may have; make another one, `create database … encoding 'UTF8' template \
         template0`, and name it in DATABASE_URL"
    )))
}
