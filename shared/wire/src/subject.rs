//! Every subject there is, bound to the types it carries. No subject literal stands anywhere else.

use std::marker::PhantomData;

use crate::conversation::direct_name;
use crate::{
    Applied, Audit, AuditRequest, Budget, Check, DeleteRequest, Deleted, DeliveredRequest, Direct,
    DropLetter, DroppedLetter, EraseRequest, Erased, HistoryRequest, InboxRequest, LetterPage,
    ListLetters, Marked, NoRequest, Page, ReadRequest, Reason, Refusal, ReplayRequest, Replayed,
    Retained, RetentionRequest, Retried, RetryLetter, Room, SendAck, SendRequest, ShowLetter,
    ShownLetter, SyncPage, SyncRequest, Unread, UnreadRequest, User,
};

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
pub const FENCE_SUBJECT: &str = "scrollback.fence";

/// Replies go to inboxes; each user's lie below `_INBOX.{user}.`.
pub const INBOX: &str = "_INBOX";
/// Replies through a service import.
pub const SERVICE_REPLY: &str = "_R_";

/// JetStream's API, as far as Scrollback asks it.
pub mod jetstream {
    /// State and configuration of the log.
    pub const STREAM_INFO: &str = "$JS.API.STREAM.INFO.CHAT_MESSAGES";
    /// Makes the log.
    pub const STREAM_CREATE: &str = "$JS.API.STREAM.CREATE.CHAT_MESSAGES";
    /// Changes its configuration.
    pub const STREAM_UPDATE: &str = "$JS.API.STREAM.UPDATE.CHAT_MESSAGES";
    /// Removes messages, or lifts the next sequence.
    pub const STREAM_PURGE: &str = "$JS.API.STREAM.PURGE.CHAT_MESSAGES";
    /// Every stream of the account.
    pub const STREAM_LIST: &str = "$JS.API.STREAM.LIST";
    /// One message as JSON, headers in base64.
    pub const MESSAGE_GET: &str = "$JS.API.STREAM.MSG.GET.CHAT_MESSAGES";
    /// Removes one message.
    pub const MESSAGE_DELETE: &str = "$JS.API.STREAM.MSG.DELETE.CHAT_MESSAGES";
    /// Messages as they are, in batches.
    pub const DIRECT_GET: &str = "$JS.API.DIRECT.GET.CHAT_MESSAGES";
    /// State of the shared consumer.
    pub const CONSUMER_INFO: &str = "$JS.API.CONSUMER.INFO.CHAT_MESSAGES.persist-message";
    /// Makes or changes the shared consumer.
    pub const CONSUMER_CREATE: &str =
        "$JS.API.CONSUMER.DURABLE.CREATE.CHAT_MESSAGES.persist-message";
    /// Holds back deliveries of the shared consumer for a while.
    pub const CONSUMER_PAUSE: &str = "$JS.API.CONSUMER.PAUSE.CHAT_MESSAGES.persist-message";
    /// Begins the shared consumer anew at a sequence: what was acknowledged from there on is delivered again.
    pub const CONSUMER_RESET: &str = "$JS.API.CONSUMER.RESET.CHAT_MESSAGES.persist-message";
    /// Pulls from the shared consumer.
    pub const CONSUMER_NEXT: &str = "$JS.API.CONSUMER.MSG.NEXT.CHAT_MESSAGES.persist-message";

    /// Does `verb` (`INFO`, `CREATE`, `UPDATE`, `MSG.GET`) with any stream.
    pub fn stream(verb: &str, stream: &str) -> String {
        format!("$JS.API.STREAM.{verb}.{stream}")
    }

    /// Does `verb` (`INFO`, `DURABLE.CREATE`) with any consumer.
    pub fn consumer(verb: &str, stream: &str, consumer: &str) -> String {
        format!("$JS.API.CONSUMER.{verb}.{stream}.{consumer}")
    }
}

