//! Every subject there is, bound to the types it carries. No subject literal stands anywhere else.

use crate::conversation::direct_name;
use crate::name::{Room, User};
use crate::reason::Reason;

/// The log.
pub const STREAM: &str = "CHAT_MESSAGES";
/// The durable consumer every copy of `persist-message` shares.
pub const WORKER: &str = "persist-message";
/// What the log takes in.
pub const STREAM_SUBJECTS: [&str; 4] = ["chat.*", "admin.*", "dm.*.*", "change.>"];

/// Every change in the log.
pub const CHANGES: &str = "change.>";
/// Every change to direct messages in the log.
pub const DM_CHANGES: &str = "change.dm.>";
/// What was stored, deleted, delivered, read: the stream relay-outbox publishes to.
pub const EVENTS_STREAM: &str = "CHAT_EVENTS";
/// What that stream takes in.
pub const EVENTS: &str = "events.v1.>";
/// Whoever wrote to the outbox says so here, so that nobody has to look all the time.
pub const OUTBOX_WAKE: &str = "scrollback.outbox";

/// What the log takes in while its sequences are being lifted: a subject nobody publishes to, so that publishers
/// get an error instead of an acknowledgement below the fence.
pub const GUARD_SUBJECT: &str = "scrollback.fence";

/// What a subject of the log says about its message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StreamSubject<'a> {
    /// `chat.{room}`.
    Chat(&'a str),
    /// `admin.{name}`: room `__admin__`.
    Admin,
    /// `dm.{from}.{to}`.
    Direct {
        /// Who sent it.
        from: &'a str,
        /// To whom.
        to: &'a str,
    },
}

/// The longest name a subject of the log may hold, in bytes.
const MAX_LOG_NAME_BYTES: usize = 255;

impl<'a> StreamSubject<'a> {
    /// # Errors
    /// The [`Reason`] why nothing published there can be stored.
    pub fn parse(subject: &'a str) -> Result<StreamSubject<'a>, Reason> {
        let tokens: Vec<&str> = subject.split('.').collect();
        let parsed = match tokens[..] {
            ["chat", room] if room == Room::ADMIN => return Err(Reason::RoomReserved),
            ["chat", room] => StreamSubject::Chat(room),
            ["admin", _] => StreamSubject::Admin,
            ["dm", from, to] => StreamSubject::Direct { from, to },
            _ => return Err(Reason::UnsupportedSubject),
        };
        if tokens.iter().any(|token| token.len() > MAX_LOG_NAME_BYTES) {
            Err(Reason::NameTooLong)
        } else if subject.contains('\0') {
            Err(Reason::NulInSubject)
        } else {
            Ok(parsed)
        }
    }

    /// The room as stored and shown: `general`, `__admin__`, `dm.alice.bob` with the names sorted.
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

/// Where a direct message from one user to another is appended.
pub fn direct_subject(from: &User, to: &User) -> String {
    format!("dm.{from}.{to}")
}

/// Every direct message to a user, whoever sends it.
pub fn direct_subjects_to(user: &User) -> String {
    format!("dm.*.{user}")
}

/// The form of a subject that messages, changes or events are published to, without anybody's name: spans are named by
/// it, because names of rooms and users are many and say who talks to whom.
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

/// The subjects of the log that carry the deletions of direct messages from or to `user`.
pub fn direct_change_subjects(user: &User) -> Vec<String> {
    vec![
        crate::change::change_subject(&format!("dm.{user}.*")),
        crate::change::change_subject(&format!("dm.*.{user}")),
    ]
}

/// Where live readers hear what is appended to `stream_subject`.
pub fn live_subject(stream_subject: &str) -> String {
    format!("live.{stream_subject}")
}

/// Whether the log takes in what is published to `subject`. Wildcards in `subject` are letters like others.
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
    fn the_log_takes_in_its_own_subjects() {
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
    fn a_subject_of_the_log_names_its_room() {
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
