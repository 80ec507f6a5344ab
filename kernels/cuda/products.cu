/* Products of a few rows with a matrix: weights are read once, in tiles that are the registers of a matrix instruction.
 *
 * A strip is 16 outputs. A block has WARPS warps, which share the inputs of its strips among them in one fixed way; what they found is
 * summed in the order of the inputs. The rows are columns of 8, 16 or 32 of the right operand: one row costs what eight do, and has the
 * same bits. Blocks of the same strip and other rows follow each other, and find the weights in the second-level cache.
 *
 * bfloat16    a unit is 32 inputs: two instructions (m16n8k16)
 * Q8_0        a unit is 128 inputs: four (m16n8k32, int8), each with its own scales of weights and of rows
 * Q4_K        a unit is 256 inputs: eight, of nibbles made bytes; minima meet the rows' sums */
#include "forerun.cuh"

#define WARPS 8
#define READERS 264 /* blocks that read on: two for each multiprocessor of a large device */

/* Where a product's rows stand: block rows `row`... of x that are below `end`. */
struct Place {
    int strip, row, end, from, to; /* units from, to */
};

/* The s-th strip of a block, counted from its first; the last again where there is none. */
__device__ __forceinline__ i64 strip_of(const Matrix &m, const Place &at, int s) { return min(s, (m.outputs + 15) / 16 - 1 - at.strip); }

__device__ __forceinline__ void begin(const Ahead &ahead) {
    wait_for_previous();
    if (!ahead.is_spread) let_next_begin();
}

/* Where this product's weights have been read, the next one's follow: memory is not idle while others make its rows ready. By the last
 * blocks, as many as there are at once. */
__device__ __forceinline__ void read_on(const Ahead &ahead) {
    const i64 blocks = (i64)gridDim.x * gridDim.y, readers = min(blocks, (i64)READERS), own = blocks - 1 - ((i64)blockIdx.y * gridDim.x + blockIdx.x);
    if (own >= readers) return;
    for (i64 at = 128 * (own * blockDim.x + threadIdx.x); at < ahead.bytes; at += 128 * readers * blockDim.x) expect(ahead.weights + at);
}

template <int STRIPS, int TILES>
__device__ __forceinline__ void bf16_units(float (&sums)[STRIPS][TILES][4], const Matrix &m, const Rows &x, const Place &at, const Ahead &ahead) {
    const int AHEAD = STRIPS * TILES > 4 ? 2 : 4, lane = threadIdx.x % WARP, group = lane / 4, part = lane % 4;
    const uint4 *tiles = m.tiles + ((i64)at.strip * m.units * 2) * WARP + lane;
    const u16 *rows[TILES];
    bool has_waited = false;
    for (int t = 0; t < TILES; t++) {
        int row = at.row + t * 8 + group;
        rows[t] = row < at.end ? x.halves + (i64)row * x.halves_stride + part * 8 : nullptr;
    }
    for (int unit = at.from; unit < at.to || !has_waited; unit += AHEAD) {
        uint4 a[AHEAD][STRIPS][2];
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
#pragma unroll
            for (int s = 0; s < STRIPS; s++)
#pragma unroll
                for (int half = 0; half < 2; half++)
                    if (unit + i < at.to) a[i][s][half] = load_once(tiles + ((strip_of(m, at, s) * m.units + unit + i) * 2 + half) * WARP);
        if (!has_waited) begin(ahead), has_waited = true;
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            if (unit + i >= at.to) break;
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                uint4 b = rows[t] ? *(const uint4 *)(rows[t] + (unit + i) * 32) : make_uint4(0, 0, 0, 0);
#pragma unroll
                for (int s = 0; s < STRIPS; s++) {
                    multiply(sums[s][t], a[i][s][0].x, a[i][s][0].y, a[i][s][0].z, a[i][s][0].w, b.x, b.y);
                    multiply(sums[s][t], a[i][s][1].x, a[i][s][1].y, a[i][s][1].z, a[i][s][1].w, b.z, b.w);
                }
            }
        }
    }
}

