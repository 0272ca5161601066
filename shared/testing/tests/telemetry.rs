//! Telemetry and its collector: resources and units of what arrives, a collector that is away, slow
//! or behind TLS.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "helpers of tests fail like tests"
)]

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use testing::{OtlpReceiver, SOON, World, eventually};

#[tokio::test]
async fn a_collector_that_is_away_costs_a_line_and_no_time() {
    let world = World::start().await;
    let receiver = OtlpReceiver::start().await;
    let mut vars: Vec<(&str, String)> = receiver
        .vars()
        .into_iter()
        .map(|(name, value)| (name, value.to_owned()))
        .collect();
    vars.push(("OTEL_EXPORTER_OTLP_TIMEOUT", "500".to_owned()));
    let vars: Vec<(&str, &str)> = vars
        .iter()
        .map(|(name, value)| (*name, value.as_str()))
        .collect();
    let address = receiver.endpoint().trim_start_matches("http://").to_owned();
    drop(receiver);
    let history = world.spawn_with("get-history", &vars).await;
    let publisher = world.client("publisher").await;
    let lines = |what: &str| {
        history
            .stderr()
            .lines()
            .filter(|line| line.contains(what))
            .count()
    };
    eventually("a line that the collector is away", SOON, async || {
        (lines("collector is away") > 0).then_some(())
    })
    .await;
    for _ in 0..20 {
        publisher
            .request("chat.history.general", "".into())
            .await
            .unwrap();
    }
    let receiver = OtlpReceiver::start_at(&address).await;
    // Spans that were exported in vain are gone, so there have to be new ones.
    eventually("a line that the collector is back", SOON, async || {
        publisher
            .request("chat.history.general", "".into())
            .await
            .unwrap();
        (lines("collector is back") > 0).then_some(())
    })
    .await;
    publisher
        .request("chat.history.general", "".into())
        .await
        .unwrap();
    receiver
        .wait_for("the span of a request after that", SOON, |spans| {
            !spans.is_empty()
        })
        .await;
    drop(receiver);
    eventually("a line that it is away again", SOON, async || {
        (lines("collector is away") > 1).then_some(())
    })
    .await;
    let begun = std::time::Instant::now();
    let log = history.stderr();
    assert!(history.terminate().await.success());
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "leaving took {:?}",
        begun.elapsed()
    );
    assert_eq!(
        log.lines()
            .filter(|line| line.contains("collector is"))
            .count(),
        3,
        "{log}"
    );
    let noise = |line: &&str| line.contains("opentelemetry") || line.contains("BatchSpanProcessor");
    assert_eq!(log.lines().find(noise), None, "{log}");
}

#[tokio::test]
async fn a_collector_that_never_answers_delays_the_end_by_one_flush_only() {
    let world = World::start().await;
    // The kernel accepts the connection, but nothing reads from it.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", silent.local_addr().unwrap());
    let vars = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"),
    ];
    let history = world.spawn_with("get-history", &vars).await;
    world
        .client("publisher")
        .await
        .request("chat.history.general", "".into())
        .await
        .unwrap();
    let begun = std::time::Instant::now();
    assert!(history.terminate().await.success());
    assert!(
        begun.elapsed() < Duration::from_secs(7),
        "three signals, two seconds each: {:?}",
        begun.elapsed()
    );
}

#[tokio::test]
async fn replicas_have_ids_and_durations_are_in_seconds() {
    let world = World::start().await;
    let receiver = OtlpReceiver::start().await;
    let vars = receiver.vars();
    let (_one, _two) = tokio::join!(
        world.spawn_with("get-history", &vars),
        world.spawn_with("get-history", &vars)
    );
    let publisher = world.client("publisher").await;
    let metrics = eventually("durations of both replicas", SOON, async || {
        publisher
            .request("chat.history.general", "".into())
            .await
            .unwrap();
        let metrics: Vec<_> = receiver
            .metrics()
            .into_iter()
            .filter(|metric| metric.name == "scrollback.duration")
            .collect();
        let instances: std::collections::BTreeSet<&str> = metrics
            .iter()
            .map(|metric| metric.instance.as_str())
            .collect();
        (instances.len() == 2 && !instances.contains("")).then(|| metrics.clone())
    })
    .await;
    let ping = ids_of_replicas(&world).await;
    assert!(
        metrics.iter().all(|metric| ping.contains(&metric.instance)),
        "not the ids nats micro ls shows: {ping:?}"
    );
    let bounds = &metrics[0].bounds;
    assert_eq!(metrics[0].unit, "s");
    assert!(
        bounds.first().unwrap() < &0.001 && bounds.last().unwrap() <= &60.0,
        "milliseconds, it seems: {bounds:?}"
    );
}

/// The ids of the replicas of get-history that answer.
async fn ids_of_replicas(world: &World) -> Vec<String> {
    let operator = world.client("operator").await;
    let inbox = operator.new_inbox();
    let mut replies = operator.subscribe(inbox.clone()).await.unwrap();
    operator
        .publish_with_reply("$SRV.PING.get-history", inbox, "".into())
        .await
        .unwrap();
    let mut ids = Vec::new();
    while ids.len() < 2 {
        let reply = tokio::time::timeout(SOON, replies.next())
            .await
            .expect("both replicas answer")
            .unwrap();
        let ping: serde_json::Value = serde_json::from_slice(&reply.payload).unwrap();
        ids.push(ping["id"].as_str().unwrap().to_owned());
    }
    ids
}

/// A listener that takes TLS off and passes the rest on to `target`.
async fn tls_before(target: String) -> u16 {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/tls");
    let certificates = CertificateDer::pem_file_iter(format!("{folder}/cert.pem"))
        .unwrap()
        .collect::<Result<Vec<_>, _>>()
        .unwrap();
    let key = PrivateKeyDer::from_pem_file(format!("{folder}/key.pem")).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(certificates, key)
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((connection, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            let target = target.clone();
            tokio::spawn(async move {
                // A client that does not trust us hangs up.
                let mut outside = acceptor.accept(connection).await.ok()?;
                let mut inside = TcpStream::connect(target).await.ok()?;
                tokio::io::copy_bidirectional(&mut outside, &mut inside)
                    .await
                    .ok()
            });
        }
    });
    port
}

#[tokio::test]
async fn telemetry_reaches_a_collector_behind_tls_that_this_machine_trusts() {
    let world = World::start().await;
    let receiver = OtlpReceiver::start().await;
    let address = receiver.endpoint().replace("http://", "");
    let endpoint = format!("https://localhost:{}", tls_before(address).await);
    let mut vars = receiver.vars();
    vars.push(("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint));
    let trusted = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/tls/cert.pem");

    let other = world.spawn_with("get-history", &vars).await;
    eventually("an unknown certificate is refused", SOON, async || {
        other
            .stderr()
            .contains("the OpenTelemetry collector is away")
            .then_some(())
    })
    .await;
    assert!(receiver.bodies().is_empty());

    vars.push(("SSL_CERT_FILE", trusted));
    let _history = world.spawn_with("get-history", &vars).await;
    eventually("metrics come", SOON, async || {
        (!receiver.metrics().is_empty()).then_some(())
    })
    .await;
}

#[tokio::test]
async fn grpc_is_refused_where_it_is_not_built_in() {
    let world = World::bare().await;
    let mut command = world.command("get-history");
    command
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4317")
        .env("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc");
    let output = command.output().await.unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        !output.status.success()
            && said.contains("--features service/grpc")
            && said.contains("http/protobuf"),
        "{said}"
    );
}
