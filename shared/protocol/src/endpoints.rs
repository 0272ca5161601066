//! The one table of endpoints.
//!
//! A row gives an endpoint's constant, its request and reply types, its name in the service API,
//! its subject, and who may call it; the comment above it is its description. Everything else
//! follows from the table: what the functions subscribe to, which subjects no stream may take
//! ([`request_subjects`]), the permissions in `nats/accounts.conf`, the lists that tests go
//! through, and the tables in `README.md`, `docs/PROTOCOL.md` and the functions' READMEs.
//!
//! A new endpoint is a row here and a handler in its function.

use base::endpoint::{Endpoint, SubjectTemplate};
use base::subject::{INBOX, SERVICE_REPLY};

use crate::audit::{Audit, AuditRequest, ReplayRequest, Replayed};
use crate::bootstrap::{Applied, Check, EmptyRequest};
use crate::conversation::Direct;
use crate::dead_letters::{
    DeadLetterPage, DropDeadLetter, DroppedDeadLetter, ListDeadLetters, Retried, RetryDeadLetter,
    ShowDeadLetter, ShownDeadLetter,
};
use crate::delete::{DeleteRequest, Deleted};
use crate::history::{HistoryRequest, Page};
use crate::name::{Room, User};
use crate::receipt::{
    DeliveredRequest, InboxRequest, ReadRequest, ReceiptAck, Unread, UnreadRequest,
};
use crate::retention::{Budget, EraseRequest, Erased, RetentionReport, RetentionRequest};
use crate::send::{SendAck, SendRequest};
use crate::subject::OUTBOX_WAKE;
use crate::sync::{SyncPage, SyncRequest};

/// Who may call an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// A chat user. Today that is a trusted publisher who asks for its users: the NATS user
    /// `publisher`.
    User,
    /// Somebody who runs this: the NATS user `operator`.
    Operator,
}

impl Role {
    /// As documents show it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Role::User => "user",
            Role::Operator => "operator",
        }
    }

    /// The user in `nats/accounts.conf` that has this role.
    pub const fn nats_user(self) -> &'static str {
        match self {
            Role::User => "publisher",
            Role::Operator => "operator",
        }
    }
}

/// A row of the table, without its types.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    /// The constant's name: `HISTORY`.
    pub constant: &'static str,
    /// The function that serves it.
    pub function: &'static str,
    /// Its name in the service API. No dots: the `nats` CLI rejects a whole INFO reply with one.
    pub name: &'static str,
    /// Its subjects.
    pub template: SubjectTemplate,
    /// What it does, in one line without a full stop.
    pub description: &'static str,
    /// The name of the request's type.
    pub request: &'static str,
    /// The name of the reply's type.
    pub reply: &'static str,
    /// Who may call it.
    pub roles: &'static [Role],
}

impl Row {
    /// The subject for permissions: callers may publish to it, the function may subscribe to it.
    /// Requests without names share one for all of their kind: `bootstrap.*`.
    pub fn permission(&self) -> String {
        match self.template.text.split_once('.') {
            Some((kind, _)) if self.template.names().is_empty() => format!("{kind}.*"),
            _ => self.template.subscription(),
        }
    }
}

macro_rules! endpoints {
    ($(
        $function:literal {
            $(
                #[doc = $description:literal]
                $constant:ident: $request:ty => $reply:ty =
                    $name:literal, $template:literal, [$($role:ident),+];
            )+
        }
    )+) => {
        $($(
            #[doc = $description]
            pub const $constant: Endpoint<$request, $reply> =
                Endpoint::new($name, template($template), one_line($description));
        )+)+

        /// Every endpoint, in the order of the table.
        pub const ENDPOINTS: &[Row] = &[$($(
            Row {
                constant: stringify!($constant),
                function: $function,
                name: $name,
                template: template($template),
                description: one_line($description),
                request: stringify!($request),
                reply: stringify!($reply),
                roles: &[$(Role::$role),+],
            }
        ),+),+];
    };
}

