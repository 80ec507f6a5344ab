/* Gated delta net: the convolution, the gates and the recurrence of a few rows of a sequence in one kernel, the state in registers; of
 * chunks in two.
 * (Yang et al. 2024, arXiv:2412.06464; formulas of Hugging Face's modeling_qwen3_5.py.)
 *
 * A block has COLUMNS columns of one head's state, four threads for each, or eight: columns know nothing of each other, so that a head can be many
 * blocks.
 * Rows of the log that were accepted come first, with the same operations in the same order as when they were verified; the state they lead
 * to is the new base, and is written then. Sizes: KEY_DIM, VALUE_DIM, KEY_HEADS, VALUE_HEADS, IS_TILED, CONV_WIDTH, NUM_DELTA,
 * COLUMNS, CHUNK_COLUMNS. */
#include "forerun.cuh"

#define ROWS_AT_ONCE 8
#define KEYS (KEY_HEADS * KEY_DIM)
#define CHANNELS (2 * KEYS + VALUE_HEADS * VALUE_DIM)
#define WINDOW (CONV_WIDTH - 1)
/* A thread has EACH columns, APART from each other, and of each every LANES-th four keys. */
#define EACH (KEY_DIM % 32 ? 1 : 2)

template <int LANES, int APART> struct State {
    static const int VECTORS = KEY_DIM / LANES / 4;
    float4 keys[EACH][VECTORS];
    __device__ __forceinline__ void load(const float *from) {
#pragma unroll
        for (int i = 0; i < EACH; i++)
#pragma unroll
            for (int j = 0; j < VECTORS; j++) keys[i][j] = *(const float4 *)(from + i * APART * KEY_DIM + j * 4 * LANES);
    }
    __device__ __forceinline__ void store(float *to) const {
#pragma unroll
        for (int i = 0; i < EACH; i++)
#pragma unroll
            for (int j = 0; j < VECTORS; j++) *(float4 *)(to + i * APART * KEY_DIM + j * 4 * LANES) = keys[i][j];
    }
};

__device__ __forceinline__ float convolved(const float *columns, const float *taps) {
    float sum = 0;
#pragma unroll
    for (int tap = 0; tap < CONV_WIDTH; tap++) sum = fmaf(columns[tap], taps[tap], sum);
    return silu(sum);
}

/* exp(log_decay * softplus(rate)) */
__device__ __forceinline__ float decay_of(float log_decay, float rate) {
    return expf(log_decay * (fmaxf(rate, 0.0f) + log1pf(expf(-fabsf(rate)))));
}

/* What a thread reads of one row. */
template <int LANES, int APART> struct Row {
    static const int VECTORS = KEY_DIM / LANES / 4;
    float4 key[VECTORS], query[VECTORS];
    float values[EACH], decay, beta;
    __device__ __forceinline__ void load(const float *k, const float *q, const float *v, float its_decay, float its_beta) {
#pragma unroll
        for (int j = 0; j < VECTORS; j++) key[j] = *(const float4 *)(k + j * 4 * LANES), query[j] = *(const float4 *)(q + j * 4 * LANES);
#pragma unroll
        for (int i = 0; i < EACH; i++) values[i] = v[i * APART];
        decay = its_decay, beta = its_beta;
    }
};

__device__ __forceinline__ void add_product(float4 &sum, const float4 &a, const float4 &b) {
    sum.x = fmaf(a.x, b.x, sum.x), sum.y = fmaf(a.y, b.y, sum.y), sum.z = fmaf(a.z, b.z, sum.z), sum.w = fmaf(a.w, b.w, sum.w);
}
__device__ __forceinline__ float all_four(const float4 &v) { return (v.x + v.y) + (v.z + v.w); }

/* What the state says to a row's key, each thread its part. */
template <int LANES, int APART>
__device__ __forceinline__ void recall(const State<LANES, APART> &state, const Row<LANES, APART> &row, float (&found)[EACH]) {
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int j = 0; j < State<LANES, APART>::VECTORS; j++) add_product(sum, row.key[j], state.keys[i][j]);
        found[i] = all_four(sum);
    }
}

