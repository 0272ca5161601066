//! Client-supplied ids. One names one message of its user, in all rooms. Two lines of a run are
//! compared before anything is published; what was sent under an id before this run is found
//! afterwards, in the rooms' history.

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use async_nats::{Client, Message};
use serde::Deserialize;
use serde_json::json;
use tokio::time::{sleep, timeout};

use crate::line::{Hash, OwnId};
use base::seq::Seq;

/// Messages in a page of history.
const PAGE: usize = 500;
const REPLY_TIMEOUT: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(500);
/// Enough for a get-history that is busy or just starting.
const ATTEMPTS: u32 = 5;

/// Every client-supplied id of this run and its first use, about 50 bytes each.
#[derive(Debug, Default)]
pub struct Ids {
    uses: HashMap<Hash, Use>,
    rooms: BTreeSet<String>,
}

#[derive(Debug)]
struct Use {
    content: Hash,
    input: u32,
    line: u64,
}

/// The fields of a message of history that are compared.
#[derive(Deserialize)]
struct Stored {
    seq: Seq,
    id: String,
    user: String,
    text: String,
    #[serde(default)]
    deleted: bool,
}

impl Ids {
    /// Remembers a line's id.
    ///
    /// # Errors
    /// Input and line that use the id for another text or room.
    pub fn insert(
        &mut self,
        room: &str,
        id: OwnId,
        input: u32,
        line: u64,
    ) -> Result<(), (u32, u64)> {
        match self.uses.entry(id.key) {
            Entry::Occupied(other) if other.get().content != id.content => {
                return Err((other.get().input, other.get().line));
            }
            Entry::Occupied(_) => {}
            Entry::Vacant(free) => {
                _ = free.insert(Use {
                    content: id.content,
                    input,
                    line,
                })
            }
        }
        if !self.rooms.contains(room) {
            self.rooms.insert(room.to_owned());
        }
        Ok(())
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.uses.len()
    }

    /// Reads the rooms' history and returns input and line of every id under which it has another
    /// message or none: those messages are dead letters.
    ///
    /// # Errors
    /// Why history could not be read.
    pub async fn conflicts(mut self, client: &Client) -> Result<Vec<(u32, u64)>, String> {
        for room in std::mem::take(&mut self.rooms) {
            let mut after = Seq::ZERO;
            loop {
                let (messages, more) = page(client, &room, after).await?;
                for stored in &messages {
                    let id = OwnId::new(&room, &stored.user, &stored.id, &stored.text);
                    // The text of a deleted message is gone, so anything sent under its id counts
                    // as a resend.
                    if self
                        .uses
                        .get(&id.key)
                        .is_some_and(|uses| stored.deleted || uses.content == id.content)
                    {
                        self.uses.remove(&id.key);
                    }
                }
                match messages.last() {
                    Some(last) if more && !self.uses.is_empty() => after = last.seq,
                    _ => break,
                }
            }
        }
        let mut left: Vec<(u32, u64)> = self
            .uses
            .values()
            .map(|uses| (uses.input, uses.line))
            .collect();
        left.sort_unstable();
        Ok(left)
    }
}

/// The messages after `after`, and whether there are more.
async fn page(client: &Client, room: &str, after: Seq) -> Result<(Vec<Stored>, bool), String> {
    let mut why = String::new();
    for _ in 0..ATTEMPTS {
        let request = json!({"after": after, "limit": PAGE}).to_string();
        match timeout(
            REPLY_TIMEOUT,
            client.request(format!("chat.history.{room}"), request.into()),
        )
        .await
        {
            Ok(Ok(reply)) => match read(&reply) {
                Some(page) => return Ok(page),
                None => {
                    why = String::from_utf8_lossy(&reply.payload)
                        .chars()
                        .take(200)
                        .collect()
                }
            },
            Ok(Err(error)) => why = error.to_string(),
            Err(_) => why = "get-history does not answer".to_owned(),
        }
        sleep(PAUSE).await;
    }
    Err(why)
}

fn read(reply: &Message) -> Option<(Vec<Stored>, bool)> {
    let more = reply
        .headers
        .as_ref()?
        .get(protocol::header::MORE)?
        .as_str()
        == "true";
    Some((serde_json::from_slice(&reply.payload).ok()?, more))
}