__device__ __forceinline__ float part_of(const float4 &v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }
__device__ __forceinline__ u32 part_of(const uint4 &v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

/* Rows that a lane loads quants of, and the two whose sums it holds. */
struct QuantRows {
    const u8 *quants;
    const float *scales[2], *sums[2];
};
__device__ __forceinline__ QuantRows quant_rows(const Rows &x, const Place &at, int tile) {
    int lane = threadIdx.x % WARP, row = at.row + tile * 8 + lane / 4, per_row = x.quants_stride / QUANT;
    QuantRows r;
    r.quants = row < at.end ? x.quants + (i64)row * x.quants_stride + lane % 4 * 32 : nullptr;
    for (int i = 0; i < 2; i++) {
        i64 column = at.row + tile * 8 + lane % 4 * 2 + i;
        r.scales[i] = column < at.end ? x.scales + column * per_row : nullptr;
        r.sums[i] = column < at.end ? x.sums + column * per_row : nullptr;
    }
    return r;
}
__device__ __forceinline__ float4 four(const float *from, int at) {
    return from ? *(const float4 *)(from + at) : make_float4(0, 0, 0, 0);
}

template <int STRIPS, int TILES>
__device__ __forceinline__ void q8_units(float (&sums)[STRIPS][TILES][4], const Matrix &m, const Rows &x, const Place &at, const Ahead &ahead) {
    const int AHEAD = 2, lane = threadIdx.x % WARP;
    const uint4 *tiles = m.tiles + ((i64)at.strip * m.units * 4) * WARP + lane;
    const uint4 *scales = m.scales + (i64)at.strip * m.units * 8 + lane / 4;
    QuantRows rows[TILES];
    bool has_waited = false;
    for (int t = 0; t < TILES; t++) rows[t] = quant_rows(x, at, t);
    for (int unit = at.from; unit < at.to || !has_waited; unit += AHEAD) {
        uint4 a[AHEAD][STRIPS][4], w[AHEAD][STRIPS];
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
#pragma unroll
            for (int s = 0; s < STRIPS; s++) {
                if (unit + i >= at.to) continue;
#pragma unroll
                for (int k = 0; k < 4; k++) a[i][s][k] = load_once(tiles + (((i64)s * m.units + unit + i) * 4 + k) * WARP);
                w[i][s] = load_once(scales + ((i64)s * m.units + unit + i) * 8);
            }
        if (!has_waited) begin(ahead), has_waited = true;
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            if (unit + i >= at.to) break;
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                uint4 b[2];
                for (int half = 0; half < 2; half++)
                    b[half] = rows[t].quants ? ((const uint4 *)(rows[t].quants + (unit + i) * 128))[half] : make_uint4(0, 0, 0, 0);
                float4 x0 = four(rows[t].scales[0], (unit + i) * 4), x1 = four(rows[t].scales[1], (unit + i) * 4);
#pragma unroll
                for (int s = 0; s < STRIPS; s++)
#pragma unroll
                    for (int k = 0; k < 4; k++) {
                        int c[4];
                        const uint4 &tile = a[i][s][k];
                        multiply(c, tile.x, tile.y, tile.z, tile.w, k % 2 ? b[k / 2].z : b[k / 2].x, k % 2 ? b[k / 2].w : b[k / 2].y);
                        u32 both = part_of(w[i][s], k);
                        float w0 = from_half((u16)both), w1 = from_half((u16)(both >> 16));
                        float s0 = part_of(x0, k), s1 = part_of(x1, k);
                        sums[s][t][0] = fmaf(w0 * s0, (float)c[0], sums[s][t][0]);
                        sums[s][t][1] = fmaf(w0 * s1, (float)c[1], sums[s][t][1]);
                        sums[s][t][2] = fmaf(w1 * s0, (float)c[2], sums[s][t][2]);
                        sums[s][t][3] = fmaf(w1 * s1, (float)c[3], sums[s][t][3]);
                    }
            }
        }
    }
}

