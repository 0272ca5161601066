use super::*;

crate::settings! {
    /// Every form of a declaration.
    struct Example {
        /// How many at once, at most,
        /// in two lines of `Markdown`.
        example_batch: usize = 1_000, in 1..=10_000;
        /// How fast.
        example_rate: f64 = 20.0, in 0.001..=1_000_000.0;
        /// How often.
        example_interval_ms: u64 = 60_000, in 1..=86_400_000;
        /// How long.
        example_days: u32 = 30, in 0..=365 => "from 1 to 365, or 0 for ever";
        /// More lines.
        example_verbose: bool = false;
        /// Who.
        example_name: String = "nobody";
        /// Where files are.
        example_folder: Option<PathBuf>;
        /// Where it is.
        example_url: SecretUrl;
        /// Who may.
        example_token: Option<SecretString>;
    }
}

const URL: (&str, &str) = ("EXAMPLE_URL", "nats://bob:hunter2@here");

fn vars(pairs: &[(&str, &str)]) -> Vars {
    let pairs = pairs.iter();
    Vars::from_pairs(pairs.map(|(name, value)| ((*name).to_owned(), (*value).to_owned())))
}

fn refusal(pairs: &[(&str, &str)]) -> String {
    let fatal = vars(pairs).read::<Example>().unwrap_err();
    fatal.to_string()
}

/// A file that is gone with the value.
struct File(PathBuf);

