// CUDA for one CPU thread: what the kernels need of the language, so that the same sources compile with any C++
// compiler and run where no GPU is. It stands in the place of ptx.cuh, in front of common.cuh and a kernel.
//
// Every thread of a block is a fiber with a stack of its own (runtime.cpp). A fiber runs until it has to wait
// for others: at a barrier of the block, or at an instruction that a warp executes together. Who goes on is
// drawn from a seeded generator, so that a missing barrier gives wrong numbers with one seed or another. Blocks run
// one after the other, in random order: what two blocks do at the same time does not show.
//
// What a GPU leaves undefined is made visible: shared memory starts as NaN, and the target of an asynchronous
// copy is NaN from the request until it has been waited for. Where the compiler can (GCC's and Clang's
// kernel-address instrumentation), each load and store of a kernel is checked against the memory it may
// touch.
#pragma once
#include <math.h>
#include <stddef.h>
#include <string.h>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __noinline__ __attribute__((noinline))
// All shared variables stand in one section, which is filled with NaN before each block.
#define __shared__ static __attribute__((section("shared_memory")))

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct dim3 { u32 x, y, z; };

static inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }

namespace emulator {

// What the fiber that runs now is.
struct Position {
    dim3 thread, block, block_size, grid;
};
extern Position here;
extern u8* dynamic_memory;

// Instructions that a warp executes together; all lanes must be at the same one.
enum Together { SYNC, SHUFFLE, VOTE, LOAD_MATRICES, TRANSPOSE, MULTIPLY };

struct alignas(16) Deposit {
    u8 bytes[32];
};

// Leaves `size` bytes for the other lanes, waits for them, and returns what all 32 left. It holds until the
// second next call.
const Deposit* exchange(Together what, const void* value, size_t size);
void block_barrier();
void request_copy(void* to, const void* from, bool wanted);
void end_copy_group();
void finish_copies(int later_groups);
// Ends the launch with a message, unless all of the memory may be read (or is shared memory).
void check_readable(const void* from, size_t bytes, const char* what);
void check_shared(const void* at, size_t bytes, const char* what);
// Eight rows that shared memory reads in one go; counts how often two lie in the same banks.
void count_conflicts(const Deposit* rows);

template <typename T>
T left_by(const Deposit* deposits, int lane) {
    T value;
    memcpy(&value, deposits[lane].bytes, sizeof(T));
    return value;
}

// Round to nearest even to a format with `exponent_bits` and `mantissa_bits`, denormals included. The result
// may be the first number beyond the format's range.
static inline u32 round_to(float x, int exponent_bits, int mantissa_bits) {
    int bias = (1 << (exponent_bits - 1)) - 1;
    float magnitude = fabsf(x);
    u32 sign = signbit(x) ? 1u << (exponent_bits + mantissa_bits) : 0;
    if (magnitude == 0.0f) return sign;
    int exponent;
    frexpf(magnitude, &exponent);
    int place = exponent - 1 < 1 - bias ? 1 - bias : exponent - 1;
    // rint rounds to even. One unit too many carries into the exponent as it should.
    u32 units = (u32)rint(ldexp((double)magnitude, mantissa_bits - place));
    return sign | (units + ((u32)(place + bias - 1) << mantissa_bits));
}

static inline float widen(u32 bits, int exponent_bits, int mantissa_bits) {
    int bias = (1 << (exponent_bits - 1)) - 1;
    u32 mantissa = bits & ((1u << mantissa_bits) - 1);
    int exponent = bits >> mantissa_bits & ((1 << exponent_bits) - 1);
    float value = exponent == 0 ? ldexpf((float)mantissa, 1 - bias - mantissa_bits)
                                : ldexpf((float)(mantissa | 1u << mantissa_bits), exponent - bias - mantissa_bits);
    return bits >> (exponent_bits + mantissa_bits) ? -value : value;
}

// c += a * b with exact products, summed in f64 and rounded once.
void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, float (*to_float)(u16));

}  // namespace emulator

#define threadIdx (emulator::here.thread)
#define blockIdx (emulator::here.block)
#define blockDim (emulator::here.block_size)
#define gridDim (emulator::here.grid)