template <int STRIPS, int TILES>
__device__ __forceinline__ void q4_units(float (&sums)[STRIPS][TILES][4], const Matrix &m, const Rows &x, const Place &at, const Ahead &ahead) {
    const int lane = threadIdx.x % WARP, group = lane / 4;
    const uint4 *tiles = m.tiles + ((i64)at.strip * m.units * 4) * WARP + lane;
    QuantRows rows[TILES];
    bool has_waited = false;
    for (int t = 0; t < TILES; t++) rows[t] = quant_rows(x, at, t);
    for (int unit = at.from; unit < at.to || !has_waited; unit++) {
        uint4 a[STRIPS][4], w[STRIPS][2];
        uint2 ends[STRIPS];
#pragma unroll
        for (int s = 0; s < STRIPS; s++) {
            if (unit >= at.to) continue;
            i64 place = (i64)s * m.units + unit, strips = (i64)at.strip * m.units + place;
#pragma unroll
            for (int k = 0; k < 4; k++) a[s][k] = load_once(tiles + (place * 4 + k) * WARP);
            for (int half = 0; half < 2; half++) w[s][half] = load_once(m.scales + (strips * 8 + group) * 2 + half);
            ends[s] = load_once(m.ends + strips * 8 + group);
        }
        if (!has_waited) begin(ahead), has_waited = true;
        if (unit >= at.to) break;
        if (TILES == 1 && unit + 1 < at.to && lane < 16) /* others have no register left for it */
            for (int s = 0; s < STRIPS; s++) expect((const u8 *)(tiles - lane + ((i64)s * m.units + unit + 1) * 4 * WARP) + 128 * lane);
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
            for (int k = 0; k < 4; k++) { /* 64 inputs: the low nibbles of a tile, and the high ones */
                const uint4 *from = (const uint4 *)(rows[t].quants + unit * 256 + k / 2 * 128 + k % 2 * 16);
                uint4 b = rows[t].quants ? *from : make_uint4(0, 0, 0, 0);
#pragma unroll
                for (int high = 0; high < 2; high++) {
                    int block = unit * 8 + 2 * k + high;
                    float scale[2], sum[2];
                    for (int i = 0; i < 2; i++) {
                        scale[i] = rows[t].scales[i] ? rows[t].scales[i][block] : 0;
                        sum[i] = rows[t].sums[i] ? rows[t].sums[i][block] : 0;
                    }
#pragma unroll
                    for (int s = 0; s < STRIPS; s++) {
                        int c[4], shift = 4 * high;
                        const u32 mask = 0x0f0f0f0f;
                        const uint4 &tile = a[s][k];
                        multiply(c, tile.x >> shift & mask, tile.y >> shift & mask, tile.z >> shift & mask, tile.w >> shift & mask,
                                 high ? b.z : b.x, high ? b.w : b.y);
                        u32 bytes = part_of(w[s][k / 2], k % 2 * 2 + high);
                        for (int i = 0; i < 2; i++) { /* outputs g and g + 8 */
                            float d = from_half((u16)(ends[s].x >> 16 * i)) * (float)(bytes >> 8 * i & 255);
                            float low = from_half((u16)(ends[s].y >> 16 * i)) * (float)(bytes >> (16 + 8 * i) & 255);
                            for (int j = 0; j < 2; j++) {
                                float &to = sums[s][t][2 * i + j];
                                to = fmaf(-low, sum[j], fmaf(d * scale[j], (float)c[2 * i + j], to));
                            }
                        }
                    }
                }
            }
    }
}

/* out [rows, out_stride] = x times m, outputs of `STRIPS` strips from `at.strip`; or, GATED, silu of one strip times the next, as bfloat16
 * into `gated`. */
