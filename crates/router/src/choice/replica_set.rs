//! A set of replicas: one bit each.

/// Most replicas of one router.
pub const MAX_REPLICAS: usize = 256;
const WORDS: usize = MAX_REPLICAS / 64;

/// A replica's place in the router. Given out again after the replica is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ReplicaId(pub u8);

/// Which of the [`MAX_REPLICAS`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReplicaSet(pub(super) [u64; WORDS]);

impl ReplicaSet {
    pub const EMPTY: Self = Self([0; WORDS]);

    pub fn insert(&mut self, replica: ReplicaId) {
        self.0[usize::from(replica.0 / 64)] |= 1 << (replica.0 % 64);
    }

    pub fn remove(&mut self, replica: ReplicaId) {
        self.0[usize::from(replica.0 / 64)] &= !(1 << (replica.0 % 64));
    }

    pub fn contains(&self, replica: ReplicaId) -> bool {
        self.0[usize::from(replica.0 / 64)] >> (replica.0 % 64) & 1 == 1
    }

    pub fn is_empty(&self) -> bool {
        self.0 == [0; WORDS]
    }

    /// Those that are in this set and not in `other`.
    pub fn without(&self, other: &Self) -> Self {
        Self(std::array::from_fn(|word| self.0[word] & !other.0[word]))
    }

    /// Those that are in both.
    pub fn and(&self, other: &Self) -> Self {
        Self(std::array::from_fn(|word| self.0[word] & other.0[word]))
    }

    /// In ascending order.
    pub fn iter(self) -> impl Iterator<Item = ReplicaId> {
        self.0.into_iter().enumerate().flat_map(|(at, word)| {
            let mut left = word;
            std::iter::from_fn(move || {
                let bit = left.trailing_zeros();
                // Clears the lowest bit; nothing is left of 0.
                left &= left.wrapping_sub(1);
                (bit < 64).then(|| ReplicaId((at * 64) as u8 + bit as u8))
            })
        })
    }
}

impl FromIterator<ReplicaId> for ReplicaSet {
    fn from_iter<I: IntoIterator<Item = ReplicaId>>(replicas: I) -> Self {
        let mut set = Self::EMPTY;
        replicas.into_iter().for_each(|replica| set.insert(replica));
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_has_its_bit() {
        let mut set = ReplicaSet::EMPTY;
        for replica in (0..=255).map(ReplicaId) {
            assert!(!set.contains(replica));
            set.insert(replica);
            assert!(set.contains(replica));
        }
        assert_eq!(set.iter().map(|replica| replica.0).collect::<Vec<_>>(), (0..=255).collect::<Vec<_>>());
        (0..=255).map(ReplicaId).for_each(|replica| set.remove(replica));
        assert!(set.is_empty());
    }

    #[test]
    fn sets_combine() {
        let set =
            |replicas: &[u8]| replicas.iter().map(|replica| ReplicaId(*replica)).collect::<ReplicaSet>();
        let (a, b) = (set(&[1, 63, 64, 200]), set(&[63, 200, 255]));
        assert_eq!(a.and(&b), set(&[63, 200]));
        assert_eq!(a.without(&b), set(&[1, 64]));
    }
}
