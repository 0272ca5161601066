//! Every endpoint there is, bound to the types it carries.

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
use crate::sync::{SyncPage, SyncRequest};
use base::endpoint::Endpoint;

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
pub const DELIVERED: Endpoint<DeliveredRequest, ReceiptAck> = Endpoint::new(
    "delivered",
    "chat.delivered.",
    "chat.delivered.>",
    "Confirms direct messages: chat.delivered.{user}",
)
.of_user();
/// A user has read a room up to here.
pub const READ: Endpoint<ReadRequest, ReceiptAck> = Endpoint::new(
    "read",
    "chat.read.",
    "chat.read.>",
    "Cursors a room as read: chat.read.{user}.{room}",
)
.of_user();
/// A user has read a conversation up to here. `*.>` and not `>` for the reason [`DM_SEND`] gives.
pub const DM_READ: Endpoint<Direct<ReadRequest>, ReceiptAck> = Endpoint::new(
    "dm-read",
    "dm.read.",
    "dm.read.*.>",
    "Cursors a conversation as read: dm.read.{user}.{peer}",
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
pub const BOOTSTRAP_CHECK: Endpoint<EmptyRequest, Check> = Endpoint::new(
    "check",
    "bootstrap.check",
    "bootstrap.check",
    "What differs between the shipped streams and the servers'",
);
/// Mends it.
pub const BOOTSTRAP_APPLY: Endpoint<EmptyRequest, Applied> = Endpoint::new(
    "apply",
    "bootstrap.apply",
    "bootstrap.apply",
    "Mends what bootstrap.check finds",
);
/// What could not be stored, page by page.
pub const DEADLETTERS_LIST: Endpoint<ListDeadLetters, DeadLetterPage> = Endpoint::new(
    "list",
    "deadletters.list",
    "deadletters.list",
    "What could not be stored, by id, without the bytes",
);
/// One dead letter with its bytes.
pub const DEADLETTERS_SHOW: Endpoint<ShowDeadLetter, ShownDeadLetter> = Endpoint::new(
    "show",
    "deadletters.show",
    "deadletters.show",
    "One dead letter with its headers and its payload",
);
/// Appends a dead letter to the log again.
pub const DEADLETTERS_RETRY: Endpoint<RetryDeadLetter, Retried> = Endpoint::new(
    "retry",
    "deadletters.retry",
    "deadletters.retry",
    "Appends a dead letter to the log again and says what became of it",
);
/// A dead letter need not be looked at any more.
pub const DEADLETTERS_DROP: Endpoint<DropDeadLetter, DroppedDeadLetter> = Endpoint::new(
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
pub const RETENTION_RUN: Endpoint<RetentionRequest, RetentionReport> = Endpoint::new(
    "run",
    "retention.run",
    "retention.run",
    "Trims the log and sweeps what has expired, or says what there is to do",
);
/// How much of the log's disk budget is used.
pub const RETENTION_STATUS: Endpoint<EmptyRequest, Budget> = Endpoint::new(
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

#[cfg(test)]
mod tests {
    use base::subject::overlap;

    use super::*;
    use crate::subject::{EVENTS, STREAM_SUBJECTS};

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
}
