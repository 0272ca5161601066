//! Why something could not be applied, and whether waiting helps.

use base::error::{Code, Error, Fatal};
use jetstream::stream::StreamError;
use nats::connection::ApiError;
use postgres::error::{Class, DatabaseError};

/// JetStream has no leader at the moment (`JSClusterNotAvailErr`, `JSClusterNotLeaderErr`).
const NO_LEADER: [u64; 2] = [10_008, 10_009];

/// Why something could not be applied. Holds nothing a message said.
#[derive(Debug, Clone)]
pub enum Trouble {
    /// JetStream's API.
    Nats(ApiError),
    /// PostgreSQL.
    Database(DatabaseError),
    /// Another copy is applying.
    Busy,
    /// Everything is applied, but the log does not take back what was saved from below the fence; why not.
    LettersWait(String),
    /// Somebody has to mend what the sentence names.
    Refused(String),
}

impl Trouble {
    /// Whether the same attempt may succeed later without anybody mending anything.
    pub fn passes(&self) -> bool {
        match self {
            Trouble::Nats(ApiError::Away(_)) | Trouble::Busy | Trouble::LettersWait(_) => true,
            Trouble::Nats(ApiError::Refused { code, .. }) => NO_LEADER.contains(code),
            Trouble::Nats(ApiError::Unreadable(_)) | Trouble::Refused(_) => false,
            Trouble::Database(error) => error.class == Class::Transient,
        }
    }

    /// What it is about: a server that is away has many ways of not answering.
    pub fn topic(&self) -> String {
        match self {
            Trouble::Nats(_) if self.passes() => "NATS".to_owned(),
            Trouble::Database(_) if self.passes() => "PostgreSQL".to_owned(),
            other => other.to_string(),
        }
    }
}

impl std::fmt::Display for Trouble {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Trouble::Nats(error) => error.fmt(f),
            Trouble::Database(error) if error.class == Class::Transient => {
                write!(f, "waiting for PostgreSQL ({error})")
            }
            Trouble::Database(error) => error.fmt(f),
            Trouble::Busy => f.write_str("another copy is applying"),
            Trouble::LettersWait(why) => write!(
                f,
                "messages from below the fence wait to be appended again: {why}"
            ),
            Trouble::Refused(sentence) => f.write_str(sentence),
        }
    }
}

impl From<ApiError> for Trouble {
    fn from(error: ApiError) -> Trouble {
        Trouble::Nats(error)
    }
}

impl From<StreamError> for Trouble {
    fn from(error: StreamError) -> Trouble {
        match error {
            StreamError::Api(error) => Trouble::Nats(error),
            StreamError::Direct(what) | StreamError::TooMuch(what) => {
                Trouble::Nats(ApiError::Away(what))
            }
            StreamError::Late => Trouble::Nats(ApiError::Away("reading the stream took too long")),
        }
    }
}

impl From<DatabaseError> for Trouble {
    fn from(error: DatabaseError) -> Trouble {
        Trouble::Database(error)
    }
}

impl From<sqlx::Error> for Trouble {
    fn from(error: sqlx::Error) -> Trouble {
        Trouble::Database(error.into())
    }
}

impl From<Trouble> for Error {
    fn from(trouble: Trouble) -> Error {
        match trouble {
            Trouble::Database(error) => error.into(),
            passing if passing.passes() => Error::new(Code::Unavailable, passing.to_string()),
            refused => Error::new(Code::Conflict, refused.to_string()),
        }
    }
}

impl From<Trouble> for Fatal {
    fn from(trouble: Trouble) -> Fatal {
        Fatal::new(trouble.to_string())
    }
}
