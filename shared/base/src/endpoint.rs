//! A request subject with the types it carries.

use std::marker::PhantomData;

use crate::error::Refusal;

/// A request subject with the types it takes and gives.
#[derive(Debug)]
pub struct Endpoint<Q, R> {
    /// The endpoint's name in the service API.
    pub name: &'static str,
    /// What stands before the names.
    pub prefix: &'static str,
    /// What a function subscribes to; wider than valid requests, so that a wrong one gets an answer.
    pub subscription: &'static str,
    /// What it is for, in a sentence.
    pub description: &'static str,
    /// Whether the first name after the prefix is the user who asks.
    pub names_user: bool,
    types: PhantomData<fn(Q) -> R>,
}

impl<Q, R> Endpoint<Q, R> {
    /// An endpoint; see the fields.
    pub const fn new(
        name: &'static str,
        prefix: &'static str,
        subscription: &'static str,
        description: &'static str,
    ) -> Self {
        Endpoint {
            name,
            prefix,
            subscription,
            description,
            names_user: false,
            types: PhantomData,
        }
    }

    /// The first name after the prefix is the user who asks.
    pub const fn of_user(self) -> Self {
        Endpoint {
            names_user: true,
            ..self
        }
    }

    /// The subject a client asks: the prefix and the names after it.
    pub fn subject(&self, names: &[&str]) -> String {
        format!("{}{}", self.prefix, names.join("."))
    }

    /// What follows the prefix in `subject`; empty when nothing does.
    pub fn names<'a>(&self, subject: &'a str) -> &'a str {
        subject.strip_prefix(self.prefix).unwrap_or_default()
    }
}

impl<Q, R> Clone for Endpoint<Q, R> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<Q, R> Copy for Endpoint<Q, R> {}

/// A request that can be read from the end of its subject and its body.
pub trait ParseRequest: Sized {
    /// # Errors
    /// A [`Refusal`] that says what to mend.
    fn parse(names: &str, body: &[u8]) -> Result<Self, Refusal>;
}
