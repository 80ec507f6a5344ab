/* The attention of a chunk of one sequence, as attend_chunk of attention.cu, by the matrix instructions of four warps together (wgmma: compute
 * capability 9.0), for heads of 128 or 256 dimensions. */
#include "hopper.cuh"
#include "pages.cuh"

#define HALF 128 /* threads: those of one half compute, 16 pairs of row and head a warp; the others copy pages */
#define PAGES 2  /* that are there at once */
#define TILE (64 * 128) /* bytes of 64 rows, of 64 values each, as an operand of a matrix instruction */
#define TILES (HEAD_DIM / 64)
#define PAGE_BYTES (2 * TILES * TILE)

#if HEAD_DIM == 128 || HEAD_DIM == 256
/* Begins to copy rows of `pieces` times 16 bytes, `stride` values apart, as operands of 64 rows; zeros where there are none. By a half. */
template <class Is_there> __device__ __forceinline__ void copy_operands(u8 *to, const u16 *from, int rows, int pieces, Is_there is_there) {
    for (int i = threadIdx.x % HALF; i < rows * pieces; i += HALF) {
        const int row = i / pieces, piece = i % pieces;
        copy_async(to + (piece / 8 * (i64)rows + row) * 128 + (piece % 8 ^ row % 8) * 16, from + (i64)row * pieces * 8 + piece * 8, is_there(row, piece));
    }
}

/* Page after page from the first on. Grid: (groups of CHUNK_PAIRS, KV_HEADS); what is found is one part. Shared: the queries' TILES, PAGES pages,
 * their barriers, and 1024 bytes to begin at a multiple of so many. */
extern "C" __global__ void __launch_bounds__(2 * HALF, 1) hopper_attend(const Span *spans, int layer, const u16 *queries, float *sums, float2 *ends) {
    SHARED(u8, shared);
    u8 *own_queries = shared + -in_shared(shared) % 1024, *staged = own_queries + TILES * TILE;
    u64 *full = (u64 *)(staged + PAGES * PAGE_BYTES), *empty = full + PAGES;
    const Span &s = spans[0];
    const int kv = blockIdx.y, first_pair = blockIdx.x * CHUNK_PAIRS, num_pairs = s.num_rows * GROUP;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, quarter = lane % 4;
    if (first_pair >= num_pairs) return;
    const i64 last = s.position + (min(first_pair + CHUNK_PAIRS, num_pairs) - 1) / GROUP; /* position that any of the rows sees */
    const int pages = (int)(last / PAGE) + 1;
    if (threadIdx.x == 0)
        for (int i = 0; i < PAGES; i++) make_barrier(full + i, HALF), make_barrier(empty + i, HALF / WARP);
    wait_for_previous();
    let_next_begin();
    if (threadIdx.x < HALF)
        for (int i = threadIdx.x; i < CHUNK_PAIRS * TILES * 8; i += HALF) {
            const int row = i / (TILES * 8), piece = i % (TILES * 8), pair = min(first_pair + row, num_pairs - 1);
            const u16 *from = queries + ((i64)(s.first_row + pair / GROUP) * HEADS + kv * GROUP + pair % GROUP) * HEAD_DIM;
            copy_async(own_queries + piece / 8 * TILE + row * 128 + (piece % 8 ^ row % 8) * 16, from + piece * 8, true);
        }
    end_of_copies();
    wait_for_copies<0>();
    show_shared();
    __syncthreads();
    if (threadIdx.x >= HALF) {
        for (int page = 0; page < pages; page++) {
            const int slot = page % PAGES;
            const i64 begin = (i64)page * PAGE, at = page_at(s, layer, begin, kv);
            u8 *place = staged + slot * PAGE_BYTES;
            if (page >= PAGES) wait_for(empty + slot, (page / PAGES - 1) % 2);
            copy_operands(place, s.keys + at, PAGE, TILES * 8, [&](int row, int) { return begin + row <= last; });
            copy_operands(place + TILES * TILE, s.values + at, HEAD_DIM, 8, [&](int, int piece) { return begin + piece * 8 <= last; });
            end_of_copies();
            if (page) {
                wait_for_copies<1>();
                show_shared();
                arrive(full + (page - 1) % PAGES);
            }
        }
        wait_for_copies<0>();
        show_shared();
        arrive(full + (pages - 1) % PAGES);
        return;
    }
    i64 seen[2]; /* by the pairs of this thread: positions up to */
#pragma unroll
    for (int i = 0; i < 2; i++) seen[i] = s.position + (first_pair + warp * 16 + lane / 4 + 8 * i) / GROUP;
    float out[HEAD_DIM / 2], most[2] = {-INFINITE, -INFINITE}, total[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; i++) out[i] = 0;
#pragma unroll 1
    for (int page = 0; page < pages; page++) {
        const u8 *keys = staged + page % PAGES * PAGE_BYTES, *values = keys + TILES * TILE;
        float found[32];
#pragma unroll
        for (int i = 0; i < 32; i++) found[i] = 0;
        wait_for(full + page % PAGES, page / PAGES % 2);
        begin_products();
#pragma unroll
        for (int step = 0; step < TILES * 4; step++) multiply_both(found, own_queries + step / 4 * TILE, keys + step / 4 * TILE, step % 4);
        end_of_products();
        wait_for_products();
        float here[2] = {-INFINITE, -INFINITE}, scale[2];
#pragma unroll
        for (int i = 0; i < 32; i++) {
            const bool is_seen = (i64)page * PAGE + i / 4 * 8 + quarter * 2 + i % 2 <= seen[i / 2 % 2];
            found[i] = is_seen ? found[i] * (1.0f / sqrtf((float)HEAD_DIM)) : -INFINITE;
            here[i / 2 % 2] = fmaxf(here[i / 2 % 2], found[i]);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float both = fmaxf(most[i], warp_max(here[i], 4));
            scale[i] = __expf(most[i] - both); /* 0 at first: position 0 is seen by all */
            most[i] = both;
            total[i] *= scale[i];
        }
        u32 weights[16]; /* of 16 positions as an operand: rows g and g + 8 of the first 8, then of the others */
#pragma unroll
        for (int i = 0; i < 16; i++) {
            weights[i] = to_halves(__expf(found[2 * i] - most[i % 2]), __expf(found[2 * i + 1] - most[i % 2]));
            total[i % 2] += low_half(weights[i]) + high_half(weights[i]); /* as they are multiplied with */
        }
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; i++) out[i] *= scale[i / 2 % 2];
        begin_products();
#pragma unroll
        for (int step = 0; step < 4; step++)
            multiply_rows<HEAD_DIM>(out, make_uint4(weights[4 * step], weights[4 * step + 1], weights[4 * step + 2], weights[4 * step + 3]), values, step);
        end_of_products();
        wait_for_products();
        __syncwarp();
        if (lane == 0) arrive(empty + page % PAGES);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        total[i] = warp_sum(total[i], 4);
        const int pair = first_pair + warp * 16 + lane / 4 + 8 * i;
        if (pair >= num_pairs) continue;
        const i64 place = (i64)(s.first_row + pair / GROUP) * HEADS + kv * GROUP + pair % GROUP;
#pragma unroll
        for (int t = 0; t < HEAD_DIM / 8; t++)
            *(float2 *)(sums + place * HEAD_DIM + t * 8 + quarter * 2) = make_float2(out[4 * t + 2 * i], out[4 * t + 2 * i + 1]);
        if (quarter == 0) ends[place] = make_float2(most[i], total[i]);
    }
}
EXPORT(hopper_attend)
#endif
