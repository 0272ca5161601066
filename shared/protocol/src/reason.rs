//! Why a message became a dead letter: the values of `dead_letters.reason`.

use std::fmt;

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $name:literal),* $(,)?) => {
        /// Why a message became a dead letter. The names are stored and queried, so never rename
        /// one.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Reason { $($(#[$doc])* $variant),* }

        impl Reason {
            /// Every reason there is.
            pub const ALL: &'static [Reason] = &[$(Reason::$variant),*];

            /// The name, as stored.
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
    /// The subject belongs to no kind of message that this version knows.
    UnsupportedSubject = "unsupported_subject",
    /// A room or user in the subject is longer than 255 bytes.
    NameTooLong = "name_too_long",
    /// A name in the subject contains U+0000.
    NulInSubject = "nul_in_subject",
    /// `chat.__admin__`: messages of that room go to `admin.*`.
    RoomReserved = "room_reserved",
    /// The payload is empty.
    EmptyPayload = "empty_payload",
    /// The payload is larger than a message with the longest text can be.
    PayloadTooLarge = "payload_too_large",
    /// The payload is not UTF-8.
    InvalidUtf8 = "invalid_utf8",
    /// The payload is JSON, but not an object.
    NotAnObject = "not_an_object",
    /// The payload is not JSON.
    NotJson = "not_json",
    /// The JSON is nested deeper than 128 levels.
    TooDeep = "too_deep",
    /// Half of a surrogate pair: `\ud800` without its other half.
    LoneSurrogate = "lone_surrogate",
    /// A number that does not fit into 64 bits.
    NumberOutOfRange = "number_out_of_range",
    /// One of the known fields occurs twice.
    DuplicateKey = "duplicate_key",
    /// A publish acknowledgement of JetStream, which a forged reply subject directed here.
    PublishAck = "publish_ack",
    /// There is no `text`.
    MissingText = "missing_text",
    /// There is no `user`, or an empty one.
    MissingUser = "missing_user",
    /// A known field has a value of another type.
    WrongType = "wrong_type",
    /// The text contains U+0000, which PostgreSQL cannot store.
    NulInText = "nul_in_text",
    /// The user contains U+0000.
    NulInUser = "nul_in_user",
    /// The id contains U+0000.
    NulInId = "nul_in_id",
    /// The text is longer than the limit.
    TextTooLong = "text_too_long",
    /// The user is longer than 255 bytes.
    UserTooLong = "user_too_long",
    /// The id is longer than 128 bytes.
    IdTooLong = "id_too_long",
    /// A message on `change.>` that is no valid deletion.
    MalformedChange = "malformed_change",
    /// Another message is stored under this sequence: the stream was recreated without the sequence
    /// guard.
    SequenceReused = "sequence_reused",
    /// The sender used this id before, for another text or in another room. The first one is
    /// stored.
    IdConflict = "id_conflict",
    /// PostgreSQL refused this row; the detail has the SQLSTATE.
    RefusedByDatabase = "refused_by_database",
    /// Salvaged from a stream below the sequence guard; it will be appended again above it.
    BelowFence = "below_fence",
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
