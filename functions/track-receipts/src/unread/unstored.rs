//! What a user has not read above `stored_through`: the rows there, merged with the stream.

use std::collections::{BTreeSet, HashMap};

use sqlx::Row as _;
use sqlx::postgres::PgConnection;

use super::Question;
use base::seq::Seq;
use protocol::message::Message;
use timeline::cursors::read_in;
use timeline::cutoffs::Cutoffs;
use timeline::dedup::Key;
use timeline::merge::Merge;
use timeline::query::message;

/// The stored messages above `$1` that are direct messages to `$2` or stand in one of the rooms
/// `$3`: not more than workers may hold unacknowledged. Because of the upper bound PostgreSQL
/// expects a small part of the table and not a third of it. Because of the subqueries, which are no
/// joins, it reads a range of an index and not all rooms.
pub const ABOVE: &str = "
    select seq, (select name from rooms where rooms.id = room_id) as room,
           sender, recipient, id, '' as text, sent_at, deleted
      from messages
     where seq > $1 and seq <= 9223372036854775807
       and (recipient = $2
            or room_id = any(array(select rooms.id from rooms where name = any($3))))
       and received_at > (select cutoff(name) from rooms where rooms.id = room_id)";

impl Question<'_> {
    /// The unread messages above `stored_through`: their conversations and positions.
    pub(super) async fn list_unstored(
        &self,
        connection: &mut PgConnection,
        stored: HashMap<Key, Seq>,
    ) -> Result<Vec<(String, Seq)>, sqlx::Error> {
        let rows = self.load_above(connection).await?;
        let in_stream: BTreeSet<&str> = self
            .tail
            .messages
            .iter()
            .map(|message| message.room.as_str())
            .collect();
        let in_stream: Vec<&str> = in_stream.into_iter().collect();
        let cutoffs = Cutoffs::load(connection, &in_stream).await?;
        let tails = std::slice::from_ref(&self.tail);
        let merge = Merge::new(stored, self.changes.clone(), cutoffs, tails);
        let above = self.stored_through.next()..=Seq::MAX;
        let no_tombstones = Seq::MAX..=Seq::ZERO;
        let merged = merge.range(rows, &self.tail, &above, &no_tombstones);
        let others: Vec<Message> = merged
            .messages
            .into_values()
            .filter(|message| !message.deleted && message.user != self.user.as_str())
            .collect();
        let read = self.load_read_cursors(connection, &others).await?;
        let is_unread =
            |message: &Message| message.seq > read.get(&message.room).copied().unwrap_or_default();
        Ok(others
            .into_iter()
            .filter(is_unread)
            .map(|message| (message.room, message.seq))
            .collect())
    }

    async fn load_above(&self, connection: &mut PgConnection) -> Result<Vec<Message>, sqlx::Error> {
        let rooms: Vec<&str> = self
            .room_cursors
            .iter()
            .map(|(room, _)| room.as_str())
            .collect();
        let rows = sqlx::query(ABOVE)
            .bind(self.stored_through.as_i64())
            .bind(self.user.as_str())
            .bind(rooms)
            .fetch_all(connection)
            .await?;
        rows.iter()
            .map(|row| message(row, row.try_get("room")?))
            .collect()
    }

    /// Those of rooms, which are known already, and those of the direct messages' conversations.
    async fn load_read_cursors(
        &self,
        connection: &mut PgConnection,
        messages: &[Message],
    ) -> Result<HashMap<String, Seq>, sqlx::Error> {
        let direct: Vec<&str> = messages
            .iter()
            .filter(|message| message.to.is_some())
            .map(|message| message.room.as_str())
            .collect();
        let mut read = read_in(connection, self.user.as_str(), &direct).await?;
        read.extend(self.room_cursors.iter().cloned());
        Ok(read)
    }
}
