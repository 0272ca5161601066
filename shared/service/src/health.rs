//! The health file: touched while the function is healthy, and read by `--health`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use crate::ctx::Shared;
use crate::responder::Service;
use base::log_once::LogOnce;

const INTERVAL: Duration = Duration::from_secs(5);
/// An older health file means that the replica is unhealthy: it missed three touches.
const MAX_AGE: Duration = Duration::from_secs(20);

/// Touches the health file while the function receives its own requests and every server it
/// depends on answers.
pub(crate) async fn stay_healthy(path: PathBuf, service: Arc<Service>, shared: Arc<Shared>) {
    let mut log = LogOnce::default();
    while !shared.stop.is_cancelled() {
        match check(&service, &shared).await {
            Ok(()) => {
                if let Err(error) = tokio::fs::write(&path, b"").await {
                    let path = path.display();
                    tracing::warn!(%path, %error, "the health file cannot be written");
                }
                if log.recovered() {
                    tracing::info!("healthy again");
                }
            }
            Err(why) => {
                // One line for an outage, however its error changes meanwhile.
                if log.is_news("unhealthy") {
                    tracing::warn!(
                        why,
                        "not healthy; the health file is not touched until this passes"
                    );
                }
            }
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

async fn check(service: &Service, shared: &Shared) -> Result<(), String> {
    service
        .ping_self()
        .await
        .map_err(|why| format!("our own $SRV.PING is not answered: {why}"))?;
    let checks: Vec<_> = {
        let checks = shared
            .health_checks
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        checks.iter().map(|check| check()).collect()
    };
    futures::future::try_join_all(checks).await.map(|_| ())
}

/// `--health`: whether the running replica touched its health file lately.
pub(crate) fn exit_code() -> ExitCode {
    let Some(path) = std::env::var_os("HEALTH_FILE") else {
        eprintln!("--health needs HEALTH_FILE, the same as the running replica's");
        return ExitCode::from(2);
    };
    let touched = std::fs::metadata(&path).and_then(|file| file.modified());
    if touched.is_ok_and(|touched| touched.elapsed().is_ok_and(|age| age < MAX_AGE)) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
