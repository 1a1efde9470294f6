// cuBLASLt as far as the program calls it, on the emulated driver: built as libcublasLt.so.13. Combinations that
// the tables of cublasLtMatmul() in NVIDIA's documentation do not list are refused. Its three "algorithms" differ
// in what they take, so that a search has something to find and a kept choice something to be refused for.
//
// With CUBLASLT_H defined, NVIDIA's header is taken in the place of these declarations.
#include "emulated.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <vector>

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

#ifdef CUBLASLT_H
#include <cublasLt.h>
typedef cublasStatus_t Status;
typedef cublasLtMatmulAlgo_t Algorithm;
typedef cublasLtMatmulHeuristicResult_t Found;
typedef cudaDataType Numbers;
typedef cublasComputeType_t Sums;
typedef cublasLtMatmulDescAttributes_t DescAttribute;
typedef cublasLtMatmulPreferenceAttributes_t PreferenceAttribute;
#else
typedef struct cublasLtContext* cublasLtHandle_t;
typedef struct cublasLtMatmulDescOpaque_t* cublasLtMatmulDesc_t;
typedef struct cublasLtMatrixLayoutOpaque_t* cublasLtMatrixLayout_t;
typedef struct cublasLtMatmulPreferenceOpaque_t* cublasLtMatmulPreference_t;
typedef struct CUstream_st* cudaStream_t;
enum Status {
    CUBLAS_STATUS_SUCCESS = 0,
    CUBLAS_STATUS_NOT_INITIALIZED = 1,
    CUBLAS_STATUS_INVALID_VALUE = 7,
    CUBLAS_STATUS_EXECUTION_FAILED = 13,
    CUBLAS_STATUS_NOT_SUPPORTED = 15,
};
enum Numbers { CUDA_R_32F = 0, CUDA_R_16F = 2, CUDA_R_16BF = 14, CUDA_R_8F_E4M3 = 28 };
enum Sums { CUBLAS_COMPUTE_32F = 68 };
enum DescAttribute {
    CUBLASLT_MATMUL_DESC_TRANSA = 3,
    CUBLASLT_MATMUL_DESC_EPILOGUE = 7,
    CUBLASLT_MATMUL_DESC_BIAS_POINTER = 8,
    CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE = 26,
};
enum PreferenceAttribute {
    CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES = 5,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES = 6,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES = 7,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES = 8,
};
enum { CUBLASLT_EPILOGUE_DEFAULT = 1, CUBLASLT_EPILOGUE_BIAS = 4, CUBLAS_OP_N = 0, CUBLAS_OP_T = 1 };
struct Algorithm {
    uint64_t data[8];
};
struct Found {
    Algorithm algo;
    size_t workspaceSize;
    Status state;
    float wavesCount;
    int reserved[4];
};
#endif