/* The state after a row whose recall is known in full, and what it then says to the query, each thread its part. */
template <int LANES, int APART>
__device__ __forceinline__ void advance(State<LANES, APART> &state, const Row<LANES, APART> &row, const float (&recalled)[EACH], float (&read)[EACH]) {
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        float write = row.beta * fmaf(-row.decay, recalled[i], row.values[i]);
        float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int j = 0; j < State<LANES, APART>::VECTORS; j++) {
            const float4 &by = row.key[j];
            float4 &s = state.keys[i][j];
            s.x = fmaf(by.x, write, s.x * row.decay), s.y = fmaf(by.y, write, s.y * row.decay);
            s.z = fmaf(by.z, write, s.z * row.decay), s.w = fmaf(by.w, write, s.w * row.decay);
            add_product(sum, row.query[j], s);
        }
        read[i] = all_four(sum);
    }
}

/* Sums over the threads of a column. */
template <int LANES> __device__ __forceinline__ void gather(float (&parts)[EACH]) {
#pragma unroll
    for (int i = 0; i < EACH; i++) parts[i] = warp_sum(parts[i], LANES);
}

/* Grid: (Hv * VALUE_DIM / COLUMNS, spans); 4 COLUMNS threads. x, b, a [rows, their stride], out [rows, Hv, dv]; conv [taps, channels]. A span
 * without rows moves its base over its log. */
