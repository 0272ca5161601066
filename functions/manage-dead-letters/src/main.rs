//! Answers `deadletters.list`, `.show`, `.retry` and `.drop`, for operators only: what could not be stored, and what is
//! done about it. No row of `dead_letters` is ever deleted here; a letter gets an outcome.

use timeline::chat::Chat;
use timeline::settings::ChatSettings;

mod discard;
mod fate;
mod letter;
mod list;
mod retry;
mod show;

#[cfg(test)]
mod tests;

use std::process::ExitCode;
use std::time::Duration;

use base::error::Code;
use base::error::Error;
use protocol::dead_letters::{DeadLetterId, DeadLetterOutcome};
use protocol::endpoints::{
    DEADLETTERS_DROP, DEADLETTERS_LIST, DEADLETTERS_RETRY, DEADLETTERS_SHOW,
};
use service::ctx::Ctx;
use service::function::Function;
use service::this;

fn main() -> ExitCode {
    function().run()
}

fn function() -> Function<Chat> {
    Function::with(this!(protocol::PROJECT), async |ctx: Ctx| Chat::open(&ctx))
        .settings::<ChatSettings>()
        .answer(DEADLETTERS_LIST, list::list)
        .answer(DEADLETTERS_SHOW, show::show)
        .answer(DEADLETTERS_RETRY, retry::retry)
        .answer(DEADLETTERS_DROP, discard::discard)
}

/// What PostgreSQL may take of a request's time, and looking at what became of a letter: what is wrong shall be said
/// before the deadline, by whoever knows it.
fn patience(ctx: &Ctx<Chat>) -> Duration {
    ctx.settings().request_deadline().mul_f64(0.8)
}

fn missing(id: DeadLetterId) -> Error {
    Error::new(Code::NotFound, format!("there is no dead letter {id}"))
}

/// A letter that has an outcome already, and needs another one.
fn settled(id: DeadLetterId, outcome: &str, outcome_seq: Option<i64>) -> Error {
    let what = match (DeadLetterOutcome::parse(outcome), outcome_seq) {
        (Some(DeadLetterOutcome::Retried), Some(seq)) => {
            format!("was retried already: the log has it as {seq}")
        }
        (Some(DeadLetterOutcome::Dropped), _) => "was dropped already".to_owned(),
        (Some(DeadLetterOutcome::Erased), _) => {
            "is erased: its author deleted the message".to_owned()
        }
        _ => format!("has an outcome already: {outcome}"),
    };
    Error::new(Code::Conflict, format!("dead letter {id} {what}"))
}
