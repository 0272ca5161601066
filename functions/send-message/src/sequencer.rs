//! The order of messages: what one sender writes to one room is appended in the order in which it came.
//!
//! Each sender and room has a queue of its own, a FIFO. A message takes its slot in the queue as soon as it comes, before
//! anything is awaited, and keeps it until its sender has an answer. The messages at the front go to the log
//! when their ids have been looked up and nothing of the same queue is in flight. Queues never wait for one another.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::mpsc;

use crate::commit::Waiting;

/// Which queue: sender and room.
pub type Key = Arc<str>;

/// Every queue that holds something.
#[derive(Debug)]
pub struct Sequencer {
    state: Mutex<State>,
    /// Queues whose first message is ready. Weak, so that the task that reads them ends with the last sender.
    ready: mpsc::WeakUnboundedSender<Key>,
}

#[derive(Debug, Default)]
struct State {
    queues: HashMap<Key, Queue>,
    next_number: u64,
    /// How many messages are to be expected right now: the senders of the last batch were just answered.
    expected: usize,
}

/// Messages of one sender to one room.
#[derive(Debug, Default)]
struct Queue {
    /// By ascending number; `None` while an id is looked up.
    waiting: VecDeque<(u64, Option<Waiting>)>,
    /// Taken to be appended, and not answered yet.
    in_flight: usize,
    /// The queue's key was sent to whoever appends, and not taken yet.
    announced: bool,
}

impl Queue {
    fn is_due(&self) -> bool {
        self.in_flight == 0 && !self.announced && matches!(self.waiting.front(), Some((_, Some(_))))
    }
}

/// A message's slot in its queue; dropping it lets the next message pass.
pub struct Slot {
    sequencer: Arc<Sequencer>,
    key: Key,
    number: u64,
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slot")
            .field("number", &self.number)
            .finish_non_exhaustive()
    }
}

impl Slot {
    /// Which queue it is in.
    pub fn key(&self) -> &Key {
        &self.key
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.sequencer.leave(&self.key, self.number);
    }
}

impl Sequencer {
    pub fn new(ready: &mpsc::UnboundedSender<Key>) -> Arc<Sequencer> {
        Arc::new(Sequencer {
            state: Mutex::default(),
            ready: ready.downgrade(),
        })
    }

    /// The next slot in this queue.
    pub fn enter(self: &Arc<Self>, key: Key) -> Slot {
        let mut state = self.lock();
        let number = state.number();
        state
            .queues
            .entry(key.clone())
            .or_default()
            .waiting
            .push_back((number, None));
        Slot {
            sequencer: self.clone(),
            key,
            number,
        }
    }

    /// A slot for a message that goes to the log at once: when there is no other message in any queue, and none to
    /// be expected.
    pub fn enter_alone(self: &Arc<Self>, key: &Key) -> Option<Slot> {
        let mut state = self.lock();
        if state.expected > 0 || !state.queues.is_empty() {
            return None;
        }
        let number = state.number();
        state.queues.insert(
            key.clone(),
            Queue {
                in_flight: 1,
                ..Queue::default()
            },
        );
        Some(Slot {
            sequencer: self.clone(),
            key: key.clone(),
            number,
        })
    }

    /// So many messages are to be expected.
    pub fn expect(&self, messages: usize) {
        self.lock().expected = messages;
    }

    /// Puts a message whose id was looked up, or needs no look-up, into its slot.
    pub fn ready(&self, waiting: Waiting) {
        let key = waiting.slot.key.clone();
        let number = waiting.slot.number;
        let mut state = self.lock();
        let Some(queue) = state.queues.get_mut(&key) else {
            return;
        };
        if let Ok(index) = queue
            .waiting
            .binary_search_by_key(&number, |(number, _)| *number)
            && let Some((_, slot)) = queue.waiting.get_mut(index)
        {
            *slot = Some(waiting);
        }
        self.announce(state, &key);
    }

    /// Takes what is ready at the front of this queue, in order, until `fits` says no.
    pub fn take(&self, key: &Key, mut fits: impl FnMut(&Waiting) -> bool) -> Vec<Waiting> {
        let mut state = self.lock();
        let Some(queue) = state.queues.get_mut(key) else {
            return Vec::new();
        };
        let mut taken = Vec::new();
        while let Some((_, Some(waiting))) = queue.waiting.front()
            && fits(waiting)
        {
            taken.extend(queue.waiting.pop_front().and_then(|(_, waiting)| waiting));
        }
        // One of which nothing fits stays announced: whoever asked comes back to it.
        queue.announced = taken.is_empty() && matches!(queue.waiting.front(), Some((_, Some(_))));
        queue.in_flight += taken.len();
        taken
    }

