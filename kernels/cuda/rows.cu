/* What happens to rows between products: norms, residuals, gates, and the forms the next product wants. */
#include "forerun.cuh"

/* x += the parts of a product; what follows reads rms(x) * weight. Grid: rows; shared: n floats.
 * x [rows, n], parts [num_parts, rows, n] or null. */
extern "C" __global__ void add_norm(float *x, const float *parts, int num_parts, const float *weight, float eps, int n, Rows to) {
    SHARED(float, values);
    __shared__ float scratch[32];
    i64 row = blockIdx.x, rows = gridDim.x;
    expect(weight, 4 * n);
    expect(x + row * n, 4 * n);
    wait_for_previous();
    let_next_begin();
    float square = 0;
    for (int i = 4 * threadIdx.x; i < n; i += 4 * blockDim.x) {
        float4 v = *(const float4 *)(x + row * n + i), w = *(const float4 *)(weight + i);
#pragma unroll 4
        for (int part = 0; part < num_parts; part++) {
            float4 more = *(const float4 *)(parts + (part * rows + row) * n + i);
            v.x += more.x, v.y += more.y, v.z += more.z, v.w += more.w;
        }
        if (num_parts) *(float4 *)(x + row * n + i) = v;
        *(float4 *)(values + i) = make_float4(v.x * w.x, v.y * w.y, v.z * w.z, v.w * w.w);
        square += v.x * v.x + v.y * v.y + (v.z * v.z + v.w * v.w);
    }
    emit(values, n, to, row, 0, rsqrtf(block_sum(square, scratch) / n + eps));
}
EXPORT(add_norm)

/* The MTP head's input: rms(embedded) * w_e beside rms(hidden) * w_h, [rows, 2 n]. Grid: rows; shared: 2 n floats. */
extern "C" __global__ void pair_norm(const float *embedded, const float *hidden, const float *w_e, const float *w_h, float eps, int n, Rows to) {
    SHARED(float, values);
    __shared__ float scratch[32];
    i64 row = blockIdx.x;
    expect(w_e, 4 * n);
    expect(w_h, 4 * n);
    wait_for_previous();
    let_next_begin();
    float squares[2] = {};
    for (int i = threadIdx.x; i < n; i += blockDim.x)
        for (int which = 0; which < 2; which++) {
            float value = (which ? hidden : embedded)[row * n + i];
            squares[which] += value * value;
            values[which * n + i] = value * (which ? w_h : w_e)[i];
        }
    for (int which = 0; which < 2; which++) {
        float scale = rsqrtf(block_sum(squares[which], scratch) / n + eps);
        for (int i = threadIdx.x; i < n; i += blockDim.x) values[which * n + i] *= scale;
    }
    __syncthreads();
    emit(values, 2 * n, to, row);
}
EXPORT(pair_norm)

/* silu(gate) * up, both [rows, stride]. Grid: rows, columns / `width`; shared: width floats. */
extern "C" __global__ void swiglu(const float *gate, const float *up, int stride, int n, int width, Rows to) {
    SHARED(float, values);
    i64 row = blockIdx.x;
    int first = blockIdx.y * width, count = min(width, n - first);
    wait_for_previous();
    let_next_begin();
    for (int i = threadIdx.x; i < count; i += blockDim.x)
        values[i] = silu(gate[row * stride + first + i]) * up[row * stride + first + i];
    __syncthreads();
    emit(values, count, to, row, first);
}
EXPORT(swiglu)

/* A gated delta net's output: per head of `dv` values, rms(mixed) * weight * silu(z). mixed [rows, Hv dv], z at its column of
 * [rows, stride]. Grid: rows, heads / `heads`; shared: heads * dv floats. */
extern "C" __global__ void gated_norm(const float *mixed, const float *z, int stride, const float *weight, float eps, int dv, int heads, int n, Rows to) {
    SHARED(float, values);
    i64 row = blockIdx.x;
    int first = blockIdx.y * heads * dv, lane = threadIdx.x % WARP, count = min(heads, n / dv - (int)blockIdx.y * heads);
    expect(weight, 4 * dv);
    wait_for_previous();
    let_next_begin();
    for (int head = threadIdx.x / WARP; head < count; head += blockDim.x / WARP) {
        const float *from = mixed + row * n + first + head * dv, *gate = z + row * stride + first + head * dv;
        float square = 0;
        for (int i = lane; i < dv; i += WARP) {
            float value = from[i];
            square += value * value;
            values[head * dv + i] = value * weight[i] * silu(gate[i]);
        }
        float scale = rsqrtf(warp_sum(square) / dv + eps);
        for (int i = lane; i < dv; i += WARP) values[head * dv + i] *= scale;
    }
    __syncthreads();
    emit(values, count * dv, to, row, first);
}
EXPORT(gated_norm)

