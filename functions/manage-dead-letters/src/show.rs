//! Shows one dead letter with its bytes.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use sqlx::Row;

use crate::dead_letter::not_found;
use crate::list::{self, HEADER_ROOM, columns};
use crate::time_limit;
use base::error::{Code, Error, Result};
use protocol::dead_letters::{DeadLetter, ShowDeadLetter, ShownDeadLetter};
use service::ctx::Ctx;
use service::request::{Reply, Request};
use timeline::chat::Chat;

const DEAD_LETTER: &str = concat!(
    "select ",
    columns!(),
    ", headers, payload from dead_letters where id = $1"
);

/// `deadletters.show`
pub async fn show(
    ctx: Ctx<Chat>,
    request: Request<ShowDeadLetter>,
) -> Result<Reply<ShownDeadLetter>> {
    let ShowDeadLetter(id) = request.body;
    let found = ctx.database().run(time_limit(&ctx), async |connection| {
        let row = sqlx::query(DEAD_LETTER)
            .bind(id.get())
            .fetch_optional(connection)
            .await?;
        let read = |row| {
            Ok((
                list::from_row(&row)?,
                row.try_get("headers")?,
                row.try_get("payload")?,
            ))
        };
        row.map(read).transpose()
    });
    let found: Option<(DeadLetter, Vec<u8>, Vec<u8>)> = found.await?;
    let (dead_letter, headers, payload) = found.ok_or_else(|| not_found(id))?;
    let mut shown = ShownDeadLetter {
        dead_letter,
        headers: BASE64.encode(headers),
        payload: BASE64.encode(&payload),
        text: None,
    };
    let room = ctx
        .nats()
        .client()
        .server_info()
        .max_payload
        .saturating_sub(HEADER_ROOM);
    shown.text = String::from_utf8(payload).ok();
    if size(&shown)? > room {
        // The payload once more, readable: the first thing to leave out.
        shown.text = None;
    }
    if size(&shown)? > room {
        let reason = format!(
            "dead letter {id} is larger than the server's max_payload lets a reply be; read it \
             with psql: it is the row of dead_letters with this id"
        );
        return Err(Error::new(Code::TooLarge, reason));
    }
    Reply::json(&shown)
}

fn size(shown: &ShownDeadLetter) -> Result<usize> {
    serde_json::to_vec(shown)
        .map(|body| body.len())
        .map_err(Error::internal)
}
