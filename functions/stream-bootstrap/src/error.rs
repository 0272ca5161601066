//! Why the desired state could not be applied, and whether waiting helps.

use base::error::{Code, Fatal};
use jetstream::stream::StreamError;
use nats::connection::ApiError;
use postgres::error::{Class, DatabaseError};

/// JetStream has no leader at the moment (`JSClusterNotAvailErr`, `JSClusterNotLeaderErr`).
const NO_LEADER: [u64; 2] = [10_008, 10_009];

/// Why the desired state could not be applied. It never contains anything from a message.
#[derive(Debug, Clone)]
pub enum Error {
    /// JetStream's API failed or refused.
    Nats(ApiError),
    /// PostgreSQL failed or refused.
    Database(DatabaseError),
    /// Another replica is applying.
    Busy,
    /// Everything is applied, but the stream does not accept the salvaged messages; this is why.
    DeadLettersWaiting(String),
    /// An operator has to fix what the message names.
    Refused(String),
}

impl Error {
    /// Whether the same attempt may succeed later although nobody fixes anything.
    pub fn is_transient(&self) -> bool {
        match self {
            Error::Nats(ApiError::Away(_)) | Error::Busy | Error::DeadLettersWaiting(_) => true,
            Error::Nats(ApiError::Refused { code, .. }) => NO_LEADER.contains(code),
            Error::Nats(ApiError::Unreadable(_)) | Error::Refused(_) => false,
            Error::Database(error) => error.class == Class::Transient,
        }
    }

    /// What the error is about. A server that is down fails in many ways; all of them have the
    /// same topic, so that they are logged once.
    pub fn topic(&self) -> String {
        match self {
            Error::Nats(_) if self.is_transient() => "NATS".to_owned(),
            Error::Database(_) if self.is_transient() => "PostgreSQL".to_owned(),
            other => other.to_string(),
        }
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Error::Nats(error) => error.fmt(f),
            Error::Database(error) if error.class == Class::Transient => {
                write!(f, "waiting for PostgreSQL ({error})")
            }
            Error::Database(error) => error.fmt(f),
            Error::Busy => f.write_str("another replica is applying"),
            Error::DeadLettersWaiting(why) => write!(
                f,
                "messages salvaged from below the sequence guard wait to be appended again: {why}"
            ),
            Error::Refused(message) => f.write_str(message),
        }
    }
}

impl From<ApiError> for Error {
    fn from(error: ApiError) -> Error {
        Error::Nats(error)
    }
}

impl From<StreamError> for Error {
    fn from(error: StreamError) -> Error {
        match error {
            StreamError::Api(error) => Error::Nats(error),
            StreamError::Direct(what) | StreamError::TooMuch(what) => {
                Error::Nats(ApiError::Away(what))
            }
            StreamError::Late => Error::Nats(ApiError::Away("reading the stream took too long")),
        }
    }
}

impl From<DatabaseError> for Error {
    fn from(error: DatabaseError) -> Error {
        Error::Database(error)
    }
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Error {
        Error::Database(error.into())
    }
}

impl From<Error> for base::error::Error {
    fn from(error: Error) -> base::error::Error {
        match error {
            Error::Database(error) => error.into(),
            transient if transient.is_transient() => {
                base::error::Error::new(Code::Unavailable, transient.to_string())
            }
            refused => base::error::Error::new(Code::Conflict, refused.to_string()),
        }
    }
}

impl From<Error> for Fatal {
    fn from(error: Error) -> Fatal {
        Fatal::new(error.to_string())
    }
}
