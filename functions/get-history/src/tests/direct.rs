//! The conversation of two users, whichever of them asks.

use serde_json::json;

use super::{SOON, ask_raw, eventually, history, publish_body};
use protocol::endpoints::DM_HISTORY;
use testing::World;

#[tokio::test]
async fn both_see_the_same_order_from_stream_projection_and_both() {
    let world = World::with_own_postgres().await;
    let function = history(&world).await;
    let client = world.client("publisher").await;
    let page = async |who: &str, peer: &str, body: serde_json::Value| {
        ask_raw(&client, DM_HISTORY.subject(&[who, peer]), &body.to_string())
            .await
            .unwrap()
    };
    // Many messages in one direction, so that the page of the other ends elsewhere.
    for number in 1..=30 {
        let (from, to) = if number % 10 < 7 {
            ("ann", "bob")
        } else {
            ("bob", "ann")
        };
        let body = json!({"user": from, "text": number.to_string()}).to_string();
        assert_eq!(
            publish_body(&client, &format!("dm.{from}.{to}"), &body).await,
            number * 2 - 1
        );
        publish_body(
            &client,
            "dm.ann.carol",
            &json!({"user": "ann", "text": "not for bob"}).to_string(),
        )
        .await;
    }
    let check = async |source: &str| {
        for (body, from, to, more) in [
            (json!({}), 1, 30, false),
            (json!({"limit": 5}), 26, 30, true),
            (json!({"limit": 5, "before": 41}), 16, 20, true),
            (json!({"limit": 5, "after": 0}), 1, 5, true),
            (json!({"limit": 4, "after": 12}), 7, 10, true),
            (json!({"limit": 6, "around": 21}), 8, 13, true),
        ] {
            let numbers: Vec<String> = (from..=to).map(|number: u32| number.to_string()).collect();
            for (who, peer) in [("ann", "bob"), ("bob", "ann")] {
                let got = page(who, peer, body.clone()).await;
                assert_eq!(got.texts(), numbers, "{who}: {body} from {source}");
                assert_eq!((got.more, got.source.as_str()), (more, source), "{body}");
            }
        }
        let first = &page("bob", "ann", json!({"limit": 1, "after": 0}))
            .await
            .messages[0];
        assert_eq!(
            (
                first.room.as_str(),
                first.user.as_str(),
                first.to.as_deref()
            ),
            ("dm.ann.bob", "ann", Some("bob"))
        );
    };
    check("both").await;
    world.postgres().stop().await;
    let source = async || page("ann", "bob", json!({})).await.source;
    eventually("PostgreSQL is missed", SOON, async || {
        (source().await == "log").then_some(())
    })
    .await;
    check("log").await;
    world.postgres().start().await;
    let _worker = world.spawn("persist-message").await;
    eventually("everything is stored", SOON, async || {
        (source().await == "index").then_some(())
    })
    .await;
    check("index").await;
    function.stop().await.unwrap();
}

#[tokio::test]
async fn a_direct_conversation_cannot_be_read_as_a_room() {
    let world = World::start().await;
    let function = history(&world).await;
    let client = world.client("publisher").await;
    publish_body(
        &client,
        "dm.ann.bob",
        &json!({"user": "ann", "text": "psst"}).to_string(),
    )
    .await;
    for subject in [
        "chat.history.ann.bob",
        "chat.history.dm.ann.bob",
        "dm.history.ann.bob.carol",
        "dm.history.ann.b%20",
    ] {
        let (code, reason) = ask_raw(&client, subject.to_owned(), "").await.unwrap_err();
        assert_eq!(code, 400, "{subject}: {reason}");
    }
    let alone = ask_raw(&client, DM_HISTORY.subject(&["carol", "bob"]), "")
        .await
        .unwrap();
    assert!(alone.messages.is_empty());
    function.stop().await.unwrap();
}
