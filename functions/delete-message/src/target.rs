//! The message that a request deletes.

use protocol::change::Mode;
use protocol::message::Message;

/// How far a message is deleted already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum DeletionState {
    /// Not at all.
    Present,
    /// It has a tombstone.
    Soft,
    /// Its text is erased.
    Hard,
}

impl DeletionState {
    /// The state after a deletion of this mode.
    pub fn of(mode: Mode) -> DeletionState {
        match mode {
            Mode::Soft => DeletionState::Soft,
            Mode::Hard => DeletionState::Hard,
        }
    }
}

/// The message that a request deletes.
#[derive(Debug, Clone)]
pub struct Target {
    /// As shown, perhaps without its text.
    pub message: Message,
    /// The id is derived from the sequence.
    pub derived: bool,
    /// When the stream received it, in Unix milliseconds.
    pub received_ms: i64,
    /// How far it is deleted already.
    pub state: DeletionState,
}
