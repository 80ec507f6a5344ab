/* Products of many rows where four warps have matrix instructions in common (wgmma: compute capability 9.0), otherwise those of wide.cu.
 *
 * A block has 8 strips of outputs and ROWS rows. One warp copies weights and rows into shared memory, STAGES times 64 inputs on their way at
 * once; 8 others, each with a strip of its own, whose weights are operands in registers, multiply them with all rows. Rows lie as the
 * instructions read them (place_of_half): what a block wants of 64 inputs is one piece of memory.
 *
 * What a row's result is made of is added in the order of the inputs, in as many parts as the grid has splits. */
#include "hopper.cuh"
#include "wide.cuh"

#define STAGES 4
#define THREADS 384 /* three times four warps: the last four have one that copies, and leave registers to the others */

/* out [rows, out_stride]; or, IS_GATED, silu of a strip times another, as bfloat16 into `gated`. Both are next to each other (`apart` 1), or all
 * of the former before all of the latter (`apart`: how many). */
template <int FORMAT, int ROWS, bool IS_GATED>
__device__ __forceinline__ void together(const Matrix &m, const Rows &x, float *out, int out_stride, const Rows &gated, int rows, int apart) {
    typedef Weights<FORMAT> W;
    const int STRIP_BYTES = W::TILES * 512, WEIGHT_BYTES = BLOCK_STRIPS * STRIP_BYTES, STAGE_BYTES = WEIGHT_BYTES + 128 * ROWS;
    SHARED(u8, shared);
    u8 *staged = shared + -in_shared(shared) % 1024;
    u64 *full = (u64 *)(staged + STAGES * STAGE_BYTES), *empty = full + STAGES;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, strips = (m.outputs + 15) / 16, groups = (rows + ROWS - 1) / ROWS;
    const int first_strip = (int)(blockIdx.x / groups) * BLOCK_STRIPS, first_row = (int)(blockIdx.x % groups) * ROWS;
    auto strip_of = [&](int warp) { /* or the last, where there is none */
        const int pair = min(first_strip / 2 + warp / 2, strips / 2 - 1);
        return !IS_GATED ? min(first_strip + warp, strips - 1) : apart == 1 ? 2 * pair + warp % 2 : pair + warp % 2 * apart;
    };
    const int stages = (x.halves_stride + STAGE_INPUTS - 1) / STAGE_INPUTS;
    const int from = (int)((i64)stages * blockIdx.y / gridDim.y), to = (int)((i64)stages * (blockIdx.y + 1) / gridDim.y);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) make_barrier(full + i, 1), make_barrier(empty + i, WARPS);
        show_shared();
    }
    __syncthreads();
    wait_for_previous();
    let_next_begin();
    if (warp >= WARPS) {
        give_registers();
        if (warp > WARPS) return;
        const int tiles_of_strip = m.units * (FORMAT == BF16 ? 2 : 4);
        const uint4 *own = m.tiles + (i64)strip_of(lane % BLOCK_STRIPS) * tiles_of_strip * WARP;
        const u16 *own_rows = x.halves + ((i64)first_row + lane % 8 * (ROWS / 8)) * STAGE_INPUTS;
        for (int stage = from; stage < to; stage++) {
            const int turn = (stage - from) / STAGES, slot = (stage - from) % STAGES, bytes = 512 * min(W::TILES, tiles_of_strip - stage * W::TILES);
            u8 *place = staged + slot * STAGE_BYTES;
            if (turn) wait_for(empty + slot, (turn - 1) % 2);
            if (lane == 0) arrive_and_expect(full + slot, BLOCK_STRIPS * bytes + 128 * ROWS);
            __syncwarp();
            if (lane < 8) copy_piece(place + lane * STRIP_BYTES, own + (i64)stage * W::TILES * WARP, bytes, full + slot);
            else if (lane < 16)
                copy_piece(place + WEIGHT_BYTES + lane % 8 * (ROWS / 8) * 128, own_rows + (i64)stage * x.halves_rows * STAGE_INPUTS, ROWS / 8 * 128,
                           full + slot);
        }
        return;
    }
    take_registers();
    const int own_strip = strip_of(warp);
    W weights;
    float sums[ROWS / 2];
