//! The database schema: the files of `migrations/`, built into this program. Each runs once and
//! never changes afterwards.

use sqlx::SqlSafeStr;
use sqlx::migrate::{MigrateError, Migration, MigrationType, Migrator};
use sqlx::postgres::PgConnection;

use crate::error::Error;
use protocol::bootstrap::Difference;

/// File name and content. A test compares this list with the directory. sqlx's macro would do the
/// same, but it would add sqlx-macros to every function's build.
const MIGRATIONS: [(&str, &str); 11] = [
    (
        "0001_messages.sql",
        include_str!("../../../migrations/0001_messages.sql"),
    ),
    (
        "0002_dead_letters.sql",
        include_str!("../../../migrations/0002_dead_letters.sql"),
    ),
    (
        "0003_deletion.sql",
        include_str!("../../../migrations/0003_deletion.sql"),
    ),
    (
        "0004_outbox.sql",
        include_str!("../../../migrations/0004_outbox.sql"),
    ),
    (
        "0005_dead_letter_outcomes.sql",
        include_str!("../../../migrations/0005_dead_letter_outcomes.sql"),
    ),
    (
        "0006_receipts.sql",
        include_str!("../../../migrations/0006_receipts.sql"),
    ),
    (
        "0007_retention.sql",
        include_str!("../../../migrations/0007_retention.sql"),
    ),
    (
        "0008_lag.sql",
        include_str!("../../../migrations/0008_lag.sql"),
    ),
    (
        "0009_conflicts.sql",
        include_str!("../../../migrations/0009_conflicts.sql"),
    ),
    (
        "0010_clock.sql",
        include_str!("../../../migrations/0010_clock.sql"),
    ),
    (
        "0011_send_secret.sql",
        include_str!("../../../migrations/0011_send_secret.sql"),
    ),
];

/// How the database compares with the list.
#[derive(Debug, Default, PartialEq)]
pub struct Status {
    /// Versions that have not run yet.
    pub missing: Vec<i64>,
    /// Migrations that ran with another text, or that this version does not know.
    pub differences: Vec<Difference>,
}

/// Drops sqlx's table of migrations if it is empty.
const DROP_EMPTY_LIST: &str = "
    do $$ begin
        if to_regclass('_sqlx_migrations') is not null
           and not exists (select from _sqlx_migrations)
        then
            drop table _sqlx_migrations;
        end if;
    end $$";

/// Runs the migrations that have not run yet; returns what was done.
///
/// # Errors
/// [`Error::Refused`] if another version migrated the database, or a migration fails.
pub async fn migrate(connection: &mut PgConnection) -> Result<Vec<String>, Error> {
    if let Some(message) = postgres::encoding::encoding_refusal(connection).await? {
        return Err(Error::Refused(message));
    }
    let missing = status(connection).await?.missing;
    // A migration may run as long as it needs, and wait longer for a lock than a request may.
    sqlx::raw_sql("set statement_timeout = 0; set lock_timeout = '60s'")
        .execute(&mut *connection)
        .await?;
    let outcome = migrator().run_direct(None, connection, false).await;
    if outcome.is_err() {
        // sqlx creates its table before anything else; a database that is not ours must not keep
        // it.
        sqlx::raw_sql(DROP_EMPTY_LIST)
            .execute(&mut *connection)
            .await?;
    }
    let reset = sqlx::raw_sql("reset statement_timeout; reset lock_timeout")
        .execute(&mut *connection)
        .await;
    outcome.map_err(refused)?;
    reset?;
    Ok(missing
        .iter()
        .map(|version| format!("migration {version} was run"))
        .collect())
}

/// Compares the database with the list; changes nothing.
///
/// # Errors
/// The database does not answer.
pub async fn status(connection: &mut PgConnection) -> Result<Status, sqlx::Error> {
    let exists: bool = sqlx::query_scalar("select to_regclass('_sqlx_migrations') is not null")
        .fetch_one(&mut *connection)
        .await?;
    let run: Vec<(i64, Vec<u8>)> = if exists {
        sqlx::query_as("select version, checksum from _sqlx_migrations order by version")
            .fetch_all(connection)
            .await?
    } else {
        Vec::new()
    };
    let known = migrator();
    let mut status = Status::default();
    for migration in known.iter() {
        match run
            .iter()
            .find(|(version, _)| *version == migration.version)
        {
            None => status.missing.push(migration.version),
            Some((_, checksum)) if *checksum != *migration.checksum => status
                .differences
                .push(difference(migration.version, "checksum")),
            Some(_) => {}
        }
    }
    let unknown = run
        .iter()
        .filter(|(version, _)| !known.version_exists(*version));
    status
        .differences
        .extend(unknown.map(|(version, _)| difference(*version, "(unknown)")));
    Ok(status)
}

fn difference(version: i64, field: &str) -> Difference {
    let (wanted, actual) = if field == "checksum" {
        ("the text of this version", "another text was run")
    } else {
        ("not run", "run")
    };
    Difference {
        object: format!("migration {version}"),
        field: field.to_owned(),
        wanted: wanted.into(),
        actual: actual.into(),
    }
}

fn migrator() -> Migrator {
    let migration = |(name, sql): &(&'static str, &'static str)| {
        let (version, description) = parts(name);
        Migration::new(
            version,
            description.into(),
            MigrationType::Simple,
            sql.into_sql_str(),
            false,
        )
    };
    Migrator::with_migrations(MIGRATIONS.iter().map(migration).collect())
}

/// `0001_messages.sql` is version 1, "messages".
fn parts(name: &'static str) -> (i64, String) {
    let (version, description) = name
        .trim_end_matches(".sql")
        .split_once('_')
        .unwrap_or((name, ""));
    (
        version.parse().unwrap_or_default(),
        description.replace('_', " "),
    )
}

fn refused(error: MigrateError) -> Error {
    match error {
        MigrateError::Execute(error) => error.into(),
        MigrateError::ExecuteMigration(error, version) => match Error::from(error) {
            error if error.is_transient() => error,
            error => Error::Refused(format!(
                "migration {version} failed and left nothing behind: {error}"
            )),
        },
        MigrateError::VersionMissing(version) => Error::Refused(format!(
            "the database has migration {version}, which this version does not know: if a newer \
             version ran here, start that one; if another program keeps its migrations here, \
             give Scrollback a schema of its own (create schema chat authorization ROLE; \
             alter role ROLE set search_path = chat)"
        )),
        MigrateError::VersionMismatch(version) => Error::Refused(format!(
            "migration {version} was run here with another text: a migration never changes after \
             it ran; restore the file and add a new one"
        )),
        other => Error::Refused(format!("migrations: {other}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_in_migrations_is_run() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../migrations");
        let mut files: Vec<String> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.ends_with(".sql"))
            .collect();
        files.sort();
        assert_eq!(files, MIGRATIONS.map(|(name, _)| name));
        let versions: Vec<i64> = migrator()
            .iter()
            .map(|migration| migration.version)
            .collect();
        assert!(
            versions.is_sorted_by(|one, next| one < next),
            "{versions:?}"
        );
    }
}
