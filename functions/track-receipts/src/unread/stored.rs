//! What a user has not read up to `stored_through`, counted by PostgreSQL.

use std::collections::HashMap;

use sqlx::postgres::PgConnection;

use super::{CONSIDERED, Count, Counts, LISTED, MOST, Question, rooms};
use base::seq::Seq;
use protocol::conversation::Conversation;

/// Direct conversations with something unread, found by going from one to the next in the index;
/// that ends after `$5` of them. Ranges are bounds of rows and not equalities: then only one index
/// has the order that is asked for. The user's own messages and tombstones are not in that index,
/// and expired messages that are not deleted yet lie at its end. So PostgreSQL considers only
/// messages that count, apart from those that were deleted a moment ago.
const DIRECT: &str = include_str!("direct.sql");

/// How many conversations were considered; and, if there is one, a conversation: its name, its
/// newest position, and its count.
type DirectRow = (i64, Option<String>, i64, i64);

impl Question<'_> {
    /// Without the positions `deleted`.
    pub(super) async fn count_stored(
        &self,
        connection: &mut PgConnection,
        deleted: &[i64],
    ) -> Result<Counts, sqlx::Error> {
        let user = self.user.as_str();
        // Messages to oneself are not unread.
        let own = Conversation::direct(self.user.clone(), self.user.clone()).name();
        let direct: Vec<DirectRow> = sqlx::query_as(DIRECT)
            .bind(user)
            .bind(self.stored_through.as_i64())
            .bind(deleted)
            .bind(MOST)
            .bind(CONSIDERED)
            .bind(LISTED as i64 + 1)
            .bind(own)
            .fetch_all(&mut *connection)
            .await?;
        let is_cut = direct.iter().any(|row| row.0 > CONSIDERED);
        let direct = direct.into_iter().filter_map(|(_, name, newest, some)| {
            let count = Count {
                count: some.unsigned_abs(),
                more: false,
                newest: Seq::from_i64(newest),
            };
            Some((name?, count))
        });
        let mut conversations: HashMap<String, Count> = direct.collect();
        let rooms = rooms::count(
            connection,
            user,
            self.room_cursors,
            self.stored_through,
            deleted,
            MOST,
        )
        .await?;
        conversations.extend(rooms.into_iter().map(|room| {
            let count = Count {
                count: room.count.unsigned_abs(),
                more: room.is_cut(),
                newest: room.newest,
            };
            (room.room.to_owned(), count)
        }));
        Ok(Counts {
            conversations,
            is_cut,
        })
    }
}
