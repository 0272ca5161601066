//! Messages as publishers send them, good and bad.

use super::*;

const RECEIVED: i64 = 1_700_000_000_000;

fn parse_as(subject: &str, header: Option<&str>, payload: &[u8]) -> Result<Incoming, Reason> {
    Incoming::parse(
        subject,
        header,
        payload,
        Seq::new(7).unwrap(),
        RECEIVED,
        Limits::default(),
    )
}

fn parse(payload: &str) -> Result<Incoming, Reason> {
    parse_as("chat.general", None, payload.as_bytes())
}

#[test]
fn a_message_is_parsed() {
    let body = concat!(
        r#"{"user":"ann","text":"hi","timestamp":1600000000000,"#,
        r#""room":"general","id":"a1","more":{"x":[1]}}"#
    );
    let message = parse(body).unwrap();
    assert!(!message.mismatched);
    assert_eq!(message.timestamp, 1_600_000_000_000);
    assert_eq!(
        serde_json::to_string(&message.into_message()).unwrap(),
        concat!(
            r#"{"id":"a1","seq":7,"room":"general","user":"ann","#,
            r#""text":"hi","timestamp":1600000000000}"#
        )
    );
}

#[test]
fn the_subject_beats_the_body() {
    assert!(
        !parse(r#"{"user":"a","text":"","room":"chat.general"}"#)
            .unwrap()
            .mismatched
    );
    assert!(
        parse(r#"{"user":"a","text":"","room":"other"}"#)
            .unwrap()
            .mismatched
    );
    assert!(
        parse(r#"{"user":"a","text":"","room":5}"#)
            .unwrap()
            .mismatched
    );
    let direct = parse_as("dm.bob.alice", None, br#"{"user":"mallory","text":"x"}"#).unwrap();
    assert_eq!(
        (
            direct.user.as_str(),
            direct.to.as_deref(),
            direct.room.as_str()
        ),
        ("bob", Some("alice"), "dm.alice.bob")
    );
    assert!(direct.mismatched);
}

#[test]
fn an_implausible_timestamp_becomes_that_of_the_stream() {
    for claimed in [
        "null",
        "0",
        "-5",
        "631151999999",
        "1700086400001",
        "9000000000000000000",
    ] {
        let message = parse(&format!(
            r#"{{"user":"a","text":"x","timestamp":{claimed}}}"#
        ))
        .unwrap();
        assert_eq!(message.timestamp, RECEIVED, "{claimed}");
    }
    assert_eq!(
        parse(r#"{"user":"a","text":"x","timestamp":1699999999999.7}"#)
            .unwrap()
            .timestamp,
        1_699_999_999_999
    );
}

#[test]
fn the_id_is_the_bodys_then_the_headers_then_derived() {
    let long = "h".repeat(129);
    let id = |header, body: &str| {
        parse_as("chat.general", header, body.as_bytes()).map(|message| message.shown_id())
    };
    assert_eq!(
        id(Some("h"), r#"{"user":"a","text":"x","id":"b"}"#),
        Ok("b".into())
    );
    assert_eq!(id(Some("h"), r#"{"user":"a","text":"x"}"#), Ok("h".into()));
    assert_eq!(
        id(Some("h"), r#"{"user":"a","text":"x","id":""}"#),
        Ok("h".into())
    );
    assert_eq!(id(None, r#"{"user":"a","text":"x"}"#), Ok("seq:7".into()));
    assert_eq!(
        id(Some(&long), r#"{"user":"a","text":"x"}"#),
        Err(Reason::IdTooLong)
    );
    assert_eq!(
        id(Some("\0"), r#"{"user":"a","text":"x"}"#),
        Err(Reason::NulInId)
    );
}

fn assert_reasons<'a>(cases: impl IntoIterator<Item = (&'a str, Reason)>) {
    for (payload, reason) in cases {
        let shown = &payload[..payload.len().min(80)];
        assert_eq!(parse(payload), Err(reason), "{shown}");
    }
}

#[test]
fn a_payload_that_is_no_object_has_its_own_reason() {
    let brackets = ["[".repeat(200), "]".repeat(200)].concat();
    let deep = format!(r#"{{"user":"a","text":"x","z":{brackets}}}"#);
    assert_reasons([
        ("hello", Reason::NotJson),
        (r#"{"user":"a","text":"x""#, Reason::NotJson),
        (r#"{"user":"a","text":"x"} {}"#, Reason::NotJson),
        ("", Reason::EmptyPayload),
        (r#"["a","b"]"#, Reason::NotAnObject),
        ("17", Reason::NotAnObject),
        ("null", Reason::NotAnObject),
        (r#""text""#, Reason::NotAnObject),
        (r#"{"user":"a","text":"\ud800"}"#, Reason::LoneSurrogate),
        (r#"{"user":"a","text":"\ud800x"}"#, Reason::LoneSurrogate),
        (
            r#"{"user":"a","text":"\ud800\ud800"}"#,
            Reason::LoneSurrogate,
        ),
        (r#"{"user":"a","text":"\udc00"}"#, Reason::LoneSurrogate),
        (
            r#"{"user":"a","text":"x","text":"y"}"#,
            Reason::DuplicateKey,
        ),
        (&deep, Reason::TooDeep),
    ]);
    assert_eq!(
        parse_as("chat.general", None, b"{\"user\":\"\xff\",\"text\":\"x\"}"),
        Err(Reason::InvalidUtf8)
    );
}

#[test]
fn each_wrong_field_has_its_own_reason() {
    assert_reasons([
        (r#"{"user":"a","text":"\u0000"}"#, Reason::NulInText),
        (r#"{"user":"\u0000","text":"x"}"#, Reason::NulInUser),
        (r#"{"user":"a","text":"x","id":"\u0000"}"#, Reason::NulInId),
        (r#"{"user":"a"}"#, Reason::MissingText),
        (r#"{"user":"a","text":null}"#, Reason::MissingText),
        (r#"{"text":"x"}"#, Reason::MissingUser),
        (r#"{"user":"","text":"x"}"#, Reason::MissingUser),
        (r#"{"user":1,"text":"x"}"#, Reason::WrongType),
        (r#"{"user":"a","text":["x"]}"#, Reason::WrongType),
        (
            r#"{"user":"a","text":"x","timestamp":"now"}"#,
            Reason::WrongType,
        ),
        (
            r#"{"user":"a","text":"x","timestamp":99999999999999999999}"#,
            Reason::NumberOutOfRange,
        ),
        (
            r#"{"user":"a","text":"x","timestamp":9223372036854775808}"#,
            Reason::NumberOutOfRange,
        ),
        (
            r#"{"user":"a","text":"x","timestamp":1e999}"#,
            Reason::NumberOutOfRange,
        ),
        (r#"{"stream":"CHAT_MESSAGES","seq":5}"#, Reason::PublishAck),
        (
            concat!(
                r#"{"stream":"CHAT_MESSAGES","domain":"hub","seq":5,"duplicate":true,"#,
                r#""user":"a","text":"x"}"#
            ),
            Reason::PublishAck,
        ),
    ]);
}

#[test]
fn each_limit_has_its_own_reason() {
    let text = |bytes| format!(r#"{{"user":"a","text":"{}"}}"#, "y".repeat(bytes));
    let user = |bytes| format!(r#"{{"user":"{}","text":"x"}}"#, "y".repeat(bytes));
    let id = |bytes| format!(r#"{{"user":"a","text":"x","id":"{}"}}"#, "y".repeat(bytes));
    let padding = "p".repeat(1 << 20);
    let payload = format!(r#"{{"user":"a","text":"x","pad":"{padding}"}}"#);
    assert_reasons([
        (text(64 * 1024 + 1).as_str(), Reason::TextTooLong),
        (&user(256), Reason::UserTooLong),
        (&id(129), Reason::IdTooLong),
        (&payload, Reason::PayloadTooLarge),
    ]);
    for at_the_limit in [text(64 * 1024), user(255), id(128)] {
        parse(&at_the_limit).unwrap();
    }
}
