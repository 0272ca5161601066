//! The lines of files, gzip or not, and of standard input.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use flate2::bufread::MultiGzDecoder;

/// Longer lines are refused unread, so a file without line ends does not fill the memory.
pub const MAX_LINE_BYTES: usize = 4 << 20;
const GZIP: [u8; 2] = [0x1f, 0x8b];
const BUFFER_BYTES: usize = 256 * 1024;

/// One file, or standard input, line by line.
pub struct Input {
    /// As the user named it.
    pub name: String,
    /// Size as stored, compressed or not; 0 when unknown.
    pub bytes: u64,
    reader: Box<dyn BufRead + Send>,
    line: u64,
}

/// One line.
pub enum Line {
    /// Without its line end.
    Text(Vec<u8>),
    /// Over [`MAX_LINE_BYTES`].
    TooLong,
}

impl Input {
    /// Opens `path`, `-` for standard input. `consumed` counts the bytes read from it, as stored.
    ///
    /// # Errors
    /// It cannot be opened or read.
    pub fn open(path: &str, consumed: Arc<AtomicU64>) -> io::Result<Input> {
        let (source, name, bytes): (Box<dyn Read + Send>, _, _) = if path == "-" {
            (Box::new(io::stdin()), "standard input", 0)
        } else {
            let file = File::open(path)?;
            let about = file.metadata()?;
            if about.is_dir() {
                return Err(io::Error::from(io::ErrorKind::IsADirectory));
            }
            (Box::new(file), path, about.len())
        };
        let source = Counted { source, consumed };
        Ok(Input {
            name: name.to_owned(),
            bytes,
            reader: decompress(source)?,
            line: 0,
        })
    }

    /// The number of the line read last, from 1 on.
    pub fn line(&self) -> u64 {
        self.line
    }

    /// The next line; `None` at the end.
    ///
    /// # Errors
    /// It cannot be read, or is broken gzip.
    pub fn next(&mut self) -> io::Result<Option<Line>> {
        let mut text = Vec::new();
        if (&mut self.reader)
            .take(MAX_LINE_BYTES as u64 + 1)
            .read_until(b'\n', &mut text)?
            == 0
        {
            return Ok(None);
        }
        self.line += 1;
        if text.last() == Some(&b'\n') {
            text.pop();
        } else if text.len() > MAX_LINE_BYTES {
            self.reader.skip_until(b'\n')?;
            return Ok(Some(Line::TooLong));
        }
        Ok(Some(Line::Text(text)))
    }
}

/// Detects gzip by the first bytes and not by the name, because standard input has none.
fn decompress(mut source: impl Read + Send + 'static) -> io::Result<Box<dyn BufRead + Send>> {
    let mut start = Vec::new();
    (&mut source)
        .take(GZIP.len() as u64)
        .read_to_end(&mut start)?;
    let gzip = start == GZIP;
    let whole = BufReader::with_capacity(BUFFER_BYTES, Cursor::new(start).chain(source));
    Ok(if gzip {
        Box::new(BufReader::with_capacity(
            BUFFER_BYTES,
            MultiGzDecoder::new(whole),
        ))
    } else {
        Box::new(whole)
    })
}

struct Counted<R> {
    source: R,
    consumed: Arc<AtomicU64>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.source.read(buffer)?;
        self.consumed.fetch_add(read as u64, Ordering::Relaxed);
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> Vec<Option<String>> {
        let reader = decompress(Cursor::new(bytes.to_vec())).unwrap();
        let mut input = Input {
            name: String::new(),
            bytes: 0,
            reader,
            line: 0,
        };
        let mut lines = Vec::new();
        while let Some(line) = input.next().unwrap() {
            lines.push(match line {
                Line::Text(text) => Some(String::from_utf8(text).unwrap()),
                Line::TooLong => None,
            });
        }
        assert_eq!(input.line(), lines.len() as u64);
        lines
    }

    #[test]
    fn lines_with_and_without_an_end() {
        assert!(read(b"").is_empty());
        assert_eq!(read(b"a"), [Some("a".to_owned())]);
        assert_eq!(
            read(b"a\n\nb\n"),
            ["a", "", "b"].map(|line| Some(line.to_owned()))
        );
    }

    #[test]
    fn gzip_is_seen_in_the_bytes() {
        use std::io::Write;
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(b"a\nb\n").unwrap();
        let mut twice = gzip.finish().unwrap();
        twice.extend(twice.clone());
        assert_eq!(
            read(&twice),
            ["a", "b", "a", "b"].map(|line| Some(line.to_owned()))
        );
    }

    #[test]
    fn a_line_without_an_end_does_not_fill_the_memory() {
        let mut bytes = vec![b'x'; MAX_LINE_BYTES];
        bytes.extend(b"\n");
        assert!(read(&bytes)[0].is_some());
        bytes.splice(0..0, b"xy".iter().copied());
        bytes.extend(b"z\n");
        assert_eq!(read(&bytes), [None, Some("z".to_owned())]);
    }
}