    fn leave(&self, key: &Key, number: u64) {
        let mut state = self.lock();
        let Some(queue) = state.queues.get_mut(key) else {
            return;
        };
        match queue
            .waiting
            .binary_search_by_key(&number, |(number, _)| *number)
        {
            // A message inside the queue owns its slot, so this one is empty.
            Ok(index) => drop(queue.waiting.remove(index)),
            Err(_) => queue.in_flight = queue.in_flight.saturating_sub(1),
        }
        if queue.waiting.is_empty() && queue.in_flight == 0 {
            state.queues.remove(key);
            return;
        }
        self.announce(state, key);
    }

    /// Tells whoever appends when the first message of the queue is ready. When nobody appends any more, the messages are
    /// dropped, so that their senders hear of it.
    fn announce(&self, mut state: MutexGuard<'_, State>, key: &Key) {
        let Some(queue) = state.queues.get_mut(key).filter(|queue| queue.is_due()) else {
            return;
        };
        queue.announced = true;
        let sent = self
            .ready
            .upgrade()
            .is_some_and(|ready| ready.send(key.clone()).is_ok());
        if !sent {
            let lost = state.queues.remove(key);
            drop(state);
            // Their slots are left only now: leaving takes the lock.
            drop(lost);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commit::waiting;

    fn sequencer() -> (
        Arc<Sequencer>,
        mpsc::UnboundedReceiver<Key>,
        mpsc::UnboundedSender<Key>,
    ) {
        let (ready, queues) = mpsc::unbounded_channel();
        (Sequencer::new(&ready), queues, ready)
    }

    fn numbers(taken: &[Waiting]) -> Vec<u64> {
        taken.iter().map(|waiting| waiting.slot.number).collect()
    }

    #[test]
    fn a_message_waits_for_those_before_it_in_its_queue_only() {
        let (sequencer, mut queues, _ready) = sequencer();
        let [ann, bob] = ["ann general", "bob general"].map(Key::from);
        let [one, two, three] = [(); 3].map(|()| sequencer.enter(ann.clone()));
        sequencer.ready(waiting(two));
        assert!(queues.try_recv().is_err(), "the first is still looked up");
        sequencer.ready(waiting(sequencer.enter(bob.clone())));
        assert_eq!(queues.try_recv().unwrap(), bob);
        sequencer.ready(waiting(one));
        sequencer.ready(waiting(three));
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
            "nothing is kept of whoever is done"
        );
    }

    #[test]
    fn whoever_is_answered_in_between_lets_the_others_pass() {
        let (sequencer, mut queues, _ready) = sequencer();
        let key = Key::from("ann general");
        let [one, two, three] = [(); 3].map(|()| sequencer.enter(key.clone()));
        sequencer.ready(waiting(three));
        drop(two);
        assert!(queues.try_recv().is_err());
        drop(one);
        assert_eq!(queues.try_recv().unwrap(), key);
        assert_eq!(numbers(&sequencer.take(&key, |_| false)), [0_u64; 0]);
        assert!(queues.try_recv().is_err(), "it was announced");
        assert_eq!(numbers(&sequencer.take(&key, |_| true)), [3]);
    }

    #[test]
    fn a_message_goes_at_once_when_it_is_the_only_one() {
        let (sequencer, mut queues, _ready) = sequencer();
        let [ann, bob] = ["ann general", "bob general"].map(Key::from);
        let alone = sequencer.enter_alone(&ann).unwrap();
        for _ in 0..3 {
            assert!(sequencer.enter_alone(&bob).is_none());
        }
        sequencer.ready(waiting(sequencer.enter(ann.clone())));
        assert!(
            queues.try_recv().is_err(),
            "the one before it is on its way"
        );
        drop(alone);
        assert_eq!(queues.try_recv().unwrap(), ann);
        drop(sequencer.take(&ann, |_| true));
        sequencer.expect(3);
        assert!(sequencer.enter_alone(&bob).is_none());
        sequencer.expect(0);
        assert!(sequencer.enter_alone(&bob).is_some());
    }

    #[test]
    fn when_nobody_appends_any_more_senders_hear_of_it() {
        let (sequencer, queues, _ready) = sequencer();
        drop(queues);
        let key = Key::from("ann general");
        let [one, two] = [(); 2].map(|()| sequencer.enter(key.clone()));
        sequencer.ready(waiting(two));
        sequencer.ready(waiting(one));
        assert!(sequencer.lock().queues.is_empty());
    }
}
