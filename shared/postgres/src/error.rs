//! Errors of the database: what caused them, whether the session is still good, and what to fix.

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

use sqlx::postgres::{PgDatabaseError, PgSeverity};

use base::error::{Code, Error};

/// What caused a database error. It decides what happens to the messages at hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// The database: wait and try again. No message is to blame.
    Transient,
    /// This row.
    Row,
    /// The deployment, for example a missing table or a wrong password. Stop and log it.
    Deployment,
}

/// What an error means for the connection that it came over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scope {
    /// The server answered: this statement failed, and the session is still good.
    Statement,
    /// The session has ended or is useless: another one may do better.
    Session,
    /// There was no connection, or it broke.
    Connection,
    /// A deadline passed. The server may be well: the statement may be slow, or a row locked.
    Deadline,
}

/// An error of the database. It holds neither DETAIL nor statement, because these may contain the
/// text of a message.
#[derive(Debug, Clone, thiserror::Error)]
pub struct DatabaseError {
    /// What caused it.
    pub class: Class,
    /// Five characters, when the server answered.
    pub sqlstate: Option<String>,
    /// The constraint that was violated.
    pub constraint: Option<String>,
    pub(crate) scope: Scope,
    what: Cow<'static, str>,
}

impl DatabaseError {
    fn plain(class: Class, scope: Scope, what: impl Into<Cow<'static, str>>) -> DatabaseError {
        DatabaseError {
            class,
            sqlstate: None,
            constraint: None,
            scope,
            what: what.into(),
        }
    }

    /// The statement did not end within `limit`.
    pub(crate) fn late(limit: Duration) -> DatabaseError {
        let what = format!("PostgreSQL did not answer within {limit:?}");
        DatabaseError::plain(Class::Transient, Scope::Deadline, what)
    }

    /// Every connection of the pool was in use for all of `limit`.
    pub(crate) fn pool_exhausted(limit: Duration) -> DatabaseError {
        let what = format!("no connection to PostgreSQL was free within {limit:?}");
        DatabaseError::plain(Class::Transient, Scope::Deadline, what)
    }

    /// The server does not accept a connection.
    pub(crate) fn unreachable(limit: Duration) -> DatabaseError {
        let what = format!("no connection to PostgreSQL could be made within {limit:?}");
        DatabaseError::plain(Class::Transient, Scope::Connection, what)
    }

    /// An error while connecting. Nothing of a message was sent yet, so the server's message may be
    /// shown.
    pub(crate) fn connecting(error: sqlx::Error) -> DatabaseError {
        match &error {
            sqlx::Error::Database(answer) if answer.code().as_deref() == Some("08P01") => {
                let message: String = answer
                    .message()
                    .chars()
                    .filter(|c| !c.is_control())
                    .take(200)
                    .collect();
                let what = format!(
                    "PostgreSQL, or a pooler before it, refuses how we connect ({message}); \
                     pgbouncer needs ignore_startup_parameters = options, extra_float_digits"
                );
                let error = DatabaseError::plain(Class::Deployment, Scope::Connection, what);
                DatabaseError {
                    sqlstate: Some("08P01".to_owned()),
                    ..error
                }
            }
            sqlx::Error::Tls(error) if error.to_string().contains("does not support TLS") => {
                DatabaseError::plain(
                    Class::Deployment,
                    Scope::Connection,
                    "PostgreSQL does not offer TLS and DATABASE_URL insists on it: set ssl = on \
                     there, or another sslmode here",
                )
            }
            sqlx::Error::Tls(_) => {
                DatabaseError::plain(Class::Deployment, Scope::Connection, BAD_TLS)
            }
            sqlx::Error::Io(error) if error.kind() == std::io::ErrorKind::InvalidData => {
                DatabaseError::plain(Class::Deployment, Scope::Connection, BAD_TLS)
            }
            sqlx::Error::Configuration(_) => DatabaseError::plain(
                Class::Deployment,
                Scope::Connection,
                "DATABASE_URL names what cannot be used: check its parameters and the files \
                 they name",
            ),
            _ => {
                let error = DatabaseError::from(error);
                // A server without a free connection is there, and one may become free.
                let is_full = error.sqlstate.as_deref() == Some("53300");
                DatabaseError {
                    scope: if is_full {
                        Scope::Deadline
                    } else {
                        Scope::Connection
                    },
                    ..error
                }
            }
        }
    }

