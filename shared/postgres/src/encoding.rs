//! The database's encoding: chat holds every character there is, and so has the database to.

use sqlx::postgres::PgConnection;

/// The only one that holds every character, and looks at what it is given: `SQL_ASCII` takes any bytes unseen.
const ENCODING: &str = "UTF8";

/// Why the database cannot hold what people write, and what to do; `None` when it can. Asked once, at the start: an encoding
/// never changes. Without this every message with such a character would become a dead letter.
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
        "the database {name} has the encoding {encoding}, which does not hold every character that a message may have; make another \
         one, `create database … encoding 'UTF8' template template0`, and name it in DATABASE_URL"
    )))
}
