//! Errors have two audiences. The caller gets a [`Code`] and a `reason` that says what to correct;
//! the operator's log gets a `detail` as well.

use std::borrow::Cow;
use std::fmt;

use serde::{Deserialize, Serialize};

/// The code of an error reply. The numbers are HTTP's, because everyone knows them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Code {
    /// 400: the request is wrong; the reason says what to correct.
    BadRequest,
    /// 403: the caller may not do this.
    Forbidden,
    /// 404: the thing asked for does not exist.
    NotFound,
    /// 409: the request conflicts with what is stored.
    Conflict,
    /// 413: the request or its reply is too large.
    TooLarge,
    /// 429: the caller exceeds a rate; the reason says how long to wait.
    TooFast,
    /// 500: a fault in the function; the operator's log says which.
    Internal,
    /// 503: something the function depends on is unavailable; try again.
    Unavailable,
}

impl Code {
    /// The number on the wire.
    pub const fn number(self) -> u16 {
        match self {
            Code::BadRequest => 400,
            Code::Forbidden => 403,
            Code::NotFound => 404,
            Code::Conflict => 409,
            Code::TooLarge => 413,
            Code::TooFast => 429,
            Code::Internal => 500,
            Code::Unavailable => 503,
        }
    }

    /// Whether the same request may succeed later.
    pub const fn retryable(self) -> bool {
        matches!(self, Code::TooFast | Code::Internal | Code::Unavailable)
    }
}

/// The body of an error reply: `{"error":{"code","reason","retryable"}}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// The error.
    pub error: ErrorDetail,
}

/// What is inside an [`ErrorBody`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorDetail {
    /// See [`Code::number`].
    pub code: u16,
    /// Says what to correct. Never contains SQL or the text of a message.
    pub reason: String,
    /// Whether the same request may succeed later.
    pub retryable: bool,
}

/// Why a request could not be parsed. Both fields go to the caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The kind of error.
    pub code: Code,
    /// What to correct.
    pub reason: String,
}

impl Refusal {
    /// A 400.
    pub fn bad_request(reason: impl Into<String>) -> Refusal {
        Refusal {
            code: Code::BadRequest,
            reason: reason.into(),
        }
    }

    /// A 403.
    pub fn forbidden(reason: impl Into<String>) -> Refusal {
        Refusal {
            code: Code::Forbidden,
            reason: reason.into(),
        }
    }
}

/// What a handler returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a request failed.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{}: {reason}{}", code.number(), in_parentheses(detail))]
pub struct Error {
    /// Goes to the caller.
    pub code: Code,
    /// Goes to the caller: what to correct. Never contains SQL or the text of a message.
    pub reason: Cow<'static, str>,
    /// Goes to the log only. Never contains the text of a message either.
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

    /// Adds what only the log should contain.
    #[must_use]
    pub fn with_detail(mut self, detail: impl fmt::Display) -> Error {
        self.detail = detail.to_string();
        self
    }

    /// A 500. The caller gets no details; the log does.
    pub fn internal(detail: impl fmt::Display) -> Error {
        Error::new(
            Code::Internal,
            "this request failed inside; the operator's log says why",
        )
        .with_detail(detail)
    }

    /// The body of the error reply.
    pub fn body(&self) -> ErrorBody {
        ErrorBody {
            error: ErrorDetail {
                code: self.code.number(),
                reason: self.reason.clone().into_owned(),
                retryable: self.code.retryable(),
            },
        }
    }
}

fn in_parentheses(detail: &str) -> String {
    if detail.is_empty() {
        String::new()
    } else {
        format!(" ({detail})")
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Error {
        Error::new(refusal.code, refusal.reason)
    }
}

/// The process cannot do its work. It prints this one line and exits with a code other than 0.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct Fatal(String);

impl Fatal {
    /// `line` says what is wrong and what to do about it. Line breaks become spaces.
    pub fn new(line: impl Into<String>) -> Fatal {
        Fatal(line.into().replace('\n', " "))
    }
}
