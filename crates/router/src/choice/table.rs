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

/// Maps up to a fixed number of keys to values. Keys must be spread evenly over all 64 bits, as hashes are.
#[derive(Debug)]
pub struct Table<V> {
    keys: Box<[u64]>,
    values: Box<[V]>,
    len: usize,
    capacity: usize,
}

impl<V: Copy + Default> Table<V> {
    /// Takes the memory for `capacity` entries. The system hands it out as it is first written to.
    pub fn new(capacity: usize) -> Self {
        let slots = Self::slots(capacity);
        let (keys, values) = (vec![FREE; slots].into(), vec![V::default(); slots].into());
        Self { keys, values, len: 0, capacity }
    }

    /// Bytes that a table of this capacity takes.
    pub fn bytes(capacity: usize) -> usize {
        Self::slots(capacity) * (size_of::<u64>() + size_of::<V>())
    }

    fn slots(capacity: usize) -> usize {
        // At least one slot stays free, where every search ends.
        capacity * SLOTS.0 / SLOTS.1 + 1
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_full(&self) -> bool {
        self.len == self.capacity
    }

    pub fn get(&self, key: u64) -> Option<&V> {
        self.find(key).ok().map(|at| &self.values[at])
    }

    pub fn get_mut(&mut self, key: u64) -> Option<&mut V> {
        self.find(key).ok().map(|at| &mut self.values[at])
    }

    /// Sets the value of a key. False, and nothing changed, if the key is new and the table full.
    #[must_use]
    pub fn insert(&mut self, key: u64, value: V) -> bool {
        let at = match self.find(key) {
            Ok(at) => at,
            Err(_) if self.is_full() => return false,
            Err(at) => {
                self.len += 1;
                at
            }
        };
        self.keys[at] = some(key);
        self.values[at] = value;
        true
    }

    pub fn remove(&mut self, key: u64) -> Option<V> {
        let found = self.find(key).ok()?;
        let value = self.values[found];
        self.len -= 1;
        let (mut gap, mut at) = (found, self.next(found));
        while self.keys[at] != FREE {
            // An entry may move into the gap if its search passes there: the gap lies, going round, at or after
            // its home and before where it is.
            let home = self.home(self.keys[at]);
            if self.distance(home, at) >= self.distance(gap, at) {
                self.keys[gap] = self.keys[at];
                self.values[gap] = self.values[at];
                gap = at;
            }
            at = self.next(at);
        }
        self.keys[gap] = FREE;
        Some(value)
    }

    /// Where the key is, or else where it would go.
    fn find(&self, key: u64) -> Result<usize, usize> {
        let key = some(key);
        let mut at = self.home(key);
        loop {
            match self.keys[at] {
                found if found == key => return Ok(at),
                FREE => return Err(at),
                _ => at = self.next(at),
            }
        }
    }

    /// The first slot of a key's search: its top bits, scaled (Lemire 2016, "A fast alternative to the modulo").
    fn home(&self, key: u64) -> usize {
        ((u128::from(key) * self.keys.len() as u128) >> 64) as usize
    }

    fn next(&self, at: usize) -> usize {
        if at + 1 == self.keys.len() { 0 } else { at + 1 }
    }

    /// Steps from one slot to another, going round.
    fn distance(&self, from: usize, to: usize) -> usize {
        if to >= from { to - from } else { to + self.keys.len() - from }
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
        Insert(u64, u32),
        Remove(u64),
    }

    /// Keys from a few clusters, so that searches are long, wrap around the end, and removals have gaps to close.
    fn key() -> impl Strategy<Value = u64> {
        (prop_oneof![Just(1_u64), Just(u64::MAX / 2), Just(u64::MAX - 40)], 0..40_u64)
            .prop_map(|(base, offset)| base.saturating_add(offset))
    }

    fn operation() -> impl Strategy<Value = Operation> {
        prop_oneof![
            3 => (key(), any::<u32>()).prop_map(|(key, value)| Operation::Insert(key, value)),
            2 => key().prop_map(Operation::Remove),
        ]
    }

    proptest! {
        #[test]
        fn behaves_as_a_map_that_is_full_at_its_capacity(
            capacity in 1_usize..40,
            operations in prop::collection::vec(operation(), 0..400),
        ) {
            let (mut table, mut map) = (Table::new(capacity), HashMap::new());
            for operation in operations {
                match operation {
                    Operation::Insert(key, value) => {
                        let fits = map.contains_key(&key) || map.len() < capacity;
                        prop_assert_eq!(table.insert(key, value), fits);
                        if fits {
                            map.insert(key, value);
                        }
                    }
                    Operation::Remove(key) => prop_assert_eq!(table.remove(key), map.remove(&key)),
                }
                prop_assert_eq!(table.len(), map.len());
                for key in map.keys() {
                    prop_assert_eq!(table.get(*key), map.get(key));
                }
            }
        }
    }

    #[test]
    fn a_table_of_nothing_takes_nothing() {
        let mut table = Table::<u32>::new(0);
        assert!(!table.insert(7, 1));
        assert_eq!((table.get(7).copied(), table.remove(7)), (None, None));
    }
}
