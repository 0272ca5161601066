//! `nats/accounts.conf` as text: the lists of its users, and what they should be.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::PathBuf;

use base::subject::overlap;
use protocol::endpoints::ENDPOINTS;
use protocol::subject::OUTBOX_WAKE;

use super::table::{callable_by, root};

const COLUMNS: usize = 100;
const INDENT: &str = "            ";
/// What functions hear beside requests, replies and discovery.
const OTHER_SUBSCRIPTIONS: [(&str, &str); 1] = [("relay-outbox", OUTBOX_WAKE)];

pub struct Accounts {
    text: String,
}

impl Accounts {
    pub fn read() -> Accounts {
        let text = std::fs::read_to_string(path()).unwrap();
        Accounts { text }
    }

    pub fn write(&self) {
        std::fs::write(path(), &self.text).unwrap();
    }

    /// Renews the function's subscriptions, or adds a user for a function that has none. What else
    /// a function may publish is decided by hand.
    pub fn renew_function(&mut self, function: &str) {
        let lines = subscriptions(function);
        match self.list(function, "subscribe") {
            Some(range) => {
                let wanted: BTreeSet<String> = lines.iter().flatten().cloned().collect();
                if quoted(&self.text[range.clone()]) != wanted {
                    self.text.replace_range(range, &written(&lines));
                }
            }
            None => {
                let before = self.text.find("user: \"publisher\"").unwrap();
                let at = self.text[..before].rfind("      {\n").unwrap();
                self.text.insert_str(at, &new_user(function, &lines));
            }
        }
    }

    /// Adds the requests that a caller may publish by its role and does not yet.
    pub fn renew_caller(&mut self, user: &str) {
        let range = self.list(user, "publish").unwrap();
        let listed = quoted(&self.text[range.clone()]);
        let wanted = callable_by(user).map(|row| row.permission());
        let missing: BTreeSet<String> = wanted.filter(|one| !listed.contains(one)).collect();
        if !missing.is_empty() {
            let lines = written(&[missing.into_iter().collect()]);
            let end = self.text[..range.end].trim_end().len();
            self.text.replace_range(end..range.end, &lines);
        }
    }

    pub fn differences_of_function(&self, function: &str) -> Vec<String> {
        let (Some(subscribe), Some(publish)) = (
            self.list(function, "subscribe"),
            self.list(function, "publish"),
        ) else {
            return vec![new_user(function, &subscriptions(function))];
        };
        let heard = quoted(&self.text[subscribe]);
        let wanted = subscriptions(function).into_iter().flatten().collect();
        let mut found = compare(function, "subscribe", &heard, &wanted);

        let published = quoted(&self.text[publish]);
        let replies = replies(function).into();
        let needed: BTreeSet<String> = published.intersection(&replies).cloned().collect();
        found.extend(compare(function, "publish", &needed, &replies));
        // A function asks no other function.
        let requests = requests_in(&published);
        found.extend(compare(function, "publish", &requests, &BTreeSet::new()));
        found
    }

    /// Of a user who calls functions: the requests it may publish are those of its role.
    pub fn differences_of_caller(&self, user: &str) -> Vec<String> {
        let publish = self.list(user, "publish").unwrap();
        let requests = requests_in(&quoted(&self.text[publish]));
        let wanted = callable_by(user).map(|row| row.permission()).collect();
        compare(user, "publish", &requests, &wanted)
    }

    /// Where in the text the list stands, without its brackets.
    fn list(&self, user: &str, kind: &str) -> Option<Range<usize>> {
        let user = self.text.find(&format!("user: \"{user}\""))?;
        let head = format!("{kind}: [");
        let begin = user + self.text[user..].find(&head)? + head.len();
        let end = begin + self.text[begin..].find(']')?;
        Some(begin..end)
    }
}

fn path() -> PathBuf {
    root().join("nats/accounts.conf")
}

/// The strings of a list, comments left out.
fn quoted(list: &str) -> BTreeSet<String> {
    let lines = list.lines().map(str::trim);
    lines
        .filter(|line| !line.starts_with('#'))
        .flat_map(|line| line.split('"').skip(1).step_by(2))
        .map(str::to_owned)
        .collect()
}

fn requests_in(subjects: &BTreeSet<String>) -> BTreeSet<String> {
    let is_request = |subject: &&String| {
        let mut wildcards = ENDPOINTS.iter().map(|row| row.template.wildcard());
        wildcards.any(|wildcard| overlap(&wildcard, subject))
    };
    subjects.iter().filter(is_request).cloned().collect()
}

/// What a function needs to answer requests and to check its own health.
fn replies(function: &str) -> [String; 3] {
    [
        "_INBOX.>".to_owned(),
        "_R_.>".to_owned(),
        format!("$SRV.PING.{function}.*"),
    ]
}

