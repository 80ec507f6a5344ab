/* Products of 9 rows and more with quantised weights, those of several sequences: what is added to an output of a row is what products.cu adds,
 * in the same order.
 *
 * A block has two strips and TILES tiles of 8 rows; a warp, of its share of the inputs, all of them. Weights come through shared memory, STAGES
 * units on their way at once, where a warp reads what it has copied itself: none waits for another. */
#include "products.cuh"

#define STRIPS 2
#define STAGES 2

/* What a strip has of a unit, in pieces of 16 bytes: 4 tiles, then scales and high bits, then ends. */
template <int FORMAT> struct Unit {
    static const int TURNS = FORMAT == Q8_0 ? 4 : 8; /* of 32 inputs */
    static const int REST = pieces_of(FORMAT), ENDS = FORMAT == Q8_0 ? 0 : 4, PIECES = 4 * WARP + REST + ENDS;
};

/* Begins to copy a unit of both strips. */
template <int FORMAT> __device__ __forceinline__ void fetch(uint4 *to, const Matrix &m, const Place &at, int unit) {
    typedef Unit<FORMAT> U;
    const int lane = threadIdx.x % WARP;
    if (unit < at.to)
#pragma unroll
        for (int s = 0; s < STRIPS; s++) {
            const u32 place = (u32)(at.strip + strip_of(m, at, s)) * (u32)m.units + unit;
            uint4 *own = to + s * U::PIECES + lane;
#pragma unroll
            for (int i = 0; i < 4; i++) copy_async(own + i * WARP, m.tiles + (place * 4 + i) * WARP + lane, true);
#pragma unroll
            for (int i = lane; i < U::REST; i += WARP) copy_async(own - lane + 4 * WARP + i, m.scales + place * U::REST + i, true);
            if (lane < U::ENDS) copy_async(own + 4 * WARP + U::REST, (const uint4 *)m.ends + place * U::ENDS + lane, true);
        }
    end_of_copies();
}

/* What a lane has of a tile's rows in a turn: 8 quants of one; scales and sums of the two that are its columns. */
struct Columns {
    uint2 quants;
    float scales[2], sums[2];
};
template <int FORMAT> __device__ __forceinline__ Columns columns(const Rows &x, int row, int turn) {
    const int lane = threadIdx.x % WARP, per_row = x.quants_stride / QUANT, scale = (row + lane % 4 * 2) * per_row + turn;
    Columns c;
    c.quants = *(const uint2 *)(x.quants + (row + lane / 4) * x.quants_stride + turn / 4 * 128 + lane % 4 * 32 + turn % 4 * 8);
    for (int i = 0; i < 2; i++) {
        c.scales[i] = x.scales[scale + i * per_row];
        if (FORMAT == Q4_K || FORMAT == Q5_K) c.sums[i] = x.sums[scale + i * per_row];
    }
    return c;
}

/* What a lane has of a strip in a turn. */
template <int FORMAT> struct Weights {
    Block n;
    __device__ __forceinline__ void load(const uint4 *unit, int turn) {
        const uint4 *rest = unit + 4 * WARP, *bits = rest + SCALES + threadIdx.x % WARP;
        const int group = threadIdx.x % WARP / 4;
        n = block_of<FORMAT>(unit[turn / 2 * WARP + threadIdx.x % WARP], FORMAT == Q4_K ? uint4{} : bits[FORMAT == Q6_K ? turn / 4 * WARP : 0], turn,
                             ((const u32 *)(rest + group * 2))[turn], ((const uint2 *)(rest + Unit<FORMAT>::REST))[group]);
    }
    __device__ __forceinline__ void add(float (&sums)[4], const Columns &c) const {
        add_block<FORMAT>(sums, n, c.quants.x, c.quants.y, c.scales[0], c.scales[1], c.sums[0], c.sums[1]);
    }
};
template <> struct Weights<Q8_0> {
    uint4 quants;
    u32 scales;
    __device__ __forceinline__ void load(const uint4 *unit, int turn) {
        quants = unit[turn * WARP + threadIdx.x % WARP];
        scales = ((const u32 *)(unit + 4 * WARP + threadIdx.x % WARP / 4))[turn];
    }
    __device__ __forceinline__ void add(float (&sums)[4], const Columns &c) const {
        add_q8(sums, quants, c.quants.x, c.quants.y, scales, c.scales[0], c.scales[1]);
    }
};

