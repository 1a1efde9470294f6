//! A pool of warm threads for the many short parallel regions of one step.
//!
//! A step of a 30-layer model has some 200 regions, each of 10 to 1,000 microseconds, so waking a
//! thread through the kernel for each would cost as much as the work. Workers therefore spin for a
//! bounded time after a region and only then park. A worker that the kernel has put aside is never
//! waited for: a region closes as soon as its tasks are done, and who comes late finds it closed.
#![allow(unsafe_code)]

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

/// How long an idle worker looks for the next region before it parks.
const SPIN: Duration = Duration::from_micros(50);

/// `Shared::state` holds the region's number in the upper half, whether tasks may still be taken,
/// and how many workers are inside.
const OPEN: u64 = 1 << 31;
const INSIDE: u64 = OPEN - 1;

/// The borrowed closure of a region. Its lifetime is erased; see [`ThreadPool::run`].
#[derive(Clone, Copy)]
struct Job {
    run: *const (dyn Fn(usize) + Sync),
    tasks: usize,
}

struct Shared {
    state: AtomicU64,
    job: UnsafeCell<Option<Job>>,
    next: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    parked: Vec<AtomicBool>,
    stop: AtomicBool,
}

// SAFETY: `job` is written only by the thread that holds the pool's `region` lock, while the state
// is closed and nobody is inside; workers read it only after they entered an open state.
unsafe impl Sync for Shared {}
// SAFETY: the raw pointer in `job` is only followed while the region that set it is running.
unsafe impl Send for Shared {}

/// A fixed number of threads, the caller's among them, that run parallel regions one at a time.
pub struct ThreadPool {
    shared: Arc<Shared>,
    /// Held while a region runs; who finds it taken (a nested call) runs its tasks alone.
    region: Mutex<()>,
    unpark: Vec<Thread>,
    workers: Vec<JoinHandle<()>>,
}

impl ThreadPool {
    /// Starts `threads - 1` workers; the caller of [`ThreadPool::run`] is the last. 0 counts as 1.
    /// Where the system refuses a thread the pool has fewer; see [`ThreadPool::threads`].
    pub fn new(threads: usize) -> Self {
        let wanted = threads.max(1) - 1;
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            next: AtomicUsize::new(0),
            panic: Mutex::new(None),
            parked: (0..wanted).map(|_| AtomicBool::new(false)).collect(),
            stop: AtomicBool::new(false),
        });
        let spawn = |index: usize| {
            let shared = Arc::clone(&shared);
            let name = format!("compute-{}", index + 1);
            std::thread::Builder::new().name(name).spawn(move || work(&shared, index)).ok()
        };
        let workers: Vec<_> = (0..wanted).map_while(spawn).collect();
        let unpark = workers.iter().map(|worker| worker.thread().clone()).collect();
        Self { shared, region: Mutex::new(()), unpark, workers }
    }

    /// Threads that take part in a region, the caller's included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task(0)` to `task(tasks - 1)`, each once, spread over the threads in no fixed order, and
    /// returns when all are done. A call from within a task runs on that thread alone.
    ///
    /// # Panics
    /// With the payload of the first task that panicked, once no task is running any more.
    pub fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        let region = match self.region.try_lock() {
            Ok(guard) => Some(guard),
            Err(std::sync::TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(std::sync::TryLockError::WouldBlock) => None,
        };
        if tasks <= 1 || self.workers.is_empty() || region.is_none() {
            (0..tasks).for_each(task);
            return;
        }
        self.open(tasks, task);
        self.shared.take_tasks(Job { run: erase(task), tasks });
        self.close();
        let payload = self.shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(region);
        if let Some(payload) = payload {
            resume_unwind(payload);
        }
    }

    /// Splits `0..items` into runs of at least `grain` and calls `body` with each.
    ///
    /// # Panics
    /// As [`ThreadPool::run`].
    pub fn run_ranges(&self, items: usize, grain: usize, body: &(dyn Fn(std::ops::Range<usize>) + Sync)) {
        let most = items / grain.max(1);
        let parts = most.clamp(1, self.threads() * 4);
        let parts = if parts < self.threads() { 1.max(most) } else { parts - parts % self.threads() };
        self.run(parts, &|part| body(split(items, parts, part)));
    }

    fn open(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        let shared = &*self.shared;
        // SAFETY: the state is closed with nobody inside (the last `close` waited for that), and the
        // region lock is held, so this is the only access.
        unsafe { *shared.job.get() = Some(Job { run: erase(task), tasks }) };
        shared.next.store(0, Ordering::Relaxed);
        let region = (shared.state.load(Ordering::Relaxed) >> 32).wrapping_add(1);
        // SeqCst pairs with the worker's: either it sees this region, or this sees it parked.
        shared.state.store((region << 32) | OPEN, Ordering::SeqCst);
        for (parked, thread) in shared.parked.iter().zip(&self.unpark) {
            if parked.load(Ordering::SeqCst) && parked.swap(false, Ordering::SeqCst) {
                thread.unpark();
            }
        }
    }

    /// Lets nobody in any more and waits until all are out: then nobody can hold the closure.
    fn close(&self) {
        self.shared.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0u32;
        while self.shared.state.load(Ordering::Acquire) & INSIDE != 0 {
            spins += 1;
            // A worker whose core was taken away in mid-task needs this one.
            if spins > 200 { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for thread in &self.unpark {
            thread.unpark();
        }
        for worker in self.workers.drain(..) {
            // A worker cannot panic: tasks run under catch_unwind.
            let _ = worker.join();
        }
    }
}

impl std::fmt::Debug for ThreadPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ThreadPool").field("threads", &self.threads()).finish()
    }
}

