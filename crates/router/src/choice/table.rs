//! A hash table that never grows.
//!
//! The index of prefixes is bounded in bytes, and a growing table is not: while it doubles it needs three times
//! its size, and a request that comes meanwhile waits. So this one takes its memory once. Open addressing with
//! linear probing; a removal closes the gap that it leaves (Knuth, The Art of Computer Programming, volume 3,
//! section 6.4, algorithm R), so that churn leaves no tombstones behind.

/// The key of a free slot.
const FREE: u64 = 0;

/// Slots for each entry: at a load of 3/4 a search that fails looks at 8.5 slots on average, most often within
/// one or two cache lines.
const SLOTS: (usize, usize) = (4, 3);

/// Maps up to a fixed number of keys to values of `N` words. Keys must be spread evenly over all 64 bits, as hashes are.
#[derive(Debug)]
pub struct Table<const N: usize> {
    /// The key of each slot and behind it its value, so that one look at memory brings both. `[slots, 1 + N]`
    words: Box<[u64]>,
    slots: usize,
    len: usize,
    capacity: usize,
}

impl<const N: usize> Table<N> {
    const STRIDE: usize = 1 + N;

    /// Reserves the memory for `capacity` entries. The system hands it out as it is first written to: see
    /// [`Table::take_memory`].
    pub fn new(capacity: usize) -> Self {
        let slots = Self::slots(capacity);
        Self { words: vec![0; slots * Self::STRIDE].into(), slots, len: 0, capacity }
    }

    /// Writes to all of its memory, so that the system hands it out now and not while somebody waits for an entry: with
    /// pages of 2 MiB that is a millisecond or two each, all of which the first few requests would meet.
    pub fn take_memory(&mut self) {
        /// Bytes of the smallest page.
        const PAGE: usize = 4096;
        for page in self.words.chunks_mut(PAGE / size_of::<u64>()) {
            page[0] = std::hint::black_box(page[0]);
        }
    }

    /// Bytes that a table of this capacity takes.
    pub fn bytes(capacity: usize) -> usize {
        Self::slots(capacity) * Self::STRIDE * size_of::<u64>()
    }

    fn slots(capacity: usize) -> usize {
        // At least one slot stays free, where every search ends.
        capacity * SLOTS.0 / SLOTS.1 + 1
    }

    pub fn len(&self) -> usize {
        self.len
    }

    fn is_full(&self) -> bool {
        self.len == self.capacity
    }

    pub fn get(&self, key: u64) -> Option<&[u64; N]> {
        let at = self.find(key).ok()?;
        self.words[at * Self::STRIDE + 1..].first_chunk()
    }

    /// The value of a key, zero at first. `None`, and nothing changed, if the key is new and the table full.
    pub fn entry(&mut self, key: u64) -> Option<&mut [u64; N]> {
        let at = match self.find(key) {
            Ok(at) => at,
            Err(_) if self.is_full() => return None,
            Err(at) => {
                self.len += 1;
                let slot = &mut self.words[at * Self::STRIDE..][..Self::STRIDE];
                slot.fill(0);
                slot[0] = some(key);
                at
            }
        };
        self.value_mut(at)
    }

    /// Takes a key out, if `is_over` says so of its value. Returns whether it did.
    pub fn remove_if(&mut self, key: u64, is_over: impl FnOnce(&mut [u64; N]) -> bool) -> bool {
        let Ok(at) = self.find(key) else { return false };
        let is_removed = self.value_mut(at).is_some_and(is_over);
        if is_removed {
            self.len -= 1;
            self.close_gap(at);
        }
        is_removed
    }

    /// Looks at where these keys are, so that they are near when they are asked for. These looks do not wait for each
    /// other, as searches do; a table that is larger than the caches would let each search wait for memory.
    pub fn bring_near(&self, keys: impl Iterator<Item = u64>) {
        let words: &[u64] = &self.words;
        let seen = keys.fold(0, |seen, key| seen ^ words[self.home(some(key)) * Self::STRIDE]);
        std::hint::black_box(seen);
    }

