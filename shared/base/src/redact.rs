//! Secrets left out of what is printed.

/// Stands for a secret.
pub const REDACTED: &str = "…";

/// One URL or several with commas between, as it may be printed: without user and password. Where a password holds
/// characters that should have been escaped, rather too much is left out.
pub fn without_userinfo(urls: &str) -> String {
    let mut shown = String::new();
    let mut rest = urls;
    while let Some(at) = rest.find('@') {
        let before = &rest[..at];
        let begin = before
            .rfind("://")
            .map(|scheme| scheme + 3)
            .or_else(|| before.rfind(',').map(|comma| comma + 1));
        shown.push_str(&before[..begin.unwrap_or(0)]);
        rest = &rest[at + 1..];
    }
    shown + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_printed_without_user_and_password() {
        for (url, shown) in [
            ("nats://here:4222", "nats://here:4222"),
            ("nats://u:p@here:4222", "nats://here:4222"),
            ("u:p@here", "here"),
            ("nats://a,u:p@b", "nats://b"),
            ("a,u:p@b", "a,b"),
            (
                "nats://a:1,nats://u:p@b:2,nats://t@c",
                "nats://a:1,nats://b:2,nats://c",
            ),
        ] {
            assert_eq!(without_userinfo(url), shown);
        }
        let unescaped = without_userinfo("nats://bob:hun,@ter://@two@here/x");
        assert!(
            !unescaped.contains("bob") && !unescaped.contains("hun"),
            "{unescaped}"
        );
    }
}
