//! The order of messages: one sender's messages to one room are appended in the order in which they
//! arrived.
//!
//! Each pair of sender and room has a queue. A message takes its slot in the queue as soon as it
//! arrives, before anything is awaited, and keeps it until its sender has a reply. The messages at
//! the front are taken when their ids have been looked up and no other message of the queue is in
//! flight. Queues never wait for one another.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::mpsc;

/// Which queue: sender and room.
pub type Key = Arc<str>;

/// Every queue that contains something. `T` is a message that waits; it owns its [`Slot`].
pub struct Sequencer<T> {
    state: Mutex<State<T>>,
    /// Queues whose first message is ready. Weak, so that the task that reads them ends with the
    /// last sender.
    ready: mpsc::WeakUnboundedSender<Key>,
}

struct State<T> {
    queues: HashMap<Key, Queue<T>>,
    next_number: u64,
    /// How many messages we expect right now: the senders of the last batch were just answered.
    expected: usize,
}

/// Messages of one sender to one room.
struct Queue<T> {
    /// By ascending number; `None` while an id is looked up.
    waiting: VecDeque<(u64, Option<T>)>,
    /// Taken, and not answered yet.
    in_flight: usize,
    /// The queue's key was sent to the task that appends, and not received yet.
    announced: bool,
}

impl<T> Queue<T> {
    fn new(in_flight: usize) -> Queue<T> {
        Queue {
            waiting: VecDeque::new(),
            in_flight,
            announced: false,
        }
    }

    fn is_first_ready(&self) -> bool {
        matches!(self.waiting.front(), Some((_, Some(_))))
    }

    fn is_due(&self) -> bool {
        self.in_flight == 0 && !self.announced && self.is_first_ready()
    }
}

/// A message's slot in its queue; dropping it lets the next message pass.
pub struct Slot<T> {
    sequencer: Arc<Sequencer<T>>,
    position: Position,
}

/// Where a slot is.
#[derive(Debug, Clone)]
pub struct Position {
    key: Key,
    number: u64,
}

impl<T> fmt::Debug for Sequencer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sequencer").finish_non_exhaustive()
    }
}

impl<T> fmt::Debug for Slot<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slot")
            .field("number", &self.position.number)
            .finish_non_exhaustive()
    }
}

impl<T> Slot<T> {
    /// Which queue it is in.
    pub fn key(&self) -> &Key {
        &self.position.key
    }

    /// Where it is, for [`Sequencer::ready`].
    pub fn position(&self) -> Position {
        self.position.clone()
    }
}

impl<T> Drop for Slot<T> {
    fn drop(&mut self) {
        self.sequencer.leave(&self.position);
    }
}

impl<T> Sequencer<T> {
    pub fn new(ready: &mpsc::UnboundedSender<Key>) -> Arc<Sequencer<T>> {
        let state = State {
            queues: HashMap::new(),
            next_number: 0,
            expected: 0,
        };
        Arc::new(Sequencer {
            state: Mutex::new(state),
            ready: ready.downgrade(),
        })
    }

    /// The next slot in this queue.
    pub fn enter(self: &Arc<Self>, key: Key) -> Slot<T> {
        let mut state = self.lock();
        let number = state.number();
        let queue = state
            .queues
            .entry(key.clone())
            .or_insert_with(|| Queue::new(0));
        queue.waiting.push_back((number, None));
        self.slot(key, number)
    }

    /// A slot for a message that is appended at once: if no other message is in any queue, and none
    /// is expected.
    pub fn enter_fast_path(self: &Arc<Self>, key: &Key) -> Option<Slot<T>> {
        let mut state = self.lock();
        if state.expected > 0 || !state.queues.is_empty() {
            return None;
        }
        let number = state.number();
        state.queues.insert(key.clone(), Queue::new(1));
        Some(self.slot(key.clone(), number))
    }

    fn slot(self: &Arc<Self>, key: Key, number: u64) -> Slot<T> {
        Slot {
            sequencer: self.clone(),
            position: Position { key, number },
        }
    }

    /// So many messages are expected.
    pub fn expect(&self, messages: usize) {
        self.lock().expected = messages;
    }

    /// Puts a message into its slot: its id was looked up, or needs no lookup.
    pub fn ready(&self, position: &Position, message: T) {
        let mut state = self.lock();
        let Some(queue) = state.queues.get_mut(&position.key) else {
            return;
        };
        if let Ok(index) = queue.find(position.number)
            && let Some((_, slot)) = queue.waiting.get_mut(index)
        {
            *slot = Some(message);
        }
        self.announce(state, &position.key);
    }

    /// Takes the ready messages at the front of this queue, in order, until `fits` says no.
    pub fn take(&self, key: &Key, mut fits: impl FnMut(&T) -> bool) -> Vec<T> {
        let mut state = self.lock();
        let Some(queue) = state.queues.get_mut(key) else {
            return Vec::new();
        };
        let mut taken = Vec::new();
        while let Some((_, Some(message))) = queue.waiting.front()
            && fits(message)
        {
            taken.extend(queue.waiting.pop_front().and_then(|(_, message)| message));
        }
        // A queue of which nothing fits stays announced: the caller comes back to it.
        queue.announced = taken.is_empty() && queue.is_first_ready();
        queue.in_flight += taken.len();
        taken
    }

