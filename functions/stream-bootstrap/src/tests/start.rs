//! Servers that are down are waited for; a wrong configuration is not.

use super::*;

#[tokio::test]
async fn servers_that_are_down_are_waited_for() {
    let world = World::builder()
        .bare()
        .own_postgres()
        .administrator()
        .start()
        .await;
    world.postgres().stop().await;
    world.nats().stop().await;
    let process = world.launch("stream-bootstrap", &[("BOOTSTRAP_INTERVAL_MS", "50")]);
    eventually("it waits for NATS", SOON, async || {
        process.stderr().contains("waiting for NATS").then_some(())
    })
    .await;
    world.nats().start().await;
    let complaints = || process.stderr().matches("not applied yet").count();
    eventually("it waits for PostgreSQL", SOON, async || {
        (complaints() > 0).then_some(())
    })
    .await;
    world.postgres().start().await;
    eventually("it applied", SOON, async || {
        process.stderr().contains("ready").then_some(())
    })
    .await;
    assert_eq!(complaints(), 1, "{}", process.stderr());
    assert!(check(&world).await.ok);

    // While it runs, too; and one line each time.
    world.postgres().kill().await;
    let operator = world.client("operator").await;
    let refused = async || {
        let stats = ask(
            &operator,
            "$SRV.STATS.stream-bootstrap".to_owned(),
            json!({}),
        )
        .await;
        let reconcile = stats["endpoints"]
            .as_array()
            .unwrap()
            .iter()
            .find(|endpoint| endpoint["name"] == "reconcile")
            .unwrap();
        reconcile["num_errors"].as_u64().unwrap()
    };
    eventually("it noticed, several times", SOON, async || {
        (refused().await >= 2).then_some(())
    })
    .await;
    assert_eq!(complaints(), 2, "{}", process.stderr());
    let reply = ask(&operator, BOOTSTRAP_CHECK.subject(&[]), json!({})).await;
    assert_eq!(reply["error"]["code"], 503, "{reply}");
    world.postgres().start().await;
    let checked =
        async || ask(&operator, BOOTSTRAP_CHECK.subject(&[]), json!({})).await["ok"] == true;
    eventually("all is well", SOON, async || checked().await.then_some(())).await;
    assert!(process.terminate().await.success());
}

#[tokio::test]
async fn a_wrong_setting_ends_the_start_with_one_line() {
    let world = bare().await;
    for (name, value, expected) in [
        (
            "BOOTSTRAP_INTERVAL_MS",
            "0",
            "BOOTSTRAP_INTERVAL_MS must be at least 1",
        ),
        (
            "BOOTSTRAP_INTERVAL_MS",
            "18446744073709551615",
            "BOOTSTRAP_INTERVAL_MS must be at most 86400000, a day",
        ),
        (
            "BOOTSTRAP_CONFIG",
            "/no/such/directory",
            "/no/such/directory/streams cannot be read",
        ),
        ("NATS_PASS", "wrong", "NATS refused this user"),
    ] {
        let line = start_with(&world, &[(name, value)])
            .await
            .unwrap_err()
            .to_string();
        assert!(line.contains(expected), "{line}");
    }
    let wrong = world.database_url().replacen("world_", "no_such_world_", 1);
    let line = start_with(&world, &[("DATABASE_URL", &wrong)])
        .await
        .unwrap_err()
        .to_string();
    assert!(
        line.contains("3D000") && line.contains("there is no such database"),
        "{line}"
    );
}
