/* What products of a few rows (products.cu) and of a batch (batch.cu) share.
 *
 * A strip is 16 outputs. A block has WARPS warps, which share the inputs of its strips among them in one fixed way; what they found is
 * summed in the order of the inputs. Rows are columns of the right operand of matrix instructions, 8 a tile: what is added to an output of a
 * row, and in which order, is the same in all of these kernels.
 *
 * bfloat16    a unit is 32 inputs: two instructions (m16n8k16)
 * Q8_0        a unit is 128 inputs: four (m16n8k32, int8), each with its own scales of weights and of rows
 * Q4_K        a unit is 256 inputs: eight, of nibbles made bytes; minima meet the rows' sums
 * Q5_K        the same with a fifth bit
 * Q6_K        with two more bits, and two instructions for 32 inputs, which have two scales */
#ifndef FORERUN_PRODUCTS_CUH
#define FORERUN_PRODUCTS_CUH
#include "forerun.cuh"

#define WARPS 8
#define READERS 264 /* blocks that read on: two for each multiprocessor of a large device */

/* A block's part of a product: strips from `strip` on, and rows from `row` on of those below `end`; a warp has the units `from` to `to`.
 * With an `order`, row i is row order[i] of what is written; `divisor` rows of that read one of x. */
struct Place {
    int strip, row, end, divisor;
    const int *order;
    int from, to;
};

/* The s-th strip of a block, counted from its first; the last again where there is none. */
__device__ __forceinline__ i64 strip_of(const Matrix &m, const Place &at, int s) { return s ? min(s, (m.outputs + 15) / 16 - 1 - at.strip) : 0; }

/* The row of x that is column `column` of a tile; the last again where there is none. */
__device__ __forceinline__ i64 row_of(const Place &at, int tile, int column) {
    int row = min(at.row + tile * 8 + column, at.end - 1);
    return (at.order ? at.order[row] : row) / at.divisor;
}

__device__ __forceinline__ void begin(const Ahead &ahead) {
    wait_for_previous();
    if (!ahead.is_spread) let_next_begin();
}

/* A block whose part of a product is its number: of pairs of STRIPS strips and 8 TILES rows, those of the same strips follow each other. */
template <int STRIPS, int TILES> __device__ __forceinline__ Place place_of(int rows) {
    int groups = (rows + 8 * TILES - 1) / (8 * TILES);
    return {(int)(blockIdx.x / groups) * STRIPS, (int)(blockIdx.x % groups) * 8 * TILES, rows, 1};
}

/* Where this product's weights have been read, the next one's follow: memory is not idle while others make its rows ready. By the last
 * blocks, as many as there are at once. Launches that are to be spread begin only now. */
__device__ __forceinline__ void read_on(const Ahead &ahead) {
    if (ahead.is_spread) let_next_begin();
    if (!ahead.bytes) return;
    const i64 blocks = (i64)gridDim.x * gridDim.y, readers = min(blocks, (i64)READERS), own = blocks - 1 - ((i64)blockIdx.y * gridDim.x + blockIdx.x);
    if (own >= readers) return;
    for (i64 at = 128 * (own * blockDim.x + threadIdx.x); at < ahead.bytes; at += 128 * readers * blockDim.x) expect(ahead.weights + at);
}

