// From logits to tokens: a block of threads answers one draw or score. The same token as the CPU's sampler
// (sampler/mod.rs) for the same logits: modifications in the same order, weights of the same bits (this file
// is compiled without fused multiply-add), ties to the smaller id, and the same random number, which depends
// on nothing but seed, choice and output position (Philox4x32-10, Salmon et al. 2011).
//
// Where the CPU sums weights in f64, this sums them as integers, in units of 2^-45 or so: then the order of
// the sum does not matter, hundreds of threads may share it, and every launch gives the same. Weights below
// the unit count nothing. The two disagree only if the random point lies within about 1e-11 of a boundary
// between two tokens.
//
// Nothing is sorted. "The likeliest k", "the likeliest with mass p" and the draw itself are all the same
// search: the token at which a running sum over the tokens, likeliest first, crosses a bound. It descends
// through the digits of the logits' bits with a histogram of each digit (radix select, Alabi et al. 2012).
//
// Bound by the reads of the row: once for a greedy token, about ten times with top_k and top_p, mostly from
// the second-level cache.
//
// Grid [answers], 512 threads: with more, the registers do not last.

#define THREADS 512
#define WARPS (THREADS / 32)
#define NO_ROW 0xffffffffu
#define BUCKETS 2048

// Status of an answer.
#define FINE 0
#define NOT_FINITE 1
#define NOTHING_LEFT 2
#define NO_SUCH_TARGET 3

// What is wanted of a row. (launch.rs, DrawWords)
struct draw_words {
    u32 row;          // of the logits; NO_ROW: padding, nothing is written
    u32 target;       // the token to score; NO_ROW: draw one
    u32 top;          // alternatives to report, up to 20; NO_ROW: no log-probabilities at all
    float temperature;  // 0: the likeliest
    u32 top_k;        // NO_ROW: all
    float top_p;
    float min_p;
    float repetition;
    float frequency;
    float presence;
    u32 seed_low;
    u32 seed_high;
    u32 choice;
    u32 output_index;
    u32 changes_begin;  // of the list of changes
    u32 changes_end;
    u32 scratch_row;    // used if there are changes
    u32 reserved[3];
};

// What happens to the logit of one token. No token stands twice in a draw's changes.
struct change_words {
    u32 token;
    float bias;   // added; -infinity bans the token
    u32 seen;     // 1: the token stands in prompt or output
    u32 count;    // how often it stands in the output
};

#define MOST_TOP 20
// Of one answer: log-probability, rank, then the alternatives' ids, then their log-probabilities.
#define LOGPROB_WORDS (2 + 2 * MOST_TOP)

// e^x for x <= 0, bit by bit as sampler/exp.rs computes it.
__device__ inline float exp_nonpositive(float x) {
    float clamped = fmaxf(x, -87.0f);
    float power = (clamped * 1.44269504f + 12582912.0f) - 12582912.0f;
    float rest = (clamped - power * 0.6933594f) - power * -2.1219444e-4f;
    float sum = 1.0f / 720.0f;
    sum = sum * rest + 1.0f / 120.0f;
    sum = sum * rest + 1.0f / 24.0f;
    sum = sum * rest + 1.0f / 6.0f;
    sum = sum * rest + 0.5f;
    sum = sum * rest + 1.0f;
    sum = sum * rest + 1.0f;
    float scale = __uint_as_float((u32)((int)power + 127) << 23);
    return x < -87.0f ? 0.0f : sum * scale;
}

