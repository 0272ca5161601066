//! A position in a stream.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A sequence number of a stream: 0 (before the first message) to 2^63 - 1, the largest number that
/// PostgreSQL's `bigint` can hold.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Seq(u64);

impl Seq {
    /// The position before every message.
    pub const ZERO: Seq = Seq(0);
    /// The highest position there can be.
    pub const MAX: Seq = Seq(i64::MAX as u64);

    /// `None` above 2^63 - 1.
    pub const fn new(seq: u64) -> Option<Seq> {
        if seq <= Self::MAX.0 {
            Some(Seq(seq))
        } else {
            None
        }
    }

    /// A sequence as JetStream reports it; one above 2^63 - 1, which no stream reaches, becomes
    /// [`Seq::MAX`].
    pub const fn saturating(seq: u64) -> Seq {
        match Self::new(seq) {
            Some(seq) => seq,
            None => Self::MAX,
        }
    }

    /// The number.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The number as PostgreSQL's `bigint`.
    pub const fn as_i64(self) -> i64 {
        self.0 as i64
    }

    /// From PostgreSQL's `bigint`. A negative number, which the schema rules out, becomes 0.
    pub const fn from_i64(seq: i64) -> Seq {
        if seq < 0 { Seq(0) } else { Seq(seq as u64) }
    }

    /// The position after this one, at most [`Seq::MAX`].
    #[must_use]
    pub const fn next(self) -> Seq {
        if self.0 == Self::MAX.0 {
            self
        } else {
            Seq(self.0 + 1)
        }
    }

    /// The position before this one, at least 0.
    #[must_use]
    pub const fn previous(self) -> Seq {
        Seq(self.0.saturating_sub(1))
    }
}

impl fmt::Display for Seq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
