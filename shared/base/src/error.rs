//! Errors have two audiences: the caller reads `reason`, the operator's log keeps `detail`.

use std::borrow::Cow;
use std::fmt;

use serde::{Deserialize, Serialize};

/// The code of an error reply; the numbers are HTTP's because everyone knows them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Code {
    /// 400: the request is wrong; the reason says what to mend.
    BadRequest,
    /// 403: not yours.
    Forbidden,
    /// 404: no such thing.
    NotFound,
    /// 409: contradicts what is there.
    Conflict,
    /// 413: too large.
    TooLarge,
    /// 429: too fast; the reason says how long to wait.
    TooFast,
    /// 500: our fault.
    Internal,
    /// 503: something we need is away; try again.
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
    /// A sentence that says what to mend. Never SQL, never a message's text.
    pub reason: String,
    /// Whether the same request may succeed later.
    pub retryable: bool,
}

/// A request that was not understood: code and sentence, both for the caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// What kind of wrong.
    pub code: Code,
    /// What to mend.
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

    /// As the caller gets it.
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

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Error {
        Error::new(refusal.code, refusal.reason)
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
