/* Products of few rows with a matrix: weights are read once, in tiles that are the registers of a matrix instruction; one row costs what eight
 * do. Of quantised weights 8 rows: batch.cu has more, but where its blocks have no room. */
#include "products.cuh"

template <int STRIPS, int TILES>
__device__ __forceinline__ void bf16_units(float (&sums)[STRIPS][TILES][4], const Matrix &m, const Rows &x, const Place &at, const Ahead &ahead) {
    const int AHEAD = STRIPS * TILES > 4 ? 2 : 4, lane = threadIdx.x % WARP;
    const uint4 *tiles = m.tiles + ((i64)at.strip * m.units * 2) * WARP + lane;
    const u16 *rows[TILES];
    bool has_waited = false;
    for (int unit = at.from; unit < at.to || !has_waited; unit += AHEAD) {
        uint4 a[AHEAD][STRIPS][2];
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
#pragma unroll
            for (int s = 0; s < STRIPS; s++)
#pragma unroll
                for (int half = 0; half < 2; half++)
                    if (unit + i < at.to) a[i][s][half] = load_once(tiles + ((strip_of(m, at, s) * m.units + unit + i) * 2 + half) * WARP);
        if (!has_waited) {
            begin(ahead), has_waited = true;
#pragma unroll
            for (int t = 0; t < TILES; t++) rows[t] = x.halves + row_of(at, t, lane / 4) * x.halves_stride + lane % 4 * 8;
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            if (unit + i >= at.to) break;
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                uint4 b = *(const uint4 *)(rows[t] + (unit + i) * 32);
#pragma unroll
                for (int s = 0; s < STRIPS; s++) add_bf16(sums[s][t], a[i][s], b);
            }
        }
    }
}

/* Where a lane's quants of a tile's rows are, and the scales and sums of the two columns that it has. */
struct QuantRows {
    const u8 *quants;
    const float *scales[2], *sums[2];
};
__device__ __forceinline__ QuantRows quant_rows(const Rows &x, const Place &at) {
    const int lane = threadIdx.x % WARP, per_row = x.quants_stride / QUANT;
    QuantRows r;
    r.quants = x.quants + row_of(at, 0, lane / 4) * x.quants_stride + lane % 4 * 32;
    for (int i = 0; i < 2; i++) {
        i64 row = row_of(at, 0, lane % 4 * 2 + i);
        r.scales[i] = x.scales + row * per_row, r.sums[i] = x.sums + row * per_row;
    }
    return r;
}

template <int STRIPS>
__device__ __forceinline__ void q8_units(float (&sums)[STRIPS][1][4], const Matrix &m, const Rows &x, const Place &at, const Ahead &ahead) {
    const int AHEAD = 2, lane = threadIdx.x % WARP;
    const uint4 *tiles = m.tiles + ((i64)at.strip * m.units * 4) * WARP + lane;
    const uint4 *scales = m.scales + (i64)at.strip * m.units * 8 + lane / 4;
    const QuantRows rows = quant_rows(x, at);
    bool has_waited = false;
    for (int unit = at.from; unit < at.to || !has_waited; unit += AHEAD) {
        uint4 a[AHEAD][STRIPS][4], w[AHEAD][STRIPS];
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
#pragma unroll
            for (int s = 0; s < STRIPS; s++) {
                if (unit + i >= at.to) continue;
#pragma unroll
                for (int k = 0; k < 4; k++) a[i][s][k] = load_once(tiles + ((strip_of(m, at, s) * m.units + unit + i) * 4 + k) * WARP);
                w[i][s] = load_once(scales + (strip_of(m, at, s) * m.units + unit + i) * 8);
            }
        if (!has_waited) begin(ahead), has_waited = true;
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            if (unit + i >= at.to) break;
            const uint4 *from = (const uint4 *)(rows.quants + (unit + i) * 128), b[2] = {from[0], from[1]};
            const float *s0 = rows.scales[0] + (unit + i) * 4, *s1 = rows.scales[1] + (unit + i) * 4; /* one by one: three blocks have registers */
#pragma unroll
            for (int s = 0; s < STRIPS; s++)
#pragma unroll
                for (int k = 0; k < 4; k++)
                    add_q8(sums[s][0], a[i][s][k], k % 2 ? b[k / 2].z : b[k / 2].x, k % 2 ? b[k / 2].w : b[k / 2].y, part_of(w[i][s], k),
                           s0[k], s1[k]);
        }
    }
}

