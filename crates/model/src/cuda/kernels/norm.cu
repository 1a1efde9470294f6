// RMS norm (Zhang and Sennrich 2019), alone and after the residual sum:
//
//   out = x / sqrt(mean(x^2) + eps) * weight
//
// A row stays in registers between the sum of its squares and the output, so that each number is read
// once. Bound by bytes: 2 numbers a row element, with the residual 4.
//
// Grid [rows], THREADS threads; thread t holds the vectors t, t + THREADS, ... of 8 numbers. WIDTH is a
// multiple of 8.

#define VECTORS (WIDTH / 8)
#define HELD ((VECTORS + THREADS - 1) / THREADS)

__device__ inline void norm_row(element* out, const float (&x)[HELD][8], const float* weight, float eps) {
    __shared__ float scratch[THREADS / 32];
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
#pragma unroll
        for (int j = 0; j < 8; j++) squares += x[i][j] * x[i][j];
    }
    float scale = 1.0f / sqrtf(block_sum<THREADS>(squares, scratch) / WIDTH + eps);
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        int vector = threadIdx.x + i * THREADS;
        if (vector < VECTORS) {
            float w[8], y[8];
            load8(w, weight + vector * 8);
#pragma unroll
            for (int j = 0; j < 8; j++) y[j] = x[i][j] * scale * w[j];
            store8(out + vector * 8, y);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) rms_norm(
    element* __restrict__ out,          // [rows, WIDTH]
    const element* __restrict__ x,      // [rows, WIDTH]
    const float* __restrict__ weight,   // [WIDTH]
    float eps) {
    x += (u64)blockIdx.x * WIDTH;
    float row[HELD][8] = {};
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        int vector = threadIdx.x + i * THREADS;
        if (vector < VECTORS) load8(row[i], x + vector * 8);
    }
    norm_row(out + (u64)blockIdx.x * WIDTH, row, weight, eps);
}

// x += delta, rounded as it is stored, and then the norm of that.
extern "C" __global__ void __launch_bounds__(THREADS, 1) add_rms_norm(
    element* __restrict__ out,          // [rows, WIDTH]
    element* __restrict__ x,            // [rows, WIDTH], changed
    const element* __restrict__ delta,  // [rows, WIDTH]
    const float* __restrict__ weight,   // [WIDTH]
    float eps) {
    x += (u64)blockIdx.x * WIDTH;
    delta += (u64)blockIdx.x * WIDTH;
    float row[HELD][8] = {};
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        int vector = threadIdx.x + i * THREADS;
        if (vector < VECTORS) {
            float more[8];
            load8(row[i], x + vector * 8);
            load8(more, delta + vector * 8);
#pragma unroll
            for (int j = 0; j < 8; j++) row[i][j] = to_float(to_element(row[i][j] + more[j]));
            store8(x + vector * 8, row[i]);
        }
    }
    norm_row(out + (u64)blockIdx.x * WIDTH, row, weight, eps);
}
