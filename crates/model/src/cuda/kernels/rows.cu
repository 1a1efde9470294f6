// Copies of whole rows and blocks. Bound by bytes: each is read once and written once, 16 at a time.

// Embedding: the rows of the table that the tokens name. A token with its top bit set stands for the one
// that the last step chose in its answer of that number: it never leaves the GPU.
//
// Grid [rows], 128 threads.
extern "C" __global__ void __launch_bounds__(128) embed(
    uint4* __restrict__ out,          // [rows, row_vectors]
    const uint4* __restrict__ table,  // [vocabulary, row_vectors]
    const u32* __restrict__ tokens,   // [rows]
    const u32* __restrict__ chosen,   // [answers of the last step]
    u32 row_vectors) {
    u32 token = tokens[blockIdx.x];
    if (token >> 31) token = chosen[token & 0x7fffffff];
    const uint4* from = table + (u64)token * row_vectors;
    uint4* to = out + (u64)blockIdx.x * row_vectors;
    for (u32 i = threadIdx.x; i < row_vectors; i += blockDim.x) to[i] = from[i];
}

// Rows by number; 0xffffffff leaves the output row as it is (padding of a recorded graph).
//
// Grid [rows of out], 128 threads.
extern "C" __global__ void __launch_bounds__(128) gather_rows(
    uint4* __restrict__ out,       // [rows, row_vectors]
    const uint4* __restrict__ x,   // [any, row_vectors]
    const u32* __restrict__ rows,  // [rows]
    u32 row_vectors) {
    u32 row = rows[blockIdx.x];
    if (row == 0xffffffff) return;
    const uint4* from = x + (u64)row * row_vectors;
    uint4* to = out + (u64)blockIdx.x * row_vectors;
    for (u32 i = threadIdx.x; i < row_vectors; i += blockDim.x) to[i] = from[i];
}

// Copy on write: whole blocks of the KV cache, in every layer. No block is both a source and a
// destination.
//
// Grid [copies, layers, chunks of a block], 256 threads.
extern "C" __global__ void __launch_bounds__(256) copy_blocks(
    uint4* cache,                    // [layers, blocks, block_vectors]
    const u32* __restrict__ copies,  // [copies, 2]: from, to
    u32 block_vectors,
    u64 layer_vectors) {
    uint4* layer = cache + blockIdx.y * layer_vectors;
    const uint4* from = layer + (u64)copies[2 * blockIdx.x] * block_vectors;
    uint4* to = layer + (u64)copies[2 * blockIdx.x + 1] * block_vectors;
    u32 step = blockDim.x * gridDim.z;
    for (u32 i = blockIdx.z * blockDim.x + threadIdx.x; i < block_vectors; i += step) to[i] = from[i];
}
