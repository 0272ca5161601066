//! Subjects of the stream, of events and of wake-ups. Those of requests are in
//! [`endpoints`](crate::endpoints); no other crate has a subject as a literal.

use crate::conversation::direct_name;
use crate::name::{Room, User};
use crate::reason::Reason;

/// The stream of messages.
pub const STREAM: &str = "CHAT_MESSAGES";
/// The durable consumer that all replicas of `persist-message` share.
pub const WORKER: &str = "persist-message";
/// The subjects that the stream takes.
pub const STREAM_SUBJECTS: [&str; 4] = ["chat.*", "admin.*", "dm.*.*", "change.>"];

/// Every change in the stream.
pub const CHANGES: &str = "change.>";
/// Every change to direct messages in the stream.
pub const DM_CHANGES: &str = "change.dm.>";
/// The stream of events: what was stored, deleted, delivered and read. `relay-outbox` publishes to
/// it.
pub const EVENTS_STREAM: &str = "CHAT_EVENTS";
/// The subjects that the stream of events takes.
pub const EVENTS: &str = "events.v1.>";
/// Wakes `relay-outbox`: a function that has written to the outbox publishes here, so that nobody
/// has to poll all the time.
pub const OUTBOX_WAKE: &str = "scrollback.outbox";

/// The only subject that the stream takes while its sequences are being advanced. Nobody publishes
/// to it, so publishers get an error instead of an acknowledgement below the sequence guard.
pub const GUARD_SUBJECT: &str = "scrollback.fence";

/// What a subject of the stream states about its message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StreamSubject<'a> {
    /// `chat.{room}`.
    Chat(&'a str),
    /// `admin.{name}`: room `__admin__`.
    Admin,
    /// `dm.{from}.{to}`.
    Direct {
        /// The sender.
        from: &'a str,
        /// The recipient.
        to: &'a str,
    },
}

/// The longest name in a subject of the stream, in bytes.
const MAX_NAME_BYTES: usize = 255;

impl<'a> StreamSubject<'a> {
    /// # Errors
    /// The [`Reason`] why no message on this subject can be stored.
    pub fn parse(subject: &'a str) -> Result<StreamSubject<'a>, Reason> {
        let tokens: Vec<&str> = subject.split('.').collect();
        let parsed = match tokens[..] {
            ["chat", room] if room == Room::ADMIN => return Err(Reason::RoomReserved),
            ["chat", room] => StreamSubject::Chat(room),
            ["admin", _] => StreamSubject::Admin,
            ["dm", from, to] => StreamSubject::Direct { from, to },
            _ => return Err(Reason::UnsupportedSubject),
        };
        if tokens.iter().any(|token| token.len() > MAX_NAME_BYTES) {
            Err(Reason::NameTooLong)
        } else if subject.contains('\0') {
            Err(Reason::NulInSubject)
        } else {
            Ok(parsed)
        }
    }

    /// The room as it is stored and as readers get it: `general`, `__admin__`, or `dm.alice.bob`
    /// with the names sorted.
    pub fn room(&self) -> String {
        match *self {
            StreamSubject::Chat(room) => room.to_owned(),
            StreamSubject::Admin => Room::ADMIN.to_owned(),
            StreamSubject::Direct { from, to } => {
                let (first, second) = if from <= to { (from, to) } else { (to, from) };
                direct_name(first, second)
            }
        }
    }
}

/// The stream's subject for direct messages from one user to another.
pub fn direct_subject(from: &User, to: &User) -> String {
    format!("dm.{from}.{to}")
}

/// Every direct message to a user.
pub fn direct_subjects_to(user: &User) -> String {
    format!("dm.*.{user}")
}

/// The template of a subject for messages, changes or events. Spans are named after it and not
/// after the subject, because names of rooms and users are many and reveal who talks to whom.
pub fn subject_template(subject: &str) -> &'static str {
    let tokens: Vec<&str> = subject.split('.').collect();
    match tokens[..] {
        ["chat", _] => "chat.{room}",
        ["admin", _] => "admin.{publisher}",
        ["dm", _, _] => "dm.{user}.{peer}",
        ["change", "chat", _] => "change.chat.{room}",
        ["change", "dm", _, _] => "change.dm.{user}.{peer}",
        ["events", "v1", "chat", _] => "events.v1.chat.{room}",
        ["events", "v1", "dm", _, _] => "events.v1.dm.{user}.{peer}",
        _ => "{subject}",
    }
}

/// The stream's subjects for changes to direct messages from or to `user`.
pub fn direct_change_subjects(user: &User) -> Vec<String> {
    vec![
        crate::change::change_subject(&format!("dm.{user}.*")),
        crate::change::change_subject(&format!("dm.*.{user}")),
    ]
}

/// The subject where live readers get what is appended to `stream_subject`.
pub fn live_subject(stream_subject: &str) -> String {
    format!("live.{stream_subject}")
}

/// Whether the stream takes messages published to `subject`. Wildcards in `subject` are taken
/// literally.
pub fn is_in_stream(subject: &str) -> bool {
    let tokens: Vec<&str> = subject.split('.').collect();
    let matches = |pattern: &str| {
        let wanted: Vec<&str> = pattern.split('.').collect();
        let (wanted, enough) = match wanted.split_last() {
            Some((&">", before)) => (before.to_vec(), tokens.len() > before.len()),
            _ => (wanted.clone(), tokens.len() == wanted.len()),
        };
        enough
            && wanted
                .iter()
                .zip(&tokens)
                .all(|(wanted, token)| *wanted == "*" || wanted == token)
    };
    tokens.iter().all(|token| !token.is_empty())
        && STREAM_SUBJECTS.iter().any(|pattern| matches(pattern))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_takes_its_own_subjects() {
        for taken in [
            "chat.general",
            "chat.*",
            "chat.>",
            "admin.a",
            "dm.ann.bob",
            "change.chat.general",
            "change.x",
        ] {
            assert!(is_in_stream(taken), "{taken}");
        }
        for foreign in [
            "",
            "chat",
            "chat.",
            "chat.history.general",
            "dm.ann",
            "dm.>",
            "dm.ann.",
            "change",
            "change.",
            "events.v1.x",
            ">",
            "*.*",
        ] {
            assert!(!is_in_stream(foreign), "{foreign}");
        }
    }

    #[test]
    fn a_subject_of_the_stream_names_its_room() {
        assert_eq!(
            StreamSubject::parse("chat.general").unwrap().room(),
            "general"
        );
        assert_eq!(
            StreamSubject::parse("admin.alerts").unwrap().room(),
            "__admin__"
        );
        assert_eq!(
            StreamSubject::parse("dm.bob.alice").unwrap().room(),
            "dm.alice.bob"
        );
        let long = format!("chat.{}", "r".repeat(300));
        for (subject, reason) in [
            ("chat.__admin__", Reason::RoomReserved),
            ("change.chat.general", Reason::UnsupportedSubject),
            ("chat.a\0b", Reason::NulInSubject),
            (long.as_str(), Reason::NameTooLong),
        ] {
            assert_eq!(StreamSubject::parse(subject), Err(reason), "{subject:?}");
        }
    }
}