    fn leave(&self, Position { key, number }: &Position) {
        let mut state = self.lock();
        let Some(queue) = state.queues.get_mut(key) else {
            return;
        };
        match queue.find(*number) {
            // A message in the queue owns its slot, so this slot is empty.
            Ok(index) => drop(queue.waiting.remove(index)),
            Err(_) => queue.in_flight = queue.in_flight.saturating_sub(1),
        }
        if queue.waiting.is_empty() && queue.in_flight == 0 {
            state.queues.remove(key);
            return;
        }
        self.announce(state, key);
    }

    /// Notifies the task that appends when the first message of the queue is ready. If that task is
    /// gone, the messages are dropped, so that their senders get an error.
    fn announce(&self, mut state: MutexGuard<'_, State<T>>, key: &Key) {
        let Some(queue) = state.queues.get_mut(key).filter(|queue| queue.is_due()) else {
            return;
        };
        queue.announced = true;
        let ready = self.ready.upgrade();
        let sent = ready.is_some_and(|ready| ready.send(key.clone()).is_ok());
        if !sent {
            let lost = state.queues.remove(key);
            drop(state);
            // Dropped only now, because dropping their slots takes the lock.
            drop(lost);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Queue<T> {
    fn find(&self, number: u64) -> Result<usize, usize> {
        self.waiting
            .binary_search_by_key(&number, |(number, _)| *number)
    }
}

impl<T> State<T> {
    fn number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A message that is nothing but its slot.
    struct Waiting(Slot<Waiting>);

    fn ready(sequencer: &Sequencer<Waiting>, slot: Slot<Waiting>) {
        sequencer.ready(&slot.position(), Waiting(slot));
    }

    fn sequencer() -> (
        Arc<Sequencer<Waiting>>,
        mpsc::UnboundedReceiver<Key>,
        mpsc::UnboundedSender<Key>,
    ) {
        let (ready, queues) = mpsc::unbounded_channel();
        (Sequencer::new(&ready), queues, ready)
    }

    fn numbers(taken: &[Waiting]) -> Vec<u64> {
        taken
            .iter()
            .map(|waiting| waiting.0.position.number)
            .collect()
    }

    #[test]
    fn a_message_waits_for_those_before_it_in_its_queue_only() {
        let (sequencer, mut queues, _ready) = sequencer();
        let [ann, bob] = ["ann general", "bob general"].map(Key::from);
        let [one, two, three] = [(); 3].map(|()| sequencer.enter(ann.clone()));
        ready(&sequencer, two);
        assert!(queues.try_recv().is_err(), "the first is still looked up");
        ready(&sequencer, sequencer.enter(bob.clone()));
        assert_eq!(queues.try_recv().unwrap(), bob);
        ready(&sequencer, one);
        ready(&sequencer, three);
        assert_eq!(queues.try_recv().unwrap(), ann);
        let mut room = 2;
        let taken = sequencer.take(&ann, |_| {
            room -= 1;
            room >= 0
        });
        assert_eq!(numbers(&taken), [1, 2]);
        assert_eq!(numbers(&sequencer.take(&bob, |_| true)), [4]);
        let mut taken = taken.into_iter();
        drop(taken.next());
        assert!(queues.try_recv().is_err(), "one of them is in flight");
        drop(taken.next());
        assert_eq!(queues.try_recv().unwrap(), ann);
        assert_eq!(numbers(&sequencer.take(&ann, |_| true)), [3]);
        assert!(
            sequencer.lock().queues.is_empty(),
            "an empty queue is removed"
        );
    }

    #[test]
    fn an_answered_message_lets_the_others_pass() {
        let (sequencer, mut queues, _ready) = sequencer();
        let key = Key::from("ann general");
        let [one, two, three] = [(); 3].map(|()| sequencer.enter(key.clone()));
        ready(&sequencer, three);
        drop(two);
        assert!(queues.try_recv().is_err());
        drop(one);
        assert_eq!(queues.try_recv().unwrap(), key);
        assert_eq!(numbers(&sequencer.take(&key, |_| false)), [0_u64; 0]);
        assert!(queues.try_recv().is_err(), "it was announced");
        assert_eq!(numbers(&sequencer.take(&key, |_| true)), [3]);
    }

    #[test]
    fn the_fast_path_is_for_the_only_message() {
        let (sequencer, mut queues, _ready) = sequencer();
        let [ann, bob] = ["ann general", "bob general"].map(Key::from);
        let only = sequencer.enter_fast_path(&ann).unwrap();
        for _ in 0..3 {
            assert!(sequencer.enter_fast_path(&bob).is_none());
        }
        ready(&sequencer, sequencer.enter(ann.clone()));
        assert!(
            queues.try_recv().is_err(),
            "the one before it is on its way"
        );
        drop(only);
        assert_eq!(queues.try_recv().unwrap(), ann);
        drop(sequencer.take(&ann, |_| true));
        sequencer.expect(3);
        assert!(sequencer.enter_fast_path(&bob).is_none());
        sequencer.expect(0);
        assert!(sequencer.enter_fast_path(&bob).is_some());
    }

    #[test]
    fn senders_get_an_error_when_the_task_that_appends_is_gone() {
        let (sequencer, queues, _ready) = sequencer();
        drop(queues);
        let key = Key::from("ann general");
        let [one, two] = [(); 2].map(|()| sequencer.enter(key.clone()));
        ready(&sequencer, two);
        ready(&sequencer, one);
        assert!(sequencer.lock().queues.is_empty());
    }
}
