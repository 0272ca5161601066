//! What the stream has and PostgreSQL may not have yet, of one conversation or of several.

use crate::changes::changes_on;
use crate::chat::Chat;
use crate::frontier::Frontier;
use crate::merge::Direction;
use crate::tail::Tails;
use base::seq::Seq;
use jetstream::stream::{Limit, StreamError};
use protocol::change::Change;

/// What is read of the stream for a page.
#[derive(Debug, Clone, Copy)]
pub struct Scope<'a> {
    /// The subjects of the messages.
    pub subjects: &'a [String],
    /// The subjects of their deletions.
    pub change_subjects: &'a [String],
    /// The directions of the page.
    pub directions: &'a [Direction],
    /// As many messages the page needs.
    pub need: Limit,
}

/// What the stream has above `frontier.stored_through`.
#[derive(Debug)]
pub struct Unstored {
    /// Where the stream stood before the rest was read.
    pub frontier: Frontier,
    /// Messages in the page's directions.
    pub tails: Tails,
    /// Every deletion, because it may concern any message.
    pub changes: Vec<Change>,
}

impl Unstored {
    /// Reads the messages above the frontier, and then the deletions.
    ///
    /// # Errors
    /// The stream does not answer, or has too many deletions.
    pub async fn read(
        chat: &Chat,
        frontier: Frontier,
        scope: Scope<'_>,
    ) -> Result<Unstored, StreamError> {
        let tails = Tails::read(
            chat.stream(),
            scope.subjects,
            frontier,
            scope.directions,
            scope.need,
            chat.limits(),
        )
        .await?;
        // After the messages: otherwise a text could be read whose deletion was not there yet.
        let changes = if frontier.is_all_stored() {
            Vec::new()
        } else {
            let from = frontier.first_unstored();
            changes_on(chat.stream(), scope.change_subjects, from, scope.need.until).await?
        };
        Ok(Unstored {
            frontier,
            tails,
            changes,
        })
    }
}

/// What the stream alone has, read while PostgreSQL is away. A deletion stands behind its message,
/// so as long as the stream has the message, it has the deletion.
#[derive(Debug)]
pub struct StreamAlone {
    /// Everything that the stream holds, as if nothing were stored.
    pub unstored: Unstored,
    /// The first sequence of the stream after everything was read. What was read below it is not
    /// all there was.
    pub first: Seq,
}

impl StreamAlone {
    /// Reads what the stream holds.
    ///
    /// # Errors
    /// As [`Unstored::read`].
    pub async fn read(chat: &Chat, scope: Scope<'_>) -> Result<StreamAlone, StreamError> {
        let frontier = Frontier::of_stream_alone(chat.stream()).await?;
        let unstored = Unstored::read(chat, frontier, scope).await?;
        let (first, _) = chat.stream().range().await?;
        Ok(StreamAlone { unstored, first })
    }

    /// Older messages were trimmed from the stream.
    pub fn is_trimmed(&self) -> bool {
        self.first > Seq::ZERO.next()
    }

    /// Whether the stream has everything after this sequence.
    pub fn has_all_after(&self, after: Seq) -> bool {
        !self.is_trimmed() || after.next() >= self.first
    }
}
