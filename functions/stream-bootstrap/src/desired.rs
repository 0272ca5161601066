//! The desired state of streams and consumers: the files in `nats/streams` and `nats/consumers`, or
//! those in a directory that the operator names.

use std::path::Path;

use serde_json::Value;

use crate::compare::{Config, is_unset};
use crate::object::{Kind, Object};
use base::error::Fatal;
use base::subject::overlap;
use protocol::endpoints::request_subjects;
use protocol::subject::{STREAM, WORKER};

/// File name and content. A test compares these lists with the directories.
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

/// Fields that no stream of ours may have unless its file sets them. The server does not report
/// fields that are unset, so each of these is compared with null.
const UNSET_BY_DEFAULT: [&str; 8] = [
    "no_ack",
    "mirror",
    "sources",
    "sealed",
    "persist_mode",
    "subject_transform",
    "republish",
    "discard_new_per_subject",
];

/// Fields that a file may not set, and which guarantee each of them would break.
const FORBIDDEN: [(&str, &str); 6] = [
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

/// Every stream and consumer that should exist: streams first, then their consumers.
#[derive(Debug)]
pub struct Desired {
    objects: Vec<Object>,
}

impl Desired {
    /// Reads the files in `directory`, or those built into this version if there is none.
    ///
    /// # Errors
    /// A file cannot be read, is not a JSON object, or its name differs from the name inside. The
    /// chat stream or its consumer is missing. A stream would capture requests, would break a
    /// guarantee, or has several replicas without `allow_replicas`.
    pub fn read(directory: Option<&Path>, allow_replicas: bool) -> Result<Desired, Fatal> {
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
        let desired = Desired { objects };
        match desired.mistake(allow_replicas) {
            Some(mistake) => Err(Fatal::new(format!("configuration: {mistake}"))),
            None => Ok(desired),
        }
    }

    /// The first thing that is wrong with this desired state, as a message.
    fn mistake(&self, allow_replicas: bool) -> Option<String> {
        let required = [
            Kind::Stream {
                name: STREAM.to_owned(),
            },
            Kind::Consumer {
                stream: STREAM.to_owned(),
                name: WORKER.to_owned(),
            },
        ];
        let exists = |kind: &Kind| self.objects.iter().any(|object| object.kind == *kind);
        if let Some(missing) = required.iter().find(|kind| !exists(kind)) {
            return Some(format!("BOOTSTRAP_CONFIG has no file for the {missing}"));
        }
        self.streams()
            .find_map(|stream| broken_guarantee(stream, allow_replicas))
            .or_else(|| {
                self.streams()
                    .flat_map(|object| {
                        captured_requests(&object.kind.to_string(), &subjects(&object.config))
                    })
                    .next()
            })
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

/// The guarantee that this stream's configuration would break, as a message.
fn broken_guarantee(stream: &Object, allow_replicas: bool) -> Option<String> {
    let Object { kind, config } = stream;
    let value = |field: &str| config.get(field).unwrap_or(&Value::Null);
    let replicas = value("num_replicas").as_u64().unwrap_or(1);
    if replicas > 1 && !allow_replicas {
        return Some(format!(
            "{kind} has num_replicas {replicas}: followers answer reads, so a page may lack what \
             was acknowledged; set it to 1, or BOOTSTRAP_ALLOW_REPLICAS=true if you accept that"
        ));
    }
    let (field, why) = FORBIDDEN
        .iter()
        .find(|(field, _)| !is_unset(value(field)))?;
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

/// The requests that a stream with these subjects would capture, one message for each. JetStream's
/// acknowledgement would reach the caller before the function's answer.
pub fn captured_requests(stream: &str, subjects: &[String]) -> Vec<String> {
    let pairs = subjects.iter().flat_map(|subject| {
        request_subjects()
            .into_iter()
            .map(move |request| (subject, request))
    });
    pairs
        .filter(|(subject, request)| overlap(subject, request))
        .map(|(subject, request)| {
            format!(
                "{stream} takes in {subject}, and so the request {request}: its acknowledgement \
                 would reach the caller before the answer; narrow that subject"
            )
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
    // The default value; the server does not report it.
    if config
        .get("persist_mode")
        .is_some_and(|value| value == "default")
    {
        config.remove("persist_mode");
    }
    for field in UNSET_BY_DEFAULT {
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
        Some(value) if value == name => Ok(name.to_owned()),
        _ => Err(Fatal::new(format!(
            "configuration: {file} must say \"{field}\": \"{name}\", as the file is called"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_in_nats_is_built_in() {
        let nats = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../nats");
        assert_eq!(files(&nats.join("streams")).unwrap(), owned(&STREAMS));
        assert_eq!(files(&nats.join("consumers")).unwrap(), owned(&CONSUMERS));
    }

    #[test]
    fn the_desired_state_is_the_chat_stream_its_worker_and_the_events() {
        let desired = Desired::read(None, false).unwrap();
        let subjects: Vec<Vec<String>> = desired
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
        let labels: Vec<String> = desired
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

    /// An empty directory of the form that `BOOTSTRAP_CONFIG` expects.
    fn folder(name: &str) -> std::path::PathBuf {
        let name = format!("scrollback-desired-{name}-{}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        for part in ["streams", "consumers"] {
            std::fs::create_dir_all(folder.join(part)).unwrap();
        }
        folder
    }

    #[test]
    fn a_wrong_directory_is_named_in_one_line() {
        let folder = folder("wrong");
        let stream = folder.join("streams/CHAT_MESSAGES.json");
        let consumer = folder.join("consumers/CHAT_MESSAGES.persist-message.json");
        let line = || Desired::read(Some(&folder), false).unwrap_err().to_string();
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
            Desired::read(Some(&folder), false).unwrap().objects().len(),
            2
        );
        std::fs::remove_dir_all(&folder).unwrap();
        assert!(line().contains("cannot be read"), "{}", line());
    }

    #[test]
    fn a_field_that_breaks_a_guarantee_is_named() {
        let folder = folder("forbidden");
        let stream = folder.join("streams/CHAT_MESSAGES.json");
        let consumer = folder.join("consumers/CHAT_MESSAGES.persist-message.json");
        std::fs::write(&consumer, r#"{"durable_name": "persist-message"}"#).unwrap();
        let line = || Desired::read(Some(&folder), false).unwrap_err().to_string();
        for (field, named) in [
            (
                r#""num_replicas": 3"#,
                "stream CHAT_MESSAGES has num_replicas 3: followers answer reads",
            ),
            (
                r#""persist_mode": "async""#,
                r#"has persist_mode "async": what is acknowledged would not be on the disk"#,
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
                Desired::read(Some(&folder), true).is_ok(),
                field.contains("replicas"),
                "{field}"
            );
        }
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