/// One page of a room.
pub const HISTORY: Endpoint<HistoryRequest, Page> = Endpoint::new(
    "history",
    "chat.history.",
    "chat.history.>",
    "One page of a room, oldest first: chat.history.{room}",
);
/// One page of the conversation of two people. `*.>` and not `>` for the reason [`DM_SEND`] gives.
pub const DM_HISTORY: Endpoint<Direct<HistoryRequest>, Page> = Endpoint::new(
    "dm-history",
    "dm.history.",
    "dm.history.*.>",
    "One page of a conversation, oldest first: dm.history.{user}.{peer}",
)
.of_user();
/// What happened in a room after a cursor.
pub const SYNC: Endpoint<SyncRequest, SyncPage> = Endpoint::new(
    "sync",
    "chat.sync.",
    "chat.sync.>",
    "Creations and changes after a cursor: chat.sync.{room}",
);
/// What happened between two people after a cursor.
pub const DM_SYNC: Endpoint<Direct<SyncRequest>, SyncPage> = Endpoint::new(
    "dm-sync",
    "dm.sync.",
    "dm.sync.*.>",
    "Creations and changes after a cursor: dm.sync.{user}.{peer}",
)
.of_user();
/// Deletes a message of a room.
pub const DELETE: Endpoint<DeleteRequest, Deleted> = Endpoint::new(
    "delete",
    "chat.delete.",
    "chat.delete.>",
    "Deletes a message of a room: chat.delete.{user}.{room}",
)
.of_user();
/// Deletes a direct message.
pub const DM_DELETE: Endpoint<Direct<DeleteRequest>, Deleted> = Endpoint::new(
    "dm-delete",
    "dm.delete.",
    "dm.delete.*.>",
    "Deletes a direct message: dm.delete.{user}.{peer}",
)
.of_user();
/// Appends a message to a room and answers when the log has it.
pub const SEND: Endpoint<SendRequest<Room>, SendAck> = Endpoint::new(
    "send",
    "chat.send.",
    "chat.send.>",
    "Sends a message to a room, acknowledged: chat.send.{user}.{room}",
)
.of_user();
/// Appends a message to the conversation of two people and answers when the log has it. Not `dm.send.>`: the log takes in
/// `dm.send.bob`, a direct message from somebody called send, and JetStream answers it.
pub const DM_SEND: Endpoint<SendRequest<User>, SendAck> = Endpoint::new(
    "dm-send",
    "dm.send.",
    "dm.send.*.>",
    "Sends a direct message, acknowledged: dm.send.{user}.{peer}",
)
.of_user();
/// Direct messages to a user that were not confirmed yet.
pub const DM_INBOX: Endpoint<InboxRequest, SyncPage> = Endpoint::new(
    "inbox",
    "chat.inbox.",
    "chat.inbox.>",
    "Direct messages not yet delivered: chat.inbox.{user}",
)
.of_user();
/// A user's client holds everything up to here.
pub const DELIVERED: Endpoint<DeliveredRequest, Marked> = Endpoint::new(
    "delivered",
    "chat.delivered.",
    "chat.delivered.>",
    "Confirms direct messages: chat.delivered.{user}",
)
.of_user();
/// A user has read a room up to here.
pub const READ: Endpoint<ReadRequest, Marked> = Endpoint::new(
    "read",
    "chat.read.",
    "chat.read.>",
    "Marks a room as read: chat.read.{user}.{room}",
)
.of_user();
/// A user has read a conversation up to here. `*.>` and not `>` for the reason [`DM_SEND`] gives.
pub const DM_READ: Endpoint<Direct<ReadRequest>, Marked> = Endpoint::new(
    "dm-read",
    "dm.read.",
    "dm.read.*.>",
    "Marks a conversation as read: dm.read.{user}.{peer}",
)
.of_user();
/// How much a user has not read.
pub const UNREAD: Endpoint<UnreadRequest, Unread> = Endpoint::new(
    "unread",
    "chat.unread.",
    "chat.unread.>",
    "Counts what is not read, by conversation: chat.unread.{user}",
)
.of_user();
/// What differs between the shipped data and the servers.
pub const BOOTSTRAP_CHECK: Endpoint<NoRequest, Check> = Endpoint::new(
    "check",
    "bootstrap.check",
    "bootstrap.check",
    "What differs between the shipped streams and the servers'",
);
/// Mends it.
pub const BOOTSTRAP_APPLY: Endpoint<NoRequest, Applied> = Endpoint::new(
    "apply",
    "bootstrap.apply",
    "bootstrap.apply",
    "Mends what bootstrap.check finds",
);
/// What could not be stored, page by page.
pub const DEADLETTERS_LIST: Endpoint<ListLetters, LetterPage> = Endpoint::new(
    "list",
    "deadletters.list",
    "deadletters.list",
    "What could not be stored, by id, without the bytes",
);
/// One dead letter with its bytes.
pub const DEADLETTERS_SHOW: Endpoint<ShowLetter, ShownLetter> = Endpoint::new(
    "show",
    "deadletters.show",
    "deadletters.show",
    "One dead letter with its headers and its payload",
);
/// Appends a dead letter to the log again.
pub const DEADLETTERS_RETRY: Endpoint<RetryLetter, Retried> = Endpoint::new(
    "retry",
    "deadletters.retry",
    "deadletters.retry",
    "Appends a dead letter to the log again and says what became of it",
);
/// A dead letter need not be looked at any more.
pub const DEADLETTERS_DROP: Endpoint<DropLetter, DroppedLetter> = Endpoint::new(
    "drop",
    "deadletters.drop",
    "deadletters.drop",
    "Takes a dead letter off the list of those that wait; its row stays",
);
/// What became of the log's messages.
pub const BOOTSTRAP_AUDIT: Endpoint<AuditRequest, Audit> = Endpoint::new(
    "audit",
    "bootstrap.audit",
    "bootstrap.audit",
    "What became of every message the log holds, part by part",
);
/// Delivers the log again.
pub const BOOTSTRAP_REPLAY: Endpoint<ReplayRequest, Replayed> = Endpoint::new(
    "replay",
    "bootstrap.replay",
    "bootstrap.replay",
    "Delivers the log again, from a sequence on, to be stored again",
);