template <int FORMAT, int STRIPS, int TILES, bool GATED>
__device__ __forceinline__ void product(const Matrix &m, const Rows &x, Place at, int out_row, float *out, int out_stride, const Rows &gated,
                                        int split, int splits, const Ahead &ahead) {
    __shared__ float4 found[WARPS * STRIPS * TILES * WARP];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    float sums[STRIPS][TILES][4];
#pragma unroll
    for (int s = 0; s < STRIPS; s++)
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
            for (int i = 0; i < 4; i++) sums[s][t][i] = 0;
    at.from = (int)((i64)m.units * (split * WARPS + warp) / (splits * WARPS));
    at.to = (int)((i64)m.units * (split * WARPS + warp + 1) / (splits * WARPS));
    if (FORMAT == BF16) bf16_units<STRIPS, TILES>(sums, m, x, at, ahead);
    else if (FORMAT == Q8_0) q8_units<STRIPS, TILES>(sums, m, x, at, ahead);
    else q4_units<STRIPS, TILES>(sums, m, x, at, ahead);
    if (ahead.is_spread) let_next_begin();
    if (ahead.bytes) read_on(ahead);
#pragma unroll
    for (int s = 0; s < STRIPS; s++)
#pragma unroll
        for (int t = 0; t < TILES; t++)
            found[((warp * STRIPS + s) * TILES + t) * WARP + lane] = make_float4(sums[s][t][0], sums[s][t][1], sums[s][t][2], sums[s][t][3]);
    __syncthreads();
    for (int i = threadIdx.x; i < (GATED ? 1 : STRIPS) * TILES * WARP; i += blockDim.x) {
        int strip = i / (TILES * WARP), tile = i / WARP % TILES, from = i % WARP;
        float total[2][4];
        for (int which = 0; which < (GATED ? 2 : 1); which++) {
            for (int j = 0; j < 4; j++) total[which][j] = 0;
            for (int w = 0; w < WARPS; w++) {
                float4 v = found[((w * STRIPS + strip + which) * TILES + tile) * WARP + from];
                total[which][0] += v.x, total[which][1] += v.y, total[which][2] += v.z, total[which][3] += v.w;
            }
        }
        for (int j = 0; j < 4; j++) {
            int row = tile * 8 + from % 4 * 2 + j % 2, output = (at.strip + strip) * 16 + from / 4 + j / 2 * 8;
            if (at.row + row >= at.end) continue;
            if (GATED) {
                int place = at.strip / 2 * 16 + from / 4 + j / 2 * 8;
                float value = silu(total[0][j]) * total[1][j];
                gated.halves[(i64)(out_row + row) * gated.halves_stride + place] = (u16)to_halves(value, 0);
            } else if (output < m.outputs) out[(i64)(out_row + row) * out_stride + output] = total[0][j];
        }
    }
}

/* All rows. Grid: (strips / STRIPS * groups of 8 TILES rows, splits); what a split finds goes into a part of its own of `out`,
 * [splits, rows, out_stride]. */
#define PRODUCT(NAME, FORMAT, STRIPS, TILES, GATED)                                                                                         \
    extern "C" __global__ void __launch_bounds__(WARPS *WARP)                                                                               \
        NAME(Matrix m, Rows x, float *out, int out_stride, Rows gated, int rows, Ahead ahead) {                                             \
        int groups = (rows + 8 * TILES - 1) / (8 * TILES), row = blockIdx.x % groups * 8 * TILES;                                           \
        Place at = {(int)(blockIdx.x / groups) * STRIPS, row, rows, 0, 0};                                                                  \
        product<FORMAT, STRIPS, TILES, GATED>(m, x, at, row, out + (i64)blockIdx.y * rows * out_stride, out_stride, gated, blockIdx.y,      \
                                              gridDim.y, ahead);                                                                            \
    }                                                                                                                                       \
    EXPORT(NAME)
PRODUCT(product_bf16_1, BF16, 1, 1, false)
PRODUCT(product_bf16_2, BF16, 1, 2, false)
PRODUCT(product_bf16_4, BF16, 2, 4, false)
PRODUCT(gated_bf16_1, BF16, 2, 1, true)
PRODUCT(gated_bf16_2, BF16, 2, 2, true)
PRODUCT(gated_bf16_4, BF16, 2, 4, true)
PRODUCT(product_q8_0_1, Q8_0, 1, 1, false)
PRODUCT(product_q8_0_2, Q8_0, 1, 2, false)
PRODUCT(product_q8_0_4, Q8_0, 1, 4, false)
PRODUCT(product_q4_k_1, Q4_K, 1, 1, false)
PRODUCT(product_q4_k_2, Q4_K, 1, 2, false)

