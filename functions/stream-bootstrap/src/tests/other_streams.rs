//! Streams of others that capture requests or our subjects.

use super::*;

#[tokio::test]
async fn a_stream_that_captures_requests_is_refused() {
    let world = bare().await;
    let running = start(&world).await.unwrap();
    let admin = world.client("administrator").await;
    // So many streams that the list has more than one page.
    for number in 0..300 {
        api(
            &admin,
            &format!("STREAM.CREATE.S{number}"),
            json!({
                "name": format!("S{number}"),
                "subjects": [format!("s.{number}")],
                "storage": "memory",
            }),
        )
        .await;
    }
    api(
        &admin,
        "STREAM.CREATE.Z",
        json!({"name": "Z", "subjects": ["chat.history.*"], "storage": "memory"}),
    )
    .await;
    let found = check(&world).await;
    assert_eq!(found.swallowed.len(), 1, "{found:?}");
    assert!(
        found.swallowed[0]
            .contains("stream Z takes in chat.history.*, and so the request chat.history.*"),
        "{found:?}"
    );
    running.stop().await.unwrap();
    let line = start(&world).await.unwrap_err().to_string();
    assert!(line.contains("stream Z takes in chat.history.*"), "{line}");
}

#[tokio::test]
async fn a_stream_that_captures_our_subjects_is_named() {
    let world = bare().await;
    let admin = world.client("administrator").await;
    for (name, subject, ours) in [
        ("LEGACY", "chat.general", "CHAT_MESSAGES"),
        ("AUDIT", "events.>", "CHAT_EVENTS"),
    ] {
        api(
            &admin,
            &format!("STREAM.CREATE.{name}"),
            json!({"name": name, "subjects": [subject], "storage": "memory"}),
        )
        .await;
        let line = start(&world).await.unwrap_err().to_string();
        let wanted = format!(
            "stream {name} takes in {subject}, which belongs to stream {ours}: narrow its \
             subjects, or delete it"
        );
        assert!(line.contains(&wanted), "{line}");
        api(&admin, &format!("STREAM.DELETE.{name}"), json!({})).await;
    }
}