    fn close_gap(&mut self, mut gap: usize) {
        let mut at = self.next(gap);
        while self.key(at) != FREE {
            // An entry may move into the gap if its search passes there: the gap lies, going round, at or after
            // its home and before where it is.
            let home = self.home(self.key(at));
            if self.distance(home, at) >= self.distance(gap, at) {
                let from = at * Self::STRIDE;
                self.words.copy_within(from..from + Self::STRIDE, gap * Self::STRIDE);
                gap = at;
            }
            at = self.next(at);
        }
        self.words[gap * Self::STRIDE] = FREE;
    }

    fn key(&self, slot: usize) -> u64 {
        self.words[slot * Self::STRIDE]
    }

    fn value_mut(&mut self, slot: usize) -> Option<&mut [u64; N]> {
        self.words[slot * Self::STRIDE + 1..].first_chunk_mut()
    }

    /// Where the key is, or else where it would go.
    fn find(&self, key: u64) -> Result<usize, usize> {
        let key = some(key);
        let words: &[u64] = &self.words;
        let mut at = self.home(key);
        loop {
            match words[at * Self::STRIDE] {
                found if found == key => return Ok(at),
                FREE => return Err(at),
                _ => at = self.next(at),
            }
        }
    }

    /// The first slot of a key's search: its top bits, scaled (Lemire 2016, "A fast alternative to the modulo").
    fn home(&self, key: u64) -> usize {
        ((u128::from(key) * self.slots as u128) >> 64) as usize
    }

    fn next(&self, at: usize) -> usize {
        if at + 1 == self.slots { 0 } else { at + 1 }
    }

    /// Steps from one slot to another, going round.
    fn distance(&self, from: usize, to: usize) -> usize {
        if to >= from { to - from } else { to + self.slots - from }
    }
}

/// The one key that means "free" is taken for its neighbour.
fn some(key: u64) -> u64 {
    if key == FREE { 1 } else { key }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Operation {
        Insert(u64, u64),
        Remove(u64),
    }

    /// Keys from a few clusters, so that searches are long, wrap around the end, and removals have gaps to close.
    fn key() -> impl Strategy<Value = u64> {
        (prop_oneof![Just(1_u64), Just(u64::MAX / 2), Just(u64::MAX - 40)], 0..40_u64)
            .prop_map(|(base, offset)| base.saturating_add(offset))
    }

    fn operation() -> impl Strategy<Value = Operation> {
        prop_oneof![
            3 => (key(), any::<u64>()).prop_map(|(key, value)| Operation::Insert(key, value)),
            2 => key().prop_map(Operation::Remove),
        ]
    }

    proptest! {
        #[test]
        fn behaves_as_a_map_that_is_full_at_its_capacity(
            capacity in 1_usize..40,
            operations in prop::collection::vec(operation(), 0..400),
        ) {
            let (mut table, mut map) = (Table::<1>::new(capacity), HashMap::new());
            for operation in operations {
                match operation {
                    Operation::Insert(key, value) => {
                        let fits = map.contains_key(&key) || map.len() < capacity;
                        let entry = table.entry(key);
                        prop_assert_eq!(entry.as_deref(), fits.then(|| map.get(&key).unwrap_or(&[0])));
                        if let Some(entry) = entry {
                            *entry = [value];
                            map.insert(key, [value]);
                        }
                    }
                    Operation::Remove(key) => {
                        prop_assert!(!table.remove_if(key, |_| false));
                        let held = map.remove(&key);
                        prop_assert_eq!(table.remove_if(key, |value| Some(*value) == held), held.is_some());
                    }
                }
                // Changes nothing of what it holds.
                table.take_memory();
                prop_assert_eq!(table.len(), map.len());
                for key in map.keys() {
                    prop_assert_eq!(table.get(*key), map.get(key));
                }
            }
        }
    }

    #[test]
    fn a_table_of_nothing_takes_nothing() {
        let mut table = Table::<1>::new(0);
        assert_eq!(table.entry(7), None);
        assert_eq!(table.get(7), None);
        assert!(!table.remove_if(7, |_| true));
    }
}
