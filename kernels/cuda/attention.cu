/* Gated attention over keys and values in pages, of a few rows, and of a whole chunk.
 *
 * Positions are computed in parts of PART, always the same ones; a part's softmax is its own, and parts are merged in their order: by a
 * kernel after this one where each part is a block, or by the block itself, with the same operations. So a row's bits depend on its
 * position alone. (Online softmax: Milakov & Gimelshein 2018, arXiv:1805.02867.)
 * Sizes: HEADS, KV_HEADS, HEAD_DIM, ROTARY_DIM. */
#include "pages.cuh"

#define PAIRS 16 /* of a row and a head, the rows of a matrix instruction */
#define SCORE_STRIDE (PART + 4)
#define SHARE_STRIDE (PART + 8)
#define WARPS 8
#define TILES ((HEAD_DIM / 8 + WARPS - 1) / WARPS) /* of 8 dimensions, that a warp has of the output */
#define OWN (PART / WARPS)                         /* positions that a warp scores */
#define EIGHTS (OWN / 8)

/* What frequency i turns by (M-RoPE): h where i % 3 == 1 and i < 3 MROPE_H, w where i % 3 == 2 and i < 3 MROPE_W, else t. */
__device__ __forceinline__ i64 coordinate(const Span &s, i64 position, int i) {
    if (position >= s.num_coordinates) return position - s.num_coordinates + s.free;
    int axis = i % 3 == 1 && i < 3 * MROPE_H ? 1 : i % 3 == 2 && i < 3 * MROPE_W ? 2 : 0;
    return s.coordinates[3 * position + axis];
}

/* Norms and turns queries and keys, and puts keys and values into their pages. q [rows, HEADS, 2 HEAD_DIM] with gates between, queries
 * [rows, HEADS, HEAD_DIM]. Grid: (rows, (HEADS + KV_HEADS) / 4), a warp a head. */
extern "C" __global__ void __launch_bounds__(128)
    keys(const Span *spans, const int *span_of, int layer, const float *q, int q_stride, const float *k, int k_stride, const float *v, int v_stride,
         const float *q_norm, const float *k_norm, const float *frequencies, float eps, u16 *queries) {
    __shared__ float turned[4][HEAD_DIM];
    int row = blockIdx.x, head = blockIdx.y * 4 + threadIdx.x / WARP, lane = threadIdx.x % WARP, kv = head - HEADS;
    expect(q_norm, 4 * HEAD_DIM);
    expect(k_norm, 4 * HEAD_DIM);
    expect(frequencies, 4 * (ROTARY_DIM / 2));
    wait_for_previous();
    let_next_begin();
    if (head >= HEADS + KV_HEADS || span_of[row] < 0) return;
    const Span &s = spans[span_of[row]];
    i64 position = s.position + row - s.first_row;
    const float *from = kv < 0 ? q + (i64)row * q_stride + head * 2 * HEAD_DIM : k + (i64)row * k_stride + kv * HEAD_DIM;
    const float *norm = kv < 0 ? q_norm : k_norm;
    float *own = turned[threadIdx.x / WARP], square = 0;
    float x[HEAD_DIM / WARP], its_value[HEAD_DIM / WARP];
#pragma unroll
    for (int i = 0; i < HEAD_DIM / WARP; i++) {
        x[i] = from[lane + i * WARP], square = fmaf(x[i], x[i], square);
        its_value[i] = kv < 0 ? 0.0f : v[(i64)row * v_stride + kv * HEAD_DIM + lane + i * WARP];
    }
    float scale = rsqrtf(warp_sum(square) / HEAD_DIM + eps);
#pragma unroll
    for (int i = 0; i < HEAD_DIM / WARP; i++) own[lane + i * WARP] = x[i] * scale * norm[lane + i * WARP];
    __syncwarp();
    i64 page = kv < 0 ? 0 : page_at(s, layer, position, kv);
    u16 *to = kv < 0 ? queries + ((i64)row * HEADS + head) * HEAD_DIM : s.keys + page + position % PAGE * HEAD_DIM;
    for (int i = 2 * lane; i < HEAD_DIM; i += 2 * WARP) {
        float pair[2];
        for (int j = 0; j < 2; j++) {
            int at = i + j, frequency = at % (ROTARY_DIM / 2);
            float value = own[at];
            if (at < ROTARY_DIM) {
                bool is_first = at < ROTARY_DIM / 2;
                float other = own[is_first ? at + ROTARY_DIM / 2 : at - ROTARY_DIM / 2], sine, cosine;
                sincosf((float)coordinate(s, position, frequency) * frequencies[frequency], &sine, &cosine);
                value = fmaf(other, is_first ? -sine : sine, value * cosine);
            }
            pair[j] = value;
        }
        *(u32 *)(to + i) = to_halves(pair[0], pair[1]);
    }
    if (kv < 0) return;
    u16 *value = s.values + page + position % PAGE;
#pragma unroll
    for (int i = 0; i < HEAD_DIM / WARP; i++) value[(i64)(lane + i * WARP) * PAGE] = (u16)to_halves(its_value[i], 0);
}
EXPORT(keys)

