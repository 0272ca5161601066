//! Who is there, and how they are doing: the service API asked by hand.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use async_nats::Client;
use futures::StreamExt;
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use crate::show;
use base::discovery::{DISCOVER_INFO, DISCOVER_STATS, Info, Stats};
use base::error::Fatal;

/// Nobody knows how many will answer: after this much silence, those were all.
const SILENCE: Duration = Duration::from_millis(300);

/// Prints a table of every service found, copies added up.
pub async fn list(operator: &Client) -> Result<(), Fatal> {
    let infos: Vec<Info> = everyone(operator, DISCOVER_INFO).await?;
    let stats: Vec<Stats> = everyone(operator, DISCOVER_STATS).await?;
    let mut copies: BTreeMap<(&str, &str), BTreeSet<&str>> = BTreeMap::new();
    for info in &infos {
        copies
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
            "service", "version", "copies", "on", "requests", "errors", "average",
        ]
        .map(str::to_owned),
    ];
    for ((name, version), ids) in copies {
        let mut about = [name.to_owned(), version.to_owned(), ids.len().to_string()];
        for (_, (subject, requests, errors, time)) in
            work.iter().filter(|((worker, _), _)| *worker == name)
        {
            let [name, version, copies] = std::mem::take(&mut about);
            let average = if *requests == 0 {
                "-".to_owned()
            } else {
                show::nanoseconds(time / requests)
            };
            rows.push([
                name,
                version,
                copies,
                (*subject).to_owned(),
                requests.to_string(),
                errors.to_string(),
                average,
            ]);
        }
    }
    if rows.len() == 1 {
        return Err(Fatal::new(
            "no service answers; does this user have the rights of an operator (nats/accounts.conf)?",
        ));
    }
    show::table(&rows);
    println!();
    Ok(())
}

/// Asks everyone who listens on `subject`.
async fn everyone<T: DeserializeOwned>(
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
        // Whoever answers something else is no service of ours.
        if let Ok(answer) = serde_json::from_slice(&reply.payload) {
            answers.push(answer);
        }
    }
    Ok(answers)
}
