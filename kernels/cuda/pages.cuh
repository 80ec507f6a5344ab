/* Where keys and values are. Sizes: HEADS, KV_HEADS, HEAD_DIM. */
#ifndef FORERUN_PAGES_CUH
#define FORERUN_PAGES_CUH
#include "forerun.cuh"

#define GROUP (HEADS / KV_HEADS)
#define CHUNK_PAIRS 64 /* of row and head, that a block of a chunk's attention has */

/* Where the page of a position begins, of one head: of its keys [PAGE, HEAD_DIM], and of its values [HEAD_DIM, PAGE]. */
__device__ __forceinline__ i64 page_at(const Span &s, int layer, i64 position, int kv) {
    return (((i64)layer * s.num_pages + s.table[position / PAGE]) * KV_HEADS + kv) * PAGE * HEAD_DIM;
}
#endif
