//! Finds out whether a refusal is about the message or about the database: a message that is known
//! to be good is stored and rolled back.

use sqlx::Connection;
use sqlx::postgres::PgConnection;

/// The highest sequence there is, which no stream reaches. Characters of every length in UTF-8,
/// because an encoding that cannot hold them cannot hold what users write.
const MESSAGE: &str = "
    insert into messages
           (seq, room_id, sender, recipient, id, derived, text, sent_at, received_at)
    values (9223372036854775807, 1, 'probe', 'probe', 'probe', false,
            'probe \u{fc} \u{65e5} \u{1f600}', now(), now())
    on conflict do nothing";

const CHANGE: &str = "
    insert into changes
           (seq, room_id, target, sender, id, mode, changed_by, received_at, recipient)
    values (9223372036854775807, 1, 9223372036854775807, 'probe', 'probe', 'soft', 'probe', now(),
            'probe')
    on conflict do nothing";

const OUTBOX: &str = "
    insert into outbox (first_seq, last_seq, seqs)
    values (9223372036854775807, 9223372036854775807, '{9223372036854775807}')";

const TOMBSTONE: &str = "
    update messages set text = '', deleted = true
     where (sender, id, derived) = ('probe', 'probe', false) and seq = 9223372036854775807";

/// Stores a message, its deletion and a row of the outbox, and rolls all of it back.
///
/// # Errors
/// PostgreSQL refuses what it has to accept: a constraint, a trigger, the encoding.
pub async fn store_and_roll_back(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    let mut transaction = connection.begin().await?;
    for statement in [MESSAGE, CHANGE, OUTBOX, TOMBSTONE] {
        sqlx::query(statement).execute(&mut *transaction).await?;
    }
    transaction.rollback().await
}