extern "C" __global__ void __launch_bounds__(4 * COLUMNS, 6)
    delta(const Span *spans, int layer, const float *x, int stride, const float *b, int b_stride, const float *a, int a_stride, const float *conv,
          const float *log_decay, const float *dt_bias, float *out) {
    __shared__ __align__(16) float q[ROWS_AT_ONCE][KEY_DIM], k[ROWS_AT_ONCE][KEY_DIM], v[ROWS_AT_ONCE][COLUMNS];
    __shared__ float decays[ROWS_AT_ONCE], betas[ROWS_AT_ONCE];
    __shared__ float *sources[WINDOW + ROWS_AT_ONCE], *kept[ROWS_AT_ONCE]; /* of columns, from the window on; where new ones go */
    const Span &s = spans[blockIdx.y];
    const int splits = VALUE_DIM / COLUMNS, head = blockIdx.x / splits, first_column = blockIdx.x % splits * COLUMNS;
    const int LANES = 4 * EACH, APART = COLUMNS / EACH, column = threadIdx.x / LANES, part = threadIdx.x % LANES;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int key_head = IS_TILED ? head % KEY_HEADS : head / (VALUE_HEADS / KEY_HEADS);
    const bool has_key_head = first_column == 0 && (IS_TILED ? head < KEY_HEADS : head % (VALUE_HEADS / KEY_HEADS) == 0);
    const i64 start = s.store == LOG ? s.base : s.position, layer_size = (i64)VALUE_HEADS * VALUE_DIM * KEY_DIM;
    const int replayed = (int)(s.position - start), rows = replayed + s.num_rows;
    const i64 own = (i64)layer * layer_size + ((i64)head * VALUE_DIM + first_column + column) * KEY_DIM + part * 4, slot = NUM_DELTA * layer_size;
    float *base = s.states + own + start % s.state_slots * slot; /* a log has one slot */
    if (rows == 0) return;
    State<LANES, APART> state;
    state.load(base);
    auto channel_of = [&](int which) { /* of the queries, keys and values that this block reads */
        return which < KEY_DIM       ? key_head * KEY_DIM + which
               : which < 2 * KEY_DIM ? KEYS + key_head * KEY_DIM + which - KEY_DIM
                                     : 2 * KEYS + head * VALUE_DIM + first_column + which - 2 * KEY_DIM;
    };
    auto slot_of = [&](i64 position) {
        return s.columns + ((i64)layer * s.column_slots + (position + s.column_slots) % s.column_slots) * CHANNELS;
    };
    const int known = CONV_WIDTH + min(WINDOW + replayed, s.column_slots); /* taps and columns of the log, which are there already */
    for (int i = threadIdx.x; i < known * ((2 * KEY_DIM + COLUMNS) / 16); i += blockDim.x) {
        int at = i % known - CONV_WIDTH, channel = channel_of(i / known * 16);
        expect((at < 0 ? conv + (at + CONV_WIDTH) * CHANNELS : slot_of(max(start + at - WINDOW, (i64)0))) + channel);
    }
    if (threadIdx.x == 0) expect(log_decay + head), expect(dt_bias + head);
    wait_for_previous();
    let_next_begin();
    for (int block = 0; block < rows; block += ROWS_AT_ONCE) {
        int count = min(ROWS_AT_ONCE, rows - block);
        __syncthreads();
        if (threadIdx.x < WINDOW + count) { /* a column is of the log, of the rows that are being computed, or before the first: null */
            i64 position = start + block + (int)threadIdx.x - WINDOW;
            float *slot = slot_of(position), *row = (float *)x + (s.first_row + position - s.position) * stride;
            sources[threadIdx.x] = position < 0 ? nullptr : position < s.position ? slot : row;
            if (threadIdx.x >= WINDOW) kept[threadIdx.x - WINDOW] = position >= s.position ? slot : nullptr;
        }
        __syncthreads();
        for (int which = threadIdx.x; which < 2 * KEY_DIM + COLUMNS; which += blockDim.x) {
            int channel = channel_of(which);
            float columns[WINDOW + ROWS_AT_ONCE], taps[CONV_WIDTH];
#pragma unroll
            for (int i = 0; i < WINDOW + ROWS_AT_ONCE; i++) columns[i] = i < WINDOW + count && sources[i] ? sources[i][channel] : 0.0f;
#pragma unroll
            for (int tap = 0; tap < CONV_WIDTH; tap++) taps[tap] = conv[tap * CHANNELS + channel];
#pragma unroll
            for (int t = 0; t < ROWS_AT_ONCE; t++) {
                if (t >= count) break;
                float value = convolved(columns + t, taps);
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
                if (first_column == 0) gates[head] = open, gates[VALUE_HEADS + head] = rate;
            }
            decays[t] = decay_of(log_decay[head], rate + dt_bias[head]);
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
            if (block + t == replayed && replayed > 0) state.store(base);
            Row<LANES, APART> row;
            float recalled[EACH], read[EACH];
            row.load(k[t] + part * 4, q[t] + part * 4, v[t] + column, decays[t], betas[t]);
            recall(state, row, recalled);
            gather<LANES>(recalled);
            advance(state, row, recalled, read);
            if (block + t < replayed) continue;
            gather<LANES>(read);
            i64 to = s.first_row + block + t - replayed;
            if (part == 0)
                for (int i = 0; i < EACH; i++) out[to * VALUE_HEADS * VALUE_DIM + head * VALUE_DIM + first_column + column + i * APART] = read[i];
            if (s.store == RING) state.store(s.states + own + (start + block + t + 1) % s.state_slots * slot);
        }
    }
    if (s.num_rows == 0) state.store(s.states + own + s.position % s.state_slots * slot);
}
EXPORT(delta)

/* Chunks of a prompt, of one sequence: what the recurrence reads is made of all rows at once. */

/* Convolved queries, keys (both of length 1, and queries over the root of KEY_DIM) and values, [rows, CHANNELS], and each value head's decay
 * and beta, [rows, 2 VALUE_HEADS]. Grid: (rows / ROWS_AT_ONCE, (2 KEY_HEADS + VALUE_HEADS) / 4), a warp a head. */
