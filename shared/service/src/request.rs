//! What a handler gets and what it gives.

use std::marker::PhantomData;

use bytes::Bytes;
use serde::Serialize;

use base::error::Error;

/// A request, parsed.
#[derive(Debug)]
pub struct Request<Q> {
    /// What is asked.
    pub body: Q,
}

/// A reply to an endpoint that gives `R`.
#[derive(Debug)]
pub struct Reply<R> {
    pub(crate) body: Bytes,
    pub(crate) headers: Vec<(&'static str, String)>,
    gives: PhantomData<fn() -> R>,
}

impl<R> Clone for Reply<R> {
    fn clone(&self) -> Self {
        Reply {
            body: self.body.clone(),
            headers: self.headers.clone(),
            gives: PhantomData,
        }
    }
}

impl<R> Reply<R> {
    /// A reply that was encoded elsewhere; `headers` hold nothing a user sent.
    pub fn encoded(body: Bytes, headers: Vec<(&'static str, String)>) -> Reply<R> {
        Reply {
            body,
            headers,
            gives: PhantomData,
        }
    }
}

impl<R: Serialize> Reply<R> {
    /// `value` as JSON.
    ///
    /// # Errors
    /// It cannot be written as JSON.
    pub fn json(value: &R) -> Result<Reply<R>, Error> {
        let body = serde_json::to_vec(value).map_err(Error::internal)?;
        Ok(Reply::encoded(body.into(), Vec::new()))
    }
}
