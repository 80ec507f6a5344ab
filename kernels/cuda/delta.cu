/* Gated delta net: the convolution, the gates and the recurrence of all rows of a sequence in one kernel, the state in registers.
 * (Yang et al. 2024, arXiv:2412.06464; formulas of Hugging Face's modeling_qwen3_5.py.)
 *
 * A block has COLUMNS columns of one head's state, four threads each: columns know nothing of each other, so that a head can be many blocks.
 * Rows of the log that were accepted come first, with the same operations in the same order as when they were verified; the state they lead
 * to is the new base, and is written then. Sizes: KEY_DIM, VALUE_DIM, KEY_HEADS, VALUE_HEADS, IS_TILED, CONV_WIDTH, NUM_DELTA,
 * COLUMNS. */
#include "forerun.cuh"

#define ROWS_AT_ONCE 8
#define KEYS (KEY_HEADS * KEY_DIM)
#define CHANNELS (2 * KEYS + VALUE_HEADS * VALUE_DIM)
#define WINDOW (CONV_WIDTH - 1)
#define VECTORS (KEY_DIM / 16) /* of 4 keys, that a thread has of its column */

/* Grid: (Hv * VALUE_DIM / COLUMNS, spans); 4 COLUMNS threads. x, b, a [rows, their stride], out [rows, Hv, dv]; conv [taps, channels]. A span
 * without rows moves its base over its log. */