extern "C" __global__ void __launch_bounds__(128)
    convolve(const Span *spans, int layer, const float *x, int stride, const float *b, int b_stride, const float *a, int a_stride,
             const float *conv, const float *log_decay, const float *dt_bias, float *out, float *gates) {
    wait_for_previous();
    let_next_begin();
    const Span &s = spans[0];
    const int head = blockIdx.y * 4 + threadIdx.x / WARP, lane = threadIdx.x % WARP, first = blockIdx.x * ROWS_AT_ONCE;
    const int count = min(ROWS_AT_ONCE, s.num_rows - first);
    if (count <= 0) return;
    if (blockIdx.y == 0)
        for (int i = threadIdx.x; i < count * VALUE_HEADS; i += blockDim.x) {
            i64 row = first + i / VALUE_HEADS;
            int of = i % VALUE_HEADS;
            gates[row * 2 * VALUE_HEADS + of] = decay_of(log_decay[of], a[row * a_stride + of] + dt_bias[of]);
            gates[row * 2 * VALUE_HEADS + VALUE_HEADS + of] = sigmoid(b[row * b_stride + of]);
        }
    if (head >= 2 * KEY_HEADS + VALUE_HEADS) return;
    const bool is_value = head >= 2 * KEY_HEADS;
    const int width = is_value ? VALUE_DIM : KEY_DIM, start = is_value ? 2 * KEYS + (head - 2 * KEY_HEADS) * VALUE_DIM : head * KEY_DIM;
    float squares[ROWS_AT_ONCE];
    for (int t = 0; t < ROWS_AT_ONCE; t++) squares[t] = 0;
    for (int i = lane; i < width; i += WARP) {
        float columns[WINDOW + ROWS_AT_ONCE], taps[CONV_WIDTH];
#pragma unroll
        for (int j = 0; j < WINDOW + ROWS_AT_ONCE; j++) {
            i64 position = s.position + first + j - WINDOW;
            const float *slot = s.columns + ((i64)layer * s.column_slots + (position + s.column_slots) % s.column_slots) * CHANNELS;
            const float *from = j < WINDOW && first + j < WINDOW ? slot : x + (i64)(first + j - WINDOW) * stride;
            columns[j] = j < WINDOW + count && position >= 0 ? from[start + i] : 0.0f;
        }
#pragma unroll
        for (int tap = 0; tap < CONV_WIDTH; tap++) taps[tap] = conv[tap * CHANNELS + start + i];
#pragma unroll
        for (int t = 0; t < ROWS_AT_ONCE; t++) {
            if (t >= count) break;
            float value = convolved(columns + t, taps);
            squares[t] = fmaf(value, value, squares[t]);
            out[(i64)(first + t) * CHANNELS + start + i] = value;
        }
    }
    if (is_value) return;
    __syncwarp();
    for (int t = 0; t < ROWS_AT_ONCE; t++) {
        float scale = (head >= KEY_HEADS ? 1.0f : 1.0f / sqrtf((float)KEY_DIM)) / sqrtf(warp_sum(squares[t]) + 1e-6f);
        if (t < count)
            for (int i = lane; i < width; i += WARP) out[(i64)(first + t) * CHANNELS + start + i] *= scale;
    }
}
EXPORT(convolve)