// Larger logits have larger keys, as f32::total_cmp orders them.
__device__ inline u32 order_key(float logit) {
    u32 bits = __float_as_uint(logit);
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

#define KEY_OF_MINUS_INFINITY 0x007fffffu

// A uniform number of 53 bits.
__device__ inline u64 random_bits(const draw_words& draw) {
    u32 c0 = draw.output_index, c1 = draw.choice, c2 = 0, c3 = 0;
    u32 k0 = draw.seed_low, k1 = draw.seed_high;
    for (int round = 0; round < 10; round++) {
        u64 a = (u64)0xd2511f53u * c0, b = (u64)0xcd9e8d57u * c2;
        c0 = (u32)(b >> 32) ^ c1 ^ k0;
        c1 = (u32)b;
        c2 = (u32)(a >> 32) ^ c3 ^ k1;
        c3 = (u32)a;
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    return ((u64)c1 << 32 | c0) >> 11;
}

// A row of logits and how its tokens are weighted.
struct row_view {
    const float* logits;
    u32 vocabulary;
    float largest;
    float temperature;
    float min_p;
    // Weights are counted in units of 1 / unit; such that the sum over the vocabulary fits 63 bits.
    float unit;

    // Probability relative to the likeliest token.
    __device__ float weight(float logit) const {
        float below = logit - largest;
        // x / 1 is x, and a division costs as much as the exponential.
        return exp_nonpositive(temperature == 1.0f ? below : below / temperature);
    }

    __device__ u64 mass(float logit) const {
        return __float2ull_rn(weight(logit) * unit);
    }

    __device__ bool may_be_drawn(float logit) const {
        return order_key(logit) > KEY_OF_MINUS_INFINITY && (min_p <= 0.0f || weight(logit) >= min_p);
    }
};

// The tokens down to this one in the order of likelihood, itself included.
struct cut {
    u32 key;
    u32 token;

    __device__ bool keeps(u32 other_key, u32 other) const {
        return other_key > key || (other_key == key && other <= token);
    }
};

#define KEEP_ALL cut{0, 0xffffffffu}

// floor(point * total) for a point of 53 bits below 1.
__device__ inline u64 part_of(u64 point, u64 total) {
    return __umul64hi(point, total) << 11 | (point * total) >> 53;
}

// Where a running sum over the tokens is to be crossed; `total` is the sum over all of them.
struct bound_rule {
    enum { FIRST, NUCLEUS, POINT } kind;
    bool all;      // tokens of probability 0 too
    u64 number;    // FIRST: how many tokens; POINT: a number of 53 bits
    double share;  // NUCLEUS: of the mass

    // The last sum that is still too small.
    __device__ u64 bound(u64 total) const {
        if (kind == POINT) return part_of(number, total);
        u64 wanted = kind == FIRST ? number : (u64)ceil(share * (double)total);
        return min(max(wanted, (u64)1), total) - 1;
    }
};

struct shared_state {
    draw_words draw;
    row_view raw;  // as the model computed it
    row_view row;  // as the request wants it
    u32 low[BUCKETS];   // sums of a digit's buckets; in mass mode the low and the high half of 64 bits
    u32 high[BUCKETS];
    u64 parts[WARPS];
    float warp_logits[WARPS];
    u32 warp_tokens[WARPS];
    u32 found;
    u32 bad;
    u32 top_keys[MOST_TOP];
    u32 top_tokens[MOST_TOP];
};

// Calls visit(token, logit) for every token of the row, 16 bytes at a time where the row is aligned; a thread asks
// for AT_ONCE of them before it looks at the first.
template <int AT_ONCE, typename Visit>
__device__ inline void for_each_token(const float* logits, u32 vocabulary, Visit visit) {
    u32 quads = ((u64)logits & 15) == 0 ? vocabulary / 4 : 0;
    for (u32 first = threadIdx.x; first < quads; first += AT_ONCE * THREADS) {
        float4 four[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            u32 i = first + j * THREADS;
            if (i < quads) four[j] = ((const float4*)logits)[i];
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            u32 i = first + j * THREADS;
            if (i < quads) {
                visit(4 * i, four[j].x);
                visit(4 * i + 1, four[j].y);
                visit(4 * i + 2, four[j].z);
                visit(4 * i + 3, four[j].w);
            }
        }
    }
    for (u32 i = 4 * quads + threadIdx.x; i < vocabulary; i += THREADS) visit(i, logits[i]);
}

__device__ inline u64 warp_sum(u64 x) {
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(FULL_WARP, x, step);
    return x;
}

// The sum over the block, in every thread.
__device__ inline u64 block_total(shared_state& shared, u64 x) {
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) shared.parts[threadIdx.x / 32] = x;
    __syncthreads();
    u64 total = 0;
    for (int warp = 0; warp < WARPS; warp++) total += shared.parts[warp];
    __syncthreads();
    return total;
}

struct crossing {
    u32 index;
    u64 before;  // the sum of all values in front of it
};

// The first index at which the running sum of value(0), value(1), ... exceeds `bound`, which the sum of all
// must. Every warp sums a part of the range; the part that crosses is the next range.
template <typename Value>
__device__ inline crossing find_crossing(shared_state& shared, u32 count, u64 bound, Value value) {
    u32 begin = 0, end = count;
    u64 before = 0;
    while (end - begin > 1) {
        u32 part = (end - begin + WARPS - 1) / WARPS;
        u32 from = begin + threadIdx.x / 32 * part, to = min(from + part, end);
        u64 sum = 0;
        for (u32 i = from + threadIdx.x % 32; i < to; i += 32) sum += value(i);
        sum = warp_sum(sum);
        if (threadIdx.x % 32 == 0) shared.parts[threadIdx.x / 32] = sum;
        __syncthreads();
        u32 chosen = 0;
        while (chosen < WARPS - 1 && before + shared.parts[chosen] <= bound) before += shared.parts[chosen++];
        begin += chosen * part;
        end = min(begin + part, end);
        __syncthreads();
    }
    return {begin, before};
}

// The token at which the running sum over the tokens that `kept` keeps, likeliest first, crosses what `rule`
// says. FIRST counts tokens, the others add up their mass.
__device__ __noinline__ cut find_cut(shared_state& shared, const row_view& row_, cut kept, const bound_rule& rule_) {
    row_view row = row_;
    bound_rule rule = rule_;
    bool by_mass = rule.kind != bound_rule::FIRST;
    u32 prefix = 0;
    u64 before = 0, bound = 0;
    auto counts = [&](u32 token, float logit, u32 key) {
        return kept.keeps(key, token) && (rule.all || row.may_be_drawn(logit));
    };
#pragma unroll 1
    for (int digit = 0; digit < 3; digit++) {
        int shift = digit == 0 ? 21 : digit == 1 ? 10 : 0;
        int bits = digit == 2 ? 10 : 11;
        for (u32 i = threadIdx.x; i < BUCKETS; i += THREADS) shared.low[i] = shared.high[i] = 0;
        __syncthreads();
        for_each_token<4>(row.logits, row.vocabulary, [&](u32 token, float logit) {
            u32 key = order_key(logit);
            if ((digit > 0 && key >> (shift + bits) != prefix) || !counts(token, logit, key)) return;
            u32 bucket = key >> shift & ((1 << bits) - 1);
            // 64 bits in two halves: shared memory adds 32 at a time.
            u64 mass = by_mass ? row.mass(logit) : 1;
            u32 low = (u32)mass;
            u32 carry = atomicAdd(&shared.low[bucket], low) + low < low;
            u32 high = (u32)(mass >> 32) + carry;
            if (high) atomicAdd(&shared.high[bucket], high);
        });
        __syncthreads();
        u32 last = (1u << bits) - 1;
        auto downwards = [&](u32 i) { return (u64)shared.high[last - i] << 32 | shared.low[last - i]; };
        if (digit == 0) {
            u64 sum = 0;
            for (u32 i = threadIdx.x; i < BUCKETS; i += THREADS) sum += downwards(i);
            bound = rule.bound(block_total(shared, sum));
        }
        crossing at = find_crossing(shared, last + 1, bound - before, downwards);
        before += at.before;
        prefix = prefix << bits | (last - at.index);
    }
    // All bits are known: of equal logits, in the order of their ids, so many are kept.
    float logit = __uint_as_float(prefix ^ (prefix >> 31 ? 0x80000000u : 0xffffffffu));
    u64 more = (bound - before) / (by_mass ? row.mass(logit) : 1);
    crossing tie = find_crossing(shared, row.vocabulary, more, [&](u32 i) {
        float logit = row.logits[i];
        u32 key = order_key(logit);
        return (u64)(key == prefix && counts(i, logit, key));
    });
    return {prefix, tie.index};
}

struct largest_logit {
    float logit;
    u32 token;  // the smallest id among equals
    bool any_nan;
};

// The largest logit of a row, in every thread.
__device__ __noinline__ largest_logit find_largest(shared_state& shared, const float* logits, u32 vocabulary) {
    float best = __uint_as_float(0xff800000u);
    u32 best_token = 0;
    bool nan = false;
    for_each_token<8>(logits, vocabulary, [&](u32 id, float logit) {
        nan = nan || isnan(logit);
        // A thread visits ids in ascending order.
        if (logit > best) {
            best = logit;
            best_token = id;
        }
    });
    auto take = [&](float other, u32 other_token) {
        if (other > best || (other == best && other_token < best_token)) {
            best = other;
            best_token = other_token;
        }
    };
    for (int step = 16; step > 0; step /= 2) {
        float other = __shfl_xor_sync(FULL_WARP, best, step);
        take(other, __shfl_xor_sync(FULL_WARP, best_token, step));
    }
    if (threadIdx.x == 0) shared.bad = 0;
    __syncthreads();
    if (nan) shared.bad = 1;
    if (threadIdx.x % 32 == 0) {
        shared.warp_logits[threadIdx.x / 32] = best;
        shared.warp_tokens[threadIdx.x / 32] = best_token;
    }
    __syncthreads();
    for (int warp = 0; warp < WARPS; warp++) take(shared.warp_logits[warp], shared.warp_tokens[warp]);
    bool any_nan = shared.bad;
    __syncthreads();
    return {best, best_token, any_nan};
}

// A copy of the row with bias, bans and penalties. The copy is complete in every thread's eyes afterwards.
__device__ inline void change_logits(
    float* to, const float* from, u32 vocabulary, const draw_words& draw, const change_words* changes) {
    for (u32 i = threadIdx.x; i < vocabulary; i += THREADS) to[i] = from[i];
    __syncthreads();
    for (u32 i = draw.changes_begin + threadIdx.x; i < draw.changes_end; i += THREADS) {
        change_words change = changes[i];
        if (change.token >= vocabulary) continue;
        float logit = to[change.token];
        if (change.bias != 0.0f) logit += change.bias;
        if (change.seen) {
            logit = logit > 0.0f ? logit / draw.repetition : logit * draw.repetition;
            if (change.count) logit -= draw.frequency * (float)change.count + draw.presence;
        }
        to[change.token] = logit;
    }
    __syncthreads();
}

// The token that the random point falls on, of those that top_k and top_p leave.
__device__ __noinline__ u32 draw_token(shared_state& shared) {
    const draw_words& draw = shared.draw;
    row_view row = shared.row;
    u64 point = random_bits(draw);
    bool by_rank = draw.top_k != NO_ROW || draw.top_p < 1.0f;
    if (!by_rank) {
        // Along the vocabulary, as the CPU does.
        auto mass = [&](u32 i) {
            float logit = row.logits[i];
            return row.may_be_drawn(logit) ? row.mass(logit) : 0;
        };
        u64 sum = 0;
        for (u32 i = threadIdx.x; i < row.vocabulary; i += THREADS) sum += mass(i);
        u64 total = block_total(shared, sum);
        return find_crossing(shared, row.vocabulary, part_of(point, total), mass).index;
    }
    cut kept = KEEP_ALL;
    if (draw.top_k != NO_ROW) kept = find_cut(shared, shared.row, kept, {bound_rule::FIRST, false, draw.top_k, 0.0});
    if (draw.top_p < 1.0f) kept = find_cut(shared, shared.row, kept, {bound_rule::NUCLEUS, false, 0, draw.top_p});
    return find_cut(shared, shared.row, kept, {bound_rule::POINT, false, point, 0.0}).token;
}

// From the model's own logits: the token's log-probability and rank, and the likeliest tokens.
__device__ __noinline__ void report_logprobs(shared_state& shared, u32 token, u32 top, float* out) {
    row_view row = shared.raw;
    float logit = row.logits[token];
    u64 sum = 0, above = 0;
    for_each_token<4>(row.logits, row.vocabulary, [&](u32, float other) {
        sum += row.mass(other);
        above += other > logit;
    });
    double ln_sum = log((double)block_total(shared, sum) / (double)row.unit);
    above = block_total(shared, above);
    auto logprob = [&](float of) { return (float)((double)of - (double)row.largest - ln_sum); };
    if (threadIdx.x == 0) {
        out[0] = logprob(logit);
        out[1] = __uint_as_float((u32)above + 1);
    }
    u32 count = min(min(top, (u32)MOST_TOP), row.vocabulary);
    if (count == 0) return;
    cut kept = find_cut(shared, shared.raw, KEEP_ALL, {bound_rule::FIRST, true, count, 0.0});
    if (threadIdx.x == 0) shared.found = 0;
    __syncthreads();
    for_each_token<4>(row.logits, row.vocabulary, [&](u32 other, float of) {
        u32 key = order_key(of);
        if (!kept.keeps(key, other)) return;
        u32 place = atomicAdd(&shared.found, 1);
        shared.top_keys[place] = key;
        shared.top_tokens[place] = other;
    });
    __syncthreads();
    // Each finds its place by counting those before it.
    if (threadIdx.x < count) {
        u32 key = shared.top_keys[threadIdx.x], other = shared.top_tokens[threadIdx.x], place = 0;
        for (u32 i = 0; i < count; i++) {
            place += i != threadIdx.x && cut{key, other}.keeps(shared.top_keys[i], shared.top_tokens[i]);
        }
        out[2 + place] = __uint_as_float(other);
        out[2 + MOST_TOP + place] = logprob(row.logits[other]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) sample_rows(
    u32* __restrict__ chosen,                  // [answers]: the token drawn, or the target
    u32* __restrict__ statuses,                // [answers]
    float* __restrict__ logprobs,              // [answers, LOGPROB_WORDS]; written where asked for
    const float* __restrict__ logits,          // [rows, logits_stride]
    float* scratch,                            // [scratch rows, vocabulary]
    const draw_words* __restrict__ draws,      // [answers]
    const change_words* __restrict__ changes,  // those of all draws
    u32 vocabulary,
    u32 logits_stride) {
    __shared__ shared_state shared;
    if (draws[blockIdx.x].row == NO_ROW) return;
    if (threadIdx.x == 0) {
        shared.draw = draws[blockIdx.x];
        // 2^(63 - bits of the vocabulary): the sum of all weights, each at most 1, fits.
        float unit = (float)(1ull << (31 + __clz(vocabulary)));
        shared.raw = {logits + (u64)shared.draw.row * logits_stride, vocabulary, 0.0f, 1.0f, 0.0f, unit};
    }
    __syncthreads();
    const draw_words& draw = shared.draw;
    largest_logit top = find_largest(shared, shared.raw.logits, vocabulary);
    if (threadIdx.x == 0) shared.raw.largest = top.logit;
    u32 status = top.any_nan || !isfinite(top.logit) ? NOT_FINITE : FINE, token = 0;
    if (status == FINE && draw.target != NO_ROW) {
        token = draw.target;
        if (token >= vocabulary) status = NO_SUCH_TARGET;
    } else if (status == FINE) {
        const float* row = shared.raw.logits;
        if (draw.changes_begin < draw.changes_end) {
            float* copy = scratch + (u64)draw.scratch_row * vocabulary;
            change_logits(copy, row, vocabulary, draw, changes);
            row = copy;
            top = find_largest(shared, copy, vocabulary);
        }
        token = top.token;
        if (!isfinite(top.logit)) {
            status = NOTHING_LEFT;
            token = 0;
        } else if (draw.temperature != 0.0f) {
            if (threadIdx.x == 0) {
                shared.row = {row, vocabulary, top.logit, draw.temperature, draw.min_p, shared.raw.unit};
            }
            __syncthreads();
            token = draw_token(shared);
        }
    }
    if (threadIdx.x == 0) {
        chosen[blockIdx.x] = token;
        statuses[blockIdx.x] = status;
    }
    if (status == FINE && draw.top != NO_ROW) {
        __syncthreads();
        report_logprobs(shared, token, draw.top, logprobs + (u64)blockIdx.x * LOGPROB_WORDS);
    }
}
