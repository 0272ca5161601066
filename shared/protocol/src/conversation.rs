//! Conversations: a room, or the direct messages between two users.

use crate::name::{Room, User, split_names};
use base::endpoint::SubjectTemplate;
use base::error::Refusal;

/// A room, or the direct messages between two users. Both users name the same conversation.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Conversation {
    /// A room.
    Room(Room),
    /// Two users, sorted by name.
    Direct(User, User),
}

impl Conversation {
    /// The conversation of two users, given in either order.
    pub fn direct(one: User, other: User) -> Conversation {
        if one.as_str() <= other.as_str() {
            Conversation::Direct(one, other)
        } else {
            Conversation::Direct(other, one)
        }
    }

    /// The name as it is stored and as readers get it: `general`, `__admin__`, `dm.alice.bob`.
    pub fn name(&self) -> String {
        match self {
            Conversation::Room(room) => room.as_str().to_owned(),
            Conversation::Direct(first, second) => direct_name(first.as_str(), second.as_str()),
        }
    }

    /// The stream's subjects for its messages.
    pub fn stream_subjects(&self) -> Vec<String> {
        match self {
            Conversation::Room(room) => vec![room.stream_subject()],
            Conversation::Direct(one, other) if one == other => {
                vec![crate::subject::direct_subject(one, other)]
            }
            Conversation::Direct(one, other) => vec![
                crate::subject::direct_subject(one, other),
                crate::subject::direct_subject(other, one),
            ],
        }
    }

    /// The two users; empty for a room.
    pub fn participants(&self) -> Vec<&str> {
        match self {
            Conversation::Room(_) => Vec::new(),
            Conversation::Direct(one, other) => vec![one.as_str(), other.as_str()],
        }
    }

    /// The stream's subject for its deletions.
    pub fn change_subject(&self) -> String {
        crate::change::change_subject(&self.name())
    }
}

/// The name of the conversation of two users who are sorted already.
pub(crate) fn direct_name(first: &str, second: &str) -> String {
    format!("dm.{first}.{second}")
}

/// A request about a conversation, whose subject ends with `{user}.{peer}`. It has a type of its
/// own, so that the subject of a room, which any user may ask for, is never parsed as that of two
/// users.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Direct<Q>(pub Q);

/// From `{user}.{peer}`: who asks, and about which conversation.
pub(crate) fn user_and_peer(
    names: &str,
    template: &SubjectTemplate,
) -> Result<(User, Conversation), Refusal> {
    let (user, peer) = split_names(names, template)?;
    let user = User::parse(user)?;
    let peer = User::parse(peer)?;
    Ok((user.clone(), Conversation::direct(user, peer)))
}

/// From `{user}.{room}`: who asks, and about which conversation.
pub(crate) fn user_and_room(
    names: &str,
    template: &SubjectTemplate,
) -> Result<(User, Conversation), Refusal> {
    let (user, room) = split_names(names, template)?;
    Ok((User::parse(user)?, Conversation::Room(Room::parse(room)?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_users_have_one_conversation() {
        let user = |name| User::parse(name).unwrap();
        let one = Conversation::direct(user("bob"), user("alice"));
        assert_eq!(one, Conversation::direct(user("alice"), user("bob")));
        assert_eq!(
            (one.name().as_str(), one.change_subject().as_str()),
            ("dm.alice.bob", "change.dm.alice.bob")
        );
        assert_eq!(one.stream_subjects(), ["dm.alice.bob", "dm.bob.alice"]);
        assert_eq!(
            Conversation::direct(user("ann"), user("ann")).stream_subjects(),
            ["dm.ann.ann"]
        );
        let admin = Conversation::Room(Room::parse("__admin__").unwrap());
        assert_eq!(
            (admin.stream_subjects(), admin.change_subject()),
            (
                vec!["admin.*".to_owned()],
                "change.chat.__admin__".to_owned()
            )
        );
    }
}
