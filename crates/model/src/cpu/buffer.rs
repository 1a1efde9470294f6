//! Memory for weights, KV cache and scratch: aligned, zeroed, and in huge pages where it is large.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

const CACHE_LINE: usize = 64;
#[cfg(target_os = "linux")]
const HUGE_PAGE: usize = 2 << 20;

/// A zeroed run of bytes, aligned to a cache line. On Linux, from 2 MiB on it is mapped by itself,
/// aligned to a huge page, and the system is asked for huge pages: to read all weights once a step in
/// 4 KiB pages would spend a good part of the time on page walks. Mapped memory becomes resident only
/// as it is touched.
#[derive(Debug)]
pub(super) struct Buffer {
    pointer: NonNull<u8>,
    bytes: usize,
    /// Start and length of the mapping, where the buffer is one.
    mapping: Option<(usize, usize)>,
}

// SAFETY: the buffer owns its memory; shared references only read.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// # Panics
    /// If `bytes` is more than the address space holds; aborts if memory is exhausted.
    pub fn zeroed(bytes: usize) -> Self {
        #[cfg(target_os = "linux")]
        if bytes >= HUGE_PAGE
            && let Some(buffer) = Self::mapped(bytes)
        {
            return buffer;
        }
        let layout = Self::layout(bytes);
        // SAFETY: the layout's size is not zero.
        let pointer = unsafe { alloc_zeroed(layout) };
        let Some(pointer) = NonNull::new(pointer) else { handle_alloc_error(layout) };
        Self { pointer, bytes, mapping: None }
    }

    fn layout(bytes: usize) -> Layout {
        Layout::from_size_align(bytes.max(1), CACHE_LINE).expect("a size below isize::MAX")
    }

    #[cfg(target_os = "linux")]
    fn mapped(bytes: usize) -> Option<Self> {
        let length = bytes.checked_add(HUGE_PAGE)?;
        let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a fresh anonymous mapping touches no existing memory.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), length, access, kind, -1, 0) };
        if start == libc::MAP_FAILED {
            return None;
        }
        let aligned = start.cast::<u8>().wrapping_add(start.align_offset(HUGE_PAGE));
        // SAFETY: the range lies within the mapping; the advice changes no content. A refusal is
        // harmless: the pages are then small.
        unsafe { libc::madvise(aligned.cast(), bytes, libc::MADV_HUGEPAGE) };
        Some(Self { pointer: NonNull::new(aligned)?, bytes, mapping: Some((start as usize, length)) })
    }

    pub fn len(&self) -> usize {
        self.bytes
    }

    pub fn as_ptr(&self) -> *const u8 {
        self.pointer.as_ptr()
    }

    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.pointer.as_ptr()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        match self.mapping {
            #[cfg(target_os = "linux")]
            Some((start, length)) => {
                // SAFETY: exactly the range that was mapped.
                unsafe { libc::munmap(start as *mut libc::c_void, length) };
            }
            // SAFETY: allocated with this layout.
            _ => unsafe { dealloc(self.pointer.as_ptr(), Self::layout(self.bytes)) },
        }
    }
}

/// A pointer that the tasks of one parallel region share; each task writes its own part.
#[derive(Debug)]
pub(super) struct SharedMut<T>(*mut T);

impl<T> Clone for SharedMut<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for SharedMut<T> {}

// SAFETY: every use states why its tasks write disjoint parts.
unsafe impl<T: Send> Send for SharedMut<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedMut<T> {}

impl<T> SharedMut<T> {
    pub fn new(slice: &mut [T]) -> Self {
        Self(slice.as_mut_ptr())
    }

    pub fn from_ptr(pointer: *mut T) -> Self {
        Self(pointer)
    }

    /// Through a method, so that closures capture the wrapper and not the bare pointer.
    pub fn get(self) -> *mut T {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_zeroed_and_aligned() {
        for bytes in [0, 1, 100, 4096, (2 << 20) - 1, 2 << 20, (6 << 20) + 5] {
            let mut buffer = Buffer::zeroed(bytes);
            assert_eq!(buffer.len(), bytes);
            assert_eq!(buffer.as_ptr() as usize % CACHE_LINE, 0);
            let pointer = buffer.as_mut_ptr();
            for index in (0..bytes).step_by(bytes / 7 + 1).chain(bytes.checked_sub(1)) {
                // SAFETY: the index is within the buffer.
                unsafe {
                    assert_eq!(*pointer.add(index), 0);
                    *pointer.add(index) = 7;
                    assert_eq!(*pointer.add(index), 7);
                    *pointer.add(index) = 0;
                }
            }
        }
    }
}
