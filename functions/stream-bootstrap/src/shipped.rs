//! Streams and consumers as data: `nats/streams`, `nats/consumers`, or a directory of the operator's.

use std::path::Path;

use serde_json::Value;

use crate::compare::{Config, is_nothing};
use crate::object::{Kind, Object};
use base::error::Fatal;
use base::subject::overlap;
use protocol::endpoints::request_subjects;
use protocol::subject::{STREAM, WORKER};

/// File name and content. A test holds these lists against the directories.
const STREAMS: [(&str, &str); 2] = [
    (
        "CHAT_EVENTS.json",
        include_str!("../../../nats/streams/CHAT_EVENTS.json"),
    ),
    (
        "CHAT_MESSAGES.json",
        include_str!("../../../nats/streams/CHAT_MESSAGES.json"),
    ),
];
const CONSUMERS: [(&str, &str); 1] = [(
    "CHAT_MESSAGES.persist-message.json",
    include_str!("../../../nats/consumers/CHAT_MESSAGES.persist-message.json"),
)];

/// What no stream of ours may have, where its file says nothing about it; the server leaves out what is not set.
const NEVER: [&str; 8] = [
    "no_ack",
    "mirror",
    "sources",
    "sealed",
    "persist_mode",
    "subject_transform",
    "republish",
    "discard_new_per_subject",
];

/// What a file may not set, and what it would break.
const BROKEN_PROMISES: [(&str, &str); 6] = [
    (
        "persist_mode",
        "what is acknowledged would not be on the disk yet",
    ),
    ("no_ack", "nobody would hear that a message was taken"),
    ("sealed", "nothing could be appended"),
    ("mirror", "nothing could be appended"),
    ("sources", "others would append, in an order of their own"),
    (
        "subject_transform",
        "messages would stand under other subjects than they were published to",
    ),
];

/// Everything that is to be there: streams first, then their consumers.
#[derive(Debug)]
pub struct Shipped {
    objects: Vec<Object>,
}

impl Shipped {
    /// From `directory`, where one is given; else as this version ships it.
    ///
    /// # Errors
    /// A file that cannot be read, is no JSON object or does not name what its file name names; the log or its
    /// consumer is missing; a stream would answer requests in a function's place, would break a promise, or has
    /// several replicas and nobody said that they may.
    pub fn read(directory: Option<&Path>, allow_replicas: bool) -> Result<Shipped, Fatal> {
        let (streams, consumers) = match directory {
            None => (owned(&STREAMS), owned(&CONSUMERS)),
            Some(directory) => (
                files(&directory.join("streams"))?,
                files(&directory.join("consumers"))?,
            ),
        };
        let streams = streams.iter().map(|(file, text)| stream(file, text));
        let consumers = consumers.iter().map(|(file, text)| consumer(file, text));
        let objects = streams
            .chain(consumers)
            .collect::<Result<Vec<Object>, Fatal>>()?;
        let wanted = [
            Kind::Stream {
                name: STREAM.to_owned(),
            },
            Kind::Consumer {
                stream: STREAM.to_owned(),
                name: WORKER.to_owned(),
            },
        ];
        if let Some(missing) = wanted
            .iter()
            .find(|wanted| !objects.iter().any(|object| object.kind == **wanted))
        {
            return Err(Fatal::new(format!(
                "configuration: BOOTSTRAP_CONFIG has no file for the {missing}"
            )));
        }
        let shipped = Shipped { objects };
        if let Some(sentence) = shipped
            .streams()
            .find_map(|stream| broken_promise(stream, allow_replicas))
        {
            return Err(Fatal::new(format!("configuration: {sentence}")));
        }
        let sentence = shipped
            .streams()
            .flat_map(|object| swallowed(&object.kind.to_string(), &subjects(&object.config)))
            .next();
        match sentence {
            Some(sentence) => Err(Fatal::new(format!("configuration: {sentence}"))),
            None => Ok(shipped),
        }
    }

    /// The streams.
    pub fn streams(&self) -> impl Iterator<Item = &Object> {
        self.objects
            .iter()
            .filter(|object| matches!(object.kind, Kind::Stream { .. }))
    }

    /// Everything.
    pub fn objects(&self) -> &[Object] {
        &self.objects
    }
}

