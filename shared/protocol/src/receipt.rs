//! The inbox, the delivered and read cursors of users, and how much they have not read:
//! `chat.inbox.{user}`, `chat.delivered.{user}`, `chat.read.{user}.{room}`,
//! `dm.read.{user}.{peer}`, `chat.unread.{user}`.

use serde::{Deserialize, Serialize};

use crate::body;
use crate::conversation::{Conversation, Direct, user_and_peer, user_and_room};
use crate::endpoints;
use crate::message::{Message, Status};
use crate::name::User;
use base::endpoint::ParseRequest;
use base::error::Refusal;
use base::seq::Seq;

const DEFAULT_INBOX: u32 = 100;
const EXAMPLE: &str = r#"{"through":1234}"#;

/// Direct messages that wait for a user: `{"limit"?: 1..500 (100)}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InboxRequest {
    /// Whose, from the subject.
    pub user: User,
    /// The most messages and changes together.
    pub limit: u32,
}

impl ParseRequest for InboxRequest {
    fn parse(names: &str, body: &[u8]) -> Result<Self, Refusal> {
        let user = User::parse(names)?;
        let body = body::object(body, r#"{"limit":100}, or empty"#)?;
        Ok(InboxRequest {
            user,
            limit: body::limit(&body, DEFAULT_INBOX)?,
        })
    }
}

/// A user's client has every direct message up to here: `{"through": seq}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeliveredRequest {
    /// Whose, from the subject.
    pub user: User,
    /// Up to where.
    pub through: Seq,
}

impl ParseRequest for DeliveredRequest {
    fn parse(names: &str, body: &[u8]) -> Result<Self, Refusal> {
        Ok(DeliveredRequest {
            user: User::parse(names)?,
            through: through(body)?,
        })
    }
}

/// A user has read a conversation up to here: `{"through": seq}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadRequest {
    /// Who, from the subject.
    pub user: User,
    /// From the subject.
    pub conversation: Conversation,
    /// Up to where.
    pub through: Seq,
}

impl ParseRequest for ReadRequest {
    fn parse(names: &str, body: &[u8]) -> Result<Self, Refusal> {
        let (user, conversation) = user_and_room(names, &endpoints::READ.template)?;
        Ok(ReadRequest {
            user,
            conversation,
            through: through(body)?,
        })
    }
}

impl ParseRequest for Direct<ReadRequest> {
    fn parse(names: &str, body: &[u8]) -> Result<Self, Refusal> {
        let (user, conversation) = user_and_peer(names, &endpoints::DM_READ.template)?;
        Ok(Direct(ReadRequest {
            user,
            conversation,
            through: through(body)?,
        }))
    }
}

fn through(body: &[u8]) -> Result<Seq, Refusal> {
    let body = body::object(body, EXAMPLE)?;
    body::sequence(&body, "through")?
        .ok_or_else(|| Refusal::bad_request("through is missing: the seq up to which it is so"))
}

/// Where a cursor is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceiptAck {
    /// The cursor.
    pub through: Seq,
    /// Whether this request moved it.
    pub moved: bool,
}

/// How much a user has not read. The request has no fields.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnreadRequest {
    /// Whose, from the subject.
    pub user: User,
}

impl ParseRequest for UnreadRequest {
    fn parse(names: &str, body: &[u8]) -> Result<Self, Refusal> {
        let user = User::parse(names)?;
        body::object(body, "{}, or empty").map(|_| UnreadRequest { user })
    }
}

/// What a user has not read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unread {
    /// The conversations with unread messages, the one with the newest message first.
    pub unread: Vec<UnreadRoom>,
    /// The sum of their counts.
    pub total: u64,
    /// There are more than `total`: in a conversation whose own `more` is set, or in one that is
    /// not listed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub more: bool,
}

/// What a user has not read of one conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnreadRoom {
    /// `general`, `dm.alice.bob`.
    pub room: String,
    /// Messages of others after the read cursor, without tombstones.
    pub count: u64,
    /// There may be more than `count`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub more: bool,
}

/// The cursors of a user in a conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cursors {
    /// Every direct message up to here is confirmed.
    pub delivered: Seq,
    /// Every message up to here is read.
    pub read: Seq,
}

