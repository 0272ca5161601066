//! What Scrollback speaks: subjects bound to the types they carry, payloads, names, errors.
//!
//! No I/O here, no clock and no randomness: everything is a value or a check of one. The contract in
//! words is `README.md` beside this crate.

mod audit;
mod body;
mod bootstrap;
mod change;
mod conversation;
mod dead_letters;
mod delete;
mod error;
mod event;
mod history;
mod message;
mod name;
mod reason;
mod receipt;
mod retention;
mod send;
mod service;
mod subject;
mod sync;

pub use audit::{Audit, AuditCounts, AuditRequest, Offender, ReplayRequest, Replayed};
pub use body::MAX_PAGE;
pub use bootstrap::{Applied, Check, Difference, Fence, NoRequest};
pub use change::{Change, ChangeEntry, ChangeType, Deletion, Mode, change_subject, event_subject};
pub use conversation::{Conversation, Direct};
pub use dead_letters::{
    DropLetter, DroppedLetter, Letter, LetterId, LetterOutcome, LetterPage, ListLetters,
    OutcomeFilter, Retried, RetryLetter, RetryOutcome, ShowLetter, ShownLetter, SubjectPattern,
};
pub use delete::{DeleteRequest, Deleted, DeletedStatus, Which};
pub use error::{Code, ErrorBody, ErrorDetail, Refusal};
pub use event::{DeletedEvent, Event, ReceiptEvent, StoredEvent, told};
pub use history::{Cursor, HistoryRequest, Page, Source};
pub use message::{Incoming, Limits, MAX_ID_BYTES, Message, Status, believable, derived_id};
pub use name::{MAX_NAME_BYTES, Room, Seq, User};
pub use reason::Reason;
pub use receipt::{
    DeliveredRequest, InboxRequest, Marked, Marks, ReadRequest, Unread, UnreadRequest, UnreadRoom,
};
pub use retention::{
    Budget, DEFAULT_ROOMS, DIRECT_ROOMS, EraseRequest, Erased, Retained, RetentionRequest,
};
pub use send::{Draft, SendAck, SendRequest, SentStatus};
pub use service::{EndpointInfo, EndpointStats, Info, Ping, Stats};
pub use subject::{
    Ask, BOOTSTRAP_APPLY, BOOTSTRAP_AUDIT, BOOTSTRAP_CHECK, BOOTSTRAP_REPLAY, CHANGES,
    DEADLETTERS_DROP, DEADLETTERS_LIST, DEADLETTERS_RETRY, DEADLETTERS_SHOW, DELETE, DELIVERED,
    DISCOVER_INFO, DISCOVER_STATS, DM_CHANGES, DM_DELETE, DM_HISTORY, DM_INBOX, DM_READ, DM_SEND,
    DM_SYNC, EVENTS, EVENTS_STREAM, Endpoint, FENCE_SUBJECT, HISTORY, INBOX, LogSubject,
    OUTBOX_WAKE, READ, REQUEST_SUBJECTS, RETENTION_ERASE, RETENTION_RUN, RETENTION_STATUS, SEND,
    SERVICE_REPLY, STREAM, STREAM_SUBJECTS, SYNC, UNREAD, WORKER, direct_changes_of,
    direct_subject, directs_to, discovery_subjects, is_in_log, jetstream, live_subject, overlap,
    ping_subject, subject_template,
};
pub use sync::{SyncPage, SyncRequest};

/// Names of the headers Scrollback reads and writes.
pub mod header {
    /// `true` when there is more in the direction asked for.
    pub const MORE: &str = "Scrollback-More";
    /// The reply holds everything of its room up to this sequence, in the range asked for.
    pub const THROUGH: &str = "Scrollback-Through";
    /// Where the reply came from: `index`, `log` or `both`.
    pub const SOURCE: &str = "Scrollback-Source";
    /// JetStream's deduplication id; a message's id when its body names none.
    pub const MESSAGE_ID: &str = "Nats-Msg-Id";
    /// The `Nats-Msg-Id` a message came with before it was appended again, from below the fence or from the dead letters. A
    /// message from below the fence that came with none has it empty; a retried letter has one that names the letter.
    pub const ORIGINAL_ID: &str = "Scrollback-Original-Id";
    /// CloudEvents' extension `sequence`: the position in the log, with leading zeros.
    pub const SEQUENCE: &str = "ce-sequence";
    /// On the event of a receipt, which has no position of its own: everything of the log was told up to here.
    pub const TOLD: &str = "Scrollback-Told";
    /// ADR-32: the sentence for the caller.
    pub const SERVICE_ERROR: &str = "Nats-Service-Error";
    /// ADR-32: the code, as a number.
    pub const SERVICE_ERROR_CODE: &str = "Nats-Service-Error-Code";
}
