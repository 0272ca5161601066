//! Why a stream could not be read.

use base::error::{Code, Error};
use nats::connection::ApiError;

/// Why the stream could not be read.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StreamError {
    /// The JSON API failed.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// The direct get failed.
    #[error("direct get: {0}")]
    Direct(&'static str),
    /// The time of the read's [`Limit`](super::Limit) is over.
    #[error("reading the stream took too long")]
    Late,
    /// There is more than the read's [`Limit`](super::Limit) allows, and a part of it is no answer.
    #[error("there is more of it than one request may read: {0}")]
    TooMuch(&'static str),
}

impl From<StreamError> for Error {
    fn from(error: StreamError) -> Error {
        let reason = match error {
            StreamError::TooMuch(_) => {
                "too much of this waits to be stored for one request to read; try again when it is"
            }
            StreamError::Late => "reading the stream took too long; try again",
            StreamError::Api(_) | StreamError::Direct(_) => "the stream does not answer; try again",
        };
        Error::new(Code::Unavailable, reason).with_detail(error)
    }
}
