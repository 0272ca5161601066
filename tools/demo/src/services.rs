//! Lists the services found through the NATS service API and what they did.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use async_nats::Client;
use futures::StreamExt;
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use crate::report;
use base::discovery::{DISCOVER_INFO, DISCOVER_STATS, Info, Stats};
use base::error::Fatal;

/// The number of replies is not known beforehand: after this much silence we stop waiting.
const SILENCE: Duration = Duration::from_millis(300);

/// Prints a table of every service found, its replicas added up.
pub async fn list(operator: &Client) -> Result<(), Fatal> {
    let infos: Vec<Info> = request_all(operator, DISCOVER_INFO).await?;
    let stats: Vec<Stats> = request_all(operator, DISCOVER_STATS).await?;
    let mut replicas: BTreeMap<(&str, &str), BTreeSet<&str>> = BTreeMap::new();
    for info in &infos {
        replicas
            .entry((&info.name, &info.version))
            .or_default()
            .insert(&info.id);
    }
    // Per function and endpoint: requests, errors, nanoseconds.
    let mut work: BTreeMap<(&str, &str), (&str, u64, u64, u64)> = BTreeMap::new();
    for (name, endpoint) in stats.iter().flat_map(|stats| {
        stats
            .endpoints
            .iter()
            .map(|endpoint| (stats.name.as_str(), endpoint))
    }) {
        let (_, requests, errors, time) =
            work.entry((name, &endpoint.name))
                .or_insert((&endpoint.subject, 0, 0, 0));
        *requests += endpoint.num_requests;
        *errors += endpoint.num_errors;
        *time += endpoint.processing_time;
    }
    let mut rows = vec![
        [
            "service", "version", "replicas", "on", "requests", "errors", "average",
        ]
        .map(str::to_owned),
    ];
    for ((name, version), ids) in replicas {
        let mut about = [name.to_owned(), version.to_owned(), ids.len().to_string()];
        for (_, (subject, requests, errors, time)) in
            work.iter().filter(|((worker, _), _)| *worker == name)
        {
            let [name, version, replicas] = std::mem::take(&mut about);
            let average = if *requests == 0 {
                "-".to_owned()
            } else {
                report::nanoseconds(time / requests)
            };
            rows.push([
                name,
                version,
                replicas,
                (*subject).to_owned(),
                requests.to_string(),
                errors.to_string(),
                average,
            ]);
        }
    }
    if rows.len() == 1 {
        return Err(Fatal::new(
            "no service answers; does this user have the rights of an operator \
             (nats/accounts.conf)?",
        ));
    }
    report::table(&rows);
    println!();
    Ok(())
}

/// Sends a request to all who listen on `subject` and collects their replies.
async fn request_all<T: DeserializeOwned>(
    client: &Client,
    subject: &'static str,
) -> Result<Vec<T>, Fatal> {
    let closed = |_| Fatal::new("the connection to NATS is closed");
    let inbox = client.new_inbox();
    let mut replies = client
        .subscribe(inbox.clone())
        .await
        .map_err(|error| closed(error.to_string()))?;
    client
        .publish_with_reply(subject, inbox, "".into())
        .await
        .map_err(|error| closed(error.to_string()))?;
    let mut answers = Vec::new();
    while let Ok(Some(reply)) = timeout(SILENCE, replies.next()).await {
        // Other services of the account may reply with something else.
        if let Ok(answer) = serde_json::from_slice(&reply.payload) {
            answers.push(answer);
        }
    }
    Ok(answers)
}
