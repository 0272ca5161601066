//! A request subject with the types it carries.

use std::marker::PhantomData;

use crate::error::Refusal;

/// A subject with names to fill in, such as `chat.history.{room}`. Each name is one token, and all
/// names stand at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SubjectTemplate {
    /// The template as written.
    pub text: &'static str,
    fewest_names: usize,
}

impl SubjectTemplate {
    /// From a template as written, such as `chat.history.{room}`.
    pub const fn new(text: &'static str) -> SubjectTemplate {
        SubjectTemplate {
            text,
            fewest_names: 1,
        }
    }

    /// Narrows the [`subscription`](Self::subscription): subjects with fewer names than `names`
    /// belong to somebody else.
    #[must_use]
    pub const fn with_fewest_names(self, names: usize) -> SubjectTemplate {
        SubjectTemplate {
            fewest_names: names,
            ..self
        }
    }

    /// What stands before the first name: `chat.history.`. The whole subject when it has no names.
    pub fn prefix(&self) -> &'static str {
        let end = self.text.find('{').unwrap_or(self.text.len());
        &self.text[..end]
    }

    /// What each name stands for, in order: `room`.
    pub fn names(&self) -> Vec<&'static str> {
        let names = self.text[self.prefix().len()..].split('.');
        names
            .filter(|name| !name.is_empty())
            .map(|name| name.trim_matches(['{', '}']))
            .collect()
    }

    /// Every valid subject as a NATS pattern: `chat.history.*`.
    pub fn wildcard(&self) -> String {
        self.subject(&vec!["*"; self.names().len()])
    }

    /// What a function subscribes to. Wider than the valid subjects, because a caller who gets a
    /// name wrong (`chat.history.a.b`) should be answered with a 400 and not with silence.
    pub fn subscription(&self) -> String {
        if self.names().is_empty() {
            return self.text.to_owned();
        }
        let fixed = "*.".repeat(self.fewest_names - 1);
        format!("{}{fixed}>", self.prefix())
    }

    /// The subject with these names filled in. Nothing is checked: a test may ask a wrong subject.
    pub fn subject(&self, names: &[&str]) -> String {
        format!("{}{}", self.prefix(), names.join("."))
    }

    /// The names in `subject`, dots included; empty when there are none.
    pub fn names_of<'a>(&self, subject: &'a str) -> &'a str {
        subject.strip_prefix(self.prefix()).unwrap_or_default()
    }

    /// The prefix, when the first name after it is the user who asks.
    pub fn prefix_of_user(&self) -> Option<&'static str> {
        let first = self.names().first().copied();
        (first == Some("user")).then(|| self.prefix())
    }
}

/// An endpoint of a function, with the types of its request `Q` and its reply `R`.
#[derive(Debug)]
pub struct Endpoint<Q, R> {
    /// The endpoint's name in the service API.
    pub name: &'static str,
    /// The subjects it answers.
    pub template: SubjectTemplate,
    /// What it does, in one line without a full stop.
    pub description: &'static str,
    types: PhantomData<fn(Q) -> R>,
}

impl<Q, R> Endpoint<Q, R> {
    /// See the fields.
    pub const fn new(
        name: &'static str,
        template: SubjectTemplate,
        description: &'static str,
    ) -> Self {
        Endpoint {
            name,
            template,
            description,
            types: PhantomData,
        }
    }

    /// The subject of a request with these names.
    pub fn subject(&self, names: &[&str]) -> String {
        self.template.subject(names)
    }

    /// What the service API says about it: the description and, where there are names to fill in,
    /// the template.
    pub fn about(&self) -> String {
        if self.template.names().is_empty() {
            self.description.to_owned()
        } else {
            format!("{}: {}", self.description, self.template.text)
        }
    }
}

impl<Q, R> Clone for Endpoint<Q, R> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<Q, R> Copy for Endpoint<Q, R> {}

/// A request that can be parsed from the names in its subject and from its body.
pub trait ParseRequest: Sized {
    /// # Errors
    /// A [`Refusal`] that states what to correct.
    fn parse(names: &str, body: &[u8]) -> Result<Self, Refusal>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_follows_from_the_template() {
        let page = SubjectTemplate::new("chat.history.{room}");
        assert_eq!(page.prefix(), "chat.history.");
        assert_eq!(page.names(), ["room"]);
        assert_eq!(page.wildcard(), "chat.history.*");
        assert_eq!(page.subscription(), "chat.history.>");
        assert_eq!(page.subject(&["general"]), "chat.history.general");
        assert_eq!(page.names_of("chat.history.a.b"), "a.b");
        assert_eq!(page.names_of("chat.history."), "");
        assert_eq!(page.prefix_of_user(), None);

        let direct = SubjectTemplate::new("dm.send.{user}.{peer}").with_fewest_names(2);
        assert_eq!(direct.wildcard(), "dm.send.*.*");
        assert_eq!(direct.subscription(), "dm.send.*.>");
        assert_eq!(direct.prefix_of_user(), Some("dm.send."));

        let plain = SubjectTemplate::new("bootstrap.check");
        assert_eq!(plain.names(), [""; 0]);
        assert_eq!(plain.subject(&[]), "bootstrap.check");
        assert_eq!(plain.wildcard(), "bootstrap.check");
        assert_eq!(plain.subscription(), "bootstrap.check");
        assert_eq!(plain.names_of("bootstrap.check"), "");
    }

    #[test]
    fn the_service_api_shows_a_template_that_has_names() {
        let page: Endpoint<(), ()> = Endpoint::new(
            "history",
            SubjectTemplate::new("chat.history.{room}"),
            "A page",
        );
        assert_eq!(page.about(), "A page: chat.history.{room}");
        let check: Endpoint<(), ()> =
            Endpoint::new("check", SubjectTemplate::new("bootstrap.check"), "A check");
        assert_eq!(check.about(), "A check");
    }
}