/* What two parts become together: the highest score, and what each one's sums are multiplied by. */
__device__ __forceinline__ float merge(float before, float highest, float *by_before, float *by_new) {
    float both = fmaxf(before, highest);
    *by_before = before == -INFINITE ? 0.0f : __expf(before - both);
    *by_new = highest == -INFINITE ? 0.0f : __expf(highest - both);
    return both;
}

/* Grid: (parts, or 1 if `is_looped`; KV_HEADS * groups of PAIRS; spans). Sums [rows, HEADS, parts, HEAD_DIM] and ends [rows, HEADS, parts]
 * (highest score, sum of the shares); shared: WARPS-wide scores and shares. */
extern "C" __global__ void __launch_bounds__(WARPS *WARP, 1)
    attend(const Span *spans, int layer, const u16 *queries, float *sums, float2 *ends, int max_parts, int is_looped) {
    __shared__ float scores[PAIRS * SCORE_STRIDE];
    __shared__ __align__(16) u16 shares[PAIRS * SHARE_STRIDE];
    __shared__ float highest[PAIRS], total[PAIRS], by_before[PAIRS], by_new[PAIRS];
    const Span &s = spans[blockIdx.z];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, group = lane / 4, quarter = lane % 4;
    const int kv = blockIdx.y % KV_HEADS, first_pair = blockIdx.y / KV_HEADS * PAIRS, num_pairs = s.num_rows * GROUP;
    if (first_pair >= num_pairs) return;
    const int last_row = (min(first_pair + PAIRS, num_pairs) - 1) / GROUP;
    const i64 last = s.position + last_row; /* position that any of the rows sees */
    const int num_parts = (int)(last / PART) + 1;
    if (!is_looped && (int)blockIdx.x >= num_parts) return;
    for (i64 begin = (is_looped ? 0 : (i64)blockIdx.x) * PART, end = begin + PART; begin < end && begin <= last; begin += PAGE) {
        i64 page = page_at(s, layer, begin, kv);
        expect(s.keys + page, 2 * PAGE * HEAD_DIM);
        expect(s.values + page, 2 * PAGE * HEAD_DIM);
    }
    wait_for_previous();
    let_next_begin();
    const u16 *query[2];
    for (int i = 0; i < 2; i++) {
        int pair = first_pair + group + 8 * i;
        i64 row = s.first_row + pair / GROUP;
        query[i] = pair < num_pairs ? queries + (row * HEADS + kv * GROUP + pair % GROUP) * HEAD_DIM + quarter * 8 : nullptr;
    }
    float out[TILES][4];
    for (int t = 0; t < TILES; t++)
        for (int i = 0; i < 4; i++) out[t][i] = 0;
    if (threadIdx.x < PAIRS) highest[threadIdx.x] = -INFINITE, total[threadIdx.x] = 0;
    int from = is_looped ? 0 : blockIdx.x, to = is_looped ? num_parts : from + 1;
    for (int part = from; part < to; part++) {
        i64 start = (i64)part * PART, pages[PART / PAGE]; /* where this head's keys, and values, begin */
#pragma unroll
        for (int i = 0; i < PART / PAGE; i++)
            pages[i] = start + i * PAGE <= last ? page_at(s, layer, start + i * PAGE, kv) : 0;
        __syncthreads();
        float found[EIGHTS][4];
        const u16 *key[EIGHTS];
        const i64 own = start + warp * OWN, page = own <= last ? page_at(s, layer, own, kv) : 0;
#pragma unroll
        for (int n = 0; n < EIGHTS; n++) {
            i64 position = own + n * 8 + group;
            key[n] = position <= last ? s.keys + page + position % PAGE * HEAD_DIM + quarter * 8 : nullptr;
            for (int i = 0; i < 4; i++) found[n][i] = 0;
        }
#pragma unroll
        for (int d = 0; d < HEAD_DIM; d += 32) {
            const uint4 zero = make_uint4(0, 0, 0, 0);
            uint4 a0 = query[0] ? *(const uint4 *)(query[0] + d) : zero, a1 = query[1] ? *(const uint4 *)(query[1] + d) : zero;
#pragma unroll
            for (int n = 0; n < EIGHTS; n++) {
                uint4 b = key[n] ? *(const uint4 *)(key[n] + d) : zero;
                multiply(found[n], a0.x, a1.x, a0.y, a1.y, b.x, b.y);
                multiply(found[n], a0.z, a1.z, a0.w, a1.w, b.z, b.w);
            }
        }
#pragma unroll
        for (int n = 0; n < EIGHTS; n++)
            for (int i = 0; i < 4; i++) {
                int pair = group + i / 2 * 8, at = warp * OWN + n * 8 + quarter * 2 + i % 2, row = (first_pair + pair) / GROUP;
                bool is_seen = first_pair + pair < num_pairs && start + at <= s.position + row;
                scores[pair * SCORE_STRIDE + at] = is_seen ? found[n][i] * (1.0f / sqrtf((float)HEAD_DIM)) : -INFINITE;
            }
        __syncthreads();
        for (int pair = warp; pair < PAIRS; pair += WARPS) {
            float *own = scores + pair * SCORE_STRIDE, most = -INFINITE, sum = 0;
            for (int i = lane; i < PART; i += WARP) most = fmaxf(most, own[i]);
            most = warp_max(most);
            for (int i = lane; i < PART; i += WARP) {
                u16 share = (u16)to_halves(most == -INFINITE ? 0.0f : __expf(own[i] - most), 0);
                shares[pair * SHARE_STRIDE + i] = share;
                sum += low_half(share); /* as it is multiplied with */
            }
            sum = warp_sum(sum);
            if (lane == 0) {
                highest[pair] = merge(highest[pair], most, &by_before[pair], &by_new[pair]);
                total[pair] = fmaf(sum, by_new[pair], total[pair] * by_before[pair]);
            }
        }
        __syncthreads();
        float more[TILES][4];
        for (int t = 0; t < TILES; t++)
            for (int i = 0; i < 4; i++) more[t][i] = 0;
#pragma unroll
        for (int at = 0; at < PART; at += 32) {
            uint4 a0 = *(const uint4 *)(shares + group * SHARE_STRIDE + at + quarter * 8);
            uint4 a1 = *(const uint4 *)(shares + (group + 8) * SHARE_STRIDE + at + quarter * 8);
            bool is_there = start + at + quarter * 8 <= last;
            const u16 *values = s.values + pages[at / PAGE] + at % PAGE + quarter * 8;
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                int dimension = (warp + t * WARPS) * 8 + group;
                if ((warp + t * WARPS) * 8 >= HEAD_DIM) continue;
                uint4 b = is_there ? *(const uint4 *)(values + (i64)dimension * PAGE) : make_uint4(0, 0, 0, 0);
                multiply(more[t], a0.x, a1.x, a0.y, a1.y, b.x, b.y);
                multiply(more[t], a0.z, a1.z, a0.w, a1.w, b.z, b.w);
            }
        }
#pragma unroll
        for (int t = 0; t < TILES; t++)
            for (int i = 0; i < 4; i++) {
                int pair = group + i / 2 * 8;
                out[t][i] = fmaf(more[t][i], by_new[pair], out[t][i] * by_before[pair]);
            }
    }