#pragma unroll
    for (int i = 0; i < ROWS / 2; i++) sums[i] = 0;
    weights.load(m, own_strip, min(from, to - 1));
    /* While four warps make operands, four others multiply. Nobody makes the next ones before his products have ended: they read registers while
     * they run, which the compiler would give to others. */
    for (int stage = from; stage < to; stage++) {
        const int slot = (stage - from) % STAGES;
        const u8 *place = staged + slot * STAGE_BYTES;
        uint4 a[2][2];
        wait_for(full + slot, (stage - from) / STAGES % 2);
#pragma unroll
        for (int unit = 0; unit < 2; unit++) weights.operands((const uint4 *)(place + warp * STRIP_BYTES) + lane, unit, a[unit]);
        if (FORMAT == BF16 && 2 * stage + 1 == m.units) a[1][0] = a[1][1] = make_uint4(0, 0, 0, 0);
        weights.load(m, own_strip, min(stage + 1, to - 1));
        begin_products();
#pragma unroll
        for (int step = 0; step < 4; step++) multiply_rows<ROWS>(sums, a[step / 2][step % 2], place + WEIGHT_BYTES, step);
        end_of_products();
        wait_for_products();
        __syncwarp();
        if (lane == 0) arrive(empty + slot);
    }
    const int place = lane / 4;
    if (IS_GATED) {
        /* Of two strips one warp takes the first half of the rows, the other the rest; what comes of it are 64 inputs of the next product, in
         * one piece. */
        const int HALF = ROWS / 16, is_second = warp % 2; /* tiles of half of the rows */
        float4 *found = (float4 *)staged + warp / 2 * 2 * HALF * WARP + lane;
        uint4 *whole = (uint4 *)staged + WARPS / 2 * (ROWS / 8) * WARP;
        uint4 *to = (uint4 *)gated.halves + ((i64)first_strip / 8 * gated.halves_rows + first_row) * 8;
        const Rows image = {(u16 *)whole, nullptr, nullptr, nullptr, nullptr, 0, 0, ROWS};
        u16 *own[4]; /* where the values of a tile go: of 8 rows further down in every tile */
#pragma unroll
        for (int i = 0; i < 4; i++) own[i] = place_of_half(image, lane % 4 * 2 + i % 2, warp / 2 * 16 + place + i / 2 * 8);
        meet_of_products();
#pragma unroll
        for (int t = 0; t < HALF; t++) {
            const int other = 4 * (t + HALF); /* chosen one by one: registers have no addresses */
            found[(is_second ? t : t + HALF) * WARP] =
                make_float4(is_second ? sums[4 * t] : sums[other], is_second ? sums[4 * t + 1] : sums[other + 1],
                            is_second ? sums[4 * t + 2] : sums[other + 2], is_second ? sums[4 * t + 3] : sums[other + 3]);
        }
        meet_of_products();
#pragma unroll
        for (int t = 0; t < HALF; t++) {
            const int tile = is_second ? t + HALF : t;
            const float4 its = found[tile * WARP];
            const float others[4] = {its.x, its.y, its.z, its.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float mine = is_second ? sums[4 * (t + HALF) + i] : sums[4 * t + i];
                const float value = is_second ? silu(others[i]) * mine : silu(mine) * others[i];
                own[i][tile * 8 * STAGE_INPUTS] = (u16)to_halves(first_strip + warp < strips ? value : 0.0f, 0);
            }
        }
        meet_of_products();
        for (int i = threadIdx.x; i < ROWS * 8; i += WARPS * WARP) to[i] = whole[i];
        return;
    }
    out += (i64)blockIdx.y * rows * out_stride;
#pragma unroll
    for (int t = 0; t < ROWS / 8; t++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = first_row + t * 8 + lane % 4 * 2 + i % 2, output = (first_strip + warp) * 16 + place + i / 2 * 8;
            if (row < rows && output < m.outputs) out[(i64)row * out_stride + output] = sums[4 * t + i];
        }
}

/* Grid: (groups of 8 strips * groups of ROWS rows, splits), each of which has a part of its own of `out`; x has whole groups of rows. Shared:
 * STAGES stages, their barriers, and 1024 bytes to begin at a multiple of so many. */
#define HOPPER(NAME, FORMAT, ROWS, IS_GATED)                                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                                                \
        NAME(Matrix m, Rows x, float *out, int out_stride, Rows gated, int rows, int apart) {                                               \
        together<FORMAT, ROWS, IS_GATED>(m, x, out, out_stride, gated, rows, apart);                                                        \
    }                                                                                                                                       \
    EXPORT(NAME)
HOPPER(hopper_bf16_128, BF16, 128, false)
HOPPER(hopper_bf16_256, BF16, 256, false)
HOPPER(hopper_q8_0_128, Q8_0, 128, false)
HOPPER(hopper_q8_0_256, Q8_0, 256, false)
HOPPER(hopper_q4_k_128, Q4_K, 128, false)
HOPPER(hopper_q4_k_256, Q4_K, 256, false)
HOPPER(hopper_q5_k_128, Q5_K, 128, false)
HOPPER(hopper_q5_k_256, Q5_K, 256, false)
HOPPER(hopper_q6_k_128, Q6_K, 128, false)
HOPPER(hopper_q6_k_256, Q6_K, 256, false)
HOPPER(hopper_gated_bf16_128, BF16, 128, true)
HOPPER(hopper_gated_bf16_256, BF16, 256, true)
HOPPER(hopper_gated_q8_0_128, Q8_0, 128, true)
HOPPER(hopper_gated_q8_0_256, Q8_0, 256, true)
HOPPER(hopper_gated_q4_k_128, Q4_K, 128, true)
HOPPER(hopper_gated_q4_k_256, Q4_K, 256, true)
HOPPER(hopper_gated_q5_k_128, Q5_K, 128, true)
HOPPER(hopper_gated_q5_k_256, Q5_K, 256, true)
HOPPER(hopper_gated_q6_k_128, Q6_K, 128, true)
HOPPER(hopper_gated_q6_k_256, Q6_K, 256, true)