impl Shared {
    fn take_tasks(&self, job: Job) {
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= job.tasks {
                return;
            }
            // SAFETY: `run` does not return before everyone who holds the job is out.
            let run = unsafe { &*job.run };
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| run(index))) {
                self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(payload);
            }
        }
    }

    /// Enters the open region if it is a new one, does tasks, leaves. Returns the region's number.
    fn join_region(&self, last: u64) -> Option<u64> {
        let state = self.state.load(Ordering::SeqCst);
        let region = state >> 32;
        if state & OPEN == 0 || region == last {
            return None;
        }
        self.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).ok()?;
        // SAFETY: having entered, the job cannot change before this worker leaves.
        if let Some(job) = unsafe { *self.job.get() } {
            self.take_tasks(job);
        }
        self.state.fetch_sub(1, Ordering::Release);
        Some(region)
    }
}

/// The life of a worker: join regions, spin a little between them, then park.
fn work(shared: &Shared, index: usize) {
    let mut last = 0;
    let mut idle_since = Instant::now();
    let mut spins = 0u32;
    while !shared.stop.load(Ordering::Relaxed) {
        if let Some(region) = shared.join_region(last) {
            last = region;
            idle_since = Instant::now();
            continue;
        }
        std::hint::spin_loop();
        spins = spins.wrapping_add(1);
        if !spins.is_multiple_of(16) || idle_since.elapsed() < SPIN {
            continue;
        }
        shared.parked[index].store(true, Ordering::SeqCst);
        let state = shared.state.load(Ordering::SeqCst);
        let wanted = state & OPEN != 0 && state >> 32 != last;
        if !wanted && !shared.stop.load(Ordering::SeqCst) {
            std::thread::park();
        }
        shared.parked[index].store(false, Ordering::SeqCst);
        idle_since = Instant::now();
    }
}

/// Forgets the lifetime of the closure.
fn erase<'a>(task: &'a (dyn Fn(usize) + Sync + 'a)) -> *const (dyn Fn(usize) + Sync) {
    let pointer: *const (dyn Fn(usize) + Sync + 'a) = task;
    // SAFETY: only the lifetime changes, and nobody follows the pointer after `run` has returned.
    unsafe {
        std::mem::transmute::<*const (dyn Fn(usize) + Sync + 'a), *const (dyn Fn(usize) + Sync + 'static)>(
            pointer,
        )
    }
}

/// Part `part` of `parts` nearly equal runs of `0..items`.
pub(super) fn split(items: usize, parts: usize, part: usize) -> std::ops::Range<usize> {
    items * part / parts..items * (part + 1) / parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(pool: &ThreadPool, tasks: usize) -> Vec<usize> {
        let counts: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
        pool.run(tasks, &|index| {
            counts[index].fetch_add(1, Ordering::Relaxed);
        });
        counts.into_iter().map(AtomicUsize::into_inner).collect()
    }

    #[test]
    fn every_task_runs_exactly_once() {
        for threads in [0, 1, 2, 5] {
            let pool = ThreadPool::new(threads);
            assert_eq!(pool.threads(), threads.max(1));
            for tasks in [0, 1, 2, 3, 64, 1000] {
                assert!(counts(&pool, tasks).iter().all(|&count| count == 1));
            }
        }
    }

    #[test]
    fn many_regions_with_pauses_between() {
        let pool = ThreadPool::new(3);
        for round in 0..3_000 {
            assert!(counts(&pool, 5).iter().all(|&count| count == 1));
            if round % 500 == 0 {
                // Long enough for the workers to park.
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }

    #[test]
    fn panics_reach_the_caller_and_the_pool_stays_usable() {
        let pool = ThreadPool::new(2);
        let caught = catch_unwind(AssertUnwindSafe(|| {
            pool.run(100, &|index| assert!(index != 37, "task {index} failed"));
        }));
        let payload = caught.expect_err("the panic must propagate");
        assert_eq!(payload.downcast_ref::<String>().map(String::as_str), Some("task 37 failed"));
        assert!(counts(&pool, 100).iter().all(|&count| count == 1));
    }

    #[test]
    fn nested_and_concurrent_regions_complete() {
        let pool = ThreadPool::new(2);
        let total = AtomicUsize::new(0);
        let add = |_| {
            total.fetch_add(1, Ordering::Relaxed);
        };
        pool.run(4, &|_| pool.run(3, &add));
        assert_eq!(total.load(Ordering::Relaxed), 12);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| (0..200).for_each(|_| pool.run(5, &add)));
            }
        });
        assert_eq!(total.load(Ordering::Relaxed), 12 + 3 * 200 * 5);
    }

    #[test]
    fn ranges_cover_all_items_once() {
        let pool = ThreadPool::new(3);
        for items in [0, 1, 2, 7, 100, 1001] {
            for grain in [1, 8, 1000] {
                let seen: Vec<_> = (0..items).map(|_| AtomicUsize::new(0)).collect();
                pool.run_ranges(items, grain, &|range| {
                    for index in range {
                        seen[index].fetch_add(1, Ordering::Relaxed);
                    }
                });
                assert!(seen.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            }
        }
    }
}
