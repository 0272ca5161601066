//! Names of rooms and users, parsed once at the edge and valid from then on.

use std::fmt;

use base::endpoint::SubjectTemplate;
use base::error::Refusal;

/// The longest name of a room or a user in a request's subject, in bytes.
pub const MAX_NAME_BYTES: usize = 64;

/// The name of a room in a request: 1 to 64 of `A-Z a-z 0-9 _ -`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Room(String);

impl Room {
    /// The room of every message published to `admin.{name}`.
    pub const ADMIN: &'static str = "__admin__";

    /// # Errors
    /// 400 with the rule that `name` breaks.
    pub fn parse(name: &str) -> Result<Room, Refusal> {
        if is_name(name) {
            Ok(Room(name.to_owned()))
        } else {
            Err(Refusal::bad_request(format!(
                "a room is 1 to {MAX_NAME_BYTES} of A-Z a-z 0-9 _ - and one subject token; \
                 correct the end of the subject"
            )))
        }
    }

    /// The name, as in subjects and replies.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The stream's subject for this room; for the admin room a wildcard.
    pub fn stream_subject(&self) -> String {
        if self.0 == Self::ADMIN {
            "admin.*".to_owned()
        } else {
            format!("chat.{}", self.0)
        }
    }

    /// The subject that a trusted publisher publishes to. For the admin room it ends with
    /// `publisher`, which must be one token.
    pub fn append_subject(&self, publisher: &str) -> String {
        if self.0 == Self::ADMIN {
            format!("admin.{publisher}")
        } else {
            format!("chat.{}", self.0)
        }
    }

    /// From the body of a message, which may give the room's name (`general`) or its subject
    /// (`chat.general`).
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

/// The name of a user in a request: 1 to 64 of `A-Z a-z 0-9 _ -`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct User(String);

impl User {
    /// # Errors
    /// 400 with the rule that `name` breaks.
    pub fn parse(name: &str) -> Result<User, Refusal> {
        if is_name(name) {
            Ok(User(name.to_owned()))
        } else {
            Err(Refusal::bad_request(format!(
                "a user is 1 to {MAX_NAME_BYTES} of A-Z a-z 0-9 _ - and one subject token; \
                 correct the end of the subject"
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

/// The two names at the end of a subject.
pub(crate) fn split_names<'a>(
    names: &'a str,
    template: &SubjectTemplate,
) -> Result<(&'a str, &'a str), Refusal> {
    let wrong = || {
        Refusal::bad_request(format!(
            "the subject must be {}, each name 1 to {MAX_NAME_BYTES} of A-Z a-z 0-9 _ -",
            template.text
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

#[cfg(test)]
mod tests {
    use base::seq::Seq;

    use super::*;

    #[test]
    fn a_room_is_checked() {
        for good in ["general", "ubuntu-2004", "__admin__", "A", &"x".repeat(64)] {
            assert_eq!(Room::parse(good).unwrap().as_str(), good);
        }
        for bad in ["", "a b", "a.b", "*", ">", "a\0", "\u{e9}", &"x".repeat(65)] {
            let refusal = Room::parse(bad).unwrap_err();
            assert_eq!(refusal.code, base::error::Code::BadRequest, "{bad:?}");
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
    fn a_room_has_its_subjects() {
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