// ---- barriers and warps ----

static inline void __syncthreads() { emulator::block_barrier(); }
static inline void __syncwarp() { emulator::exchange(emulator::SYNC, "", 0); }
// One CPU thread runs all blocks, so that every write is seen at once.
static inline void __threadfence() {}

template <typename T>
T __shfl_sync(u32, T value, int lane) {
    return emulator::left_by<T>(emulator::exchange(emulator::SHUFFLE, &value, sizeof(T)), lane & 31);
}

template <typename T>
T __shfl_xor_sync(u32 mask, T value, int lanes) {
    return __shfl_sync(mask, value, (int)(threadIdx.x % 32) ^ lanes);
}

static inline bool __any_sync(u32, bool condition) {
    const emulator::Deposit* conditions = emulator::exchange(emulator::VOTE, &condition, sizeof(condition));
    for (int lane = 0; lane < 32; lane++) {
        if (emulator::left_by<bool>(conditions, lane)) return true;
    }
    return false;
}

template <typename T>
T atomicAdd(T* at, T value) {
    T old = *at;
    *at += value;
    return old;
}
static inline u32 atomicAdd(u32* at, int value) { return atomicAdd<u32>(at, (u32)value); }

// ---- arithmetic ----

static inline float __uint_as_float(u32 bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
static inline u32 __float_as_uint(float value) {
    u32 bits;
    memcpy(&bits, &value, 4);
    return bits;
}
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fdividef(float a, float b) { return a / b; }
static inline u64 __float2ull_rn(float x) { return (u64)rint((double)x); }
static inline u64 __umul64hi(u64 a, u64 b) { return (u64)((unsigned __int128)a * b >> 64); }
static inline int __clz(u32 x) { return x ? __builtin_clz(x) : 32; }
template <typename T>
T min(T a, T b) { return b < a ? b : a; }
template <typename T>
T max(T a, T b) { return a < b ? b : a; }

// ---- the functions of ptx.cuh ----

static inline u32 pack_bf16(float low, float high) {
    auto round = [](float x) -> u32 {
        u32 bits = __float_as_uint(x);
        return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    };
    return round(low) | round(high) << 16;
}

static inline u32 pack_f16(float low, float high) {
    auto round = [](float x) -> u32 {
        if (x != x) return 0x7fff;
        u32 infinity = 0x7c00, sign = signbit(x) ? 0x8000 : 0;
        if (fabsf(x) >= 65520.0f) return sign | infinity;
        return emulator::round_to(x, 5, 10);
    };
    return round(low) | round(high) << 16;
}

static inline float f16_to_float(u16 bits) {
    if ((bits & 0x7c00) == 0x7c00) return bits & 0x3ff ? NAN : bits >> 15 ? -INFINITY : INFINITY;
    return emulator::widen(bits, 5, 10);
}

static inline u16 pack_e4m3(float low, float high) {
    auto round = [](float x) -> u32 {
        if (x != x) return 0x7f;
        u32 largest = 0x7e, sign = signbit(x) ? 0x80 : 0;
        return fabsf(x) >= 448.0f ? sign | largest : emulator::round_to(x, 4, 3);
    };
    return (u16)(round(low) | round(high) << 8);
}

static inline u32 e4m3_to_f16(u16 packed) {
    auto wide = [](u32 bits) { return (bits & 0x7f) == 0x7f ? NAN : emulator::widen(bits, 4, 3); };
    return pack_f16(wide(packed & 0xff), wide(packed >> 8));
}

static inline float exp2_fast(float x) {
    float y = exp2f(x);
    return y < 1.17549435e-38f ? 0.0f : y;
}

static inline u32 select_bytes(u32 low, u32 high, u32 selector) {
    u64 bytes = (u64)high << 32 | low;
    u32 out = 0;
    for (int i = 0; i < 4; i++) out |= (u32)(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return out;
}

static inline u8* dynamic_shared() { return emulator::dynamic_memory; }

static inline void copy_async(void* to, const void* from, bool wanted) {
    emulator::request_copy(to, from, wanted);
}
static inline void commit_copies() { emulator::end_copy_group(); }
template <int LATER>
void wait_copies() { emulator::finish_copies(LATER); }

static inline u16 matrix_element(const emulator::Deposit* rows, int row, int column) {
    u16 bits;
    memcpy(&bits, emulator::left_by<const u8*>(rows, row) + 2 * column, 2);
    return bits;
}

static inline const emulator::Deposit* exchange_rows(const void* row) {
    emulator::check_shared(row, 16, "the row of a matrix");
    const emulator::Deposit* rows = emulator::exchange(emulator::LOAD_MATRICES, &row, sizeof(row));
    for (int matrix = 0; matrix < 4; matrix++) emulator::count_conflicts(rows + 8 * matrix);
    return rows;
}

static inline void load_matrices(u32 (&m)[4], const void* row) {
    const emulator::Deposit* rows = exchange_rows(row);
    int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
    for (int i = 0; i < 4; i++) {
        m[i] = matrix_element(rows, 8 * i + g, 2 * c) | matrix_element(rows, 8 * i + g, 2 * c + 1) << 16;
    }
}

static inline void load_matrices_transposed(u32 (&m)[4], const void* row) {
    const emulator::Deposit* rows = exchange_rows(row);
    int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
    for (int i = 0; i < 4; i++) {
        m[i] = matrix_element(rows, 8 * i + 2 * c, g) | matrix_element(rows, 8 * i + 2 * c + 1, g) << 16;
    }
}

static inline u32 transpose_matrix(u32 m) {
    const emulator::Deposit* held = emulator::exchange(emulator::TRANSPOSE, &m, 4);
    int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
    u32 first = emulator::left_by<u32>(held, 8 * c + g / 2) >> 16 * (g % 2) & 0xffff;
    u32 second = emulator::left_by<u32>(held, 8 * c + 4 + g / 2) >> 16 * (g % 2) & 0xffff;
    return first | second << 16;
}

static inline void multiply_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    emulator::multiply(c, a, b0, b1, [](u16 bits) { return __uint_as_float((u32)bits << 16); });
}

static inline void multiply_f16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    emulator::multiply(c, a, b0, b1, f16_to_float);
}

