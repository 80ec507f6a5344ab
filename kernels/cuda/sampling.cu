/* Which token is next: kernels/sampling.py, with the same noise and the same filters; where tokens with equal logits stand at the edge of
 * a nucleus, all of them stay.
 *
 * A filter's edge is a logit, found digit by digit (radix select): a histogram of the first 11 bits of all logits, of the next 11 of those
 * that have the first right, of the last 10. What is counted is tokens (top-k) or probability in fixed point (top-p): sums of integers, so
 * that they do not depend on who comes first. A row is computed by many blocks, and its result depends on nothing but the row. */
#include "forerun.cuh"

#define THREADS 256
#define BINS 2048
#define PASSES 3 /* of a filter */

/* What a block found in its part of a row: the highest logit, the first place it stands at, the sum of exp(logit - highest). */
struct Part {
    float highest;
    int place;
    float sum;
    int reserved;
};
/* The best of a part once noise is added. */
struct Scored {
    double score;
    int place, reserved;
};
/* Where a radix select is: the digits found so far, and how much is wanted of what has them. */
struct Edge {
    u64 wanted;
    u32 digits, reserved;
};

/* The better of two candidates: the higher, of equals the first. */
template <class T> __device__ __forceinline__ void take_better(T &best, int &place, T other, int its) {
    if (other > best || (other == best && its < place)) best = other, place = its;
}
template <class T> __device__ __forceinline__ void warp_best(T &best, int &place) {
    for (int distance = WARP / 2; distance; distance /= 2) {
        T other = __shfl_xor_sync(ALL_LANES, best, distance);
        int its = __shfl_xor_sync(ALL_LANES, place, distance);
        take_better(best, place, other, its);
    }
}
/* Over a block; all threads get it. */
template <class T> __device__ __forceinline__ void block_best(T &best, int &place) {
    __shared__ T bests[THREADS / WARP];
    __shared__ int places[THREADS / WARP];
    warp_best(best, place);
    if (threadIdx.x % WARP == 0) bests[threadIdx.x / WARP] = best, places[threadIdx.x / WARP] = place;
    __syncthreads();
    best = bests[threadIdx.x % (THREADS / WARP)], place = places[threadIdx.x % (THREADS / WARP)];
    warp_best(best, place);
}

/* Which tokens of n a block has: fours, as the noise comes. */
__device__ __forceinline__ int part_begin(int n, int part) { return min(n, (int)((i64)((n + 3) / 4) * part / gridDim.x) * 4); }

/* Parts of each row of logits [rows, stride], n of it. Grid: (parts, rows); found [rows, parts]. Empties the row's histograms, if any. */
extern "C" __global__ void __launch_bounds__(THREADS) survey(const float *logits, int stride, int n, Part *found, u64 *histograms) {
    __shared__ float scratch[32];
    wait_for_previous();
    let_next_begin();
    const float *row = logits + (i64)blockIdx.y * stride;
    const int from = part_begin(n, blockIdx.x), to = part_begin(n, blockIdx.x + 1);
    float highest = -INFINITE, sum = 0;
    int place = 0x7fffffff;
    for (int i = from + threadIdx.x; i < to; i += THREADS) take_better(highest, place, row[i], i);
    block_best(highest, place);
    for (int i = from + threadIdx.x; i < to; i += THREADS) sum += __expf(row[i] - highest);
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) found[blockIdx.y * gridDim.x + blockIdx.x] = {highest, place, sum, 0};
    if (!histograms) return;
    u64 *own = histograms + (i64)blockIdx.y * 2 * PASSES * BINS;
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < 2 * PASSES * BINS; i += gridDim.x * THREADS) own[i] = 0;
}
EXPORT(survey)

/* The highest logit of a row, to each lane of a warp. */
__device__ __forceinline__ void highest_of(const Part *parts, int num_parts, float &highest, int &place) {
    highest = -INFINITE, place = 0x7fffffff;
    for (int i = threadIdx.x % WARP; i < num_parts; i += WARP) take_better(highest, place, parts[i].highest, parts[i].place);
    warp_best(highest, place);
}