extern "C" __global__ void __launch_bounds__(4 * COLUMNS, 4)
    delta(const Span *spans, int layer, const float *x, int stride, const float *b, int b_stride, const float *a, int a_stride, const float *conv,
          const float *log_decay, const float *dt_bias, float *out) {
    __shared__ __align__(16) float q[ROWS_AT_ONCE][KEY_DIM], k[ROWS_AT_ONCE][KEY_DIM], v[ROWS_AT_ONCE][COLUMNS];
    __shared__ float decays[ROWS_AT_ONCE], betas[ROWS_AT_ONCE];
    __shared__ float *sources[WINDOW + ROWS_AT_ONCE], *kept[ROWS_AT_ONCE]; /* of columns, from the window on; where new ones go */
    const Span &s = spans[blockIdx.y];
    const int splits = VALUE_DIM / COLUMNS, head = blockIdx.x / splits, first_column = blockIdx.x % splits * COLUMNS;
    const int column = threadIdx.x / 4, part = threadIdx.x % 4, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int key_head = IS_TILED ? head % KEY_HEADS : head / (VALUE_HEADS / KEY_HEADS);
    const bool has_key_head = first_column == 0 && (IS_TILED ? head < KEY_HEADS : head % (VALUE_HEADS / KEY_HEADS) == 0);
    const i64 start = s.store == LOG ? s.base : s.position, layer_size = (i64)VALUE_HEADS * VALUE_DIM * KEY_DIM;
    const int replayed = (int)(s.position - start), rows = replayed + s.num_rows;
    const i64 own = (i64)layer * layer_size + ((i64)head * VALUE_DIM + first_column + column) * KEY_DIM + part * 4, slot = NUM_DELTA * layer_size;
    float *base = s.states + own + start % s.state_slots * slot; /* a log has one slot */
    if (rows == 0) return;
    float4 state[VECTORS];
#pragma unroll
    for (int j = 0; j < VECTORS; j++) state[j] = *(const float4 *)(base + j * 16);
    wait_for_previous();
    let_next_begin();
    for (int block = 0; block < rows; block += ROWS_AT_ONCE) {
        int count = min(ROWS_AT_ONCE, rows - block);
        __syncthreads();
        if (threadIdx.x < WINDOW + count) { /* a column is of the log, of the rows that are being computed, or before the first: null */
            i64 position = start + block + (int)threadIdx.x - WINDOW;
            float *slot = s.columns + ((i64)layer * s.column_slots + (position + s.column_slots) % s.column_slots) * CHANNELS;
            float *row = (float *)x + (s.first_row + position - s.position) * stride;
            sources[threadIdx.x] = position < 0 ? nullptr : position < s.position ? slot : row;
            if (threadIdx.x >= WINDOW) kept[threadIdx.x - WINDOW] = s.store != CHUNK && position >= s.position ? slot : nullptr;
        }
        __syncthreads();
        for (int which = threadIdx.x; which < 2 * KEY_DIM + COLUMNS; which += blockDim.x) {
            int channel = which < KEY_DIM       ? key_head * KEY_DIM + which
                          : which < 2 * KEY_DIM ? KEYS + key_head * KEY_DIM + which - KEY_DIM
                                                : 2 * KEYS + head * VALUE_DIM + first_column + which - 2 * KEY_DIM;
            float columns[WINDOW + ROWS_AT_ONCE], taps[CONV_WIDTH];
#pragma unroll
            for (int i = 0; i < WINDOW + ROWS_AT_ONCE; i++) columns[i] = i < WINDOW + count && sources[i] ? sources[i][channel] : 0.0f;
#pragma unroll
            for (int tap = 0; tap < CONV_WIDTH; tap++) taps[tap] = conv[tap * CHANNELS + channel];
#pragma unroll
            for (int t = 0; t < ROWS_AT_ONCE; t++) {
                if (t >= count) break;
                float sum = 0;
#pragma unroll
                for (int tap = 0; tap < CONV_WIDTH; tap++) sum = fmaf(columns[t + tap], taps[tap], sum);
                float value = silu(sum);
                if (which < KEY_DIM) q[t][which] = value;
                else if (which < 2 * KEY_DIM) k[t][which - KEY_DIM] = value;
                else v[t][which - 2 * KEY_DIM] = value;
                if (kept[t] && (which >= 2 * KEY_DIM || has_key_head)) kept[t][channel] = columns[t + WINDOW];
            }
        }
        if (blockDim.x - 1 - threadIdx.x < count) { /* the last threads, which have the fewest channels */
            int t = blockDim.x - 1 - threadIdx.x;
            i64 position = start + block + t;
            float *gates = s.gates + ((i64)layer * s.column_slots + position % s.column_slots) * 2 * VALUE_HEADS;
            float open, rate;
            if (block + t < replayed) open = gates[head], rate = gates[VALUE_HEADS + head];
            else {
                i64 row = s.first_row + block + t - replayed;
                open = b[row * b_stride + head], rate = a[row * a_stride + head];
                if (s.store != CHUNK && first_column == 0) gates[head] = open, gates[VALUE_HEADS + head] = rate;
            }
            float y = rate + dt_bias[head];
            decays[t] = expf(log_decay[head] * (fmaxf(y, 0.0f) + log1pf(expf(-fabsf(y)))));
            betas[t] = sigmoid(open);
        }
        __syncthreads();
        for (int i = warp; i < 2 * count; i += blockDim.x / WARP) {
            float *vector = i % 2 ? k[i / 2] : q[i / 2], square = 0;
            for (int j = lane; j < KEY_DIM; j += WARP) square = fmaf(vector[j], vector[j], square);
            float scale = (i % 2 ? 1.0f : 1.0f / sqrtf((float)KEY_DIM)) / sqrtf(warp_sum(square) + 1e-6f);
            for (int j = lane; j < KEY_DIM; j += WARP) vector[j] *= scale;
        }
        __syncthreads();
        for (int t = 0; t < count; t++) {
            if (block + t == replayed && replayed > 0) {
#pragma unroll
                for (int j = 0; j < VECTORS; j++) *(float4 *)(base + j * 16) = state[j];
            }
            const float4 *key = (const float4 *)(k[t] + part * 4), *query = (const float4 *)(q[t] + part * 4);
            float decay = decays[t];
            float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
            for (int j = 0; j < VECTORS; j++) {
                float4 by = key[j * 4];
                sum.x = fmaf(by.x, state[j].x, sum.x), sum.y = fmaf(by.y, state[j].y, sum.y);
                sum.z = fmaf(by.z, state[j].z, sum.z), sum.w = fmaf(by.w, state[j].w, sum.w);
            }
            float write = betas[t] * fmaf(-decay, warp_sum((sum.x + sum.y) + (sum.z + sum.w), 4), v[t][column]);
            sum = make_float4(0, 0, 0, 0);
#pragma unroll
            for (int j = 0; j < VECTORS; j++) {
                float4 by = key[j * 4], of = query[j * 4];
                state[j].x = fmaf(by.x, write, state[j].x * decay), state[j].y = fmaf(by.y, write, state[j].y * decay);
                state[j].z = fmaf(by.z, write, state[j].z * decay), state[j].w = fmaf(by.w, write, state[j].w * decay);
                sum.x = fmaf(of.x, state[j].x, sum.x), sum.y = fmaf(of.y, state[j].y, sum.y);
                sum.z = fmaf(of.z, state[j].z, sum.z), sum.w = fmaf(of.w, state[j].w, sum.w);
            }
            float read = warp_sum((sum.x + sum.y) + (sum.z + sum.w), 4);
            if (block + t < replayed) continue;
            i64 row = s.first_row + block + t - replayed;
            if (part == 0) out[row * VALUE_HEADS * VALUE_DIM + head * VALUE_DIM + first_column + column] = read;
            if (s.store == RING) {
                float *to = s.states + own + (start + block + t + 1) % s.state_slots * slot;
#pragma unroll
                for (int j = 0; j < VECTORS; j++) *(float4 *)(to + j * 16) = state[j];
            }
        }
    }
    if (s.store == CHUNK || s.num_rows == 0) {
        float *to = s.states + own + (s.position + s.num_rows) % s.state_slots * slot;
#pragma unroll
        for (int j = 0; j < VECTORS; j++) *(float4 *)(to + j * 16) = state[j];
    }
}
EXPORT(delta)

/* The window after a chunk: its last columns. While a chunk is computed its rows may be more than the slots. Grid: spans. */
extern "C" __global__ void keep_columns(const Span *spans, int layer, const float *x, int stride) {
    wait_for_previous();
    let_next_begin();
    const Span &s = spans[blockIdx.x];
    int count = min(CONV_WIDTH - 1, s.num_rows);
    for (int i = threadIdx.x; i < count * CHANNELS; i += blockDim.x) {
        int row = s.num_rows - count + i / CHANNELS;
        i64 slot = (i64)layer * s.column_slots + (s.position + row) % s.column_slots;
        s.columns[slot * CHANNELS + i % CHANNELS] = x[(i64)(s.first_row + row) * stride + i % CHANNELS];
    }
}
EXPORT(keep_columns)