#define STAGED_ROWS 16
/* The recurrence over what `convolve` made. Grid: Hv * VALUE_DIM / CHUNK_COLUMNS; 4 COLUMNS threads, more a column where there are fewer. */
extern "C" __global__ void __launch_bounds__(4 * COLUMNS)
    recur(const Span *spans, int layer, const float *x, const float *gates, float *out) {
    __shared__ __align__(16) float q[2][STAGED_ROWS][KEY_DIM], k[2][STAGED_ROWS][KEY_DIM], v[2][STAGED_ROWS][CHUNK_COLUMNS];
    __shared__ float decays[2][STAGED_ROWS], betas[2][STAGED_ROWS];
    const Span &s = spans[0];
    const int splits = VALUE_DIM / CHUNK_COLUMNS, head = blockIdx.x / splits, first_column = blockIdx.x % splits * CHUNK_COLUMNS;
    const int APART = CHUNK_COLUMNS / EACH, LANES = 4 * COLUMNS / APART, column = threadIdx.x / LANES, part = threadIdx.x % LANES;
    const int key_head = IS_TILED ? head % KEY_HEADS : head / (VALUE_HEADS / KEY_HEADS), rows = s.num_rows;
    const i64 layer_size = (i64)VALUE_HEADS * VALUE_DIM * KEY_DIM, slot = NUM_DELTA * layer_size;
    float *own = s.states + (i64)layer * layer_size + ((i64)head * VALUE_DIM + first_column + column) * KEY_DIM + part * 4;
    State<LANES, APART> state;
    state.load(own + s.position % s.state_slots * slot);
    wait_for_previous();
    let_next_begin();
    auto fetch = [&](int start) {
        const int which = start / STAGED_ROWS % 2, vectors = (2 * KEY_DIM + CHUNK_COLUMNS) / 4;
        for (int i = threadIdx.x; i < STAGED_ROWS * vectors; i += blockDim.x) {
            int t = i / vectors, at = i % vectors * 4;
            bool is_there = start + t < rows;
            const float *row = x + (is_there ? (i64)(start + t) * CHANNELS : 0);
            if (at < KEY_DIM) copy_async(&q[which][t][at], row + key_head * KEY_DIM + at, is_there);
            else if (at < 2 * KEY_DIM) copy_async(&k[which][t][at - KEY_DIM], row + KEYS + key_head * KEY_DIM + at - KEY_DIM, is_there);
            else copy_async(&v[which][t][at - 2 * KEY_DIM], row + 2 * KEYS + head * VALUE_DIM + first_column + at - 2 * KEY_DIM, is_there);
        }
        end_of_copies();
        if (threadIdx.x < STAGED_ROWS && start + (int)threadIdx.x < rows) {
            const float *own_gates = gates + (i64)(start + threadIdx.x) * 2 * VALUE_HEADS;
            decays[which][threadIdx.x] = own_gates[head], betas[which][threadIdx.x] = own_gates[VALUE_HEADS + head];
        }
    };
    fetch(0);
    for (int first = 0; first < rows; first += STAGED_ROWS) {
        fetch(first + STAGED_ROWS);
        wait_for_copies<1>();
        __syncthreads();
        const int which = first / STAGED_ROWS % 2, count = min(STAGED_ROWS, rows - first);
        float *to = out + ((i64)(s.first_row + first) * VALUE_HEADS + head) * VALUE_DIM + first_column + column;
        Row<LANES, APART> row;
        float read[EACH] = {};
        row.load(k[which][0] + part * 4, q[which][0] + part * 4, v[which][0] + column, decays[which][0], betas[which][0]);
#pragma unroll 2
        for (int t = 0; t < count; t++) { /* what one row read is gathered with what the next one recalls: none waits for the other */
            float recalled[EACH];
            recall(state, row, recalled);
            Row<LANES, APART> next;
            const int after = min(t + 1, count - 1);
            next.load(k[which][after] + part * 4, q[which][after] + part * 4, v[which][after] + column, decays[which][after], betas[which][after]);
            gather<LANES>(recalled);
            gather<LANES>(read);
            if (part == 0 && t > 0)
                for (int i = 0; i < EACH; i++) to[(t - 1) * VALUE_HEADS * VALUE_DIM + i * APART] = read[i];
            advance(state, row, recalled, read);
            row = next;
        }
        gather<LANES>(read);
        if (part == 0)
            for (int i = 0; i < EACH; i++) to[(count - 1) * VALUE_HEADS * VALUE_DIM + i * APART] = read[i];
        __syncthreads();
    }
    state.store(own + (s.position + rows) % s.state_slots * slot);
}
EXPORT(recur)

/* The window after a chunk: its last columns. While a chunk is computed its rows may be more than the slots. Grid: of 256 channels. */
extern "C" __global__ void keep_columns(const Span *spans, int layer, const float *x, int stride) {
    wait_for_previous();
    let_next_begin();
    const Span &s = spans[0];
    int channel = blockIdx.x * blockDim.x + threadIdx.x;
    if (channel >= CHANNELS) return;
    for (int row = max(0, s.num_rows - WINDOW); row < s.num_rows; row++) {
        i64 slot = (i64)layer * s.column_slots + (s.position + row) % s.column_slots;
        s.columns[slot * CHANNELS + channel] = x[(i64)row * stride + channel];
    }
}
EXPORT(keep_columns)