endpoints! {
    "send-message" {
        /// Appends a message to a room and acknowledges it.
        SEND: SendRequest<Room> => SendAck =
            "send", "chat.send.{user}.{room}", [User];
        /// Appends a direct message and acknowledges it.
        DM_SEND: SendRequest<User> => SendAck =
            "dm-send", "dm.send.{user}.{peer}", [User];
    }
    "get-history" {
        /// One page of a room, oldest first.
        HISTORY: HistoryRequest => Page =
            "history", "chat.history.{room}", [User, Operator];
        /// One page of a conversation, oldest first.
        DM_HISTORY: Direct<HistoryRequest> => Page =
            "dm-history", "dm.history.{user}.{peer}", [User];
    }
    "sync-messages" {
        /// Messages and changes of a room after a cursor.
        SYNC: SyncRequest => SyncPage =
            "sync", "chat.sync.{room}", [User];
        /// Messages and changes of a conversation after a cursor.
        DM_SYNC: Direct<SyncRequest> => SyncPage =
            "dm-sync", "dm.sync.{user}.{peer}", [User];
        /// Direct messages not yet confirmed as delivered.
        DM_INBOX: InboxRequest => SyncPage =
            "inbox", "chat.inbox.{user}", [User];
    }
    "delete-message" {
        /// Deletes a message of a room.
        DELETE: DeleteRequest => Deleted =
            "delete", "chat.delete.{user}.{room}", [User];
        /// Deletes a direct message.
        DM_DELETE: Direct<DeleteRequest> => Deleted =
            "dm-delete", "dm.delete.{user}.{peer}", [User];
    }
    "track-receipts" {
        /// Confirms direct messages as delivered.
        DELIVERED: DeliveredRequest => ReceiptAck =
            "delivered", "chat.delivered.{user}", [User];
        /// Moves the read cursor of a room.
        READ: ReadRequest => ReceiptAck =
            "read", "chat.read.{user}.{room}", [User];
        /// Moves the read cursor of a conversation.
        DM_READ: Direct<ReadRequest> => ReceiptAck =
            "dm-read", "dm.read.{user}.{peer}", [User];
        /// Unread counts by conversation.
        UNREAD: UnreadRequest => Unread =
            "unread", "chat.unread.{user}", [User];
    }
    "stream-bootstrap" {
        /// How streams, consumer and schema differ from their desired state.
        BOOTSTRAP_CHECK: EmptyRequest => Check =
            "check", "bootstrap.check", [Operator];
        /// Applies the desired state.
        BOOTSTRAP_APPLY: EmptyRequest => Applied =
            "apply", "bootstrap.apply", [Operator];
        /// Looks up what became of every message in the stream, part by part.
        BOOTSTRAP_AUDIT: AuditRequest => Audit =
            "audit", "bootstrap.audit", [Operator];
        /// Delivers the stream again, from a sequence on, to be stored again.
        BOOTSTRAP_REPLAY: ReplayRequest => Replayed =
            "replay", "bootstrap.replay", [Operator];
    }
    "manage-dead-letters" {
        /// Lists what could not be stored, by id, without headers and payloads.
        DEADLETTERS_LIST: ListDeadLetters => DeadLetterPage =
            "list", "deadletters.list", [Operator];
        /// Shows one dead letter with its headers and its payload.
        DEADLETTERS_SHOW: ShowDeadLetter => ShownDeadLetter =
            "show", "deadletters.show", [Operator];
        /// Appends a dead letter to the stream again and reports what became of it.
        DEADLETTERS_RETRY: RetryDeadLetter => Retried =
            "retry", "deadletters.retry", [Operator];
        /// Takes a dead letter off the list of those that wait; its row stays.
        DEADLETTERS_DROP: DropDeadLetter => DroppedDeadLetter =
            "drop", "deadletters.drop", [Operator];
    }
    "enforce-retention" {
        /// Trims the stream and expires messages now, or reports what there is to do.
        RETENTION_RUN: RetentionRequest => RetentionReport =
            "run", "retention.run", [Operator];
        /// How much of the stream's disk budget is used, and how long the rest lasts.
        RETENTION_STATUS: EmptyRequest => Budget =
            "status", "retention.status", [Operator];
        /// Erases every text of a user, part by part; tombstones remain.
        RETENTION_ERASE: EraseRequest => Erased =
            "erase", "retention.erase", [Operator];
    }
}

