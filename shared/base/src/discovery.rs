//! The NATS service API (ADR-32): the replies to PING, INFO and STATS.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The reply to `$SRV.PING`: which replicas run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ping {
    /// `io.nats.micro.v1.ping_response`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The function's name.
    pub name: String,
    /// The replica's id.
    pub id: String,
    /// Semantic version.
    pub version: String,
    /// Facts about the function.
    pub metadata: BTreeMap<String, String>,
}

/// The reply to `$SRV.INFO`: what a function serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Info {
    /// `io.nats.micro.v1.info_response`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The function's name.
    pub name: String,
    /// The replica's id.
    pub id: String,
    /// Semantic version.
    pub version: String,
    /// What the function does.
    pub description: String,
    /// Facts about the function.
    pub metadata: BTreeMap<String, String>,
    /// Its endpoints, and what it works on in the background.
    pub endpoints: Vec<EndpointInfo>,
}

/// One endpoint in [`Info`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointInfo {
    /// No dots: the `nats` CLI rejects the whole reply if there is one.
    pub name: String,
    /// The subject it subscribes to.
    pub subject: String,
    /// Replicas in one group share the work.
    pub queue_group: String,
    /// Its description.
    pub metadata: BTreeMap<String, String>,
}

/// The reply to `$SRV.STATS`: what a replica has done so far.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// `io.nats.micro.v1.stats_response`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The function's name.
    pub name: String,
    /// The replica's id.
    pub id: String,
    /// Semantic version.
    pub version: String,
    /// Facts about the function.
    pub metadata: BTreeMap<String, String>,
    /// When the replica started: RFC 3339, UTC.
    pub started: String,
    /// One entry for each endpoint.
    pub endpoints: Vec<EndpointStats>,
}

/// One endpoint in [`Stats`]. Times in nanoseconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EndpointStats {
    /// As in [`EndpointInfo`].
    pub name: String,
    /// As in [`EndpointInfo`].
    pub subject: String,
    /// As in [`EndpointInfo`].
    pub queue_group: String,
    /// Requests answered, or messages handled.
    pub num_requests: u64,
    /// Requests answered with an error, or messages dead-lettered.
    pub num_errors: u64,
    /// The last error, `code:reason`; empty when there was none.
    pub last_error: String,
    /// The sum over all requests.
    pub processing_time: u64,
    /// The sum divided by the number of requests.
    pub average_processing_time: u64,
    /// More counters, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub data: BTreeMap<String, u64>,
}

/// Every replica of every function answers with [`Info`].
pub const DISCOVER_INFO: &str = "$SRV.INFO";
/// Every replica of every function answers with [`Stats`].
pub const DISCOVER_STATS: &str = "$SRV.STATS";

/// The nine subjects of the service API that a replica subscribes to, each with its verb.
pub fn discovery_subjects(name: &str, id: &str) -> Vec<(&'static str, String)> {
    ["PING", "INFO", "STATS"]
        .into_iter()
        .flat_map(|verb| {
            [
                format!("$SRV.{verb}"),
                format!("$SRV.{verb}.{name}"),
                format!("$SRV.{verb}.{name}.{id}"),
            ]
            .map(|subject| (verb, subject))
        })
        .collect()
}

/// The subject that pings one replica alone.
pub fn ping_subject(name: &str, id: &str) -> String {
    format!("$SRV.PING.{name}.{id}")
}