impl File {
    fn new(name: &str, text: &str) -> File {
        let name = format!("scrollback-config-{}-{name}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, text).unwrap();
        File(path)
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[test]
fn what_is_not_set_has_its_declared_default() {
    let read: Example = vars(&[URL, ("EXAMPLE_FOLDER", "")]).read().unwrap();
    assert_eq!(read.example_batch, 1_000);
    assert_eq!(read.example_rate, 20.0);
    assert_eq!(read.example_interval_ms, 60_000);
    assert_eq!(read.example_days, 30);
    assert!(!read.example_verbose);
    assert_eq!(read.example_name, "nobody");
    assert_eq!(read.example_folder, None);
    assert!(read.example_token.is_none());
}

#[test]
fn what_is_set_counts() {
    let pairs = [
        URL,
        ("EXAMPLE_BATCH", "7"),
        ("EXAMPLE_RATE", "0.5"),
        ("EXAMPLE_VERBOSE", "true"),
        ("EXAMPLE_FOLDER", "/here"),
        ("EXAMPLE_DAYS", "0"),
    ];
    let read: Example = vars(&pairs).read().unwrap();
    assert_eq!((read.example_batch, read.example_days), (7, 0));
    assert_eq!(read.example_rate, 0.5);
    assert!(read.example_verbose);
    assert_eq!(read.example_folder.as_deref(), Some("/here".as_ref()));
    assert_eq!(read.example_url.expose(), URL.1);
}

#[test]
fn a_wrong_value_is_named_in_one_line() {
    for (name, value, line) in [
        (
            "EXAMPLE_BATCH",
            "0",
            "configuration: EXAMPLE_BATCH must be at least 1",
        ),
        (
            "EXAMPLE_BATCH",
            "10001",
            "configuration: EXAMPLE_BATCH must be at most 10000",
        ),
        (
            "EXAMPLE_RATE",
            "NaN",
            "configuration: EXAMPLE_RATE must be at least 0.001",
        ),
        (
            "EXAMPLE_RATE",
            "inf",
            "configuration: EXAMPLE_RATE must be at most 1000000",
        ),
        (
            "EXAMPLE_INTERVAL_MS",
            "86400001",
            "configuration: EXAMPLE_INTERVAL_MS must be at most 86400000, a day",
        ),
        (
            "EXAMPLE_DAYS",
            "366",
            "configuration: EXAMPLE_DAYS must be from 1 to 365, or 0 for ever",
        ),
        (
            "EXAMPLE_BATCH",
            "many",
            "configuration: invalid digit found in string while parsing value 'many' provided by \
             EXAMPLE_BATCH",
        ),
    ] {
        assert_eq!(refusal(&[URL, (name, value)]), line);
    }
    assert_eq!(refusal(&[]), "configuration: EXAMPLE_URL is not set");
}

#[test]
fn a_secret_may_be_in_a_file() {
    let file = File::new("token", "hunter2\r\n");
    let pairs = [URL, ("EXAMPLE_TOKEN_FILE", file.path())];
    let read: Example = vars(&pairs).read().unwrap();
    let token = read.example_token.unwrap();
    assert_eq!(secrecy::ExposeSecret::expose_secret(&token), "hunter2");

    let both = [pairs[0], pairs[1], ("EXAMPLE_TOKEN", "hunter2")];
    let line =
        "configuration: both EXAMPLE_TOKEN and EXAMPLE_TOKEN_FILE are set; unset one of them";
    assert_eq!(refusal(&both), line);

    let empty = File::new("empty", "\n");
    let line = refusal(&[URL, ("EXAMPLE_TOKEN_FILE", empty.path())]);
    assert!(line.ends_with(" is empty"), "{line}");

    // Not a secret: its file is not read, and is no variable of ours.
    let name = [URL, ("EXAMPLE_NAME_FILE", file.path())];
    let read: Example = vars(&name).read().unwrap();
    assert_eq!(read.example_name, "nobody");
}

#[test]
fn a_secret_is_never_printed() {
    let pairs = [URL, ("EXAMPLE_TOKEN", "hunter2")];
    let printed = format!("{:?}", vars(&pairs).read::<Example>().unwrap());
    assert!(printed.contains("nats://here"), "{printed}");
    assert!(!printed.contains("hunter2"), "{printed}");
}

#[test]
#[cfg(unix)]
fn a_value_that_is_not_utf_8_is_named() {
    use std::os::unix::ffi::OsStringExt;
    let mut vars = vars(&[URL]);
    vars.insert("EXAMPLE_NAME".into(), OsString::from_vec(vec![0xff]));
    let fatal = vars.read::<Example>().unwrap_err();
    assert_eq!(
        fatal.to_string(),
        "configuration: EXAMPLE_NAME is not UTF-8"
    );
}

#[test]
fn a_variable_that_nobody_reads_is_named() {
    let pairs = [
        // Read.
        URL,
        ("EXAMPLE_TOKEN_FILE", "hunter2"),
        // Nothing like ours.
        ("PATH", "/bin"),
        ("PERSIST_BATCH", "1"),
        // Set by others.
        ("EXAMPLE_SERVICE_HOST", "10.0.0.1"),
        ("EXAMPLE_PORT_4222_TCP", "tcp://10.0.0.1"),
        ("EXAMPLE_FUNCTION_PASSWORD", "hunter2"),
        // Mistakes.
        ("EXAMPLE_BACTH", "hunter2"),
        ("EXMAPLE_URL", "hunter2"),
        ("EXAMPLE_SOMETHING_ELSE_ALTOGETHER", "hunter2"),
        ("EXAMPLE_NAME_FILE", "hunter2"),
    ];
    let nobody = "is set, and nothing here reads it";
    let expected = [
        format!("EXAMPLE_BACTH {nobody}; did you mean EXAMPLE_BATCH?"),
        format!("EXAMPLE_NAME_FILE {nobody}: only secrets are read from files; set EXAMPLE_NAME"),
        format!("EXAMPLE_SOMETHING_ELSE_ALTOGETHER {nobody}; --help lists the variables"),
        format!("EXMAPLE_URL {nobody}; did you mean EXAMPLE_URL?"),
    ];
    assert_eq!(unknown(&vars(&pairs), Example::VARIABLES), expected);
}

/// Every program may have a `MAX_…`.
#[test]
fn only_a_misspelling_of_a_common_name_is_a_mistake() {
    let pairs = [("MAX_JOBS", "4"), ("MAX_WAITNG_BYTES", "4")];
    let found = unknown(&vars(&pairs), RequestVariables::VARIABLES);
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(
        found[0].ends_with("did you mean MAX_WAITING_BYTES?"),
        "{found:?}"
    );
}

#[test]
fn help_shows_all_that_is_declared() {
    let help = help(Example::VARIABLES);
    for line in help.lines() {
        assert!(line.len() <= 100, "{line}");
    }
    let words = help.split_whitespace().collect::<Vec<_>>().join(" ");
    for shown in [
        "EXAMPLE_BATCH How many at once, at most, in two lines of Markdown. Default: 1000. Range: \
         1 to 10000.",
        "EXAMPLE_DAYS How long. Default: 30. Range: from 1 to 365, or 0 for ever.",
        "EXAMPLE_FOLDER Where files are. EXAMPLE_URL",
        "EXAMPLE_URL Where it is. Required. Or EXAMPLE_URL_FILE.",
        "EXAMPLE_TOKEN Who may. Or EXAMPLE_TOKEN_FILE.",
    ] {
        assert!(words.contains(shown), "{shown}\n{help}");
    }
}

#[test]
fn a_program_reads_what_is_declared() {
    let json = json(Example::VARIABLES);
    let batch = serde_json::json!({
        "name": "EXAMPLE_BATCH", "type": "integer", "required": false, "default": "1000",
        "range": "1 to 10000", "secret": false,
        "help": "How many at once, at most, in two lines of `Markdown`.",
    });
    assert_eq!(json[0], batch);
    let url = json
        .as_array()
        .unwrap()
        .iter()
        .find(|variable| variable["name"] == "EXAMPLE_URL")
        .unwrap();
    assert_eq!(
        (&url["required"], &url["secret"]),
        (&true.into(), &true.into())
    );
    assert_eq!(url["default"], serde_json::Value::Null);
}