/* Rows of x for the next product as they are: chosen ones where `which` is not null. Grid: rows; shared: n floats. */
extern "C" __global__ void prepare(const float *x, const int *which, int n, Rows to) {
    SHARED(float, values);
    wait_for_previous();
    let_next_begin();
    i64 from = which ? which[blockIdx.x] : blockIdx.x;
    for (int i = threadIdx.x; i < n; i += blockDim.x) values[i] = x[from * n + i];
    __syncthreads();
    emit(values, n, to, blockIdx.x);
}
EXPORT(prepare)

/* Puts rows where their sequence keeps its newest. Grid: rows. */
extern "C" __global__ void keep_hidden(const Span *spans, const int *span_of, const float *rows, int n) {
    wait_for_previous();
    let_next_begin();
    int row = blockIdx.x;
    if (span_of[row] < 0) return;
    const Span &span = spans[span_of[row]];
    float *to = span.hidden + (span.position + row - span.first_row) % span.hidden_slots * n;
    for (int i = threadIdx.x; i < n; i += blockDim.x) to[i] = rows[(i64)row * n + i];
}
EXPORT(keep_hidden)

/* For each row of the spans its sequence's hidden row of the position before, zeros before position 0. Grid: rows. */
extern "C" __global__ void read_hidden(const Span *spans, const int *span_of, float *rows, int n) {
    wait_for_previous();
    let_next_begin();
    int row = blockIdx.x;
    if (span_of[row] < 0) return;
    const Span &span = spans[span_of[row]];
    i64 position = span.position + row - span.first_row - 1;
    const float *from = span.hidden + max(position, (i64)0) % span.hidden_slots * n;
    for (int i = threadIdx.x; i < n; i += blockDim.x) rows[(i64)row * n + i] = position < 0 ? 0.0f : from[i];
}
EXPORT(read_hidden)

/* Routed experts: routes [rows, 2 used], numbers ascending, then shares that sum to 1. Grid: rows; a warp. */
extern "C" __global__ void route(const float *logits, int stride, int experts, int used, float *routes) {
    wait_for_previous();
    let_next_begin();
    const float *own = logits + (i64)blockIdx.x * stride;
    float *ids = routes + (i64)blockIdx.x * 2 * used, *shares = ids + used;
    int lane = threadIdx.x, last = -1;
    float highest = 0, before = 0, total = 0;
    for (int rank = 0; rank < used; rank++) { /* the next in order of falling logit, then of number */
        float best = -INFINITE;
        int which = experts;
        for (int i = lane; i < experts; i += WARP) {
            bool is_open = rank == 0 || own[i] < before || (own[i] == before && i > last);
            if (is_open && (own[i] > best || which == experts)) best = own[i], which = i;
        }
        for (int distance = WARP / 2; distance; distance /= 2) {
            float other = __shfl_xor_sync(ALL_LANES, best, distance);
            int its = __shfl_xor_sync(ALL_LANES, which, distance);
            if (its < experts && (which == experts || other > best || (other == best && its < which))) best = other, which = its;
        }
        before = best, last = which;
        if (rank == 0) highest = best;
        float share = __expf(best - highest);
        total += share;
        if (lane == 0) ids[rank] = (float)min(which, experts - 1), shares[rank] = share; /* there may be none of logits that are no numbers */
    }
    __syncwarp();
    if (lane == 0) {
        for (int i = 0; i < used; i++) shares[i] /= total;
        for (int i = 1; i < used; i++)
            for (int j = i; j > 0 && ids[j - 1] > ids[j]; j--) {
                float id = ids[j], share = shares[j];
                ids[j] = ids[j - 1], shares[j] = shares[j - 1], ids[j - 1] = id, shares[j - 1] = share;
            }
    }
}
EXPORT(route)

/* out = shares of the experts' rows y [rows, used, n], in order, + the shared expert's row with its gate; added to x by the next norm.
 * Grid: (rows, n / 256). */
extern "C" __global__ void mix(const float *y, const float *routes, int used, const float *shared, const float *gate, int gate_stride, float *out, int n) {
    wait_for_previous();
    let_next_begin();
    i64 row = blockIdx.x;
    float open = sigmoid(gate[row * gate_stride]);
    int i = blockIdx.y * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float sum = 0;
    for (int rank = 0; rank < used; rank++) sum = fmaf(routes[row * 2 * used + used + rank], y[(row * used + rank) * n + i], sum);
    out[row * n + i] = fmaf(shared[row * n + i], open, sum);
}
EXPORT(mix)
