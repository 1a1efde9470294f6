// The machine behind emulator.h: fibers, barriers, asynchronous copies, checks of memory, and the launch.
#include "emulator.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <mutex>
#include <vector>

// The section of the shared variables, and the whole of this library, as the linker knows them.
extern "C" u8 __start_shared_memory[] __attribute__((weak, visibility("hidden")));
extern "C" u8 __stop_shared_memory[] __attribute__((weak, visibility("hidden")));
extern "C" u8 __ehdr_start[] __attribute__((visibility("hidden")));
extern "C" u8 _end[] __attribute__((visibility("hidden")));

namespace emulator {

Position here;
u8* dynamic_memory;

namespace {

const size_t STACK_BYTES = 128 << 10;
const int MOST_THREADS = 1024;
const int MOST_COPIES = 512;
const int MOST_PARAMETERS = 32;
// Loads and stores of a block after which it must be running in circles: some ten seconds.
const u64 MOST_ACCESSES = 2000000000;

struct Copy {
    void* to;
    const void* from;
    bool wanted;
};

struct Fiber {
    jmp_buf where;
    u32 thread;
    bool done;
    u32 exchanges;             // how many it took part in
    Copy copies[MOST_COPIES];  // requested and not done, oldest first
    int copy_count;
    int group_sizes[MOST_COPIES];  // of the groups that have ended, oldest first
    int group_count;
    int open_group;  // copies of the group that has not ended
};

struct Warp {
    u32 live, arrived;
    Together what;
    Deposit deposits[2][32];
    u32 waiting[32];
};

struct Range {
    const u8* begin;
    const u8* end;
};

// One launch as the loader describes it.
struct Launch {
    u32 grid[3];
    u32 block;
    u32 shared_bytes;
    u64 seed;
    void (*call)(const u64*);
    const u64* words;
    u64 word_count;
    const Range* memory;  // what may be read and written, ascending
    u64 memory_count;
    char* error;  // where a message goes
    u64 error_bytes;
    u64 conflicts;  // out: matrix loads whose rows lay in the same banks
};

std::mutex one_at_a_time;
Launch* launch;
Fiber fibers[MOST_THREADS];
Warp warps[MOST_THREADS / 32];
u8* stacks;
Fiber* running;
jmp_buf scheduler;
ucontext_t starter, starting;
u32 runnable[MOST_THREADS], runnable_count;
u32 at_barrier[MOST_THREADS], at_barrier_count;
u32 live_count;
u64 random_state;
u64 accesses;
u64 arguments[MOST_PARAMETERS];

u64 draw() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

[[noreturn]] void fail(const char* format, ...) {
    if (!launch->error[0]) {
        int length = snprintf(launch->error, launch->error_bytes, "block (%u, %u, %u), thread %u: ",
                              here.block.x, here.block.y, here.block.z, here.thread.x);
        va_list values;
        va_start(values, format);
        vsnprintf(launch->error + length, launch->error_bytes - length, format, values);
        va_end(values);
    }
    _longjmp(scheduler, 1);
}

// Gives the CPU back to the scheduler, which gives it to somebody who can go on.
void pause() {
    if (_setjmp(running->where) == 0) _longjmp(scheduler, 1);
}

void wake(u32 thread) { runnable[runnable_count++] = thread; }

void release_barrier() {
    for (u32 i = 0; i < at_barrier_count; i++) wake(at_barrier[i]);
    at_barrier_count = 0;
}

void body() {
    launch->call(arguments);
    Fiber* fiber = running;
    fiber->done = true;
    Warp& warp = warps[fiber->thread / 32];
    warp.live--;
    live_count--;
    if (warp.arrived) fail("left the kernel while its warp waits for it at a common instruction");
    if (at_barrier_count && at_barrier_count == live_count) release_barrier();
    _longjmp(scheduler, 1);
}

void start(u32 thread) {
    getcontext(&starting);
    starting.uc_stack.ss_sp = stacks + thread * STACK_BYTES;
    starting.uc_stack.ss_size = STACK_BYTES;
    starting.uc_link = nullptr;
    makecontext(&starting, body, 0);
    swapcontext(&starter, &starting);
}

void run_block(const dim3& block) {
    u32 threads = launch->block;
    memset(__start_shared_memory, 0xff, __stop_shared_memory - __start_shared_memory);
    memset(dynamic_memory, 0xff, launch->shared_bytes);
    static bool started[MOST_THREADS];
    for (u32 i = 0; i < threads; i++) {
        Fiber& fiber = fibers[i];
        fiber.thread = i;
        fiber.done = started[i] = false;
        fiber.exchanges = fiber.copy_count = fiber.group_count = fiber.open_group = 0;
        if (i % 32 == 0) {
            warps[i / 32].live = 32;
            warps[i / 32].arrived = 0;
        }
    }
    live_count = threads;
    accesses = 0;
    at_barrier_count = runnable_count = 0;
    for (u32 i = 0; i < threads; i++) wake(i);

    // Every fiber that pauses, ends or fails jumps here.
    _setjmp(scheduler);
    if (launch->error[0]) return;
    if (runnable_count == 0) {
        if (live_count > 0) {
            snprintf(launch->error, launch->error_bytes,
                     "block (%u, %u, %u): %u threads wait at a barrier or a common instruction of a warp that the "
                     "other %u never reach",
                     block.x, block.y, block.z, at_barrier_count, live_count - at_barrier_count);
        }
        return;
    }
    // With even seeds anyone; with odd ones mostly who became able to go on last, so that one warp runs far ahead
    // while another has not started.
    bool any = launch->seed % 2 == 0 || draw() % 64 == 0;
    u32 pick = any ? draw() % runnable_count : runnable_count - 1;
    u32 thread = runnable[pick];
    runnable[pick] = runnable[--runnable_count];
    running = &fibers[thread];
    here.thread = {thread, 0, 0};
    here.block = block;
    if (started[thread]) _longjmp(running->where, 1);
    started[thread] = true;
    start(thread);
}

bool is_within(const u8* from, const u8* to, const u8* begin, const u8* end) {
    return from >= begin && to <= end;
}

bool is_shared(const u8* from, const u8* to) {
    return is_within(from, to, __start_shared_memory, __stop_shared_memory)
        || is_within(from, to, dynamic_memory, dynamic_memory + launch->shared_bytes);
}

bool is_allocated(const u8* from, const u8* to) {
    static u64 last;  // mostly the same memory as before
    if (last < launch->memory_count && is_within(from, to, launch->memory[last].begin, launch->memory[last].end)) {
        return true;
    }
    u64 low = 0, high = launch->memory_count;
    while (low < high) {
        u64 middle = (low + high) / 2;
        if (launch->memory[middle].end < to) low = middle + 1; else high = middle;
    }
    last = low;
    return low < launch->memory_count && is_within(from, to, launch->memory[low].begin, launch->memory[low].end);
}

void check_access(const void* at, size_t bytes, const char* what) {
    const u8 *from = (const u8*)at, *to = from + bytes;
    if (++accesses > MOST_ACCESSES) fail("the block never ends");
    if (is_allocated(from, to) || is_shared(from, to)) return;
    if (is_within(from, to, stacks, stacks + MOST_THREADS * STACK_BYTES)) return;
    // Constants and the emulator's own variables, but no shared ones: those were looked at above.
    bool own = is_within(from, to, __ehdr_start, _end);
    bool in_section = from >= __start_shared_memory && from < __stop_shared_memory;
    if (own && !in_section) return;
    fail("%s %zu bytes at %p, outside all memory", what, bytes, at);
}

}  // namespace

const Deposit* exchange(Together what, const void* value, size_t size) {
    Fiber* fiber = running;
    Warp& warp = warps[fiber->thread / 32];
    Deposit* deposits = warp.deposits[fiber->exchanges++ & 1];
    memcpy(deposits[fiber->thread % 32].bytes, value, size);
    if (warp.live < 32) fail("a common instruction of a warp of which %u lanes have left", 32 - warp.live);
    if (warp.arrived == 0) warp.what = what;
    if (warp.what != what) fail("lanes of one warp are at different common instructions");
    warp.waiting[warp.arrived++] = fiber->thread;
    if (warp.arrived == 32) {
        warp.arrived = 0;
        for (u32 thread : warp.waiting) wake(thread);
    }
    pause();
    return deposits;
}

void block_barrier() {
    at_barrier[at_barrier_count++] = running->thread;
    if (at_barrier_count == live_count) release_barrier();
    pause();
}

void request_copy(void* to, const void* from, bool wanted) {
    check_shared(to, 16, "the target of an asynchronous copy");
    if (wanted) check_readable(from, 16, "the source of an asynchronous copy");
    Fiber* fiber = running;
    if (fiber->copy_count == MOST_COPIES) fail("more than %d asynchronous copies at once", MOST_COPIES);
    fiber->copies[fiber->copy_count++] = {to, from, wanted};
    fiber->open_group++;
    memset(to, 0xff, 16);
}

void end_copy_group() {
    Fiber* fiber = running;
    if (fiber->group_count == MOST_COPIES) fail("more than %d groups of copies", MOST_COPIES);
    fiber->group_sizes[fiber->group_count++] = fiber->open_group;
    fiber->open_group = 0;
}

void finish_copies(int later_groups) {
    Fiber* fiber = running;
    int groups = fiber->group_count - later_groups, copies = 0;
    if (groups <= 0) return;
    for (int i = 0; i < groups; i++) copies += fiber->group_sizes[i];
    for (int i = 0; i < copies; i++) {
        Copy& copy = fiber->copies[i];
        if (copy.wanted) memcpy(copy.to, copy.from, 16); else memset(copy.to, 0, 16);
    }
    fiber->copy_count -= copies;
    fiber->group_count -= groups;
    memmove(fiber->copies, fiber->copies + copies, fiber->copy_count * sizeof(Copy));
    memmove(fiber->group_sizes, fiber->group_sizes + groups, fiber->group_count * sizeof(int));
}

void check_readable(const void* from, size_t bytes, const char* what) {
    if ((u64)from % bytes) fail("%s is not aligned: %p", what, from);
    if (!is_allocated((const u8*)from, (const u8*)from + bytes)) fail("%s is outside all memory: %p", what, from);
}

void check_shared(const void* at, size_t bytes, const char* what) {
    if ((u64)at % bytes) fail("%s is not aligned: %p", what, at);
    if (!is_shared((const u8*)at, (const u8*)at + bytes)) fail("%s is outside shared memory: %p", what, at);
}

void count_conflicts(const Deposit* rows) {
    if (running->thread % 32) return;
    u32 taken = 0;
    for (int i = 0; i < 8; i++) taken |= 1u << (left_by<u64>(rows, i) / 16 % 8);
    launch->conflicts += 8 - __builtin_popcount(taken);
}

void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, float (*to_float)(u16)) {
    u32 mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    const Deposit* held = exchange(MULTIPLY, mine, sizeof(mine));
    int g = running->thread % 32 / 4, column = running->thread % 4 * 2;
    auto number = [&](int lane, int word, int half) {
        u32 packed;
        memcpy(&packed, held[lane].bytes + 4 * word, 4);
        return (double)to_float((u16)(packed >> 16 * half));
    };
    double sum[4] = {c[0], c[1], c[2], c[3]};
    for (int k = 0; k < 16; k++) {
        // Which lane of four, which register and which half hold index k of a row of A or a column of B.
        int lane = k % 8 / 2, upper = k / 8, half = k % 2;
        double above = number(4 * g + lane, 2 * upper, half), below = number(4 * g + lane, 2 * upper + 1, half);
        double left = number(4 * column + lane, 4 + upper, half);
        double right = number(4 * (column + 1) + lane, 4 + upper, half);
        sum[0] += above * left;
        sum[1] += above * right;
        sum[2] += below * left;
        sum[3] += below * right;
    }
    for (int i = 0; i < 4; i++) c[i] = (float)sum[i];
}