#pragma unroll
    for (int t = 0; t < TILES; t++)
        for (int i = 0; i < 4; i++) {
            int pair = first_pair + group + i / 2 * 8, dimension = (warp + t * WARPS) * 8 + quarter * 2 + i % 2;
            if (pair >= num_pairs || dimension >= HEAD_DIM) continue;
            i64 place = ((i64)(s.first_row + pair / GROUP) * HEADS + kv * GROUP + pair % GROUP) * max_parts + from;
            sums[place * HEAD_DIM + dimension] = out[t][i];
        }
    __syncthreads();
    if (threadIdx.x < PAIRS && first_pair + (int)threadIdx.x < num_pairs) {
        int pair = first_pair + threadIdx.x;
        i64 place = ((i64)(s.first_row + pair / GROUP) * HEADS + kv * GROUP + pair % GROUP) * max_parts + from;
        ends[place] = make_float2(highest[threadIdx.x], total[threadIdx.x]);
    }
}
EXPORT(attend)

#define UNITS (HEAD_DIM / 32)
#define KEY_PLANE (PAGE * 64 + 64)       /* bytes of 32 dimensions of a page's keys; planes begin at other banks */
#define VALUE_PLANE (HEAD_DIM * 64 + 64) /* of 32 positions of its values */
#define STAGE_BYTES (UNITS * KEY_PLANE + 2 * VALUE_PLANE)
#define HALF_TILES (HEAD_DIM / 16) /* of 8 dimensions, that a warp has of the output */
#define WEIGHT_STRIDE (PAGE + 8)