static inline float load_shared_result(const float* from) { return *from; }
static inline void store_shared_result(float* to, float value) { *to = value; }

// ---- from the launch to the kernel ----

namespace emulator {

template <typename T>
struct Kind { static const char letter = 'p'; };
template <>
struct Kind<u32> { static const char letter = 'u'; };
template <>
struct Kind<u64> { static const char letter = 'l'; };
template <>
struct Kind<float> { static const char letter = 'f'; };

// Calls a kernel with arguments that stand as 64-bit words, and tells what kinds it takes.
template <typename... Parameters>
struct Signature {
    static const char* letters(void (*)(Parameters...)) {
        static const char all[] = {Kind<Parameters>::letter..., 0};
        return all;
    }

    template <size_t... I>
    struct Indices {};
    template <size_t N, size_t... I>
    struct UpTo : UpTo<N - 1, N - 1, I...> {};
    template <size_t... I>
    struct UpTo<0, I...> { using Type = Indices<I...>; };

    template <size_t... I>
    static void call(void (*kernel)(Parameters...), const u64* words, Indices<I...>) {
        kernel(argument<Parameters>(words[I])...);
    }

    template <typename T>
    static T argument(u64 word) {
        T value;
        memcpy(&value, &word, sizeof(T));
        return value;
    }
};

template <typename... P>
const char* letters_of(void (*kernel)(P...)) { return Signature<P...>::letters(kernel); }

template <typename... P>
void call(void (*kernel)(P...), const u64* words) {
    Signature<P...>::call(kernel, words, typename Signature<P...>::template UpTo<sizeof...(P)>::Type());
}

}  // namespace emulator

// What the loader finds by name.
#define EXPORT_KERNEL(name)                                                                               \
    extern "C" __attribute__((visibility("default"))) const char* signature_##name() {                  \
        return emulator::letters_of(name);                                                               \
    }                                                                                                    \
    extern "C" __attribute__((visibility("default"))) void call_##name(const u64* words) {              \
        emulator::call(name, words);                                                                     \
    }
