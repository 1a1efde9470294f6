// Instructions that C++ has no name for, as functions. All inline assembly of the kernels stands here;
// the emulator (cuda/emulator/emulator.h) has functions of the same names that do the same on a CPU.
//
// Matrix instructions work on fragments: 32 lanes of a warp hold one small matrix together. With
// g = lane / 4 and c = lane % 4, two numbers in each 32-bit register (the first in the low half):
//
//   A [16 x 16]  a[0] row g,     columns 2c, 2c+1      a[2] row g,     columns 2c+8, 2c+9
//                a[1] row g + 8, columns 2c, 2c+1      a[3] row g + 8, columns 2c+8, 2c+9
//   B [16 x 8]   b[0] rows 2c, 2c+1, column g          b[1] rows 2c+8, 2c+9, column g
//   C [16 x 8]   c[0], c[1] row g, columns 2c, 2c+1    c[2], c[3] row g + 8, columns 2c, 2c+1   (f32)
//
// (PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type".)

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// Two f32 rounded to nearest even and packed.
__device__ inline u32 pack_bf16(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

__device__ inline u32 pack_f16(float low, float high) {
    u32 packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

__device__ inline float f16_to_float(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
// Two f32 rounded to e4m3, values beyond the range to the largest; NaN stays NaN.
__device__ inline u16 pack_e4m3(float low, float high) {
    u16 packed;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
    return packed;
}

// Two e4m3 as f16, which holds them exactly.
__device__ inline u32 e4m3_to_f16(u16 packed) {
    u32 wide;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(wide) : "h"(packed));
    return wide;
}
#endif

// 2^x to about 2 units in the last place; 0 for -inf. Denormal results are 0.
__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Selects 4 of the 8 bytes of (high, low) by the 4 hexadecimal digits of `selector`, lowest first.
__device__ inline u32 select_bytes(u32 low, u32 high, u32 selector) {
    return __byte_perm(low, high, selector);
}

// The dynamic shared memory of the block.
__device__ inline u8* dynamic_shared() {
    extern __shared__ uint4 memory[];
    return (u8*)memory;
}

__device__ inline u32 shared_address(const void* pointer) {
    return (u32)__cvta_generic_to_shared(pointer);
}

// Asks for 16 bytes of global memory to be copied to shared memory, both aligned; zeros if not `wanted`
// (then `from` is not read). Done when the group it was committed in has been waited for.
__device__ inline void copy_async(void* to, const void* from, bool wanted) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 ::"r"(shared_address(to)), "l"(from), "r"(wanted ? 16 : 0)
                 : "memory");
}

// Ends a group of asynchronous copies.
__device__ inline void commit_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `LATER` groups of this thread, the latest ones, are not done.
template <int LATER>
__device__ inline void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LATER) : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers from shared memory. Lane 8i + r gives the address of row r of
// matrix i, 16 bytes. Each lane receives of each matrix row g, columns 2c and 2c+1.
__device__ inline void load_matrices(u32 (&m)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// The same, each matrix transposed: each lane receives column g, rows 2c and 2c+1.
__device__ inline void load_matrices_transposed(u32 (&m)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// Transposes an 8 x 8 matrix that the warp holds.
__device__ inline u32 transpose_matrix(u32 m) {
    u32 transposed;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(m));
    return transposed;
}

// c += a * b, with f32 sums.
__device__ inline void multiply_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline void multiply_f16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Reads and writes that bypass the first-level cache, for what other blocks wrote in the same launch.
__device__ inline float load_shared_result(const float* from) {
    return __ldcg(from);
}

__device__ inline void store_shared_result(float* to, float value) {
    __stcg(to, value);
}