/* A number that rises as a float does. */
__device__ __forceinline__ u32 rising(float x) {
    u32 bits = __float_as_uint(x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ int bits_of(int digit) { return digit < 2 ? 11 : 10; }
__device__ __forceinline__ u32 digits_of(u32 key, int count) { return count == 0 ? 0 : count == 1 ? key >> 21 : count == 2 ? key >> 10 : key; }

/* The next digit: of the bins, from the last to the first, the one in which what is wanted is reached. `share`: wanted is this part of all
 * there is. By a block. */
__device__ __forceinline__ Edge narrow(const u64 *bins, Edge before, int digit, double share) {
    __shared__ u64 sums[THREADS / WARP];
    __shared__ Edge found;
    const int EACH = BINS / THREADS, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    u64 own[EACH], sum = 0, others = 0, total = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) own[i] = bins[BINS - 1 - (int)threadIdx.x * EACH - i], sum += own[i];
    u64 up_to = sum; /* of the lanes up to this one */
    for (int distance = 1; distance < WARP; distance *= 2) {
        u64 other = __shfl_sync(ALL_LANES, up_to, max(lane - distance, 0));
        if (lane >= distance) up_to += other;
    }
    __syncthreads();
    if (lane == WARP - 1) sums[warp] = up_to;
    if (threadIdx.x == 0) found = {1, before.digits << bits_of(digit), 0}; /* when nothing was counted */
    __syncthreads();
    for (int w = 0; w < THREADS / WARP; w++) others += w < warp ? sums[w] : 0, total += sums[w];
    u64 wanted = before.wanted, reached = others + up_to - sum;
    if (share > 0) wanted = max((u64)1, (u64)ceil(share * (double)total));
    wanted = wanted < total ? wanted : total;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        if (reached < wanted && reached + own[i] >= wanted)
            found = {wanted - reached, before.digits << bits_of(digit) | (u32)(BINS - 1 - (int)threadIdx.x * EACH - i), 0};
        reached += own[i];
    }
    __syncthreads();
    return found;
}

__device__ __forceinline__ bool has_top_k(const Draw &d, int n) { return d.temperature > 0 && d.top_k > 0 && d.top_k < n; }
__device__ __forceinline__ bool has_top_p(const Draw &d) { return d.temperature > 0 && d.top_p < 1; }

/* A token's logit over the temperature, which is 0 for the highest. */
__device__ __forceinline__ double scaled(const Draw &d, float logit, float highest) {
    return ((double)logit - (double)highest) / (d.temperature > 1e-6 ? d.temperature : 1e-6);
}

/* One pass of a filter: 0 to 2 of top-k, 3 to 5 of top-p. Grid: (parts, rows); histograms [rows, 2 PASSES, BINS], edges [rows, 2 PASSES]. */
extern "C" __global__ void __launch_bounds__(THREADS)
    filter(const Draw *draws, const float *logits, int stride, int n, const Part *parts, int num_parts, int pass, u64 *histograms, Edge *edges) {
    __shared__ u64 bins[BINS];
    wait_for_previous();
    let_next_begin();
    const Draw &d = draws[blockIdx.y];
    const bool is_mass = pass >= PASSES;
    if (is_mass ? !has_top_p(d) : !has_top_k(d, n)) return;
    const float *row = logits + (i64)blockIdx.y * stride;
    u64 *own = histograms + (i64)blockIdx.y * 2 * PASSES * BINS;
    Edge *at = edges + (i64)blockIdx.y * 2 * PASSES, edge = {(u64)d.top_k, 0, 0};
    const int digit = pass % PASSES;
    if (digit > 0) {
        if (digit > 1) edge = at[pass - 1];
        edge = narrow(own + (pass - 1) * BINS, edge, digit - 1, is_mass && digit == 1 ? fmax(d.top_p, 1e-300) : 0);
        if (blockIdx.x == 0 && threadIdx.x == 0) at[pass] = edge;
    }
    u32 floor = is_mass && has_top_k(d, n) ? narrow(own + (PASSES - 1) * BINS, at[PASSES - 1], PASSES - 1, 0).digits : 0;
    float highest;
    int place;
    highest_of(parts + blockIdx.y * num_parts, num_parts, highest, place);
    for (int i = threadIdx.x; i < BINS; i += THREADS) bins[i] = 0;
    __syncthreads();
    const int from = part_begin(n, blockIdx.x), to = part_begin(n, blockIdx.x + 1);
    for (int i = from + threadIdx.x; i < to; i += THREADS) {
        u32 key = rising(row[i]);
        if (key < floor || digits_of(key, digit) != edge.digits) continue;
        u64 much = is_mass ? (u64)(exp(scaled(d, row[i], highest)) * (double)(1ull << 44)) : 1;
        if (much) atomicAdd(&bins[digits_of(key, digit + 1) & ((1u << bits_of(digit)) - 1)], much);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < BINS; i += THREADS)
        if (bins[i]) atomicAdd(&own[pass * BINS + i], bins[i]);
}
EXPORT(filter)