/// Trims the log and sweeps what has expired, or says what there is to do.
pub const RETENTION_RUN: Endpoint<RetentionRequest, Retained> = Endpoint::new(
    "run",
    "retention.run",
    "retention.run",
    "Trims the log and sweeps what has expired, or says what there is to do",
);
/// How much of the log's disk budget is used.
pub const RETENTION_STATUS: Endpoint<NoRequest, Budget> = Endpoint::new(
    "status",
    "retention.status",
    "retention.status",
    "How much of the log's disk budget is used, and how long the rest lasts",
);
/// Erases whatever a user wrote.
pub const RETENTION_ERASE: Endpoint<EraseRequest, Erased> = Endpoint::new(
    "erase",
    "retention.erase",
    "retention.erase",
    "Erases every text of a user, part by part; their places remain",
);

/// Every copy of every function answers what it offers.
pub const DISCOVER_INFO: &str = "$SRV.INFO";
/// Every copy of every function answers how it is doing.
pub const DISCOVER_STATS: &str = "$SRV.STATS";

/// Everything a client may ask, with wildcards for names. A stream that overlaps one of these would
/// answer in the function's place.
pub const REQUEST_SUBJECTS: &[&str] = &[
    "chat.send.*.*",
    "dm.send.*.*",
    "chat.history.*",
    "dm.history.*.*",
    "chat.sync.*",
    "dm.sync.*.*",
    "chat.inbox.*",
    "chat.delete.*.*",
    "dm.delete.*.*",
    "chat.read.*.*",
    "dm.read.*.*",
    "chat.delivered.*",
    "chat.unread.*",
    "bootstrap.*",
    "deadletters.*",
    "retention.*",
    "$SRV.>",
    "live.>",
    "scrollback.outbox",
    "_INBOX.>",
    "_R_.>",
];

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
    pub about: &'static str,
    /// Whether the first name after the prefix is the user who asks.
    pub names_user: bool,
    types: PhantomData<fn(Q) -> R>,
}