/// A comment as a description: without the space before it and the full stop behind it.
const fn one_line(comment: &'static str) -> &'static str {
    let text = comment.trim_ascii();
    match text.as_bytes() {
        [kept @ .., b'.'] => text.split_at(kept.len()).0,
        _ => text,
    }
}

/// A function subscribes to `dm.send.*.>`, not to `dm.send.>`: the stream takes `dm.*.*`, so
/// `dm.send.bob` is a direct message from a user called send, and JetStream acknowledges it.
const fn template(text: &'static str) -> SubjectTemplate {
    let template = SubjectTemplate::new(text);
    match text.as_bytes() {
        [b'd', b'm', b'.', ..] => template.with_fewest_names(2),
        _ => template,
    }
}

/// Subjects of requests and replies, with wildcards for names. No stream may take any of them:
/// JetStream's acknowledgement would reach the caller before the function's answer.
pub fn request_subjects() -> Vec<String> {
    let mut found = Vec::new();
    for row in ENDPOINTS {
        let subject = if row.template.names().is_empty() {
            row.permission()
        } else {
            row.template.wildcard()
        };
        if !found.contains(&subject) {
            found.push(subject);
        }
    }
    found.extend(["$SRV.>", "live.>", OUTBOX_WAKE].map(str::to_owned));
    found.extend([INBOX, SERVICE_REPLY].map(|prefix| format!("{prefix}.>")));
    found
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use base::subject::{matches, overlap};

    use super::*;
    use crate::subject::{EVENTS, STREAM_SUBJECTS};

    #[test]
    fn no_stream_takes_requests() {
        for stream in STREAM_SUBJECTS.into_iter().chain([EVENTS]) {
            for request in request_subjects() {
                assert!(
                    !overlap(stream, &request),
                    "{stream} would swallow {request}"
                );
            }
        }
    }

    #[test]
    fn no_function_hears_what_the_stream_takes() {
        for row in ENDPOINTS {
            for stream in STREAM_SUBJECTS {
                for heard in [row.template.subscription(), row.permission()] {
                    assert!(!overlap(stream, &heard), "{stream} and {heard}");
                }
            }
        }
    }

    #[test]
    fn every_request_is_heard_by_its_function_alone() {
        for row in ENDPOINTS {
            let heard = |other: &Row| {
                let names = row.template.names();
                matches(
                    &other.template.subscription(),
                    &row.template.subject(&names),
                )
            };
            let hearing: Vec<_> = ENDPOINTS.iter().filter(|other| heard(other)).collect();
            assert_eq!(hearing.len(), 1, "{hearing:?}");
            assert_eq!(hearing[0].constant, row.constant);
        }
    }

    #[test]
    fn names_in_the_service_api_are_unique_within_a_function_and_have_no_dots() {
        let mut seen = BTreeSet::new();
        for row in ENDPOINTS {
            assert!(seen.insert((row.function, row.name)), "{}", row.name);
            assert!(!row.name.contains('.'), "{}", row.name);
        }
    }

    #[test]
    fn a_row_is_what_its_constant_is() {
        let row = ENDPOINTS
            .iter()
            .find(|row| row.constant == "DM_HISTORY")
            .unwrap();
        assert_eq!(row.template, DM_HISTORY.template);
        assert_eq!(
            (row.function, row.name, row.template.text),
            ("get-history", "dm-history", "dm.history.{user}.{peer}")
        );
        assert_eq!((row.request, row.reply), ("Direct<HistoryRequest>", "Page"));
        assert_eq!(row.description, "One page of a conversation, oldest first");
        assert_eq!(row.roles, [Role::User]);
        assert_eq!(row.permission(), "dm.history.*.>");
        assert_eq!(DEADLETTERS_LIST.template.subscription(), "deadletters.list");
        let list = ENDPOINTS.iter().find(|row| row.name == "list").unwrap();
        assert_eq!(list.permission(), "deadletters.*");
    }
}