/* The same for a chunk of one sequence, page by page from the first on, however many rows there are. A pair of warps has 16 pairs of row and
 * head: each scores half of a page's positions, then sums half of the dimensions. Grid: (groups of CHUNK_PAIRS, KV_HEADS); what is found is
 * one part; shared: `stages` STAGE_BYTES, of two of which one is on its way while the other is computed. */
extern "C" __global__ void __launch_bounds__(WARPS *WARP, 1) attend_chunk(const Span *spans, int layer, const u16 *queries, float *sums, float2 *ends, int stages) {
    SHARED(u8, staged);
    __shared__ __align__(16) u16 weights[CHUNK_PAIRS * WEIGHT_STRIDE];
    __shared__ float highest[2][CHUNK_PAIRS], totals[2][CHUNK_PAIRS];
    const Span &s = spans[0];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, group = lane / 4, quarter = lane % 4, half = warp / 4, own = warp % 4 * 16;
    const int kv = blockIdx.y, first_pair = blockIdx.x * CHUNK_PAIRS, num_pairs = s.num_rows * GROUP;
    if (first_pair >= num_pairs) return;
    const i64 last = s.position + (min(first_pair + CHUNK_PAIRS, num_pairs) - 1) / GROUP; /* position that any of the rows sees */
    wait_for_previous();
    let_next_begin();
    auto fetch = [&](int which) {
        i64 begin = (i64)which * PAGE, page = begin <= last ? page_at(s, layer, begin, kv) : 0;
        u8 *to = staged + which % stages * STAGE_BYTES;
        for (int i = threadIdx.x; i < PAGE * UNITS * 4; i += blockDim.x) {
            int position = i / (UNITS * 4), piece = i % (UNITS * 4), dimension = i / 8, at = i % 8 * 8;
            copy_async(to + piece / 4 * KEY_PLANE + position * 64 + piece % 4 * 16, s.keys + page + position * HEAD_DIM + piece * 8,
                       begin + position <= last);
            copy_async(to + UNITS * KEY_PLANE + at / 32 * VALUE_PLANE + dimension * 64 + at % 32 * 2,
                       s.values + page + (i64)dimension * PAGE + at, begin + at <= last);
        }
        end_of_copies();
    };
    fetch(0);
    uint4 query[UNITS][2];
    i64 seen[2]; /* by the rows of this thread: positions up to */
    for (int i = 0; i < 2; i++) {
        int pair = first_pair + own + group + 8 * i;
        seen[i] = s.position + pair / GROUP;
        const u16 *from = queries + ((i64)(s.first_row + pair / GROUP) * HEADS + kv * GROUP + pair % GROUP) * HEAD_DIM + quarter * 8;
#pragma unroll
        for (int unit = 0; unit < UNITS; unit++) query[unit][i] = pair < num_pairs ? *(const uint4 *)(from + unit * 32) : make_uint4(0, 0, 0, 0);
    }
    float out[HALF_TILES][4], most[2] = {-INFINITE, -INFINITE}, total[2] = {0, 0};
#pragma unroll
    for (int t = 0; t < HALF_TILES; t++)
        for (int i = 0; i < 4; i++) out[t][i] = 0;
    for (int page = 0; (i64)page * PAGE <= last; page++) {
        wait_for_copies<0>();
        __syncthreads();
        if (stages > 1) fetch(page + 1);
        const u8 *keys_at = staged + page % stages * STAGE_BYTES, *values_at = keys_at + UNITS * KEY_PLANE;
        float found[4][4], here[2] = {-INFINITE, -INFINITE};
#pragma unroll
        for (int n = 0; n < 4; n++)
            for (int i = 0; i < 4; i++) found[n][i] = 0;
#pragma unroll
        for (int unit = 0; unit < UNITS; unit++) {
            const uint4 &a0 = query[unit][0], &a1 = query[unit][1];
#pragma unroll
            for (int n = 0; n < 4; n++) {
                uint4 b = *(const uint4 *)(keys_at + unit * KEY_PLANE + (half * 32 + n * 8 + group) * 64 + quarter * 16);
                multiply(found[n], a0.x, a1.x, a0.y, a1.y, b.x, b.y);
                multiply(found[n], a0.z, a1.z, a0.w, a1.w, b.z, b.w);
            }
        }
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                bool is_seen = (i64)page * PAGE + half * 32 + n * 8 + quarter * 2 + i % 2 <= seen[i / 2];
                found[n][i] = is_seen ? found[n][i] * (1.0f / sqrtf((float)HEAD_DIM)) : -INFINITE;
                here[i / 2] = fmaxf(here[i / 2], found[n][i]);
            }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            here[i] = warp_max(here[i], 4);
            if (quarter == 0) highest[half][own + group + 8 * i] = here[i];
        }
        __syncthreads();
        float scale[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float both = fmaxf(most[i], fmaxf(here[i], highest[1 - half][own + group + 8 * i]));
            scale[i] = __expf(most[i] - both); /* 0 at first: position 0 is seen by all */
            most[i] = both;
            total[i] *= scale[i];
        }
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                u32 pair = to_halves(__expf(found[n][2 * i] - most[i]), __expf(found[n][2 * i + 1] - most[i]));
                total[i] += low_half(pair) + high_half(pair); /* as they are multiplied with */
                *(u32 *)(weights + (own + group + 8 * i) * WEIGHT_STRIDE + half * 32 + n * 8 + quarter * 2) = pair;
            }
        __syncthreads();
