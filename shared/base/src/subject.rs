//! NATS subjects and patterns.

/// The first token of inboxes, where replies go. Each user's inboxes begin with `_INBOX.{user}.`.
pub const INBOX: &str = "_INBOX";
/// The first token of replies that come through a service import.
pub const SERVICE_REPLY: &str = "_R_";

/// Whether `pattern` matches `subject`.
pub fn matches(pattern: &str, subject: &str) -> bool {
    let mut tokens = subject.split('.');
    for wanted in pattern.split('.') {
        match (wanted, tokens.next()) {
            (">", Some(_)) => return true,
            ("*", Some(_)) => {}
            (wanted, Some(token)) if wanted == token => {}
            (_, _) => return false,
        }
    }
    tokens.next().is_none()
}

/// Whether some subject matches both patterns.
pub fn overlap(one: &str, other: &str) -> bool {
    let mut left = one.split('.');
    let mut right = other.split('.');
    loop {
        match (left.next(), right.next()) {
            (None, None) => return true,
            (Some(">"), Some(_)) | (Some(_), Some(">")) => return true,
            (Some(a), Some(b)) if a == b || a == "*" || b == "*" => {}
            _ => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_overlap_when_a_subject_matches_both() {
        assert!(overlap("chat.>", "chat.history.*"));
        assert!(overlap("dm.*.*", "dm.inbox.*"));
        assert!(overlap("*.history.a", "chat.*.*"));
        assert!(!overlap("chat.*", "chat.history.*"));
        assert!(!overlap("chat.>", "chat"));
        assert!(!overlap("dm.*.*", "chat.inbox.*"));
    }

    #[test]
    fn a_pattern_matches_token_by_token() {
        for (pattern, subject, wanted) in [
            (">", "chat.general", true),
            ("chat.general", "chat.general", true),
            ("chat.general", "chat.general.x", false),
            ("chat.general.x", "chat.general", false),
            ("admin.*", "admin.alerts", true),
            ("admin.*", "admin", false),
            ("dm.*.bob", "dm.ann.bob", true),
            ("dm.*.bob", "dm.bob.ann", false),
            ("change.dm.>", "change.dm.ann.bob", true),
            ("change.dm.>", "change.dm", false),
        ] {
            assert_eq!(matches(pattern, subject), wanted, "{pattern} {subject}");
        }
    }
}