template <int FORMAT, int TILES>
__device__ __forceinline__ void batch(const Matrix &m, const Rows &x, Place at, float *out, int out_stride, const Ahead &ahead) {
    typedef Unit<FORMAT> U;
    SHARED(uint4, shared);
    const int share = threadIdx.x / WARP;
    uint4 *own = shared + share * STAGES * STRIPS * U::PIECES;
    float sums[STRIPS][TILES][4];
    clear(sums);
    set_share(at, m, share, blockIdx.y, gridDim.y);
    for (int i = 0; i < STAGES; i++) fetch<FORMAT>(own + i * STRIPS * U::PIECES, m, at, at.from + i);
    begin(ahead);
    const int last = max(at.to * U::TURNS - 1, 0);
    Columns next = columns<FORMAT>(x, at.row, min(at.from * U::TURNS, last));
    for (int unit = at.from; unit < at.to; unit++) {
        uint4 *stage = own + (unit - at.from) % STAGES * STRIPS * U::PIECES;
        wait_for_copies<STAGES - 1>();
        __syncwarp();
#pragma unroll 1
        for (int i = 0; i < U::TURNS; i++) {
            Weights<FORMAT> weights[STRIPS];
#pragma unroll
            for (int s = 0; s < STRIPS; s++) weights[s].load(stage + s * U::PIECES, i);
#pragma unroll
            for (int t = 0; t < TILES; t++) { /* while one tile's columns are used, the next one's come */
                const Columns now = next;
                next = columns<FORMAT>(x, at.row + (t + 1) % TILES * 8, min(unit * U::TURNS + i + (t + 1) / TILES, last));
#pragma unroll
                for (int s = 0; s < STRIPS; s++) weights[s].add(sums[s][t], now);
            }
        }
        __syncwarp();
        fetch<FORMAT>(stage, m, at, unit + STAGES);
    }
    read_on(ahead);
    wait_for_copies<0>();
    __syncthreads();
    leave<STRIPS, TILES>(sums, (float4 *)shared);
    sum_up<STRIPS, TILES, false>((const float4 *)shared, m, at, out, out_stride, {});
}

/* Grid: (pairs of strips * groups of 8 TILES rows, splits); what a split finds goes into a part of its own of `out`, [splits, rows, out_stride].
 * x has whole groups of rows, though they mean nothing from `rows` on. Blocks of the same strips and other rows follow each other, and find the
 * weights in the second-level cache. Shared: the larger of WARPS times STAGES units of two strips, and what sum_up wants. */
#define BATCH(NAME, FORMAT, TILES)                                                                                                          \
    extern "C" __global__ void __launch_bounds__(WARPS *WARP, 2)                                                                            \
        NAME(Matrix m, Rows x, float *out, int out_stride, Rows, int rows, Ahead ahead) {                                                   \
        batch<FORMAT, TILES>(m, x, place_of<STRIPS, TILES>(rows), out + (i64)blockIdx.y * rows * out_stride, out_stride, ahead);            \
    }                                                                                                                                       \
    EXPORT(NAME)
BATCH(batch_q8_0_2, Q8_0, 2)
BATCH(batch_q8_0_4, Q8_0, 4)
BATCH(batch_q4_k_2, Q4_K, 2)
BATCH(batch_q4_k_4, Q4_K, 4)
BATCH(batch_q5_k_2, Q5_K, 2) /* of four tiles would have too many registers */
BATCH(batch_q6_k_2, Q6_K, 2)