/* Philox4x64 with 10 rounds (Salmon et al. 2011), as NumPy's Philox(key, counter) gives it: four numbers for each counter. */
__device__ __forceinline__ void philox(u64 key, u64 block, u64 position, u64 (&x)[4]) {
    u64 key_1 = 0;
    x[0] = block, x[1] = position, x[2] = 0, x[3] = 0;
#pragma unroll
    for (int round = 0; round < 10; round++) {
        u64 first = __umul64hi(0xD2E7470EE14C6C93ull, x[0]), second = __umul64hi(0xCA5A826395121157ull, x[2]);
        u64 low = 0xD2E7470EE14C6C93ull * x[0];
        x[0] = second ^ x[1] ^ key, x[1] = 0xCA5A826395121157ull * x[2];
        x[2] = first ^ x[3] ^ key_1, x[3] = low;
        key += 0x9E3779B97F4A7C15ull, key_1 += 0xBB67AE8584CAA73Bull;
    }
}
/* Gumbel noise of 53 of the bits. */
__device__ __forceinline__ double gumbel(u64 bits) {
    double e = -log1p(-((double)(i64)(bits >> 11) * 0x1p-53));
    return -log(e > 1e-300 ? e : 1e-300);
}

/* The best of each part with noise. Grid: (parts, rows); scored [rows, parts]. */
extern "C" __global__ void __launch_bounds__(THREADS)
    score(const Draw *draws, const float *logits, int stride, int n, const Part *parts, int num_parts, const u64 *histograms, const Edge *edges,
          Scored *scored) {
    wait_for_previous();
    let_next_begin();
    const Draw &d = draws[blockIdx.y];
    if (d.temperature <= 0) return;
    const float *row = logits + (i64)blockIdx.y * stride;
    const u64 *own = histograms + (i64)blockIdx.y * 2 * PASSES * BINS;
    const Edge *at = edges + (i64)blockIdx.y * 2 * PASSES;
    u32 floor = 0;
    if (has_top_p(d)) floor = narrow(own + (2 * PASSES - 1) * BINS, at[2 * PASSES - 1], PASSES - 1, 0).digits;
    else if (has_top_k(d, n)) floor = narrow(own + (PASSES - 1) * BINS, at[PASSES - 1], PASSES - 1, 0).digits;
    float highest;
    int place;
    highest_of(parts + blockIdx.y * num_parts, num_parts, highest, place);
    const int from = part_begin(n, blockIdx.x), to = part_begin(n, blockIdx.x + 1);
    double best = -(double)INFINITE;
    place = 0x7fffffff;
    for (int first = from + 4 * threadIdx.x; first < to; first += 4 * THREADS) {
        u64 noise[4];
        bool has_noise = false;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (first + i >= to || rising(row[first + i]) < floor) continue;
            double x = scaled(d, row[first + i], highest);
            if (!(x >= d.log_min_p)) continue;
            if (!has_noise) philox(d.seed, (u64)(first / 4 + 1), (u64)d.position, noise), has_noise = true;
            take_better(best, place, x + gumbel(noise[i]), first + i);
        }
    }
    block_best(best, place);
    if (threadIdx.x == 0) scored[blockIdx.y * gridDim.x + blockIdx.x] = {best, place, 0};
}
EXPORT(score)

/* The token of each row, and its probability at temperature 1 where `shares` is not null. Without `draws` it is the highest. Grid: rows; a
 * warp. */
extern "C" __global__ void pick(const Draw *draws, const float *logits, int stride, int n, const Part *parts, int num_parts, const Scored *scored,
                                int *tokens, float *shares) {
    wait_for_previous();
    let_next_begin();
    const Part *own = parts + blockIdx.x * num_parts;
    float highest, total = 0;
    int place, lane = threadIdx.x;
    highest_of(own, num_parts, highest, place);
    if (draws && draws[blockIdx.x].temperature > 0) {
        double best = -(double)INFINITE;
        place = 0x7fffffff;
        for (int i = lane; i < num_parts; i += WARP) {
            const Scored &s = scored[blockIdx.x * num_parts + i];
            take_better(best, place, s.score, s.place);
        }
        warp_best(best, place);
    }
    place = place < n ? place : 0; /* where no logit is a number */
    if (shares) {
        for (int i = lane; i < num_parts; i += WARP) total += own[i].sum * __expf(own[i].highest - highest);
        total = warp_sum(total);
    }
    if (lane) return;
    tokens[blockIdx.x] = place;
    if (shares) shares[blockIdx.x] = __expf(logits[(i64)blockIdx.x * stride + place] - highest) / total;
}
EXPORT(pick)
