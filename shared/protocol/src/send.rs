//! `chat.send.{user}.{room}`, `dm.send.{user}.{peer}`: one message, acknowledged when the stream
//! has it.

use serde::{Deserialize, Serialize};

use crate::endpoints;
use crate::message::{Fields, MAX_ID_BYTES, Scalar};
use crate::name::{Room, User, split_names};
use crate::reason::Reason;
use base::endpoint::ParseRequest;
use base::error::Refusal;
use base::seq::Seq;

/// One message to a [`Room`] or to another [`User`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SendRequest<To> {
    /// The sender, from the subject, where permissions pin that token. A `user` in the body is
    /// ignored.
    pub user: User,
    /// The room or the recipient, from the subject.
    pub to: To,
    /// The message, from the body.
    pub draft: Draft,
}

/// The body of a [`SendRequest`]: `{"text", "id"?, "timestamp"?}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Draft {
    /// The text, without U+0000. The function checks its length.
    pub text: String,
    /// The client-supplied id: 1 to [`MAX_ID_BYTES`] bytes without U+0000.
    pub id: Option<String>,
    /// The client's time, in Unix milliseconds.
    pub timestamp: Option<i64>,
}

impl ParseRequest for SendRequest<Room> {
    fn parse(names: &str, body: &[u8]) -> Result<Self, Refusal> {
        let (user, room) = split_names(names, &endpoints::SEND.template)?;
        let user = User::parse(user)?;
        let to = Room::parse(room)?;
        if to.as_str() == Room::ADMIN {
            return Err(Refusal::forbidden(
                "the room __admin__ takes messages from trusted publishers only",
            ));
        }
        Ok(SendRequest {
            user,
            to,
            draft: Draft::parse(body)?,
        })
    }
}

impl ParseRequest for SendRequest<User> {
    fn parse(names: &str, body: &[u8]) -> Result<Self, Refusal> {
        let (user, peer) = split_names(names, &endpoints::DM_SEND.template)?;
        Ok(SendRequest {
            user: User::parse(user)?,
            to: User::parse(peer)?,
            draft: Draft::parse(body)?,
        })
    }
}

impl Draft {
    fn parse(body: &[u8]) -> Result<Draft, Refusal> {
        let fields = Fields::parse(body).map_err(refusal)?;
        let text = match fields.text {
            Some(Scalar::Text(text)) if text.contains('\0') => {
                return Err(Refusal::bad_request(
                    "text must not contain U+0000: the database cannot store it",
                ));
            }
            Some(Scalar::Text(text)) => text,
            None | Some(Scalar::Null) => return Err(Refusal::bad_request("text is missing")),
            Some(_) => return Err(Refusal::bad_request("text must be a string")),
        };
        let id = match fields.id {
            None | Some(Scalar::Null) => None,
            Some(Scalar::Text(id))
                if !id.is_empty() && id.len() <= MAX_ID_BYTES && !id.contains('\0') =>
            {
                Some(id)
            }
            Some(_) => {
                return Err(Refusal::bad_request(format!(
                    "id must be a string of 1 to {MAX_ID_BYTES} bytes without U+0000; leave it out \
                     and one is generated"
                )));
            }
        };
        let timestamp = match fields.timestamp {
            None | Some(Scalar::Null) => None,
            Some(Scalar::Whole(ms)) => Some(ms),
            Some(_) => {
                return Err(Refusal::bad_request(
                    "timestamp must be a number of Unix milliseconds, or be left out",
                ));
            }
        };
        Ok(Draft {
            text,
            id,
            timestamp,
        })
    }
}

/// Why the body as a whole is refused.
fn refusal(reason: Reason) -> Refusal {
    Refusal::bad_request(match reason {
        Reason::DuplicateKey => "a field occurs twice in the body",
        Reason::TooDeep => "the body is nested too deeply",
        Reason::LoneSurrogate => {
            "the body contains half of a surrogate pair, which is no character"
        }
        Reason::NumberOutOfRange => "the body contains a number that is out of range",
        Reason::InvalidUtf8 => "the body must be UTF-8",
        _ => r#"the body must be a JSON object such as {"text":"hello","id":"a-1"}"#,
    })
}

/// The stream has the message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "ack", tag = "type", rename_all = "camelCase")]
pub struct SendAck {
    /// The client-supplied id, or the generated one.
    pub message_id: String,
    /// Its position. For a message that was sent before, the position it got then.
    pub seq: Seq,
    /// Its status.
    pub status: SentStatus,
    /// The same message was sent before.
    pub duplicate: bool,
}