namespace {

// The opaque descriptors, as this library fills them.
struct Operation {
    Sums sums;
    Numbers scale;
    int transpose_a;
    u32 epilogue;
    u64 bias;
    Numbers bias_numbers;
    bool has_bias_numbers;
};

struct Layout {
    Numbers numbers;
    u64 height, width;
    int64_t leading;
};

struct Preference {
    u64 workspace;
    u32 alignment[4];
};

const Operation& of(cublasLtMatmulDesc_t handle) { return *(const Operation*)handle; }
const Layout& of(cublasLtMatrixLayout_t handle) { return *(const Layout*)handle; }

int bytes_of(Numbers numbers) { return numbers == CUDA_R_32F ? 4 : numbers == CUDA_R_8F_E4M3 ? 1 : 2; }

// What can be multiplied with what into what, with which bias.
bool is_supported(const Operation& operation, const Layout& a, const Layout& b, const Layout& d) {
    if (operation.sums != CUBLAS_COMPUTE_32F || operation.scale != CUDA_R_32F) return false;
    u64 depth = operation.transpose_a ? a.height : a.width, outputs = operation.transpose_a ? a.width : a.height;
    if (b.height != depth || d.height != outputs || d.width != b.width || a.numbers != b.numbers) return false;
    for (const Layout* layout : {&a, &b, &d}) {
        if (layout->leading < (int64_t)layout->height) return false;
    }
    Numbers bias = d.numbers;
    if (a.numbers == CUDA_R_8F_E4M3) {
        // Pointers and dimensions have to be multiples of 16 bytes, and A transposed.
        bool aligned = depth % 16 == 0 && outputs * (u64)bytes_of(d.numbers) % 16 == 0;
        bool is_there = emulated::arch() >= 89;
        if (!is_there || !operation.transpose_a || !aligned || d.numbers == CUDA_R_8F_E4M3) return false;
        if (d.numbers == CUDA_R_32F) bias = CUDA_R_16BF;
    } else if (a.numbers == CUDA_R_32F || (d.numbers != a.numbers && d.numbers != CUDA_R_32F)) {
        return false;
    }
    if (operation.epilogue == CUBLASLT_EPILOGUE_DEFAULT) return true;
    Numbers given = operation.has_bias_numbers ? operation.bias_numbers : d.numbers;
    return operation.epilogue == CUBLASLT_EPILOGUE_BIAS && operation.bias != 0 && given == bias;
}

const u64 MARK = 0x5e7ab5e7ab5e7ab0;
const u64 ALGORITHMS = 3;

// The second takes whole classes of rows and aligned memory, the third needs scratch memory.
bool takes(u64 algorithm, const Layout& b) { return algorithm != 1 || b.width % 8 == 0; }
size_t workspace_of(u64 algorithm) { return algorithm == 2 ? 1 << 20 : 0; }

Found found(u64 algorithm) {
    Found found;
    memset(&found, 0, sizeof(found));
    found.algo.data[0] = MARK + algorithm;
    found.workspaceSize = workspace_of(algorithm);
    found.state = CUBLAS_STATUS_SUCCESS;
    found.wavesCount = 1;
    return found;
}

bool is_aligned(const void* at) { return (u64)at % 16 == 0; }

float widen(u32 bits, int exponent_bits, int mantissa_bits) {
    int bias = (1 << (exponent_bits - 1)) - 1, exponent = bits >> mantissa_bits & ((1 << exponent_bits) - 1);
    u32 one = 1u << mantissa_bits, mantissa = bits & (one - 1);
    float value = exponent == 0 ? ldexpf((float)mantissa, 1 - bias - mantissa_bits)
                                : ldexpf((float)(mantissa | one), exponent - bias - mantissa_bits);
    return bits >> (exponent_bits + mantissa_bits) ? -value : value;
}

float e4m3(u8 bits) { return (bits & 0x7f) == 0x7f ? NAN : widen(bits, 4, 3); }

float from_half(u16 bits) {
    if ((bits & 0x7c00) == 0x7c00) return bits & 0x3ff ? NAN : bits >> 15 ? -INFINITY : INFINITY;
    return widen(bits, 5, 10);
}

// Rounds to nearest even.
u16 to_half(float x) {
    u16 sign = signbit(x) ? 0x8000 : 0;
    if (x != x) return 0x7fff;
    if (fabsf(x) >= 65520.0f) return sign | 0x7c00;
    int exponent;
    frexpf(x, &exponent);
    int place = x == 0.0f || exponent < -13 ? -14 : exponent - 1;
    // One unit too many carries into the exponent as it should.
    u32 units = (u32)rint(ldexp(fabs((double)x), 10 - place));
    return (u16)(sign | (units + ((u32)(place + 14) << 10)));
}

float read(const u8* at, Numbers numbers) {
    u16 half;
    u32 word;
    switch (numbers) {
        case CUDA_R_16BF: memcpy(&half, at, 2); word = (u32)half << 16; break;
        case CUDA_R_32F: memcpy(&word, at, 4); break;
        case CUDA_R_16F: memcpy(&half, at, 2); return from_half(half);
        default: return e4m3(*at);
    }
    float value;
    memcpy(&value, &word, 4);
    return value;
}

void write(u8* at, Numbers numbers, float value) {
    u32 word;
    memcpy(&word, &value, 4);
    if (numbers == CUDA_R_32F) {
        memcpy(at, &word, 4);
    } else if (numbers == CUDA_R_16F) {
        u16 half = to_half(value);
        memcpy(at, &half, 2);
    } else {
        u16 half = value != value ? 0x7fff : (u16)((word + 0x7fff + (word >> 16 & 1)) >> 16);
        memcpy(at, &half, 2);
    }
}

std::vector<float> matrix(const void* at, const Layout& layout) {
    std::vector<float> numbers(layout.height * layout.width);
    int bytes = bytes_of(layout.numbers);
    for (u64 column = 0; column < layout.width; column++) {
        for (u64 row = 0; row < layout.height; row++) {
            const u8* from = (const u8*)at + (column * layout.leading + row) * bytes;
            numbers[column * layout.height + row] = read(from, layout.numbers);
        }
    }
    return numbers;
}

bool is_there(const void* at, const Layout& layout) {
    return emulated::is_device_memory((u64)at, layout.leading * layout.width * bytes_of(layout.numbers));
}

struct Product {
    Operation operation;
    Layout a, b, d;
    const void *at_a, *at_b;
    void* at_d;
    float alpha;
    void* workspace;
    size_t scratch;