impl Cursors {
    /// The status of the message at `seq`. A message that was read counts as delivered.
    pub fn status(self, seq: Seq) -> Status {
        if seq <= self.read {
            Status::Read
        } else if seq <= self.delivered {
            Status::Delivered
        } else {
            Status::Sent
        }
    }

    /// Sets the status of a direct message by the cursors of its recipient, which `of` looks up.
    /// Other messages have no status.
    pub fn set_status(message: &mut Message, of: impl FnOnce(&str) -> Cursors) {
        if let Some(to) = &message.to {
            message.status = Some(of(to).status(message.seq));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_is_a_sequence() {
        let parse = |body: &str| {
            DeliveredRequest::parse("bob", body.as_bytes()).map(|request| request.through)
        };
        assert_eq!(
            parse(r#"{"through":7,"unknown":1}"#),
            Ok(Seq::new(7).unwrap())
        );
        for (body, hint) in [
            ("", "through is missing"),
            ("{}", "through is missing"),
            (r#"{"through":null}"#, "through is missing"),
            (r#"{"through":-1}"#, "through must be"),
            (r#"{"through":"7"}"#, "through must be"),
            (r#"{"through":1.5}"#, "through must be"),
            (r#"{"through":9223372036854775808}"#, "through must be"),
            ("[7]", "a JSON object"),
            ("seven", "a JSON object"),
        ] {
            let refusal = parse(body).unwrap_err();
            assert!(
                refusal.code.number() == 400 && refusal.reason.contains(hint),
                "{body}: {}",
                refusal.reason
            );
            assert_eq!(
                ReadRequest::parse("bob.general", body.as_bytes()).unwrap_err(),
                refusal,
                "{body}"
            );
            assert_eq!(
                Direct::<ReadRequest>::parse("bob.ann", body.as_bytes()).unwrap_err(),
                refusal,
                "{body}"
            );
        }
    }

    #[test]
    fn a_subject_names_its_user_and_nobody_else() {
        let through = br#"{"through":1}"#;
        let Direct(read) = Direct::<ReadRequest>::parse("bob.ann", through).unwrap();
        assert_eq!(
            (read.user.as_str(), read.conversation.name().as_str()),
            ("bob", "dm.ann.bob")
        );
        for names in [
            "",
            "bob.",
            ".general",
            "bob.dm.ann",
            "bob.a.b",
            "*.general",
            "bob.>",
            "b b.general",
            "bob.ann.carol",
        ] {
            assert!(ReadRequest::parse(names, through).is_err(), "{names}");
            assert!(
                Direct::<ReadRequest>::parse(names, through).is_err(),
                "{names}"
            );
        }
        for names in ["", "bob.ann", "*", ">", "b b"] {
            assert!(DeliveredRequest::parse(names, through).is_err(), "{names}");
            assert!(InboxRequest::parse(names, b"").is_err(), "{names}");
            assert!(UnreadRequest::parse(names, b"").is_err(), "{names}");
        }
    }

    #[test]
    fn an_inbox_has_a_limit() {
        let parse = |body: &str| InboxRequest::parse("bob", body.as_bytes());
        assert_eq!(parse("").unwrap().limit, 100);
        assert_eq!(parse(r#"{"limit":500}"#).unwrap().limit, 500);
        for body in [
            r#"{"limit":0}"#,
            r#"{"limit":501}"#,
            r#"{"limit":"5"}"#,
            "[5]",
            "five",
        ] {
            assert_eq!(parse(body).unwrap_err().code.number(), 400, "{body}");
        }
        assert_eq!(
            UnreadRequest::parse("bob", b"[]")
                .unwrap_err()
                .code
                .number(),
            400
        );
    }

    #[test]
    fn a_message_that_was_read_is_delivered() {
        let seq = |seq| Seq::new(seq).unwrap();
        let cursors = Cursors {
            delivered: seq(2),
            read: seq(4),
        };
        let status = [1, 2, 3, 4, 5].map(|at| cursors.status(seq(at)));
        assert_eq!(
            status,
            [
                Status::Read,
                Status::Read,
                Status::Read,
                Status::Read,
                Status::Sent
            ]
        );
        let cursors = Cursors {
            delivered: seq(4),
            read: seq(2),
        };
        assert_eq!(
            [2, 3, 4, 5].map(|at| cursors.status(seq(at))),
            [
                Status::Read,
                Status::Delivered,
                Status::Delivered,
                Status::Sent
            ]
        );
    }
}