impl<Q, R> Endpoint<Q, R> {
    const fn new(
        name: &'static str,
        prefix: &'static str,
        subscription: &'static str,
        about: &'static str,
    ) -> Self {
        Endpoint {
            name,
            prefix,
            subscription,
            about,
            names_user: false,
            types: PhantomData,
        }
    }

    /// The first name after the prefix is the user who asks.
    const fn of_user(self) -> Self {
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
pub trait Ask: Sized {
    /// # Errors
    /// A [`Refusal`] that says what to mend.
    fn parse(names: &str, body: &[u8]) -> Result<Self, Refusal>;
}

/// What a subject of the log says about its message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogSubject<'a> {
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

impl<'a> LogSubject<'a> {
    /// # Errors
    /// The [`Reason`] why nothing published there can be stored.
    pub fn parse(subject: &'a str) -> Result<LogSubject<'a>, Reason> {
        let tokens: Vec<&str> = subject.split('.').collect();
        let parsed = match tokens[..] {
            ["chat", room] if room == Room::ADMIN => return Err(Reason::RoomReserved),
            ["chat", room] => LogSubject::Chat(room),
            ["admin", _] => LogSubject::Admin,
            ["dm", from, to] => LogSubject::Direct { from, to },
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
            LogSubject::Chat(room) => room.to_owned(),
            LogSubject::Admin => Room::ADMIN.to_owned(),
            LogSubject::Direct { from, to } => {
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
pub fn directs_to(user: &User) -> String {
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
pub fn direct_changes_of(user: &User) -> Vec<String> {
    vec![
        crate::change_subject(&format!("dm.{user}.*")),
        crate::change_subject(&format!("dm.*.{user}")),
    ]
}

/// Where live readers hear what is appended to `log_subject`.
pub fn live_subject(log_subject: &str) -> String {
    format!("live.{log_subject}")
}

/// The nine subjects of the service API one copy of a function listens on, with the verb of each.
pub fn discovery_subjects(name: &str, id: &str) -> Vec<(&'static str, String)> {
    ["PING", "INFO", "STATS"]
        .into_iter()
        .flat_map(|verb| {
            [
                format!("$SRV.{verb}"),
                format!("$SRV.{verb}.{name}"),
                format!("$SRV.{verb}.{name}.{id}"),
            ]
            .map(|subject| (verb, subject))
        })
        .collect()
}

/// Where one replica of a function alone is asked whether it is there.
pub fn ping_subject(name: &str, id: &str) -> String {
    format!("$SRV.PING.{name}.{id}")
}

/// Whether the log takes in what is published to `subject`. Wildcards in `subject` are letters like others.
pub fn is_in_log(subject: &str) -> bool {
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

/// Whether some subject matches both patterns.
pub fn overlap(one: &str, other: &str) -> bool {
    let (mut left, mut right) = (one.split('.'), other.split('.'));
    loop {
        match (left.next(), right.next()) {
            (None, None) => return true,
            (Some(">"), Some(_)) | (Some(_), Some(">")) => return true,
            (Some(a), Some(b)) if a == b || a == "*" || b == "*" => {}
            _ => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_request_matches_the_log_or_the_events() {
        for stream in STREAM_SUBJECTS.into_iter().chain([EVENTS]) {
            for request in REQUEST_SUBJECTS {
                assert!(
                    !overlap(stream, request),
                    "{stream} would swallow {request}"
                );
            }
        }
    }

    #[test]
    fn every_endpoint_is_among_the_requests() {
        for subject in [
            SEND.subject(&["ann", "general"]),
            DM_SEND.subject(&["ann", "bob"]),
            HISTORY.subject(&["general"]),
            DM_HISTORY.subject(&["ann", "bob"]),
            SYNC.subject(&["general"]),
            DM_SYNC.subject(&["ann", "bob"]),
            DELETE.subject(&["ann", "general"]),
            DM_DELETE.subject(&["ann", "bob"]),
            DM_INBOX.subject(&["ann"]),
            DELIVERED.subject(&["ann"]),
            READ.subject(&["ann", "general"]),
            DM_READ.subject(&["ann", "bob"]),
            UNREAD.subject(&["ann"]),
            BOOTSTRAP_CHECK.subject(&[]),
            BOOTSTRAP_APPLY.subject(&[]),
            DEADLETTERS_LIST.subject(&[]),
            DEADLETTERS_SHOW.subject(&[]),
            DEADLETTERS_RETRY.subject(&[]),
            DEADLETTERS_DROP.subject(&[]),
            BOOTSTRAP_AUDIT.subject(&[]),
            BOOTSTRAP_REPLAY.subject(&[]),
            RETENTION_RUN.subject(&[]),
            RETENTION_STATUS.subject(&[]),
            RETENTION_ERASE.subject(&[]),
        ] {
            assert!(
                REQUEST_SUBJECTS
                    .iter()
                    .any(|pattern| overlap(pattern, &subject)),
                "{subject}"
            );
        }
    }

    #[test]
    fn no_function_hears_what_the_log_takes_in() {
        for subscription in [
            SEND.subscription,
            DM_SEND.subscription,
            HISTORY.subscription,
            DM_HISTORY.subscription,
            SYNC.subscription,
            DM_SYNC.subscription,
            DELETE.subscription,
            DM_DELETE.subscription,
            DM_INBOX.subscription,
            DELIVERED.subscription,
            READ.subscription,
            DM_READ.subscription,
            UNREAD.subscription,
            DEADLETTERS_LIST.subscription,
            DEADLETTERS_SHOW.subscription,
            DEADLETTERS_RETRY.subscription,
            DEADLETTERS_DROP.subscription,
            BOOTSTRAP_CHECK.subscription,
            BOOTSTRAP_APPLY.subscription,
            BOOTSTRAP_AUDIT.subscription,
            BOOTSTRAP_REPLAY.subscription,
            RETENTION_RUN.subscription,
            RETENTION_STATUS.subscription,
            RETENTION_ERASE.subscription,
        ] {
            for stream in STREAM_SUBJECTS {
                assert!(
                    !overlap(stream, subscription),
                    "{stream} and {subscription}"
                );
            }
        }
    }

    #[test]
    fn patterns_overlap_when_a_subject_matches_both() {
        assert!(overlap("chat.>", "chat.history.*"));
        assert!(overlap("dm.*.*", "dm.inbox.*"));
        assert!(overlap("*.history.a", "chat.*.*"));
        assert!(!overlap("chat.*", "chat.history.*"));
        assert!(!overlap("chat.>", "chat"));
        assert!(!overlap("dm.*.*", "chat.inbox.*"));
    }

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
            assert!(is_in_log(taken), "{taken}");
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
            assert!(!is_in_log(foreign), "{foreign}");
        }
    }

    #[test]
    fn a_subject_of_the_log_names_its_room() {
        assert_eq!(LogSubject::parse("chat.general").unwrap().room(), "general");
        assert_eq!(
            LogSubject::parse("admin.alerts").unwrap().room(),
            "__admin__"
        );
        assert_eq!(
            LogSubject::parse("dm.bob.alice").unwrap().room(),
            "dm.alice.bob"
        );
        let long = format!("chat.{}", "r".repeat(300));
        for (subject, reason) in [
            ("chat.__admin__", Reason::RoomReserved),
            ("change.chat.general", Reason::UnsupportedSubject),
            ("chat.a\0b", Reason::NulInSubject),
            (long.as_str(), Reason::NameTooLong),
        ] {
            assert_eq!(LogSubject::parse(subject), Err(reason), "{subject:?}");
        }
    }
}