    Layout bias_layout() const {
        Numbers numbers = operation.has_bias_numbers ? operation.bias_numbers : d.numbers;
        return {numbers, d.height, 1, (int64_t)d.height};
    }

    bool all_there() const {
        bool has_bias = operation.epilogue == CUBLASLT_EPILOGUE_BIAS;
        return is_there(at_a, a) && is_there(at_b, b) && is_there(at_d, d)
            && emulated::is_device_memory((u64)workspace, scratch)
            && (!has_bias || is_there((const void*)operation.bias, bias_layout()));
    }

    // Transposed A only: column of A times column of B.
    void compute() const {
        std::vector<float> weights = matrix(at_a, a), x = matrix(at_b, b), bias(d.height);
        if (operation.epilogue == CUBLASLT_EPILOGUE_BIAS) {
            bias = matrix((const void*)operation.bias, bias_layout());
        }
        for (u64 column = 0; column < d.width; column++) {
            for (u64 row = 0; row < d.height; row++) {
                float sum = 0;
                const float *left = &weights[row * a.height], *right = &x[column * b.height];
                for (u64 k = 0; k < a.height; k++) sum += left[k] * right[k];
                write((u8*)at_d + (column * d.leading + row) * bytes_of(d.numbers), d.numbers, alpha * sum + bias[row]);
            }
        }
    }
};

template <typename T>
Status set(T* field, const void* value, size_t bytes) {
    if (bytes != sizeof(T)) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(field, value, bytes);
    return CUBLAS_STATUS_SUCCESS;
}

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

API size_t cublasLtGetVersion() { return 130000; }

API Status cublasLtCreate(cublasLtHandle_t* handle) {
    if (!emulated::has_context()) return CUBLAS_STATUS_NOT_INITIALIZED;
    *handle = (cublasLtHandle_t) new u64(MARK);
    return CUBLAS_STATUS_SUCCESS;
}

API Status cublasLtDestroy(cublasLtHandle_t handle) {
    delete (u64*)handle;
    return CUBLAS_STATUS_SUCCESS;
}

API Status cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* handle, Sums sums, Numbers scale) {
    *handle = (cublasLtMatmulDesc_t) new Operation{sums, scale, CUBLAS_OP_N, CUBLASLT_EPILOGUE_DEFAULT, 0, scale, false};
    return CUBLAS_STATUS_SUCCESS;
}

API Status cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t handle) {
    delete (Operation*)handle;
    return CUBLAS_STATUS_SUCCESS;
}

API Status cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t handle, DescAttribute attribute, const void* value,
                                          size_t bytes) {
    auto operation = (Operation*)handle;
    switch (attribute) {
        case CUBLASLT_MATMUL_DESC_TRANSA: return set(&operation->transpose_a, value, bytes);
        case CUBLASLT_MATMUL_DESC_EPILOGUE: return set(&operation->epilogue, value, bytes);
        case CUBLASLT_MATMUL_DESC_BIAS_POINTER: return set(&operation->bias, value, bytes);
        case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE:
            operation->has_bias_numbers = true;
            return set(&operation->bias_numbers, value, bytes);
        default: return CUBLAS_STATUS_INVALID_VALUE;
    }
}

API Status cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* handle, Numbers numbers, uint64_t height, uint64_t width,
                                      int64_t leading) {
    *handle = (cublasLtMatrixLayout_t) new Layout{numbers, height, width, leading};
    return CUBLAS_STATUS_SUCCESS;
}

