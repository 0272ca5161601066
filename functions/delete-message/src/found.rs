//! A message that is to be deleted.

use protocol::change::Mode;
use protocol::message::Message;

/// How far a message is deleted already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    /// It is there.
    There,
    /// It has a tombstone.
    Soft,
    /// Its text is erased.
    Hard,
}

impl State {
    /// What a deletion of this mode makes of a message.
    pub fn of(mode: Mode) -> State {
        match mode {
            Mode::Soft => State::Soft,
            Mode::Hard => State::Hard,
        }
    }
}

/// The message that is meant.
#[derive(Debug, Clone)]
pub struct Found {
    /// As shown, its text aside.
    pub message: Message,
    /// The id was made from the position.
    pub derived: bool,
    /// When the log received it, in Unix milliseconds.
    pub received_ms: i64,
    /// How far it is deleted already.
    pub state: State,
}
