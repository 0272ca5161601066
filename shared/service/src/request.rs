//! What a handler receives and returns.

use std::marker::PhantomData;

use bytes::Bytes;
use serde::Serialize;

use base::error::Error;

/// A parsed request.
#[derive(Debug)]
pub struct Request<Q> {
    /// The request, parsed from its subject and its payload.
    pub body: Q,
}

/// A reply of an endpoint whose replies are `R`.
#[derive(Debug)]
pub struct Reply<R> {
    pub(crate) body: Bytes,
    pub(crate) headers: Vec<(&'static str, String)>,
    reply: PhantomData<fn() -> R>,
}

impl<R> Clone for Reply<R> {
    fn clone(&self) -> Self {
        Reply {
            body: self.body.clone(),
            headers: self.headers.clone(),
            reply: PhantomData,
        }
    }
}

impl<R> Reply<R> {
    /// A reply that is encoded already. `headers` must hold nothing that a user sent.
    pub fn encoded(body: Bytes, headers: Vec<(&'static str, String)>) -> Reply<R> {
        Reply {
            body,
            headers,
            reply: PhantomData,
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
