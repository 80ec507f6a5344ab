/* Products of many rows, for chunks of a prompt. A block has 8 strips of outputs, a warp two of them and half of the block's rows; of experts,
 * which have few rows, one of them and all rows. Weights and rows come through shared memory, STAGES times 64 inputs on their way at once.
 *
 * What a row's result is made of is added in the order of the inputs (in as many parts as the grid has splits, which depends on the weights
 * alone), so a row's bits depend on nothing but the row. They are not those of products.cu. */
#include "wide.cuh"

#define STAGES 3

/* A block's part of a product: rows from `row` on of `rows`, a split of the inputs. In IS_GROUPED products row i is row order[i] of `out`, and
 * order[i] / divisor of x. */
struct Part {
    int strip, row, rows, split, splits;
    const int *order;
    int divisor;
};

/* out [rows, out_stride], outputs of 8 strips; or, IS_GATED, silu of one strip times the next, as bfloat16 into `gated`. */
template <int FORMAT, int ROWS, bool IS_GATED, bool IS_GROUPED>
__device__ __forceinline__ void wide(const Matrix &m, const Rows &x, float *out, int out_stride, const Rows &gated, const Part &at) {
    const int EACH = IS_GROUPED && !IS_GATED ? 1 : 2, TILES = ROWS / 8 / EACH, TOGETHER = IS_GROUPED ? 2 : 4; /* strips, tiles of 8 rows of a warp */
    const int STRIP_TILES = Weights<FORMAT>::TILES;
    const int PLANE = ROWS * 64 + 64, WEIGHT_BYTES = BLOCK_STRIPS * STRIP_TILES * 512; /* of one unit of all rows; planes begin at other banks */
    const int STAGE_BYTES = WEIGHT_BYTES + 2 * PLANE;
    SHARED(u8, staged);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, strips = (m.outputs + 15) / 16;
    const int own_strip = at.strip + warp * EACH % BLOCK_STRIPS, first_row = warp * EACH / BLOCK_STRIPS * TILES * 8;
    const int inputs = x.halves_stride, stages = (inputs + STAGE_INPUTS - 1) / STAGE_INPUTS;
    const int from = (int)((i64)stages * at.split / at.splits), to = (int)((i64)stages * (at.split + 1) / at.splits);
    Weights<FORMAT> weights[EACH];
#pragma unroll
    for (int s = 0; s < EACH; s++) weights[s].load(m, min(own_strip + s, strips - 1), from);
    float sums[EACH][TILES][4];
    clear(sums);

    const int piece = threadIdx.x % 8, tiles_of_strip = m.units * (FORMAT == BF16 ? 2 : 4); /* piece: of 8 inputs, of a row's 64 */
    auto fetch_weights = [&](int stage) {
        u8 *place = staged + stage % STAGES * STAGE_BYTES;
#pragma unroll 1
        for (int i = threadIdx.x; i < BLOCK_STRIPS * STRIP_TILES * WARP; i += WARPS * WARP) {
            int strip = min(at.strip + i / (STRIP_TILES * WARP), strips - 1), tile = stage * STRIP_TILES + i / WARP % STRIP_TILES;
            bool is_there = stage < to && tile < tiles_of_strip;
            copy_async(place + i * 16, m.tiles + (is_there ? ((i64)strip * tiles_of_strip + tile) * WARP + i % WARP : 0), is_there);
        }
    };
    auto fetch_rows = [&](int stage) {
        u8 *place = staged + stage % STAGES * STAGE_BYTES + WEIGHT_BYTES + piece / 4 * PLANE + piece % 4 * 16;
        int input = stage * STAGE_INPUTS + piece * 8;
#pragma unroll 1
        for (int row = threadIdx.x / 8; row < ROWS; row += WARPS * WARP / 8) {
            bool is_there = stage < to && at.row + row < at.rows && input < inputs;
            i64 of = !is_there ? 0 : IS_GROUPED ? at.order[at.row + row] / at.divisor : at.row + row;
            copy_async(place + row * 64, x.halves + (is_there ? of * x.halves_stride + input : 0), is_there);
        }
        end_of_copies();
    };
    for (int stage = from; stage < from + STAGES - 1; stage++) fetch_weights(stage);
    wait_for_previous();
    for (int stage = from; stage < from + STAGES - 1; stage++) fetch_rows(stage);
    for (int stage = from; stage < to; stage++) {
        wait_for_copies<STAGES - 2>();
        __syncthreads();
        fetch_weights(stage + STAGES - 1);
        fetch_rows(stage + STAGES - 1);
        const u8 *here = staged + stage % STAGES * STAGE_BYTES;
        const uint4 *tiles = (const uint4 *)here + (own_strip - at.strip) * STRIP_TILES * WARP + lane;
        const u8 *base = here + WEIGHT_BYTES + (first_row + lane / 4) * 64 + lane % 4 * 16;
#pragma unroll 1
        for (int unit = 0; unit < 2; unit++) {
            uint4 a[EACH][2];
#pragma unroll
            for (int s = 0; s < EACH; s++) {
                weights[s].operands(tiles + s * STRIP_TILES * WARP, unit, a[s]);
                if (unit == 1) weights[s].load(m, min(own_strip + s, strips - 1), min(stage + 1, to - 1));
            }
#pragma unroll
            for (int first = 0; first < TILES; first += TOGETHER) { /* what adds to one sum is far apart */
                if (IS_GROUPED && at.row + first_row + first * 8 >= at.rows) break; /* most experts have few rows */
                uint4 b[TOGETHER];
#pragma unroll
                for (int t = 0; t < TOGETHER; t++) b[t] = *(const uint4 *)(base + unit * PLANE + (first + t) * 8 * 64);
#pragma unroll
                for (int t = 0; t < TOGETHER; t++)
#pragma unroll
                    for (int s = 0; s < EACH; s++)
                        multiply(sums[s][first + t], a[s][0].x, a[s][0].y, a[s][0].z, a[s][0].w, b[t].x, b[t].y);
#pragma unroll
                for (int t = 0; t < TOGETHER; t++)
#pragma unroll
                    for (int s = 0; s < EACH; s++)
                        multiply(sums[s][first + t], a[s][1].x, a[s][1].y, a[s][1].z, a[s][1].w, b[t].z, b[t].w);
            }
        }
    }
    wait_for_copies<0>();
    let_next_begin();
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int row = at.row + first_row + t * 8 + lane % 4 * 2 + i % 2, place = lane / 4 + i / 2 * 8;
            if (row >= at.rows) continue;
            i64 of = IS_GROUPED ? at.order[row] : row;
            if (IS_GATED) {
                if (own_strip < strips)
                    gated.halves[of * gated.halves_stride + own_strip / 2 * 16 + place] = (u16)to_halves(silu(sums[0][t][i]) * sums[EACH - 1][t][i], 0);
            } else {
#pragma unroll
                for (int s = 0; s < EACH; s++)
                    if ((own_strip + s) * 16 + place < m.outputs) out[of * out_stride + (own_strip + s) * 16 + place] = sums[s][t][i];
            }
        }
}

