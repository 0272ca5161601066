//! Stores the stream in PostgreSQL: batches from the consumer that all replicas share, one
//! statement per batch, acknowledged after the commit.

mod batch;
mod changes;
mod dead_letters;
mod erase;
mod handler;
mod last_seen;
mod probe;
mod row;
mod settings;
mod store;
mod writer;

#[cfg(test)]
mod tests;

use std::process::ExitCode;
use std::time::Duration;

use last_seen::LastSeen;
use service::ctx::Ctx;
use service::function::Function;
use service::this;
use settings::Settings;
use timeline::chat::Chat;
use timeline::settings::ChatSettings;

/// What batches share.
struct Shared {
    chat: Chat,
    /// The most messages one statement stores.
    batch: usize,
    stuck_after: Duration,
    last_seen: LastSeen,
}

fn main() -> ExitCode {
    function().run()
}

fn function() -> Function<Shared> {
    Function::with(this!(protocol::PROJECT), async |ctx: Ctx| {
        let settings: Settings = ctx.read_settings()?;
        Ok(Shared {
            chat: Chat::open(&ctx)?,
            batch: settings.persist_batch,
            stuck_after: Duration::from_millis(settings.persist_stuck_after_ms),
            last_seen: LastSeen::default(),
        })
    })
    .settings::<ChatSettings>()
    .settings::<Settings>()
    .work(
        "store",
        protocol::subject::STREAM,
        "Stores the stream's messages; requests are messages, errors are dead letters",
        handler::persist_messages,
    )
}