/// The function's subscriptions, in groups: its inbox and its requests, then discovery.
fn subscriptions(function: &str) -> Vec<Vec<String>> {
    let mut first = vec![format!("_INBOX.{function}.>")];
    for row in ENDPOINTS.iter().filter(|row| row.function == function) {
        // Only as one of the queue group `q`, so that replicas share the requests.
        let requests = format!("{} q", row.permission());
        if !first.contains(&requests) {
            first.push(requests);
        }
    }
    let others = OTHER_SUBSCRIPTIONS
        .iter()
        .filter(|(name, _)| *name == function);
    first.extend(others.map(|(_, subject)| (*subject).to_owned()));
    let discovery = ["PING", "INFO", "STATS"].map(|verb| {
        let all = format!("$SRV.{verb}");
        let named = format!("{all}.{function}");
        let replica = format!("{named}.*");
        vec![all, named, replica]
    });
    std::iter::once(first).chain(discovery).collect()
}

/// A list as it stands between its brackets, each group on lines of its own.
fn written(groups: &[Vec<String>]) -> String {
    let mut text = String::from("\n");
    for group in groups {
        let mut line = INDENT.to_owned();
        for (number, subject) in group.iter().enumerate() {
            let separator = if number == 0 { "" } else { ", " };
            if line.len() + separator.len() + subject.len() + 2 > COLUMNS {
                text.push_str(&line);
                text.push('\n');
                line = format!("{INDENT}\"{subject}\"");
            } else {
                line.push_str(&format!("{separator}\"{subject}\""));
            }
        }
        text.push_str(&line);
        text.push('\n');
    }
    text + "          "
}

fn new_user(function: &str, subscriptions: &[Vec<String>]) -> String {
    let password = function.to_uppercase().replace('-', "_");
    let publish = written(&[replies(function).into()]);
    let subscribe = written(subscriptions);
    format!(
        "      {{\n        user: \"{function}\", password: ${password}_PASSWORD\n        \
         permissions {{\n          publish: [{publish}]\n          \
         subscribe: [{subscribe}]\n        }}\n      }}\n"
    )
}

fn compare(
    user: &str,
    list: &str,
    actual: &BTreeSet<String>,
    wanted: &BTreeSet<String>,
) -> Vec<String> {
    let side = |what: &str, subjects: Vec<&String>| {
        (!subjects.is_empty()).then(|| format!("{user}, {list}, {what}: {subjects:?}"))
    };
    let missing = side("missing", wanted.difference(actual).collect());
    let extra = side("too much", actual.difference(wanted).collect());
    missing.into_iter().chain(extra).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changed(from: &str, to: &str) -> Accounts {
        let Accounts { text } = Accounts::read();
        assert!(text.contains(from), "{from}");
        Accounts {
            text: text.replacen(from, to, 1),
        }
    }

    #[test]
    fn a_difference_is_found_and_named() {
        let accounts = changed("\"chat.history.> q\"", "\"chat.sync.> q\"");
        assert_eq!(
            accounts.differences_of_function("get-history"),
            [
                r#"get-history, subscribe, missing: ["chat.history.> q"]"#,
                r#"get-history, subscribe, too much: ["chat.sync.> q"]"#,
            ]
        );
        let accounts = changed("\"$SRV.PING.get-history.*\"", "\"deadletters.*\"");
        assert_eq!(
            accounts.differences_of_function("get-history"),
            [
                r#"get-history, publish, missing: ["$SRV.PING.get-history.*"]"#,
                r#"get-history, publish, too much: ["deadletters.*"]"#,
            ]
        );
        let accounts = changed("\"retention.*\", \"chat.history.>\"", "\"chat.read.>\"");
        assert_eq!(
            accounts.differences_of_caller("operator"),
            [
                r#"operator, publish, missing: ["chat.history.>", "retention.*"]"#,
                r#"operator, publish, too much: ["chat.read.>"]"#,
            ]
        );
    }

    #[test]
    fn a_caller_gets_what_it_lacks() {
        let mut accounts = changed("\"retention.*\", ", "");
        assert_eq!(accounts.differences_of_caller("operator").len(), 1);
        accounts.renew_caller("operator");
        assert_eq!(accounts.differences_of_caller("operator"), [""; 0]);
        let Accounts { text } = &accounts;
        assert!(
            text.contains("\n            \"retention.*\"\n          ]"),
            "{text}"
        );
    }

    #[test]
    fn a_function_without_a_user_gets_one() {
        let mut accounts = changed("user: \"get-history\"", "user: \"got-history\"");
        let [block] = &accounts.differences_of_function("get-history")[..] else {
            panic!("one difference, the whole user");
        };
        assert!(block.contains("password: $GET_HISTORY_PASSWORD"));
        let block = block.clone();
        accounts.renew_function("get-history");
        assert!(accounts.text.contains(&block));
        assert_eq!(accounts.differences_of_function("get-history"), [""; 0]);
    }
}