/* Grid: (groups of 8 strips * groups of ROWS rows, splits), each of which has a part of its own of `out`; shared: STAGES stages. */
#define WIDE(NAME, FORMAT, ROWS, BLOCKS, IS_GATED)                                                                                            \
    extern "C" __global__ void __launch_bounds__(WARPS *WARP, BLOCKS)                                                                         \
        NAME(Matrix m, Rows x, float *out, int out_stride, Rows gated, int rows) {                                                           \
        int groups = (rows + ROWS - 1) / ROWS;                                                                                               \
        Part at = {(int)(blockIdx.x / groups) * BLOCK_STRIPS, (int)(blockIdx.x % groups) * ROWS, rows, (int)blockIdx.y, (int)gridDim.y,      \
                   nullptr, 1};                                                                                                              \
        wide<FORMAT, ROWS, IS_GATED, false>(m, x, out + (i64)blockIdx.y * rows * out_stride, out_stride, gated, at);                         \
    }                                                                                                                                        \
    EXPORT(NAME)
WIDE(wide_bf16_64, BF16, 64, 2, false)
WIDE(wide_bf16_128, BF16, 128, 2, false)
WIDE(wide_gated_bf16_64, BF16, 64, 2, true)
WIDE(wide_gated_bf16_128, BF16, 128, 2, true)
WIDE(wide_q8_0_64, Q8_0, 64, 1, false)
WIDE(wide_q8_0_128, Q8_0, 128, 1, false)
WIDE(wide_q8_0_256, Q8_0, 256, 1, false)
WIDE(wide_q4_k_64, Q4_K, 64, 1, false)
WIDE(wide_q4_k_128, Q4_K, 128, 1, false)
WIDE(wide_q4_k_256, Q4_K, 256, 1, false)
WIDE(wide_q5_k_64, Q5_K, 64, 1, false)
WIDE(wide_q5_k_128, Q5_K, 128, 1, false)
WIDE(wide_q5_k_256, Q5_K, 256, 1, false)
WIDE(wide_q6_k_64, Q6_K, 64, 1, false)
WIDE(wide_q6_k_128, Q6_K, 128, 1, false)
WIDE(wide_q6_k_256, Q6_K, 256, 1, false)