template <int FORMAT, int STRIPS>
__device__ __forceinline__ void k_units(float (&sums)[STRIPS][1][4], const Matrix &m, const Rows &x, const Place &at, const Ahead &ahead) {
    const int lane = threadIdx.x % WARP, group = lane / 4, PIECES = pieces_of(FORMAT), HIGH = (PIECES - SCALES) / WARP;
    const uint4 *tiles = m.tiles + ((i64)at.strip * m.units * 4) * WARP + lane;
    const QuantRows rows = quant_rows(x, at);
    bool has_waited = false;
    for (int unit = at.from; unit < at.to || !has_waited; unit++) {
        uint4 a[STRIPS][4], bits[STRIPS][HIGH + 1], w[STRIPS][2];
        uint2 ends[STRIPS];
#pragma unroll
        for (int s = 0; s < STRIPS; s++) {
            if (unit >= at.to) continue;
            i64 place = strip_of(m, at, s) * m.units + unit, from = (i64)at.strip * m.units + place;
#pragma unroll
            for (int k = 0; k < 4; k++) a[s][k] = load_once(tiles + (place * 4 + k) * WARP);
#pragma unroll
            for (int k = 0; k < HIGH; k++) bits[s][k] = load_once(m.scales + from * PIECES + SCALES + k * WARP + lane);
            for (int half = 0; half < 2; half++) w[s][half] = load_once(m.scales + from * PIECES + group * 2 + half);
            ends[s] = load_once(m.ends + from * 8 + group);
        }
        if (!has_waited) begin(ahead), has_waited = true;
        if (unit >= at.to) break;
        if (unit + 1 < at.to)
            for (int s = 0; s < STRIPS; s++) {
                i64 next = strip_of(m, at, s) * m.units + unit + 1;
                if (lane < 16) expect((const u8 *)(tiles - lane + next * 4 * WARP) + 128 * lane);
                else if (HIGH && lane < 16 + PIECES / 8) expect(m.scales + ((i64)at.strip * m.units + next) * PIECES + 8 * (lane - 16));
            }
#pragma unroll
        for (int k = 0; k < 4; k++) { /* 64 inputs: the low nibbles of a tile, and the high ones */
            uint4 b = *(const uint4 *)(rows.quants + unit * 256 + k / 2 * 128 + k % 2 * 16);
#pragma unroll
            for (int high = 0; high < 2; high++) {
                int turn = 2 * k + high, block = unit * 8 + turn;
#pragma unroll
                for (int s = 0; s < STRIPS; s++) {
                    Block n = block_of<FORMAT>(a[s][k], bits[s][HIGH == 2 ? turn / 4 : 0], turn, part_of(w[s][k / 2], turn % 4), ends[s]);
                    add_block<FORMAT>(sums[s][0], n, high ? b.z : b.x, high ? b.w : b.y, rows.scales[0][block], rows.scales[1][block],
                                      rows.sums[0][block], rows.sums[1][block]);
                }
            }
        }
    }
}

template <int FORMAT, int STRIPS, int TILES, bool GATED>
__device__ __forceinline__ void product(const Matrix &m, const Rows &x, Place at, int split, int splits, float *out, int out_stride, const Rows &gated,
                                        const Ahead &ahead) {
    __shared__ float4 found[WARPS * STRIPS * TILES * WARP];
    float sums[STRIPS][TILES][4];
    clear(sums);
    set_share(at, m, threadIdx.x / WARP, split, splits);
    if constexpr (FORMAT == BF16) bf16_units<STRIPS, TILES>(sums, m, x, at, ahead);
    else if constexpr (FORMAT == Q8_0) q8_units<STRIPS>(sums, m, x, at, ahead);
    else k_units<FORMAT, STRIPS>(sums, m, x, at, ahead);
    read_on(ahead);
    leave<STRIPS, TILES>(sums, found);
    sum_up<STRIPS, TILES, GATED>(found, m, at, out, out_stride, gated);
}

/* Grid: (strips / STRIPS * groups of 8 TILES rows, splits); what a split finds goes into a part of its own of `out`, [splits, rows, out_stride].
 * Blocks of the same strips and other rows follow each other, and find the weights in the second-level cache. */