/// What a stream may not be like, in one sentence.
fn broken_promise(stream: &Object, allow_replicas: bool) -> Option<String> {
    let Object { kind, config } = stream;
    let value = |field: &str| config.get(field).unwrap_or(&Value::Null);
    let replicas = value("num_replicas").as_u64().unwrap_or(1);
    if replicas > 1 && !allow_replicas {
        return Some(format!(
            "{kind} has num_replicas {replicas}: followers answer reads, so a page may lack what was acknowledged; \
             set it to 1, or BOOTSTRAP_ALLOW_REPLICAS=true if you accept that"
        ));
    }
    let (field, why) = BROKEN_PROMISES
        .iter()
        .find(|(field, _)| !is_nothing(value(field)))?;
    Some(format!(
        "{kind} has {field} {}: {why}; leave it out",
        value(field)
    ))
}

/// A stream's `subjects`.
pub fn subjects(config: &Config) -> Vec<String> {
    let values = config.get("subjects").and_then(Value::as_array);
    values
        .into_iter()
        .flatten()
        .filter_map(|subject| subject.as_str().map(str::to_owned))
        .collect()
}

/// The requests that a stream with these subjects would answer in a function's place, a sentence each.
pub fn swallowed(stream: &str, subjects: &[String]) -> Vec<String> {
    let pairs = subjects.iter().flat_map(|subject| {
        request_subjects()
            .into_iter()
            .map(move |request| (subject, request))
    });
    pairs
        .filter(|(subject, request)| overlap(subject, request))
        .map(|(subject, request)| {
            format!("{stream} takes in {subject}, and so the request {request}: its acknowledgement would reach the caller before the answer; narrow that subject")
        })
        .collect()
}

fn owned(files: &[(&str, &str)]) -> Vec<(String, String)> {
    files
        .iter()
        .map(|(name, text)| ((*name).to_owned(), (*text).to_owned()))
        .collect()
}

fn files(directory: &Path) -> Result<Vec<(String, String)>, Fatal> {
    let unreadable = |path: &Path, error| {
        Fatal::new(format!(
            "configuration: BOOTSTRAP_CONFIG: {} cannot be read: {error}",
            path.display()
        ))
    };
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(|error| unreadable(directory, error))? {
        let path = entry.map_err(|error| unreadable(directory, error))?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "json")
        {
            let text = std::fs::read_to_string(&path).map_err(|error| unreadable(&path, error))?;
            found.push((
                path.file_name()
                    .unwrap_or_default()
                    .to_string_lossy()
                    .into_owned(),
                text,
            ));
        }
    }
    found.sort();
    Ok(found)
}

fn stream(file: &str, text: &str) -> Result<Object, Fatal> {
    let mut config = object(file, text)?;
    let name = named(file, &config, "name", file.trim_end_matches(".json"))?;
    // The server leaves it out.
    if config
        .get("persist_mode")
        .is_some_and(|value| value == "default")
    {
        config.remove("persist_mode");
    }
    for field in NEVER {
        config.entry(field).or_insert(Value::Null);
    }
    Ok(Object {
        kind: Kind::Stream { name },
        config,
    })
}

fn consumer(file: &str, text: &str) -> Result<Object, Fatal> {
    let config = object(file, text)?;
    let (stream, name) = file
        .trim_end_matches(".json")
        .split_once('.')
        .ok_or_else(|| {
            Fatal::new(format!(
                "configuration: consumers/{file} must be called <stream>.<consumer>.json"
            ))
        })?;
    let name = named(file, &config, "durable_name", name)?;
    Ok(Object {
        kind: Kind::Consumer {
            stream: stream.to_owned(),
            name,
        },
        config,
    })
}

fn object(file: &str, text: &str) -> Result<Config, Fatal> {
    serde_json::from_str(text).map_err(|error| {
        Fatal::new(format!(
            "configuration: {file} is not a JSON object: {error}"
        ))
    })
}

