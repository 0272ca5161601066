//! Names that cannot be wrong: parsed once at the edge, trusted afterwards.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::Refusal;

/// The longest room or user a request subject may name, in bytes.
pub const MAX_NAME_BYTES: usize = 64;

/// A room as a request names it: 1 to 64 of `A-Z a-z 0-9 _ -`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Room(String);

impl Room {
    /// The room of everything published to `admin.{name}`.
    pub const ADMIN: &'static str = "__admin__";

    /// # Errors
    /// 400 with the rule, when `name` breaks it.
    pub fn parse(name: &str) -> Result<Room, Refusal> {
        if is_name(name) {
            Ok(Room(name.to_owned()))
        } else {
            Err(Refusal::bad_request(format!(
                "a room is 1 to {MAX_NAME_BYTES} of A-Z a-z 0-9 _ - and one subject token; mend the end of the subject"
            )))
        }
    }

    /// The name, as in subjects and replies.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The subject in the log that carries this room; a wildcard for the admin room.
    pub fn log_subject(&self) -> String {
        if self.0 == Self::ADMIN {
            "admin.*".to_owned()
        } else {
            format!("chat.{}", self.0)
        }
    }

    /// Where a trusted publisher appends to this room. `publisher` ends the subject of the admin room, as one token.
    pub fn append_subject(&self, publisher: &str) -> String {
        if self.0 == Self::ADMIN {
            format!("admin.{publisher}")
        } else {
            format!("chat.{}", self.0)
        }
    }

    /// From a message's body, where a room stands as a name or, as `chat.general`, the subject it was published on.
    ///
    /// # Errors
    /// As [`Room::parse`].
    pub fn from_body(room: &str) -> Result<Room, Refusal> {
        Room::parse(room.strip_prefix("chat.").unwrap_or(room))
    }
}

impl fmt::Display for Room {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A user as a request names them: 1 to 64 of `A-Z a-z 0-9 _ -`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct User(String);

impl User {
    /// # Errors
    /// 400 with the rule, when `name` breaks it.
    pub fn parse(name: &str) -> Result<User, Refusal> {
        if is_name(name) {
            Ok(User(name.to_owned()))
        } else {
            Err(Refusal::bad_request(format!(
                "a user is 1 to {MAX_NAME_BYTES} of A-Z a-z 0-9 _ - and one subject token; mend the end of the subject"
            )))
        }
    }

    /// The name, as in subjects and replies.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The two names a subject ends with.
pub(crate) fn two<'a>(names: &'a str, form: &str) -> Result<(&'a str, &'a str), Refusal> {
    let wrong = || {
        Refusal::bad_request(format!(
            "the subject must be {form}, each name 1 to 64 of A-Z a-z 0-9 _ -"
        ))
    };
    names
        .split_once('.')
        .filter(|(_, last)| !last.contains('.'))
        .ok_or_else(wrong)
}

fn is_name(name: &str) -> bool {
    (1..=MAX_NAME_BYTES).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
}

/// A position in the log: 0 (before the first message) to 2^63 - 1, the largest PostgreSQL can hold.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Seq(u64);

impl Seq {
    /// Before every message.
    pub const ZERO: Seq = Seq(0);
    /// After every message.
    pub const MAX: Seq = Seq(i64::MAX as u64);

    /// `None` above 2^63 - 1.
    pub const fn new(seq: u64) -> Option<Seq> {
        if seq <= Self::MAX.0 {
            Some(Seq(seq))
        } else {
            None
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

    /// From PostgreSQL's `bigint`; a negative one, which the schema rules out, becomes 0.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_room_is_checked() {
        for good in ["general", "ubuntu-2004", "__admin__", "A", &"x".repeat(64)] {
            assert_eq!(Room::parse(good).unwrap().as_str(), good);
        }
        for bad in ["", "a b", "a.b", "*", ">", "a\0", "\u{e9}", &"x".repeat(65)] {
            let refusal = Room::parse(bad).unwrap_err();
            assert_eq!(refusal.code, crate::Code::BadRequest, "{bad:?}");
            assert!(refusal.reason.contains("1 to 64"), "{bad:?}");
            assert!(
                User::parse(bad)
                    .unwrap_err()
                    .reason
                    .starts_with("a user is 1 to 64"),
                "{bad:?}"
            );
        }
    }

    #[test]
    fn a_room_knows_its_subjects() {
        let general = Room::from_body("chat.general").unwrap();
        assert_eq!(
            (general.as_str(), general.append_subject("import")),
            ("general", "chat.general".to_owned())
        );
        assert_eq!(
            Room::from_body("__admin__")
                .unwrap()
                .append_subject("import"),
            "admin.import"
        );
        assert!(Room::from_body("dm.alice.bob").is_err());
    }

    #[test]
    fn a_sequence_fits_a_bigint() {
        assert_eq!(Seq::new(1 << 63), None);
        assert_eq!(Seq::new((1 << 63) - 1), Some(Seq::MAX));
        assert_eq!(Seq::MAX.next(), Seq::MAX);
        assert_eq!(Seq::ZERO.previous(), Seq::ZERO);
        assert_eq!(Seq::from_i64(Seq::MAX.as_i64()), Seq::MAX);
    }
}