    /// The server cannot be reached.
    pub(crate) fn is_away(&self) -> bool {
        self.scope == Scope::Connection && self.class == Class::Transient
    }

    /// The connection may be used again.
    pub(crate) fn leaves_session(&self) -> bool {
        self.scope == Scope::Statement
    }

    /// A new session may do better: the connection that this error came over must not be used
    /// again.
    pub(crate) fn ends_session(&self) -> bool {
        matches!(self.scope, Scope::Session | Scope::Connection)
    }
}

const BAD_TLS: &str = "TLS with PostgreSQL failed: check sslmode and sslrootcert in DATABASE_URL, \
                       and the server's certificate";

impl fmt::Display for DatabaseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        if let Some(state) = &self.sqlstate {
            write!(f, ", SQLSTATE {state}")?;
        }
        if let Some(constraint) = &self.constraint {
            write!(f, ", constraint {constraint}")?;
        }
        Ok(())
    }
}

impl From<sqlx::Error> for DatabaseError {
    fn from(error: sqlx::Error) -> DatabaseError {
        use Class::{Deployment, Transient};
        let plain = DatabaseError::plain;
        match error {
            sqlx::Error::Database(error) => {
                let sqlstate = error
                    .code()
                    .map(|code| code.into_owned())
                    .unwrap_or_default();
                let answer = error.try_downcast_ref::<PgDatabaseError>();
                let stale_plan =
                    answer.and_then(PgDatabaseError::routine) == Some("RevalidateCachedQuery");
                let fatal = answer.is_some_and(|answer| {
                    matches!(answer.severity(), PgSeverity::Fatal | PgSeverity::Panic)
                });
                let scope = if fatal || stale_plan || is_of_session(&sqlstate) {
                    Scope::Session
                } else {
                    Scope::Statement
                };
                let constraint = error.constraint().map(str::to_owned);
                let what = advice(&sqlstate).into();
                DatabaseError {
                    class: class_of(&sqlstate),
                    constraint,
                    sqlstate: Some(sqlstate),
                    scope,
                    what,
                }
            }
            sqlx::Error::Io(_) | sqlx::Error::Tls(_) => plain(
                Transient,
                Scope::Connection,
                "the connection to PostgreSQL broke or was refused",
            ),
            sqlx::Error::PoolTimedOut => plain(
                Transient,
                Scope::Deadline,
                "no connection to PostgreSQL was free",
            ),
            sqlx::Error::PoolClosed => plain(Transient, Scope::Statement, "the pool is closed"),
            sqlx::Error::Encode(_)
            | sqlx::Error::Decode(_)
            | sqlx::Error::ColumnDecode { .. }
            | sqlx::Error::ColumnNotFound(_) => plain(
                Deployment,
                Scope::Statement,
                "PostgreSQL's schema is not the one this function knows",
            ),
            _ => plain(
                Transient,
                Scope::Session,
                "the conversation with PostgreSQL failed",
            ),
        }
    }
}

/// By the first two characters. An unknown class is never blamed on a message.
fn class_of(sqlstate: &str) -> Class {
    match sqlstate.get(..2) {
        _ if is_of_session(sqlstate) => Class::Transient,
        Some("22" | "23" | "54") => Class::Row,
        Some("42" | "28" | "3D" | "3F") => Class::Deployment,
        _ => Class::Transient,
    }
}

/// Whether the error concerns the session and not the statement. A read-only session may be one to
/// a former primary. A prepared statement that is missing, or exists already, means that a pooler
/// has put another session behind this connection.
fn is_of_session(sqlstate: &str) -> bool {
    sqlstate.starts_with("08")
        || sqlstate.starts_with("25")
        || matches!(
            sqlstate,
            "57P01" | "57P02" | "57P03" | "57P05" | "26000" | "42P05"
        )
}

