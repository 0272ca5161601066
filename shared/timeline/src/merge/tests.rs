//! Single cases of the merge; `tests/model.rs` has all the others.

mod model;

use serde_json::json;

use super::*;
use crate::tail::SubjectRange;
use jetstream::stream::StreamMessage;
use protocol::message::Limits;

fn seq(number: u64) -> Seq {
    Seq::new(number).unwrap()
}

fn message(number: u64, id: &str, text: &str) -> Message {
    let message = json!({
        "id": id, "seq": number, "room": "general", "user": "ann", "text": text, "timestamp": 0,
    });
    serde_json::from_value(message).unwrap()
}

fn tombstone(number: u64, id: &str) -> Message {
    Message {
        deleted: true,
        ..message(number, id, "")
    }
}

fn deletion(target: u64, id: &str) -> Change {
    let body = json!({
        "type": "delete", "target": target, "id": id, "user": "ann",
        "derived": id.starts_with("seq:"), "timestamp": 0, "received": 0, "mode": "soft",
        "by": "ann",
    });
    Change::parse(
        "change.chat.general",
        body.to_string().as_bytes(),
        seq(100),
        0,
    )
    .unwrap()
}

/// A tail of these messages.
fn tail(messages: &[Message]) -> Tail {
    let stored = |message: &Message| StreamMessage {
        seq: message.seq,
        subject: format!("chat.{}", message.room),
        headers: None,
        payload: json!({"user": message.user, "text": message.text, "id": message.id})
            .to_string()
            .into(),
        received_ms: 0,
    };
    let range = SubjectRange {
        messages: messages.iter().map(stored).collect(),
        complete: true,
        from: Seq::ZERO,
    };
    Tail::of_oldest(vec![range], Seq::ZERO, Limits::default())
}

/// Position and text of each message shown up to 50, and whether the stream was needed.
fn merge(
    stored: &[(&str, u64)],
    changes: &[Change],
    rows: &[Message],
    messages: &[Message],
) -> (Vec<(u64, String)>, bool) {
    let stored = stored
        .iter()
        .map(|(id, at)| (("ann".to_owned(), (*id).to_owned()), seq(*at)))
        .collect();
    let all = Seq::ZERO..=seq(50);
    let tails = [tail(messages)];
    let merge = Merge::new(stored, changes.iter().collect(), Cutoffs::default(), &tails);
    let merged = merge.range(rows.to_vec(), &tails[0], &all, &all);
    let shown = |message: &Message| {
        assert_eq!(message.deleted, message.text.is_empty());
        (message.seq.get(), message.text.clone())
    };
    (
        merged.messages.values().map(shown).collect(),
        merged.from_stream,
    )
}

fn shown(messages: &[(u64, &str)]) -> Vec<(u64, String)> {
    messages
        .iter()
        .map(|(seq, text)| (*seq, (*text).to_owned()))
        .collect()
}

#[test]
fn the_first_of_two_with_one_id_is_shown() {
    // The projection has the first; it has the later one, and the first is in the tail; both have
    // the same one.
    assert_eq!(
        merge(
            &[("a", 5)],
            &[],
            &[message(5, "a", "x")],
            &[message(9, "a", "x")]
        ),
        (shown(&[(5, "x")]), false)
    );
    assert_eq!(
        merge(
            &[("a", 9)],
            &[],
            &[message(9, "a", "x")],
            &[message(5, "a", "x")]
        ),
        (shown(&[(5, "x")]), true)
    );
    assert_eq!(
        merge(
            &[("a", 5)],
            &[],
            &[message(5, "a", "x")],
            &[message(5, "a", "x")]
        ),
        (shown(&[(5, "x")]), false)
    );
}

#[test]
fn no_text_is_shown_that_stream_or_projection_has_as_deleted() {
    let change = deletion(5, "a");
    assert_eq!(
        merge(
            &[("a", 5)],
            std::slice::from_ref(&change),
            &[message(5, "a", "x")],
            &[]
        ),
        (shown(&[(5, "")]), true)
    );
    assert_eq!(
        merge(
            &[],
            std::slice::from_ref(&change),
            &[],
            &[message(5, "a", "x")]
        ),
        (shown(&[(5, "")]), true)
    );
    assert_eq!(
        merge(
            &[("a", 5)],
            &[],
            &[tombstone(5, "a")],
            &[message(5, "a", "x")]
        ),
        (shown(&[(5, "")]), false),
        "deleted meanwhile"
    );
    // The deletion names a duplicate in another place.
    assert_eq!(
        merge(
            &[("a", 5)],
            &[deletion(9, "a")],
            &[message(5, "a", "x")],
            &[]
        ),
        (shown(&[(5, "")]), true)
    );
}

#[test]
fn a_message_erased_before_it_was_stored_has_one_tombstone() {
    assert_eq!(
        merge(&[], &[deletion(5, "a")], &[], &[message(7, "b", "y")]),
        (shown(&[(5, ""), (7, "y")]), true)
    );
    assert_eq!(
        merge(&[], &[deletion(5, "seq:5")], &[], &[]),
        (shown(&[(5, "")]), true)
    );
    assert_eq!(
        merge(&[], &[deletion(60, "a")], &[], &[]),
        (shown(&[]), false),
        "outside of the range"
    );
    // The message stands elsewhere, outside of what was read.
    assert_eq!(
        merge(&[("a", 3)], &[deletion(5, "a")], &[], &[]),
        (shown(&[]), false)
    );
    // The projection has it, beyond what may be shown of it.
    assert_eq!(
        merge(&[("a", 5)], &[deletion(5, "a")], &[], &[]),
        (shown(&[(5, "")]), true)
    );
}

#[test]
fn a_duplicate_of_an_erased_message_is_not_shown() {
    let change = deletion(5, "a");
    assert_eq!(
        merge(
            &[],
            std::slice::from_ref(&change),
            &[],
            &[message(7, "a", "x")]
        ),
        (shown(&[(5, "")]), true)
    );
    assert_eq!(
        merge(
            &[("a", 7)],
            std::slice::from_ref(&change),
            &[message(7, "a", "x")],
            &[]
        ),
        (shown(&[(5, "")]), true)
    );
}
