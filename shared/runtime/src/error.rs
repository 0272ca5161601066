//! Errors have two audiences: the caller reads `reason`, the log keeps `detail`.

use std::borrow::Cow;
use std::fmt;

use wire::{Code, ErrorBody, ErrorDetail, Refusal};

use crate::{DatabaseError, LogError};

/// What a handler returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a request was not answered as asked.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{}: {reason}{}", code.number(), if detail.is_empty() { String::new() } else { format!(" ({detail})") })]
pub struct Error {
    /// For the caller.
    pub code: Code,
    /// For the caller: what to mend. Never SQL, never a message's text.
    pub reason: Cow<'static, str>,
    /// For the log. Never a message's text either.
    pub detail: String,
}

impl Error {
    /// An error the caller can act on.
    pub fn new(code: Code, reason: impl Into<Cow<'static, str>>) -> Error {
        Error {
            code,
            reason: reason.into(),
            detail: String::new(),
        }
    }

    /// Adds what only the log should know.
    #[must_use]
    pub fn with_detail(mut self, detail: impl fmt::Display) -> Error {
        self.detail = detail.to_string();
        self
    }

    /// A 500: the caller learns nothing, the log does.
    pub fn internal(detail: impl fmt::Display) -> Error {
        Error::new(
            Code::Internal,
            "this request failed inside; the operator's log says why",
        )
        .with_detail(detail)
    }

    pub(crate) fn body(&self) -> ErrorBody {
        ErrorBody {
            error: ErrorDetail {
                code: self.code.number(),
                reason: self.reason.clone().into_owned(),
                retryable: self.code.retryable(),
            },
        }
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Error {
        Error::new(refusal.code, refusal.reason)
    }
}

impl From<DatabaseError> for Error {
    fn from(error: DatabaseError) -> Error {
        match error.class {
            crate::Class::Trouble => {
                Error::new(Code::Unavailable, "the database does not answer; try again")
                    .with_detail(error)
            }
            crate::Class::Deployment => Error::new(
                Code::Unavailable,
                "the database is not set up; the operator's log says why",
            )
            .with_detail(error),
            crate::Class::Row => Error::internal(error),
        }
    }
}

impl From<LogError> for Error {
    fn from(error: LogError) -> Error {
        let reason = match error {
            LogError::TooMuch(_) => {
                "too much of this waits to be stored for one request to read; try again when it is"
            }
            LogError::Late => "reading the log took too long; try again",
            LogError::Api(_) | LogError::Direct(_) => "the log does not answer; try again",
        };
        Error::new(Code::Unavailable, reason).with_detail(error)
    }
}

/// The process cannot do its work: one plain line, and it leaves with a code that is not zero.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct Fatal(String);

impl Fatal {
    /// `line` says what is wrong and what to mend.
    pub fn new(line: impl Into<String>) -> Fatal {
        Fatal(line.into().replace('\n', " "))
    }
}