/// What happened, and what to fix.
fn advice(sqlstate: &str) -> &'static str {
    match sqlstate {
        "28P01" => {
            "PostgreSQL refuses the password: check user and password in DATABASE_URL (in \
             Docker: .env; the volume keeps the password it was made with, so change it with \
             alter role, or put the old one back)"
        }
        "28000" => {
            "PostgreSQL does not let this user in: check the user in DATABASE_URL, sslmode, and \
             the server's pg_hba.conf"
        }
        "3D000" => {
            "there is no such database: check the name at the end of DATABASE_URL, or create it"
        }
        "3F000" => {
            "there is no schema to work in: create the one that the user's search_path names \
             (create schema chat authorization ROLE)"
        }
        "42501" => {
            "the user of DATABASE_URL lacks a right: grant usage and create on the schema to it, \
             or give it a schema of its own (create schema chat authorization ROLE; alter role \
             ROLE set search_path = chat)"
        }
        "42P07" | "42710" | "42723" => {
            "a table, index or function of that name is there already, and not ours: give \
             Scrollback a schema of its own (create schema chat authorization ROLE; alter role \
             ROLE set search_path = chat)"
        }
        "42P01" | "42703" | "42883" => {
            "a table, column or function is missing: has stream-bootstrap migrated this database, \
             and is the user's search_path the same for all functions?"
        }
        "42P05" | "26000" => {
            "a prepared statement is there already, or gone: is DATABASE_URL behind a pooler in \
             transaction mode? Use session mode, or pgbouncer 1.21 with max_prepared_statements"
        }
        "25006" => {
            "PostgreSQL is read-only: a standby, a former primary, or default_transaction_read_only"
        }
        "53300" => {
            "PostgreSQL has no connection left: raise max_connections, or lower \
             DATABASE_CONNECTIONS"
        }
        "53100" => "PostgreSQL's disk is full",
        "55P03" => "a lock was not free in time",
        "57014" => "PostgreSQL ended a query that took too long",
        "57P01" | "57P02" | "57P05" => "PostgreSQL ended the session",
        "57P03" => "PostgreSQL is starting or stopping",
        _ => match class_of(sqlstate) {
            Class::Transient => "PostgreSQL cannot run statements at the moment",
            Class::Row => "PostgreSQL refused the row",
            Class::Deployment => "PostgreSQL is not set up for this function",
        },
    }
}

impl From<DatabaseError> for Error {
    fn from(error: DatabaseError) -> Error {
        match error.class {
            Class::Transient => {
                Error::new(Code::Unavailable, "the database does not answer; try again")
                    .with_detail(error)
            }
            Class::Deployment => Error::new(
                Code::Unavailable,
                "the database is not set up; the operator's log says why",
            )
            .with_detail(error),
            Class::Row => Error::internal(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sqlstate_decides_the_class() {
        for state in [
            "08006", "40P01", "53300", "55P03", "57P01", "58030", "XX000", "25006", "42P05",
            "26000", "",
        ] {
            assert_eq!(class_of(state), Class::Transient, "{state}");
        }
        for state in ["22021", "23505", "54000"] {
            assert_eq!(class_of(state), Class::Row, "{state}");
        }
        for state in ["42P01", "28P01", "3D000", "42501"] {
            assert_eq!(class_of(state), Class::Deployment, "{state}");
        }
    }

    #[test]
    fn some_states_concern_the_session() {
        for state in [
            "08006", "25006", "25P02", "25P03", "57P01", "57P02", "57P03", "57P05", "26000",
            "42P05",
        ] {
            assert!(is_of_session(state), "{state}");
        }
        for state in [
            "40P01", "53300", "55P03", "57014", "0A000", "22021", "23505", "42P01", "XX000", "",
        ] {
            assert!(!is_of_session(state), "{state}");
        }
    }

    #[test]
    fn each_error_that_an_operator_fixes_has_advice_of_its_own() {
        let states = [
            "28P01", "28000", "3D000", "3F000", "42501", "42P07", "42P01", "42P05", "25006",
            "53300", "53100",
        ];
        let advices: std::collections::HashSet<&str> = states.into_iter().map(advice).collect();
        assert_eq!(advices.len(), states.len());
        assert!(advice("28P01").contains("DATABASE_URL") && advice("28P01").contains(".env"));
        assert!(advice("42P07").contains("search_path") && advice("42501").contains("search_path"));
        assert!(advice("42P05").contains("transaction mode"));
    }
}