/* The experts, which lie one after another in m, each with `strips` strips: for the rows that use it. Those of expert e are order[starts[e]]
 * to order[starts[e + 1]]. Grid: (groups of 8 strips of one, experts); shared as above. */
#define WIDE_EXPERT(NAME, FORMAT, IS_GATED)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(WARPS *WARP, 2) NAME(Matrix m, Rows x, const int *starts, const int *order, int divisor,   \
                                                                      int strips, float *out, int out_stride, Rows gated) {                 \
        wait_for_previous();                                                                                                                 \
        const int expert = blockIdx.y, begin = starts[expert], rows = starts[expert + 1] - begin;                                            \
        skip_to<FORMAT>(m, expert, strips);                                                                                                  \
        for (int row = 0; row < rows; row += 64) {                                                                                           \
            Part at = {(int)blockIdx.x * BLOCK_STRIPS, row, rows, 0, 1, order + begin, divisor};                                             \
            wide<FORMAT, 64, IS_GATED, true>(m, x, out, out_stride, gated, at);                                                              \
            __syncthreads();                                                                                                                 \
        }                                                                                                                                    \
    }                                                                                                                                        \
    EXPORT(NAME)
WIDE_EXPERT(wide_expert_bf16, BF16, false)
WIDE_EXPERT(wide_expert_gated_bf16, BF16, true)
WIDE_EXPERT(wide_expert_q8_0, Q8_0, false)
WIDE_EXPERT(wide_expert_q4_k, Q4_K, false)
WIDE_EXPERT(wide_expert_q5_k, Q5_K, false)
WIDE_EXPERT(wide_expert_q6_k, Q6_K, false)

/* Which rows use each expert: order [rows * used], places in `routes` as products.cu has them, and starts [experts + 1]. One block; shared:
 * experts + 1 numbers. */
extern "C" __global__ void group_rows(const float *routes, int rows, int used, int experts, int *starts, int *order) {
    SHARED(int, next);
    wait_for_previous();
    let_next_begin();
    for (int i = threadIdx.x; i <= experts; i += blockDim.x) next[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < rows * used; i += blockDim.x) atomicAdd(&next[(int)routes[i / used * 2 * used + i % used] + 1], 1);
    __syncthreads();
    if (threadIdx.x < WARP) { /* how many before each: a lane has some of the experts, and what the lanes before it have */
        int each = (experts + WARP - 1) / WARP, first = min(each * (int)threadIdx.x, experts), last = min(first + each, experts), own = 0, before = 0;
        for (int i = first; i < last; i++) own += next[i + 1];
        for (int lane = 0; lane < WARP; lane++) {
            int count = __shfl_sync(ALL_LANES, own, lane);
            if (lane < (int)threadIdx.x) before += count;
        }
        for (int i = first; i < last; i++) next[i + 1] = before += next[i + 1];
    }
    __syncthreads();
    for (int i = threadIdx.x; i <= experts; i += blockDim.x) starts[i] = next[i];
    __syncthreads();
    for (int i = threadIdx.x; i < rows * used; i += blockDim.x) order[atomicAdd(&next[(int)routes[i / used * 2 * used + i % used]], 1)] = i;
}
EXPORT(group_rows)