/// The status of a message that was just sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SentStatus {
    /// The stream has it.
    Sent,
}

#[cfg(test)]
mod tests {
    use super::*;
    use base::error::Code;

    fn room(names: &str, body: &str) -> Result<SendRequest<Room>, Refusal> {
        SendRequest::<Room>::parse(names, body.as_bytes())
    }

    #[test]
    fn the_subject_names_the_sender() {
        let request = room(
            "ann.general",
            r#"{"text":"hi","user":"mallory","id":"a","timestamp":5,"room":7,"more":[1]}"#,
        )
        .unwrap();
        assert_eq!(
            (request.user.as_str(), request.to.as_str()),
            ("ann", "general")
        );
        assert_eq!(
            request.draft,
            Draft {
                text: "hi".to_owned(),
                id: Some("a".to_owned()),
                timestamp: Some(5)
            }
        );
        let request =
            SendRequest::<User>::parse("ann.bob", br#"{"text":"","id":null,"timestamp":null}"#)
                .unwrap();
        assert_eq!(
            (
                request.to.as_str(),
                request.draft.id,
                request.draft.timestamp
            ),
            ("bob", None, None)
        );
    }

    #[test]
    fn a_wrong_name_is_refused() {
        for names in [
            "",
            "ann",
            "ann.",
            ".general",
            "ann.general.x",
            "a b.general",
            "ann.*",
            ">.general",
        ] {
            assert_eq!(
                room(names, r#"{"text":"x"}"#).unwrap_err().code,
                Code::BadRequest,
                "{names}"
            );
            assert_eq!(
                SendRequest::<User>::parse(names, br#"{"text":"x"}"#)
                    .unwrap_err()
                    .code,
                Code::BadRequest,
                "{names}"
            );
        }
        assert_eq!(
            room("ann.__admin__", r#"{"text":"x"}"#).unwrap_err().code,
            Code::Forbidden
        );
    }

    #[test]
    fn a_refusal_says_what_to_correct() {
        let id_of = |bytes| format!(r#"{{"text":"","id":"{}"}}"#, "i".repeat(bytes));
        let at_the_limit = id_of(128);
        let too_long = id_of(129);
        room("ann.general", &at_the_limit).unwrap();
        for (body, hint) in [
            ("", "a JSON object"),
            ("hello", "a JSON object"),
            (r#"["text"]"#, "a JSON object"),
            ("{}", "text is missing"),
            (r#"{"text":null}"#, "text is missing"),
            (r#"{"text":5}"#, "text must be a string"),
            (r#"{"text":{}}"#, "text must be a string"),
            (r#"{"text":"a\u0000b"}"#, "U+0000"),
            (r#"{"text":"a","text":"b"}"#, "twice"),
            (r#"{"text":"\ud800"}"#, "surrogate"),
            (r#"{"text":"a","id":""}"#, "id must be"),
            (r#"{"text":"a","id":7}"#, "id must be"),
            (r#"{"text":"a","id":"\u0000"}"#, "id must be"),
            (&too_long, "id must be"),
            (r#"{"text":"a","timestamp":"now"}"#, "timestamp must be"),
            (r#"{"text":"a","timestamp":true}"#, "timestamp must be"),
            (
                r#"{"text":"a","timestamp":99999999999999999999}"#,
                "timestamp must be",
            ),
            (r#"{"text":"a","timestamp":1e999}"#, "out of range"),
        ] {
            let refusal = room("ann.general", body).unwrap_err();
            assert_eq!(refusal.code, Code::BadRequest, "{body}");
            assert!(refusal.reason.contains(hint), "{body}: {}", refusal.reason);
        }
        assert!(
            SendRequest::<Room>::parse("ann.general", b"{\"text\":\"\xff\"}")
                .unwrap_err()
                .reason
                .contains("UTF-8")
        );
    }

    #[test]
    fn an_acknowledgement_has_the_form_of_the_contract() {
        let ack = SendAck {
            message_id: "a".to_owned(),
            seq: Seq::ZERO.next(),
            status: SentStatus::Sent,
            duplicate: false,
        };
        let text = r#"{"type":"ack","messageId":"a","seq":1,"status":"sent","duplicate":false}"#;
        assert_eq!(serde_json::to_string(&ack).unwrap(), text);
        assert_eq!(serde_json::from_str::<SendAck>(text).unwrap(), ack);
    }
}