// A library that is unloaded takes its fibers' stacks with it.
__attribute__((destructor)) void give_stacks_back() {
    if (stacks) munmap(stacks, MOST_THREADS * STACK_BYTES);
}

// Runs all blocks, in an order that the seed decides.
extern "C" __attribute__((visibility("default"))) void run_launch(Launch* given) {
    std::lock_guard<std::mutex> lock(one_at_a_time);
    launch = given;
    if (given->word_count > MOST_PARAMETERS) abort();
    memcpy(arguments, given->words, given->word_count * sizeof(u64));
    random_state = given->seed * 0x9e3779b97f4a7c15ull + 1;
    if (!stacks) {
        int kind = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        stacks = (u8*)mmap(nullptr, MOST_THREADS * STACK_BYTES, PROT_READ | PROT_WRITE, kind, -1, 0);
        if (stacks == MAP_FAILED) abort();
    }
    // Exactly as large as asked for, with room for the alignment that kernels rely on.
    std::vector<u8> memory(given->shared_bytes + 128);
    dynamic_memory = memory.data() + (128 - (u64)memory.data() % 128);
    here.block_size = {given->block, 1, 1};
    here.grid = {given->grid[0], given->grid[1], given->grid[2]};
    std::vector<dim3> blocks;
    for (u32 z = 0; z < here.grid.z; z++) {
        for (u32 y = 0; y < here.grid.y; y++) {
            for (u32 x = 0; x < here.grid.x; x++) blocks.push_back({x, y, z});
        }
    }
    for (size_t left = blocks.size(); left > 0 && !given->error[0]; left--) {
        size_t pick = draw() % left;
        run_block(blocks[pick]);
        blocks[pick] = blocks[left - 1];
    }
    launch = nullptr;
}

}  // namespace emulator

// What the compiler's kernel-address instrumentation calls before each load and store of a kernel.
#define CHECKED(bytes)                                                                         \
    extern "C" void __asan_load##bytes##_noabort(const void* at) {                              \
        emulator::check_access(at, bytes, "read of");                                           \
    }                                                                                          \
    extern "C" void __asan_store##bytes##_noabort(const void* at) {                             \
        emulator::check_access(at, bytes, "write of");                                          \
    }
CHECKED(1)
CHECKED(2)
CHECKED(4)
CHECKED(8)
CHECKED(16)
extern "C" void __asan_loadN_noabort(const void* at, size_t bytes) {
    emulator::check_access(at, bytes, "read of");
}
extern "C" void __asan_storeN_noabort(const void* at, size_t bytes) {
    emulator::check_access(at, bytes, "write of");
}
extern "C" void __asan_handle_no_return() {}