#define PRODUCT(NAME, FORMAT, STRIPS, TILES, GATED)                                                                                         \
    extern "C" __global__ void __launch_bounds__(WARPS *WARP)                                                                               \
        NAME(Matrix m, Rows x, float *out, int out_stride, Rows gated, int rows, Ahead ahead) {                                             \
        Place at = place_of<STRIPS, TILES>(rows);                                                                                           \
        out += (i64)blockIdx.y * rows * out_stride;                                                                                         \
        product<FORMAT, STRIPS, TILES, GATED>(m, x, at, blockIdx.y, gridDim.y, out, out_stride, gated, ahead);                              \
    }                                                                                                                                       \
    EXPORT(NAME)
PRODUCT(product_bf16_1, BF16, 1, 1, false)
PRODUCT(product_bf16_2, BF16, 1, 2, false)
PRODUCT(product_bf16_4, BF16, 2, 4, false)
PRODUCT(gated_bf16_1, BF16, 2, 1, true)
PRODUCT(gated_bf16_2, BF16, 2, 2, true)
PRODUCT(gated_bf16_4, BF16, 2, 4, true)
PRODUCT(product_q8_0_1, Q8_0, 1, 1, false)
PRODUCT(product_q4_k_1, Q4_K, 1, 1, false)
PRODUCT(product_q5_k_1, Q5_K, 1, 1, false)
PRODUCT(product_q6_k_1, Q6_K, 1, 1, false)

/* The experts that rows use: `routes` [rows, 2 used] are their numbers, then their shares. Experts lie one after another in m, each with
 * `strips` strips; an expert of a row writes a row of its own. Grid: (strips / STRIPS, experts), each for all that use it, 8 at a time: those of
 * expert e are order[starts[e]] to order[starts[e + 1]]; without `starts`: (strips / STRIPS, rows * used). */
#define EXPERT(NAME, FORMAT, STRIPS, GATED, BOUNDS)                                                                                         \
    extern "C" __global__ void __launch_bounds__ BOUNDS                                                                                     \
        NAME(Matrix m, Rows x, const float *routes, int used, const int *starts, const int *order, int divisor, int strips, float *out,    \
             int out_stride, Rows gated) {                                                                                                  \
        wait_for_previous();                                                                                                                \
        int own = blockIdx.y, expert = starts ? own : (int)routes[own / used * 2 * used + own % used];                                      \
        int row = starts ? starts[expert] : own, end = starts ? starts[expert + 1] : own + 1;                                               \
        skip_to<FORMAT>(m, expert, strips);                                                                                                 \
        for (; row < end; row += 8) {                                                                                                       \
            Place at = {(int)blockIdx.x * STRIPS, row, end, divisor, starts ? order : nullptr};                                             \
            product<FORMAT, STRIPS, 1, GATED>(m, x, at, 0, 1, out, out_stride, gated, {});                                                  \
            __syncthreads();                                                                                                                \
        }                                                                                                                                   \
    }                                                                                                                                       \
    EXPORT(NAME)
EXPERT(expert_bf16, BF16, 1, false, (WARPS * WARP))
EXPERT(expert_gated_bf16, BF16, 2, true, (WARPS * WARP))
EXPERT(expert_q8_0, Q8_0, 1, false, (WARPS * WARP))
EXPERT(expert_q4_k, Q4_K, 1, false, (WARPS * WARP))
EXPERT(expert_q5_k, Q5_K, 1, false, (WARPS * WARP))
EXPERT(expert_q6_k, Q6_K, 1, false, (WARPS * WARP, 2)) /* for a third block a register would be spilled on some architectures */

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
    int block = input / 32 % 8, pieces = pieces_of(m.format), high = m.format == Q6_K ? 2 : m.format == Q5_K;
    const uint4 *scales = m.scales + unit * pieces;
    int quant = ((const u8 *)(m.tiles + (unit * 4 + block / 2) * WARP + lane))[byte] >> (block % 2 * 4) & 15;
    if (high) {
        int turns = 8 / high; /* that share a byte */
        quant |= (((const u8 *)(scales + SCALES + block / turns * WARP + lane))[byte] >> (block % turns * high) & ((1 << high) - 1)) << 4;
    }
    const u8 *bytes = (const u8 *)(scales + g * 2) + block * 4;
    const u16 *ends = (const u16 *)(m.ends + unit * 8 + g);
    if (m.format == Q6_K) return from_half(ends[is_high]) * (float)(signed char)bytes[input % 32 / 16 * 2 + is_high] * (float)(quant - 32);
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