#pragma unroll
        for (int t = 0; t < HALF_TILES; t++)
            for (int i = 0; i < 4; i++) out[t][i] *= scale[i / 2];
#pragma unroll
        for (int unit = 0; unit < 2; unit++) {
            uint4 a0 = *(const uint4 *)(weights + (own + group) * WEIGHT_STRIDE + unit * 32 + quarter * 8);
            uint4 a1 = *(const uint4 *)(weights + (own + group + 8) * WEIGHT_STRIDE + unit * 32 + quarter * 8);
#pragma unroll
            for (int t = 0; t < HALF_TILES; t++) {
                int dimension = half * (HEAD_DIM / 2) + t * 8 + group;
                uint4 b = *(const uint4 *)(values_at + unit * VALUE_PLANE + dimension * 64 + quarter * 16);
                multiply(out[t], a0.x, a1.x, a0.y, a1.y, b.x, b.y);
                multiply(out[t], a0.z, a1.z, a0.w, a1.w, b.z, b.w);
            }
        }
        if (stages == 1) {
            __syncthreads();
            fetch(page + 1);
        }
    }
    wait_for_copies<0>();
#pragma unroll
    for (int i = 0; i < 2; i++) {
        total[i] = warp_sum(total[i], 4);
        if (quarter == 0) totals[half][own + group + 8 * i] = total[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int pair = first_pair + own + group + 8 * i;
        if (pair >= num_pairs) continue;
        i64 place = (i64)(s.first_row + pair / GROUP) * HEADS + kv * GROUP + pair % GROUP;
#pragma unroll
        for (int t = 0; t < HALF_TILES; t++)
            *(float2 *)(sums + place * HEAD_DIM + half * (HEAD_DIM / 2) + t * 8 + quarter * 2) = make_float2(out[t][2 * i], out[t][2 * i + 1]);
        if (half == 0 && quarter == 0) ends[place] = make_float2(most[i], totals[0][own + group + 8 * i] + totals[1][own + group + 8 * i]);
    }
}
EXPORT(attend_chunk)