fn named(file: &str, config: &Config, field: &str, name: &str) -> Result<String, Fatal> {
    match config.get(field).and_then(Value::as_str) {
        Some(said) if said == name => Ok(name.to_owned()),
        _ => Err(Fatal::new(format!(
            "configuration: {file} must say \"{field}\": \"{name}\", as the file is called"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_in_nats_is_shipped() {
        let nats = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../nats");
        assert_eq!(files(&nats.join("streams")).unwrap(), owned(&STREAMS));
        assert_eq!(files(&nats.join("consumers")).unwrap(), owned(&CONSUMERS));
    }

    #[test]
    fn what_is_shipped_is_the_log_its_worker_and_the_events() {
        let shipped = Shipped::read(None, false).unwrap();
        let subjects: Vec<Vec<String>> = shipped
            .streams()
            .map(|stream| subjects(&stream.config))
            .collect();
        assert_eq!(
            subjects,
            [
                vec![protocol::subject::EVENTS.to_owned()],
                protocol::subject::STREAM_SUBJECTS
                    .map(str::to_owned)
                    .to_vec()
            ]
        );
        let labels: Vec<String> = shipped
            .objects()
            .iter()
            .map(|object| object.kind.to_string())
            .collect();
        assert_eq!(
            labels,
            [
                "stream CHAT_EVENTS",
                "stream CHAT_MESSAGES",
                "consumer CHAT_MESSAGES/persist-message"
            ]
        );
    }

    #[test]
    fn a_wrong_directory_is_named_in_one_line() {
        let folder =
            std::env::temp_dir().join(format!("scrollback-shipped-{}", std::process::id()));
        for part in ["streams", "consumers"] {
            std::fs::create_dir_all(folder.join(part)).unwrap();
        }
        let stream = folder.join("streams/CHAT_MESSAGES.json");
        let consumer = folder.join("consumers/CHAT_MESSAGES.persist-message.json");
        let line = || Shipped::read(Some(&folder), false).unwrap_err().to_string();
        assert!(
            line().contains("no file for the stream CHAT_MESSAGES"),
            "{}",
            line()
        );
        std::fs::write(&stream, r#"["chat.*"]"#).unwrap();
        assert!(
            line().contains("CHAT_MESSAGES.json is not a JSON object"),
            "{}",
            line()
        );
        std::fs::write(&stream, r#"{"name": "OTHER"}"#).unwrap();
        assert!(
            line().contains(r#"must say "name": "CHAT_MESSAGES""#),
            "{}",
            line()
        );
        std::fs::write(
            &stream,
            r#"{"name": "CHAT_MESSAGES", "subjects": ["chat.>"]}"#,
        )
        .unwrap();
        std::fs::write(&consumer, r#"{"durable_name": "persist-message"}"#).unwrap();
        assert!(
            line().contains("takes in chat.>, and so the request chat.send.*.*"),
            "{}",
            line()
        );
        std::fs::write(
            &stream,
            r#"{"name": "CHAT_MESSAGES", "subjects": ["chat.*"]}"#,
        )
        .unwrap();
        assert_eq!(
            Shipped::read(Some(&folder), false).unwrap().objects().len(),
            2
        );
        for (field, named) in [
            (
                r#""num_replicas": 3"#,
                "stream CHAT_MESSAGES has num_replicas 3: followers answer reads",
            ),
            (
                r#""persist_mode": "async""#,
                r#"stream CHAT_MESSAGES has persist_mode "async": what is acknowledged would not be on the disk"#,
            ),
            (r#""no_ack": true"#, "has no_ack true: nobody would hear"),
            (
                r#""sealed": true"#,
                "has sealed true: nothing could be appended",
            ),
            (r#""mirror": {"name": "X"}"#, "has mirror"),
            (r#""sources": [{"name": "X"}]"#, "has sources"),
            (
                r#""subject_transform": {"src": "a", "dest": "b"}"#,
                "has subject_transform",
            ),
        ] {
            std::fs::write(
                &stream,
                format!(r#"{{"name": "CHAT_MESSAGES", "subjects": ["chat.*"], {field}}}"#),
            )
            .unwrap();
            assert!(line().contains(named), "{}", line());
            assert_eq!(
                Shipped::read(Some(&folder), true).is_ok(),
                field.contains("replicas"),
                "{field}"
            );
        }
        std::fs::remove_dir_all(&folder).unwrap();
        assert!(line().contains("cannot be read"), "{}", line());
    }
}
