//! Why a message could not be stored: the fixed list behind `dead_letters.reason`.

use std::fmt;

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $name:literal),* $(,)?) => {
        /// Why a message went to the dead letters. The names are stored and queried: never rename one.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Reason { $($(#[$doc])* $variant),* }

        impl Reason {
            /// Every reason there is.
            pub const ALL: &'static [Reason] = &[$(Reason::$variant),*];

            /// The name as stored.
            pub const fn as_str(self) -> &'static str {
                match self { $(Reason::$variant => $name),* }
            }
        }
    };
}

reasons! {
    /// A client cannot parse the headers (lone CR, no colon, space in a name, invalid UTF-8).
    MalformedHeaders = "malformed_headers",
    /// The subject is not UTF-8.
    MalformedSubject = "malformed_subject",
    /// The subject belongs to no kind of message this version knows.
    UnsupportedSubject = "unsupported_subject",
    /// A room or user in the subject is longer than 255 bytes.
    NameTooLong = "name_too_long",
    /// U+0000 in a name in the subject.
    NulInSubject = "nul_in_subject",
    /// `chat.__admin__`: that room belongs to `admin.*`.
    RoomReserved = "room_reserved",
    /// No bytes at all.
    EmptyPayload = "empty_payload",
    /// More bytes than a message of the permitted text length can need.
    PayloadTooLarge = "payload_too_large",
    /// The payload is not UTF-8.
    InvalidUtf8 = "invalid_utf8",
    /// JSON, but not an object.
    NotAnObject = "not_an_object",
    /// Not JSON.
    NotJson = "not_json",
    /// Nested deeper than 128 levels.
    TooDeep = "too_deep",
    /// `\ud800` without its other half.
    LoneSurrogate = "lone_surrogate",
    /// A number no integer of 64 bits can hold.
    NumberOutOfRange = "number_out_of_range",
    /// One of the known keys stands there twice.
    DuplicateKey = "duplicate_key",
    /// JetStream's own publish acknowledgement, sent here by a forged reply subject.
    PublishAck = "publish_ack",
    /// No `text`.
    MissingText = "missing_text",
    /// No `user`, or an empty one.
    MissingUser = "missing_user",
    /// A known key with a value of another type.
    WrongType = "wrong_type",
    /// U+0000 in the text; PostgreSQL cannot hold it.
    NulInText = "nul_in_text",
    /// U+0000 in the user.
    NulInUser = "nul_in_user",
    /// U+0000 in the id.
    NulInId = "nul_in_id",
    /// The text is longer than the limit.
    TextTooLong = "text_too_long",
    /// The user is longer than 255 bytes.
    UserTooLong = "user_too_long",
    /// The id is longer than 128 bytes.
    IdTooLong = "id_too_long",
    /// On `change.>`, and no deletion.
    MalformedChange = "malformed_change",
    /// Another message is stored under this sequence: the stream was re-created without the fence.
    SequenceReused = "sequence_reused",
    /// Its sender has used this id for another text, or in another room; the first one of them is stored.
    IdConflict = "id_conflict",
    /// PostgreSQL refused this one row; the detail names the SQLSTATE.
    RefusedByDatabase = "refused_by_database",
    /// Taken from a stream below the fence, waiting to be appended again above it.
    BelowFence = "below_fence",
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