/* Merges the parts and applies the gates, which stand in q beside the queries. Grid: (rows, HEADS / heads); shared: heads * HEAD_DIM
 * floats. */
extern "C" __global__ void merge_parts(const Span *spans, const int *span_of, const float *sums, const float2 *ends, int max_parts, int is_looped,
                                       const float *q, int q_stride, int heads, Rows to) {
    SHARED(float, values);
    wait_for_previous();
    let_next_begin();
    int row = blockIdx.x, first = blockIdx.y * heads, count = min(heads, HEADS - first);
    if (span_of[row] < 0) return;
    const Span &s = spans[span_of[row]];
    int num_parts = is_looped ? 1 : (int)((s.position + row - s.first_row) / PART) + 1;
    for (int i = threadIdx.x; i < count * HEAD_DIM; i += blockDim.x) {
        int head = first + i / HEAD_DIM, dimension = i % HEAD_DIM;
        i64 place = ((i64)row * HEADS + head) * max_parts;
        float highest = -INFINITE, total = 0, sum = 0;
        for (int part = 0; part < num_parts; part++) {
            float2 end = ends[place + part];
            float by_before, by_new;
            highest = merge(highest, end.x, &by_before, &by_new);
            total = fmaf(end.y, by_new, total * by_before);
            sum = fmaf(sums[(place + part) * HEAD_DIM + dimension], by_new, sum * by_before);
        }
        values[i] = sum / total * sigmoid(q[(i64)row * q_stride + head * 2 * HEAD_DIM + HEAD_DIM + dimension]);
    }
    __syncthreads();
    emit(values, count * HEAD_DIM, to, row, first * HEAD_DIM);
}
EXPORT(merge_parts)
