//! What a caller is told when something is wrong.

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