API Status cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t handle) {
    delete (Layout*)handle;
    return CUBLAS_STATUS_SUCCESS;
}

API Status cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* handle) {
    *handle = (cublasLtMatmulPreference_t) new Preference{0, {256, 256, 256, 256}};
    return CUBLAS_STATUS_SUCCESS;
}

API Status cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t handle) {
    delete (Preference*)handle;
    return CUBLAS_STATUS_SUCCESS;
}

API Status cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t handle, PreferenceAttribute attribute,
                                                const void* value, size_t bytes) {
    auto preference = (Preference*)handle;
    switch (attribute) {
        case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES: return set(&preference->workspace, value, bytes);
        case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES: return set(&preference->alignment[0], value, bytes);
        case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES: return set(&preference->alignment[1], value, bytes);
        case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES: return set(&preference->alignment[2], value, bytes);
        case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES: return set(&preference->alignment[3], value, bytes);
        default: return CUBLAS_STATUS_INVALID_VALUE;
    }
}

API Status cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t operation, cublasLtMatrixLayout_t a,
                                          cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t d,
                                          cublasLtMatmulPreference_t preference, int most, Found* results, int* count) {
    *count = 0;
    auto wishes = (const Preference*)preference;
    bool aligned = of(a).numbers != CUDA_R_8F_E4M3 || (wishes->alignment[0] >= 16 && wishes->alignment[1] >= 16);
    if (!is_supported(of(operation), of(a), of(b), of(d)) || !aligned) return CUBLAS_STATUS_NOT_SUPPORTED;
    for (u64 algorithm = 0; algorithm < ALGORITHMS && *count < most; algorithm++) {
        if (takes(algorithm, of(b)) && workspace_of(algorithm) <= wishes->workspace) results[(*count)++] = found(algorithm);
    }
    return CUBLAS_STATUS_SUCCESS;
}

API Status cublasLtMatmulAlgoCheck(cublasLtHandle_t, cublasLtMatmulDesc_t operation, cublasLtMatrixLayout_t a,
                                   cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t d,
                                   const Algorithm* algorithm, Found* result) {
    u64 number = algorithm->data[0] - MARK;
    if (number >= ALGORITHMS) return CUBLAS_STATUS_INVALID_VALUE;
    if (!is_supported(of(operation), of(a), of(b), of(d)) || !takes(number, of(b))) return CUBLAS_STATUS_NOT_SUPPORTED;
    *result = found(number);
    return CUBLAS_STATUS_SUCCESS;
}

API Status cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t operation, const void* alpha, const void* at_a,
                          cublasLtMatrixLayout_t a, const void* at_b, cublasLtMatrixLayout_t b, const void* beta,
                          const void*, cublasLtMatrixLayout_t c, void* at_d, cublasLtMatrixLayout_t d,
                          const Algorithm* algorithm, void* workspace, size_t workspace_bytes, cudaStream_t stream) {
    if (*(u64*)handle != MARK || !emulated::has_context()) return CUBLAS_STATUS_NOT_INITIALIZED;
    Found checked;
    Status status = cublasLtMatmulAlgoCheck(handle, operation, a, b, c, d, algorithm, &checked);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    if (!of(operation).transpose_a || *(const float*)beta != 0.0f) return CUBLAS_STATUS_NOT_SUPPORTED;
    size_t scratch = checked.workspaceSize;
    if (scratch > workspace_bytes || !emulated::is_device_memory((u64)workspace, workspace_bytes)) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    bool aligned = is_aligned(at_a) && is_aligned(at_b) && is_aligned(at_d);
    bool needs_it = of(a).numbers == CUDA_R_8F_E4M3 || algorithm->data[0] == MARK + 1;
    if (needs_it && !aligned) return CUBLAS_STATUS_NOT_SUPPORTED;
    Product product = {of(operation), of(a), of(b), of(d), at_a, at_b, at_d, *(const float*)alpha, workspace, scratch};
    if (!product.all_there()) return CUBLAS_STATUS_INVALID_VALUE;
    int put = emulated::put(stream, [=] {
        if (!product.all_there()) return emulated::lose("a product with memory that was freed");
        // Whoever keeps something in there loses it.
        memset(workspace, 0xff, scratch);
        product.compute();
    });
    return put == 0 ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}
