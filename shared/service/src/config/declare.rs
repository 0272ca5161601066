//! One declaration per variable: [`settings!`](crate::settings) makes from it the struct, its
//! defaults, its checks, and what `--help` and the configuration reference print.

use std::fmt::Display;
use std::ops::{Bound, RangeBounds};
use std::path::PathBuf;

use base::error::Fatal;
use base::redact::SecretUrl;
use secrecy::SecretString;
use serde::de::DeserializeOwned;

use super::{STANDARD, Vars};

/// Declares a struct whose fields are environment variables: `persist_batch` is `PERSIST_BATCH`.
///
/// ```
/// service::settings! {
///     /// What this function reads.
///     pub struct Settings {
///         /// Messages one statement stores, at most.
///         persist_batch: usize = 1_000, in 1..=10_000;
///         /// Days messages are kept.
///         expire_days: u32 = 30, in 0..=36_500 => "from 1 to 36500, or 0 for ever";
///         /// Where the database is.
///         database_url: base::redact::SecretUrl;
///         /// A directory instead of what is built in.
///         bootstrap_config: Option<std::path::PathBuf>;
///     }
/// }
/// ```
///
/// * `= …` is the default. A field with neither a default nor `Option` is required.
/// * `in …` is the range. Another value ends the program at start, with one line. The text after
///   `=>` replaces the range in that line and in the reference.
/// * The type decides whether it is a secret ([`Setting::SECRET`]). A secret is never in `Debug`,
///   and may be in a file that `NAME_FILE` names.
/// * The documentation comment is the help.
#[macro_export]
macro_rules! settings {
    (
        $(#[$outer:meta])*
        $vis:vis struct $name:ident {
            $(
                $(#[doc = $help:literal])+
                $field:ident: $type:ty
                    $(= $default:expr)?
                    $(, in $range:expr $(=> $words:literal)?)?
            );+ $(;)?
        }
    ) => {
        $(#[$outer])*
        #[derive(Debug, Clone, $crate::config::serde::Deserialize)]
        #[serde(crate = "service::config::serde")]
        $vis struct $name {
            $($(#[doc = $help])+ $vis $field: $type,)+
        }

        impl $crate::config::Declared for $name {
            const VARIABLES: &'static [$crate::config::Variable] = &[$(
                $crate::config::Variable {
                    field: stringify!($field),
                    help: concat!($($help),+),
                    kind: <$type as $crate::config::Setting>::KIND,
                    secret: <$type as $crate::config::Setting>::SECRET,
                    optional: <$type as $crate::config::Setting>::OPTIONAL,
                    default: $crate::settings!(@default $type $(, $default)?),
                    range: $crate::settings!(@range $type $(, $range $(=> $words)?)?),
                }
            ),+];

            fn check(&self) -> ::std::result::Result<(), $crate::config::OutOfRange> {
                $($(
                    $crate::config::in_range(
                        stringify!($field),
                        &self.$field,
                        &$range,
                        $crate::settings!(@words $($words)?),
                    )?;
                )?)+
                Ok(())
            }
        }
    };
    (@default $type:ty) => { None };
    (@default $type:ty, $default:expr) => {
        Some(|| {
            let default: <$type as $crate::config::Setting>::Default = $default;
            ::std::string::ToString::to_string(&default)
        })
    };
    (@range $type:ty) => { None };
    (@range $type:ty, $range:expr) => {
        Some(|| $crate::config::range_in_words::<$type, _>(&$range))
    };
    (@range $type:ty, $range:expr => $words:literal) => { Some(|| $words.to_owned()) };
    (@words) => { None };
    (@words $words:literal) => { Some($words) };
}

/// A type that a variable can have.
pub trait Setting {
    /// What a default is written as.
    type Default: Display;
    /// In one word, for the reference.
    const KIND: &'static str;
    /// Never printed, and may be in a file.
    const SECRET: bool = false;
    /// May be left out although there is no default.
    const OPTIONAL: bool = false;
}

macro_rules! types {
    ($($type:ty, $default:ty, $kind:literal, $secret:literal;)+) => {
        $(impl Setting for $type {
            type Default = $default;
            const KIND: &'static str = $kind;
            const SECRET: bool = $secret;
        })+
    };
}

types! {
    u32, u32, "integer", false;
    u64, u64, "integer", false;
    usize, usize, "integer", false;
    f64, f64, "number", false;
    bool, bool, "boolean", false;
    String, &'static str, "text", false;
    PathBuf, &'static str, "path", false;
    SecretString, &'static str, "text", true;
    SecretUrl, &'static str, "URL", true;
}

impl<T: Setting> Setting for Option<T> {
    type Default = T::Default;
    const KIND: &'static str = T::KIND;
    const SECRET: bool = T::SECRET;
    const OPTIONAL: bool = true;
}

/// A struct made by [`settings!`](crate::settings).
pub trait Declared: DeserializeOwned {
    /// Its variables, in the order of the declaration.
    const VARIABLES: &'static [Variable];

    /// # Errors
    /// The first variable that is out of its range.
    fn check(&self) -> Result<(), OutOfRange>;
}

/// What is known of a variable.
#[derive(Debug, Clone, Copy)]
pub struct Variable {
    /// Its name in lower case.
    pub field: &'static str,
    /// What it decides, in Markdown.
    pub help: &'static str,
    /// [`Setting::KIND`].
    pub kind: &'static str,
    /// [`Setting::SECRET`].
    pub secret: bool,
    /// [`Setting::OPTIONAL`].
    pub optional: bool,
    /// The value when it is not set.
    pub default: Option<fn() -> String>,
    /// What it may be, such as `1 to 10000`.
    pub range: Option<fn() -> String>,
}

impl Variable {
    /// Its name in the environment.
    pub fn name(&self) -> String {
        self.field.to_uppercase()
    }

    /// The function does not start without it.
    pub fn is_required(&self) -> bool {
        !self.optional && self.default.is_none()
    }
}

type Check = fn(&Vars) -> Result<(), Fatal>;

/// Everything that a function reads, known before it reads anything.
#[derive(Clone, Default)]
pub(crate) struct Declarations {
    variables: Vec<Variable>,
    checks: Vec<Check>,
}

impl Declarations {
    pub fn add<T: Declared>(&mut self) {
        self.variables.extend_from_slice(T::VARIABLES);
        self.checks.push(|vars| vars.read::<T>().map(drop));
    }

    pub fn variables(&self) -> &[Variable] {
        &self.variables
    }

    /// With those that libraries read.
    pub fn documented(&self) -> Vec<Variable> {
        [self.variables(), &STANDARD].concat()
    }

    /// # Errors
    /// Names the first variable that is missing or wrong.
    pub fn check(&self, vars: &Vars) -> Result<(), Fatal> {
        self.checks.iter().try_for_each(|check| check(vars))
    }
}

/// A value that is out of its range.
#[derive(Debug, thiserror::Error)]
#[error("configuration: {} must be {allowed}", .field.to_uppercase())]
pub struct OutOfRange {
    field: &'static str,
    allowed: String,
}

impl From<OutOfRange> for Fatal {
    fn from(error: OutOfRange) -> Fatal {
        Fatal::new(error.to_string())
    }
}

/// # Errors
/// `value` is not in `range`: says which end it is beyond, or `words`.
pub fn in_range<T: PartialOrd + Display, R: RangeBounds<T>>(
    field: &'static str,
    value: &T,
    range: &R,
    words: Option<&str>,
) -> Result<(), OutOfRange> {
    if range.contains(value) {
        return Ok(());
    }
    let allowed = match (words, range.start_bound(), range.end_bound()) {
        (Some(words), ..) => words.to_owned(),
        (None, _, Bound::Included(most)) if value > most => {
            format!("at most {}", number(field, most))
        }
        // Not a number is in no range, and ends here as well.
        (None, Bound::Included(least), _) => format!("at least {least}"),
        _ => range_in_words(range),
    };
    Err(OutOfRange { field, allowed })
}

/// Such as `1 to 10000`.
pub fn range_in_words<T: Display, R: RangeBounds<T>>(range: &R) -> String {
    match (range.start_bound(), range.end_bound()) {
        (Bound::Included(least), Bound::Included(most)) => format!("{least} to {most}"),
        (Bound::Included(least), _) => format!("at least {least}"),
        (_, Bound::Included(most)) => format!("at most {most}"),
        _ => "any".to_owned(),
    }
}

/// A number as text; milliseconds in words behind it where that is shorter.
fn number(field: &str, number: &impl Display) -> String {
    let digits = number.to_string();
    let in_words = match digits.parse::<u64>() {
        Ok(milliseconds) if field.ends_with("_ms") => duration(milliseconds),
        _ => None,
    };
    in_words.map_or(digits.clone(), |words| format!("{digits}, {words}"))
}

/// Whole days, hours, minutes or seconds.
fn duration(milliseconds: u64) -> Option<String> {
    [
        (86_400_000, "a day", "days"),
        (3_600_000, "an hour", "hours"),
        (60_000, "a minute", "minutes"),
        (1_000, "a second", "seconds"),
    ]
    .into_iter()
    .find(|(unit, ..)| milliseconds >= *unit && milliseconds.is_multiple_of(*unit))
    .map(|(unit, one, many)| match milliseconds / unit {
        1 => one.to_owned(),
        count => format!("{count} {many}"),
    })
}
