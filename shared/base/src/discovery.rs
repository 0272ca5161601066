//! The NATS service API (ADR-32): what PING, INFO and STATS answer.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// `$SRV.PING`: who is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ping {
    /// `io.nats.micro.v1.ping_response`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The function.
    pub name: String,
    /// This copy of it.
    pub id: String,
    /// Semantic version.
    pub version: String,
    /// About the function.
    pub metadata: BTreeMap<String, String>,
}

/// `$SRV.INFO`: what it answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Info {
    /// `io.nats.micro.v1.info_response`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The function.
    pub name: String,
    /// This copy of it.
    pub id: String,
    /// Semantic version.
    pub version: String,
    /// What it is for.
    pub description: String,
    /// About the function.
    pub metadata: BTreeMap<String, String>,
    /// What it answers or works on.
    pub endpoints: Vec<EndpointInfo>,
}

/// One endpoint in [`Info`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointInfo {
    /// No dots: the CLI rejects the whole reply.
    pub name: String,
    /// What it listens on.
    pub subject: String,
    /// Copies in one group share the work.
    pub queue_group: String,
    /// Shapes and meaning.
    pub metadata: BTreeMap<String, String>,
}

/// `$SRV.STATS`: how it is doing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// `io.nats.micro.v1.stats_response`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The function.
    pub name: String,
    /// This copy of it.
    pub id: String,
    /// Semantic version.
    pub version: String,
    /// About the function.
    pub metadata: BTreeMap<String, String>,
    /// RFC 3339, UTC.
    pub started: String,
    /// Per endpoint.
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
    /// Requests refused, or messages set aside.
    pub num_errors: u64,
    /// The last error, `code:reason`; empty when there was none.
    pub last_error: String,
    /// Sum over all requests.
    pub processing_time: u64,
    /// The sum divided by the requests.
    pub average_processing_time: u64,
    /// More counters, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub data: BTreeMap<String, u64>,
}

/// Every copy of every function answers what it offers.
pub const DISCOVER_INFO: &str = "$SRV.INFO";
/// Every copy of every function answers how it is doing.
pub const DISCOVER_STATS: &str = "$SRV.STATS";

/// The nine subjects of the service API one copy of a function listens on, with the verb of each.
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

/// Where one replica of a function alone is asked whether it is there.
pub fn ping_subject(name: &str, id: &str) -> String {
    format!("$SRV.PING.{name}.{id}")
}
