//! Ids that lines bring along: one names one message of its user, in all rooms. Two lines of a run are told apart before anything is
//! published; what was said under an id before this run shows afterwards, in the rooms' history.

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use async_nats::{Client, Message};
use serde::Deserialize;
use serde_json::json;
use tokio::time::{sleep, timeout};

use crate::line::{Hash, OwnId};
use base::seq::Seq;

/// Messages a page of history may have.
const PAGE: usize = 500;
const ANSWER: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(500);
/// A service that is busy, or just being started, answers by then.
const ATTEMPTS: u32 = 5;

/// Every id of this run, and what it names: some fifty bytes each.
#[derive(Debug, Default)]
pub struct Ids {
    given: HashMap<Hash, Given>,
    rooms: BTreeSet<String>,
}

#[derive(Debug)]
struct Given {
    content: Hash,
    input: u32,
    line: u64,
}

/// The part of a message of history that matters here.
#[derive(Deserialize)]
struct Shown {
    seq: Seq,
    id: String,
    user: String,
    text: String,
    #[serde(default)]
    deleted: bool,
}

impl Ids {
    /// Remembers a line's id; the input and the line that have it for something else.
    ///
    /// # Errors
    /// Where the other one stands.
    pub fn give(&mut self, room: &str, id: OwnId, input: u32, line: u64) -> Result<(), (u32, u64)> {
        match self.given.entry(id.key) {
            Entry::Occupied(other) if other.get().content != id.content => {
                return Err((other.get().input, other.get().line));
            }
            Entry::Occupied(_) => {}
            Entry::Vacant(free) => {
                _ = free.insert(Given {
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
        self.given.len()
    }

    /// Reads the rooms' history, and returns input and line of every id under which it has another message, or none: those
    /// messages are dead letters.
    ///
    /// # Errors
    /// Why history could not be read.
    pub async fn conflicts(mut self, client: &Client) -> Result<Vec<(u32, u64)>, String> {
        for room in std::mem::take(&mut self.rooms) {
            let mut after = Seq::ZERO;
            loop {
                let (messages, more) = page(client, &room, after).await?;
                for shown in &messages {
                    let id = OwnId::new(&room, &shown.user, &shown.id, &shown.text);
                    // Of a deleted message nobody knows the text: whatever is sent under its id is a resend.
                    if self
                        .given
                        .get(&id.key)
                        .is_some_and(|given| shown.deleted || given.content == id.content)
                    {
                        self.given.remove(&id.key);
                    }
                }
                match messages.last() {
                    Some(last) if more && !self.given.is_empty() => after = last.seq,
                    _ => break,
                }
            }
        }
        let mut left: Vec<(u32, u64)> = self
            .given
            .values()
            .map(|given| (given.input, given.line))
            .collect();
        left.sort_unstable();
        Ok(left)
    }
}

/// The messages after `after`, and whether there are more.
async fn page(client: &Client, room: &str, after: Seq) -> Result<(Vec<Shown>, bool), String> {
    let mut why = String::new();
    for _ in 0..ATTEMPTS {
        let request = json!({"after": after, "limit": PAGE}).to_string();
        match timeout(
            ANSWER,
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

fn read(reply: &Message) -> Option<(Vec<Shown>, bool)> {
    let more = reply
        .headers
        .as_ref()?
        .get(protocol::header::MORE)?
        .as_str()
        == "true";
    Some((serde_json::from_slice(&reply.payload).ok()?, more))
}
