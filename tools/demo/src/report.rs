//! Text for a terminal: aligned columns without control characters.

use time::OffsetDateTime;

use protocol::message::{Message, Status};

const MAX_TEXT_CHARS: usize = 80;

/// One line for each message; for a direct message also its status.
pub fn print_messages(messages: &[Message]) {
    let rows: Vec<[String; 5]> = messages
        .iter()
        .map(|message| {
            let text = if message.deleted {
                "(deleted)".to_owned()
            } else {
                plain(&message.text)
            };
            let status = match message.status {
                Some(Status::Sent) => "sent",
                Some(Status::Delivered) => "delivered",
                Some(Status::Read) => "read",
                None => "",
            };
            [
                message.seq.to_string(),
                when(message.timestamp),
                plain(&message.user),
                text,
                status.to_owned(),
            ]
        })
        .collect();
    table(&rows);
}

/// Columns as wide as they have to be, indented.
pub fn table<const N: usize>(rows: &[[String; N]]) {
    for line in lines(rows) {
        println!("     {line}");
    }
}

fn lines<const N: usize>(rows: &[[String; N]]) -> Vec<String> {
    let width = |column: usize| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: [usize; N] = std::array::from_fn(width);
    let line = |row: &[String; N]| {
        row.iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect::<Vec<_>>()
            .join("  ")
    };
    rows.iter()
        .map(|row| line(row).trim_end().to_owned())
        .collect()
}

/// Replaces control characters and direction marks, because users choose these texts.
fn plain(text: &str) -> String {
    let harmless = |c: char| {
        if c.is_control()
            || matches!(c, '\u{200e}' | '\u{200f}')
            || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
        {
            '\u{fffd}'
        } else {
            c
        }
    };
    let mut shown: String = text.chars().take(MAX_TEXT_CHARS).map(harmless).collect();
    if shown.len() < text.len() && text.chars().nth(MAX_TEXT_CHARS).is_some() {
        shown.push('…');
    }
    shown
}

fn when(unix_ms: i64) -> String {
    match OffsetDateTime::from_unix_timestamp(unix_ms.div_euclid(1_000)) {
        Ok(at) => format!(
            "{} {:02}:{:02}:{:02}",
            at.date(),
            at.hour(),
            at.minute(),
            at.second()
        ),
        Err(_) => unix_ms.to_string(),
    }
}

/// A duration with a unit that fits.
pub fn nanoseconds(nanoseconds: u64) -> String {
    match nanoseconds {
        0..1_000_000 => format!("{:.0} µs", nanoseconds as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} ms", nanoseconds as f64 / 1e6),
        _ => format!("{:.1} s", nanoseconds as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        assert_eq!(plain("a\u{1b}[2Jb\u{202e}c"), "a\u{fffd}[2Jb\u{fffd}c");
        assert_eq!(plain(&"ä".repeat(81)), format!("{}…", "ä".repeat(80)));
        assert_eq!(plain(&"ä".repeat(80)), "ä".repeat(80));
    }

    #[test]
    fn columns_align() {
        let rows = [["a", "bb", "c"], ["aaa", "b", ""]].map(|row| row.map(str::to_owned));
        assert_eq!(lines(&rows), ["a    bb  c", "aaa  b"]);
    }

    #[test]
    fn times_read_well() {
        assert_eq!(when(1_103_966_040_037), "2004-12-25 09:14:00");
        assert_eq!(nanoseconds(1_500), "2 µs");
        assert_eq!(nanoseconds(1_500_000), "1.5 ms");
        assert_eq!(nanoseconds(2_000_000_000), "2.0 s");
    }
}