/* The experts that each row uses: `routes` [rows, 2 used] are their numbers, then their shares. Experts lie one after another in m. Grid:
 * (strips of one / STRIPS, rows * used). `is_shared`: all of a row's experts read one row of x; else each its own. */
#define EXPERT(NAME, FORMAT, STRIPS, GATED)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(WARPS *WARP)                                                                               \
        NAME(Matrix m, Rows x, const float *routes, int used, int is_shared, float *out, int out_stride, Rows gated) {                      \
        wait_for_previous();                                                                                                                \
        int place = blockIdx.y, row = is_shared ? place / used : place;                                                                     \
        int expert = (int)routes[place / used * 2 * used + place % used], strips = gridDim.x * STRIPS;                                      \
        Matrix own = m;                                                                                                                     \
        i64 skipped = (i64)expert * strips * m.units;                                                                                       \
        own.tiles += skipped * (FORMAT == BF16 ? 2 : 4) * WARP;                                                                             \
        if (FORMAT != BF16) own.scales += skipped * (FORMAT == Q8_0 ? 8 : 16);                                                              \
        if (FORMAT == Q4_K) own.ends += skipped * 8;                                                                                        \
        Place at = {(int)blockIdx.x * STRIPS, row, row + 1, 0, 0};                                                                          \
        product<FORMAT, STRIPS, 1, GATED>(own, x, at, place, out, out_stride, gated, 0, 1, {});                                             \
    }                                                                                                                                       \
    EXPORT(NAME)
EXPERT(expert_bf16, BF16, 1, false)
EXPERT(expert_gated_bf16, BF16, 2, true)
EXPERT(expert_q8_0, Q8_0, 1, false)
EXPERT(expert_q4_k, Q4_K, 1, false)

/* Weight (output, input). */
__device__ __forceinline__ float weight_at(const Matrix &m, int output, int input) {
    int strip = output / 16, g = output % 8, is_high = output % 16 / 8, lane = g * 4 + input / 8 % 4;
    if (m.format == BF16) {
        i64 tile = ((i64)strip * m.units + input / 32) * 2 + input / 4 % 2;
        const u16 *own = (const u16 *)(m.tiles + tile * WARP + lane);
        return low_half(own[(input / 2 % 2 * 2 + is_high) * 2 + input % 2]);
    }
    int byte = (input / 4 % 2 * 2 + is_high) * 4 + input % 4;
    if (m.format == Q8_0) {
        i64 unit = (i64)strip * m.units + input / 128;
        signed char quant = ((const signed char *)(m.tiles + (unit * 4 + input / 32 % 4) * WARP + lane))[byte];
        return from_half(((const u16 *)(m.scales + unit * 8 + g))[input / 32 % 4 * 2 + is_high]) * (float)quant;
    }
    i64 unit = (i64)strip * m.units + input / 256;
    int quant = ((const u8 *)(m.tiles + (unit * 4 + input / 64 % 4) * WARP + lane))[byte] >> (input / 32 % 2 * 4) & 15;
    const u8 *bytes = (const u8 *)(m.scales + (unit * 8 + g) * 2) + input / 32 % 8 * 4;
    const u16 *ends = (const u16 *)(m.ends + unit * 8 + g);
    return from_half(ends[is_high]) * (float)bytes[is_high] * (float)quant - from_half(ends[2 + is_high]) * (float)bytes[2 + is_high];
}

/* out [rows, n] = rows `tokens` of a table; -1 - i is row i of what the sequence was given. Grid: rows. */
extern "C" __global__ void embed(Matrix m, const int *tokens, const Span *spans, const int *span_of, float *out, int n) {
    wait_for_previous();
    let_next_begin();
    int token = tokens[blockIdx.x];
    const float *given = token < 0 ? spans[span_of[blockIdx.x]].given + (i64)(-1 - token) * n : nullptr;
    for (int i = threadIdx.x; i < n; i += blockDim.x) out[(i64)blockIdx.x * n + i] = given ? given[i] : weight_at(m, token, i);
}
EXPORT(embed)
