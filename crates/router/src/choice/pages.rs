//! Memory of a fixed size, in large pages where the system has them.
//!
//! The index of prefixes is read in random places. In pages of 4 KiB nearly every read walks the page table of the
//! processor besides, and a router that has just started takes a page fault for nearly every block of its first
//! requests. Linux gives pages of 2 MiB to those who ask for them.

use std::ops::{Deref, DerefMut};

use bytemuck::Pod;
use memmap2::MmapMut;

/// Less is left to the allocator: large pages would stay half empty.
const LEAST_MAPPED_BYTES: usize = 8 << 20;

/// A fixed number of values, zero at first. The system hands out the memory as it is first written to.
#[derive(Debug)]
pub struct Pages<T>(Memory<T>);

#[derive(Debug)]
enum Memory<T> {
    Mapped { map: MmapMut, len: usize },
    Heap(Box<[T]>),
}

impl<T: Pod> Pages<T> {
    pub fn new(len: usize) -> Self {
        let bytes = len.saturating_mul(size_of::<T>());
        let map = (bytes >= LEAST_MAPPED_BYTES).then(|| MmapMut::map_anon(bytes).ok()).flatten();
        Self(match map {
            Some(map) => {
                // A system without large pages serves as well, only slower.
                #[cfg(target_os = "linux")]
                let _ = map.advise(memmap2::Advice::HugePage);
                Memory::Mapped { map, len }
            }
            None => Memory::Heap(vec![T::zeroed(); len].into()),
        })
    }
}

impl<T: Pod> Deref for Pages<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match &self.0 {
            Memory::Mapped { map, len } => &bytemuck::cast_slice(map)[..*len],
            Memory::Heap(values) => values,
        }
    }
}

impl<T: Pod> DerefMut for Pages<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        match &mut self.0 {
            Memory::Mapped { map, len } => &mut bytemuck::cast_slice_mut(map)[..*len],
            Memory::Heap(values) => values,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_as_long_as_asked_and_zero_on_either_side_of_the_limit() {
        for len in [0, 1, 1000, LEAST_MAPPED_BYTES / 8, LEAST_MAPPED_BYTES / 8 + 1] {
            let mut pages = Pages::<u64>::new(len);
            assert_eq!((pages.len(), pages.iter().any(|value| *value != 0)), (len, false));
            if let Some(last) = pages.last_mut() {
                *last = 7;
            }
            assert_eq!(pages.last().copied(), (len > 0).then_some(7));
        }
    }
}