__device__ __forceinline__ u32 part_of(const uint4 &v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

/* 32 inputs of a strip, as bfloat16, and 8 rows. */
__device__ __forceinline__ void add_bf16(float (&sums)[4], const uint4 (&a)[2], const uint4 &b) {
    multiply(sums, a[0].x, a[0].y, a[0].z, a[0].w, b.x, b.y);
    multiply(sums, a[1].x, a[1].y, a[1].z, a[1].w, b.z, b.w);
}

/* 32 inputs of Q8_0: the scales of outputs g and g + 8, and of both columns that a lane has. */
__device__ __forceinline__ void add_q8(float (&sums)[4], const uint4 &a, u32 b0, u32 b1, u32 scales, float s0, float s1) {
    int c[4];
    float w0 = from_half((u16)scales), w1 = from_half((u16)(scales >> 16));
    multiply_bytes(c, a.x, a.y, a.z, a.w, b0, b1);
    sums[0] = fmaf(w0 * s0, (float)c[0], sums[0]);
    sums[1] = fmaf(w0 * s1, (float)c[1], sums[1]);
    sums[2] = fmaf(w1 * s0, (float)c[2], sums[2]);
    sums[3] = fmaf(w1 * s1, (float)c[3], sums[3]);
}

/* 32 inputs of a block of 256 as the matrix instruction wants them, and what they are multiples of: for outputs g and g + 8 a scale, and what is
 * taken away (Q4_K, Q5_K); or scales of the first 16 inputs and of the others (Q6_K). */
struct Block {
    uint4 quants;
    float first[2], second[2];
};

/* The 32 inputs of a turn, one of 8: `bits` as pieces_of has them, `bytes` of scales of g and g + 8, then both minima, or scales of the other 16. */
template <int FORMAT> __device__ __forceinline__ Block block_of(const uint4 &tile, const uint4 &bits, int turn, u32 bytes, const uint2 &ends) {
    Block n;
    n.quants = make_uint4(quants_of<FORMAT>(tile.x, bits.x, turn), quants_of<FORMAT>(tile.y, bits.y, turn), quants_of<FORMAT>(tile.z, bits.z, turn),
                          quants_of<FORMAT>(tile.w, bits.w, turn));
    for (int i = 0; i < 2; i++) {
        u32 first = bytes >> 8 * i, second = bytes >> (16 + 8 * i);
        float d = from_half((u16)(ends.x >> 16 * i));
        if (FORMAT == Q6_K) n.first[i] = d * (float)(signed char)first, n.second[i] = d * (float)(signed char)second;
        else n.first[i] = d * (float)(first & 255), n.second[i] = from_half((u16)(ends.y >> 16 * i)) * (float)(second & 255);
    }
    return n;
}

/* Scales and sums of the rows that are both columns of a lane. */
template <int FORMAT>
__device__ __forceinline__ void add_block(float (&sums)[4], const Block &n, u32 b0, u32 b1, float scale0, float scale1, float sum0, float sum1) {
    int c[4];
    if (FORMAT == Q6_K) { /* lanes 0 and 1 of four have the first 16 inputs */
        const bool is_first = threadIdx.x % 4 < 2;
#pragma unroll
        for (int which = 0; which < 2; which++) {
            multiply_bytes(c, n.quants.x, n.quants.y, n.quants.z, n.quants.w, is_first == !which ? b0 : 0, is_first == !which ? b1 : 0);
            for (int i = 0; i < 2; i++) {
                float scale = which ? n.second[i] : n.first[i];
                sums[2 * i] = fmaf(scale * scale0, (float)c[2 * i], sums[2 * i]);
                sums[2 * i + 1] = fmaf(scale * scale1, (float)c[2 * i + 1], sums[2 * i + 1]);
            }
        }
        return;
    }
    multiply_bytes(c, n.quants.x, n.quants.y, n.quants.z, n.quants.w, b0, b1);
    for (int i = 0; i < 2; i++) {
        sums[2 * i] = fmaf(-n.second[i], sum0, fmaf(n.first[i] * scale0, (float)c[2 * i], sums[2 * i]));
        sums[2 * i + 1] = fmaf(-n.second[i], sum1, fmaf(n.first[i] * scale1, (float)c[2 * i + 1], sums[2 * i + 1]));
    }
}

/* The units of one of the WARPS shares of a split. */
__device__ __forceinline__ void set_share(Place &at, const Matrix &m, int share, int split, int splits) {
    int part = split * WARPS + share, parts = splits * WARPS;
    at.from = (int)((i64)m.units * part / parts), at.to = (int)((i64)m.units * (part + 1) / parts);
}

/* Leaves a warp's sums for sum_up. `found`: a float4 for each share, strip, tile and lane. */
template <int STRIPS, int TILES> __device__ __forceinline__ void leave(const float (&sums)[STRIPS][TILES][4], float4 *found) {
#pragma unroll
    for (int s = 0; s < STRIPS; s++)
#pragma unroll
        for (int t = 0; t < TILES; t++)
            found[((threadIdx.x / WARP * STRIPS + s) * TILES + t) * WARP + threadIdx.x % WARP] =
                make_float4(sums[s][t][0], sums[s][t][1], sums[s][t][2], sums[s][t][3]);
}

/* Adds the shares up: out [rows, out_stride], outputs of STRIPS strips from at.strip; or, GATED, silu of one strip times the next, as bfloat16
 * into `gated`. */
template <int STRIPS, int TILES, bool GATED>
__device__ __forceinline__ void sum_up(const float4 *found, const Matrix &m, const Place &at, float *out, int out_stride, const Rows &gated) {
    __syncthreads();
    for (int i = threadIdx.x; i < STRIPS * TILES * WARP / (GATED ? 2 : 1); i += blockDim.x) {
        int strip = i / (TILES * WARP) * (GATED ? 2 : 1), tile = i / WARP % TILES, from = i % WARP;
        float total[2][4];
        for (int which = 0; which < (GATED ? 2 : 1); which++) {
            for (int j = 0; j < 4; j++) total[which][j] = 0;
            for (int share = 0; share < WARPS; share++) {
                float4 v = found[((share * STRIPS + strip + which) * TILES + tile) * WARP + from];
                total[which][0] += v.x, total[which][1] += v.y, total[which][2] += v.z, total[which][3] += v.w;
            }
        }
        for (int j = 0; j < 4; j++) {
            int row = at.row + tile * 8 + from % 4 * 2 + j % 2, output = (at.strip + strip) * 16 + from / 4 + j / 2 * 8;
            if (row >= at.end || output >= m.outputs) continue;
            i64 to = at.order ? at.order[row] : row;
            if (GATED) {
                int place = (at.strip + strip) / 2 * 16 + from / 4 + j / 2 * 8;
                gated.halves[to * gated.halves_stride + place] = (u16)to_halves(silu(total[0][j]) * total[1][j], 0);
            } else out[to * out_stride + output] = total[0][j];
        }
    }
}
#endif
