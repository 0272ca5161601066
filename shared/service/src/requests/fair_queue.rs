//! Requests that wait for a permit: bounded, and shared fairly by their callers.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

/// How much may wait, of all callers together.
#[derive(Debug, Clone, Copy)]
pub(crate) struct QueueLimits {
    pub requests: usize,
    pub bytes: usize,
}

impl QueueLimits {
    fn bytes_per_request(self) -> usize {
        (self.bytes / self.requests).max(1)
    }
}

/// A queue for each caller, served in turn. When there is no room, the newest request of the
/// caller with the most room is evicted: a flood fills its own queue and nobody else's.
#[derive(Debug)]
pub(super) struct FairQueue<T> {
    limits: QueueLimits,
    callers: HashMap<Arc<str>, Caller<T>>,
    /// Callers with waiting requests, the next one first.
    turns: VecDeque<Arc<str>>,
    /// The same callers, by [`Caller::room`].
    by_room: BTreeSet<(usize, Arc<str>)>,
    requests: usize,
    bytes: usize,
}

#[derive(Debug)]
struct Caller<T> {
    waiting: VecDeque<(usize, T)>,
    /// How much of the limits these take: their bytes, and for each request an equal share of the
    /// bytes. One measure for both limits.
    room: usize,
}

impl<T> FairQueue<T> {
    pub(super) fn new(limits: QueueLimits) -> FairQueue<T> {
        FairQueue {
            limits,
            callers: HashMap::new(),
            turns: VecDeque::new(),
            by_room: BTreeSet::new(),
            requests: 0,
            bytes: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.requests
    }

    pub(super) fn is_empty(&self) -> bool {
        self.requests == 0
    }

    /// Puts a request of `bytes` behind the caller's others. Returns the requests that were evicted
    /// for it, or the request itself if it does not fit.
    pub(super) fn push(&mut self, caller: &Arc<str>, bytes: usize, request: T) -> Vec<T> {
        if bytes > self.limits.bytes {
            return vec![request];
        }
        let room = bytes + self.limits.bytes_per_request();
        let own = self.callers.get(caller).map_or(0, |own| own.room) + room;
        let mut evicted = Vec::new();
        while self.requests + 1 > self.limits.requests || self.bytes + bytes > self.limits.bytes {
            // Among equals the new request is the one that does not fit.
            match self.by_room.last() {
                Some((most, largest)) if *most > own && largest != caller => {
                    let largest = largest.clone();
                    evicted.extend(self.remove(&largest, VecDeque::pop_back));
                    self.forget_idle(&largest);
                }
                _ => {
                    evicted.push(request);
                    return evicted;
                }
            }
        }
        let entry = self.callers.entry(caller.clone()).or_insert_with(|| {
            self.turns.push_back(caller.clone());
            Caller {
                waiting: VecDeque::new(),
                room: 0,
            }
        });
        self.by_room.remove(&(entry.room, caller.clone()));
        entry.room += room;
        entry.waiting.push_back((bytes, request));
        self.by_room.insert((entry.room, caller.clone()));
        self.requests += 1;
        self.bytes += bytes;
        evicted
    }

    /// The oldest request of the caller whose turn it is.
    pub(super) fn pop(&mut self) -> Option<T> {
        let caller = self.turns.pop_front()?;
        let request = self.remove(&caller, VecDeque::pop_front);
        if self.callers.contains_key(&caller) {
            self.turns.push_back(caller);
        }
        request
    }

    /// Removes requests that are `late`. A caller's requests are in the order of their arrival, so
    /// each queue is searched up to its first request that is not late.
    pub(super) fn expire(&mut self, late: impl Fn(&T) -> bool) -> Vec<T> {
        let callers: Vec<Arc<str>> = self.turns.iter().cloned().collect();
        let mut expired = Vec::new();
        for caller in callers {
            while self
                .callers
                .get(&caller)
                .and_then(|own| own.waiting.front())
                .is_some_and(|(_, request)| late(request))
            {
                expired.extend(self.remove(&caller, VecDeque::pop_front));
            }
        }
        if !expired.is_empty() {
            self.turns
                .retain(|caller| self.callers.contains_key(caller));
        }
        expired
    }

    /// Removes one request of `caller` from either end. Does not touch `turns`.
    fn remove(
        &mut self,
        caller: &Arc<str>,
        take: impl FnOnce(&mut VecDeque<(usize, T)>) -> Option<(usize, T)>,
    ) -> Option<T> {
        let own = self.callers.get_mut(caller)?;
        let (bytes, request) = take(&mut own.waiting)?;
        let room = bytes + self.limits.bytes_per_request();
        self.by_room.remove(&(own.room, caller.clone()));
        own.room -= room;
        if own.waiting.is_empty() {
            self.callers.remove(caller);
        } else {
            self.by_room.insert((own.room, caller.clone()));
        }
        self.requests -= 1;
        self.bytes -= bytes;
        Some(request)
    }

    fn forget_idle(&mut self, caller: &Arc<str>) {
        if !self.callers.contains_key(caller) {
            self.turns.retain(|waiting| waiting != caller);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(requests: usize, bytes: usize) -> FairQueue<u32> {
        FairQueue::new(QueueLimits { requests, bytes })
    }

    fn name(caller: &str) -> Arc<str> {
        caller.into()
    }

    fn drained(queue: &mut FairQueue<u32>) -> Vec<u32> {
        std::iter::from_fn(|| queue.pop()).collect()
    }

    #[test]
    fn callers_take_turns_and_keep_their_own_order() {
        let mut queue = queue(10, 10_000);
        for (caller, request) in [
            ("a", 1),
            ("a", 2),
            ("a", 3),
            ("b", 11),
            ("b", 12),
            ("c", 21),
        ] {
            assert!(queue.push(&name(caller), 1, request).is_empty());
        }
        assert_eq!(drained(&mut queue), [1, 11, 21, 2, 12, 3]);
        assert!(
            queue.is_empty()
                && queue.callers.is_empty()
                && queue.by_room.is_empty()
                && queue.bytes == 0
        );
    }

    #[test]
    fn a_flood_loses_its_own_newest_requests() {
        let mut queue = queue(4, 10_000);
        for request in 1..=4 {
            assert!(queue.push(&name("flood"), 1, request).is_empty());
        }
        assert_eq!(queue.push(&name("flood"), 1, 5), [5], "its own newest");
        assert_eq!(queue.push(&name("other"), 1, 11), [4]);
        assert_eq!(queue.push(&name("other"), 1, 12), [3]);
        assert_eq!(
            queue.push(&name("other"), 1, 13),
            [13],
            "now both have as much"
        );
        assert_eq!(queue.push(&name("third"), 1, 21).len(), 1);
        assert_eq!(queue.len(), 4);
        assert_eq!(drained(&mut queue).len(), 4);
    }

    #[test]
    fn bytes_are_bounded_like_requests() {
        let mut queue = queue(100, 1_000);
        assert_eq!(queue.push(&name("a"), 1_001, 1), [1], "would never fit");
        for request in 1..=3 {
            assert!(queue.push(&name("large"), 300, request).is_empty());
        }
        assert!(queue.push(&name("small"), 100, 11).is_empty());
        assert_eq!(queue.push(&name("small"), 100, 12), [3]);
        assert_eq!(queue.push(&name("large"), 300, 4), [4]);
        assert_eq!(drained(&mut queue), [1, 11, 2, 12]);
    }

    #[test]
    fn what_is_late_goes_and_the_rest_keeps_its_turn() {
        let mut queue = queue(10, 10_000);
        for (caller, request) in [("a", 1), ("b", 2), ("c", 9), ("a", 10)] {
            queue.push(&name(caller), 1, request);
        }
        assert_eq!(queue.expire(|request| *request < 5), [1, 2]);
        assert!(queue.expire(|request| *request < 5).is_empty());
        queue.push(&name("b"), 1, 12);
        assert_eq!(drained(&mut queue), [10, 9, 12]);
    }
}
