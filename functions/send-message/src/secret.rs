//! The `Nats-Msg-Id` of a message with a client-supplied id: nobody can guess it, and every replica
//! computes the same one.

use std::fmt;

use sha2::{Digest, Sha256};

/// SHA-256's block size in bytes.
const BLOCK: usize = 64;
/// How many of the code's 32 bytes are used: enough that nobody guesses them.
const LENGTH: usize = 16;

/// Known only to the replicas of `send-message`, which share a database.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Vec<u8>);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

impl Secret {
    pub fn new(bytes: Vec<u8>) -> Secret {
        Secret(bytes)
    }

    /// `{user}:{code}`, where the code is an HMAC of user and id.
    pub fn message_id(&self, user: &str, id: &str) -> String {
        // No name contains U+0000, so no two pairs give the same text.
        let code = self.hmac(&[user.as_bytes(), &[0], id.as_bytes()].concat());
        let hex: String = code
            .iter()
            .take(LENGTH)
            .map(|byte| format!("{byte:02x}"))
            .collect();
        format!("{user}:{hex}")
    }

    /// HMAC-SHA-256, RFC 2104.
    fn hmac(&self, text: &[u8]) -> [u8; 32] {
        let mut key = [0; BLOCK];
        if self.0.len() > BLOCK {
            key[..32].copy_from_slice(&Sha256::digest(&self.0));
        } else {
            key[..self.0.len()].copy_from_slice(&self.0);
        }
        let inner = Sha256::new()
            .chain_update(key.map(|byte| byte ^ 0x36))
            .chain_update(text)
            .finalize();
        Sha256::new()
            .chain_update(key.map(|byte| byte ^ 0x5c))
            .chain_update(inner)
            .finalize()
            .into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// RFC 4231, test cases 2 and 6.
    #[test]
    fn the_code_is_hmac_sha_256() {
        let code = Secret::new(b"Jefe".to_vec()).hmac(b"what do ya want for nothing?");
        assert_eq!(
            hex(&code),
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
        );
        let code = Secret::new(vec![0xaa; 131])
            .hmac(b"Test Using Larger Than Block-Size Key - Hash Key First");
        assert_eq!(
            hex(&code),
            "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54"
        );
    }

    #[test]
    fn user_and_id_make_the_message_id() {
        let one = Secret::new(vec![1; 32]);
        let other = Secret::new(vec![2; 32]);
        let id = one.message_id("ann", "a");
        assert!(id.starts_with("ann:") && id.len() == 4 + 2 * LENGTH, "{id}");
        assert_eq!(one.message_id("ann", "a"), id);
        for another in [
            one.message_id("ann", "b"),
            one.message_id("bob", "a"),
            other.message_id("ann", "a"),
        ] {
            assert_ne!(another, id);
        }
        assert!(one.message_id("ann", "\r\nX: \u{e9}\u{1}").is_ascii());
        assert_eq!(format!("{one:?}"), "Secret");
    }
}
