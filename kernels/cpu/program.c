/* Runs a program: the steps of a model's forward pass, each spread over all threads in units.
 * What a unit of work computes does not depend on who computes it, nor on how many threads there are. */
#include "api.h"

#include <stdlib.h>

extern const Kernels kernels_portable;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512;
#elif defined(__aarch64__)
extern const Kernels kernels_neon;
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#endif

const Kernels *kernels = &kernels_portable;

static int is_supported(const char *name) {
    if (!strcmp(name, "portable")) return 1;
#if defined(__x86_64__)
    __builtin_cpu_init();
    int has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (!strcmp(name, "avx2")) return has_avx2;
    if (!strcmp(name, "avx512"))
        return has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#elif defined(__aarch64__)
#if defined(__linux__)
    if (!strcmp(name, "neon")) return (getauxval(AT_HWCAP) >> 20 & 1) != 0; /* ASIMDDP */
#else
    if (!strcmp(name, "neon")) return 1;
#endif
#endif
    return 0;
}

const char *forerun_use(const char *name) {
    static const struct {
        const char *name;
        const Kernels *kernels;
    } all[] = {
#if defined(__x86_64__)
        {"avx512", &kernels_avx512}, {"avx2", &kernels_avx2},
#elif defined(__aarch64__)
        {"neon", &kernels_neon},
#endif
        {"portable", &kernels_portable},
    };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if ((!*name || !strcmp(name, all[i].name)) && is_supported(all[i].name)) {
            kernels = all[i].kernels;
            return all[i].name;
        }
    return NULL;
}

/* ---- memory: one arena for all calls, as they run one at a time ---- */

/* Who uses which expert, as the last ROUTE found, for the EXPERTS that follow it: users are row * used + rank. */
typedef struct {
    int32_t count;           /* of experts that are used */
    int32_t *expert, *first; /* [count], [count + 1]: where in `users` its own begin */
    int32_t *users, *end;    /* [rows * used]; [experts], for counting */
    uint8_t *is_taken;       /* [experts] */
} Routed;

typedef struct {
    const Call *call;
    float **buffers;
    Routed routed;
    int *forms; /* that the products of each op ask for */
    Activations quants_32, quants_256; /* of the rows of one LINEAR */
    int parts;        /* of a row's attention that may be computed beside each other */
    float *attended;  /* [rows, kv heads, parts], each Attended; of which `arrived` are there */
    int *arrived;     /* [rows, kv heads] */
    float *scratch; /* one part a thread */
    int64_t scratch_size;
    int *span_of, *first_row; /* of a row; of a span */
} Run;

static void *arena;
static size_t arena_size;

static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* Positions of a part of an attention: each is summed up alone, and then they are joined in their order, whoever has computed them. */
#define PART 512

/* Floats that are kept of all parts at once, at most: beyond that they are computed one after another. */
#define MOST_ATTENDED (8 << 20)

/* In floats, whole lines of a cache. */
static int64_t size_of_attended(const Sizes *s) { return (s->heads / s->kv_heads * (int64_t)(s->head_dim + 2) + 15) / 16 * 16; }

static int64_t most_seen(const Call *call) {
    int64_t seen = 0;
    for (int i = 0; i < call->num_spans; i++) seen = most(seen, call->spans[i].position + call->spans[i].num_rows);
    return seen;
}

static int64_t scratch_floats(const Call *call) {
    const Sizes *s = call->sizes;
    int64_t rows = 0, seen = most_seen(call), group = s->heads / s->kv_heads;
    for (int i = 0; i < call->num_spans; i++) rows = most(rows, call->spans[i].num_rows + call->spans[i].num_kept);
    int64_t values = (s->value_dim + PANEL - 1) / PANEL * PANEL;
    int64_t delta = rows * (2 * s->key_dim + values + 2) + PANEL * (int64_t)(s->key_dim + 2) + s->value_dim;
    return most(delta, group * ((seen < PART ? seen : PART) + 8 + s->head_dim) + 2 * size_of_attended(s)) + 64;
}

/* Lays out everything a call needs, at `base` or, to learn how much that is, at NULL. Returns its bytes. */
static size_t lay_out(Run *run, char *base, int num_threads) {
    const Call *call = run->call;
    size_t at = 0;
#define TAKE(to, count)                                                  \
    do {                                                                 \
        if (base) (to) = (void *)(base + at);                            \
        at = (at + (size_t)(count) * sizeof *(to) + 127) / 64 * 64;      \
    } while (0)
    int64_t rows = most(call->num_rows, 1), inputs = 1, experts = 0, users = 0;
    for (int i = 0; i < call->num_ops; i++) {
        const Op *op = call->ops + i;
        if (op->code == LINEAR || op->code == EXPERTS_UP) inputs = most(inputs, op->matrices->inputs);
        if (op->code == EXPERTS_DOWN) inputs = most(inputs, (int64_t)op->matrices[2].inputs * op->num_used);
        if (op->code == ROUTE) experts = most(experts, call->widths[op->in[0]]), users = most(users, rows * op->num_used);
    }
    TAKE(run->buffers, call->num_buffers);
    for (int i = 0; i < call->num_buffers; i++) {
        float *buffer = NULL;
        TAKE(buffer, call->given[i] ? 0 : rows * call->widths[i]);
        if (base) run->buffers[i] = call->given[i] ? call->given[i] : buffer;
    }
    Activations *both[2] = {&run->quants_32, &run->quants_256};
    for (int i = 0; i < 2; i++) {
        TAKE(both[i]->quants, rows * inputs);
        TAKE(both[i]->scales, rows * (inputs / 32 + 1));
        TAKE(both[i]->sums, rows * (inputs / 16 + 1));
        TAKE(both[i]->sums_32, rows * (inputs / 32 + 1));
    }
    run->scratch_size = scratch_floats(call);
    TAKE(run->scratch, run->scratch_size * num_threads);
    int64_t pairs = rows * call->sizes->kv_heads, parts = most((most_seen(call) + PART - 1) / PART, 1);
    int64_t attended = pairs * parts * size_of_attended(call->sizes);
    int is_split = parts > 1 && pairs < 4 * num_threads && attended <= MOST_ATTENDED; /* many pairs are work enough for all threads */
    run->parts = is_split ? (int)parts : 1;
    TAKE(run->attended, is_split ? attended : 0);
    TAKE(run->arrived, pairs);
    TAKE(run->span_of, rows);
    TAKE(run->first_row, call->num_spans + 1);
    TAKE(run->forms, call->num_ops);
    TAKE(run->routed.expert, experts);
    TAKE(run->routed.first, experts + 1);
    TAKE(run->routed.users, users);
    TAKE(run->routed.end, experts);
    TAKE(run->routed.is_taken, experts);
#undef TAKE
    return at;
}

/* ---- products ---- */

static int units(int64_t size, int of) { return (int)((size + of - 1) / of); }

static int rows_of(const Run *run, const Op *op) { return op->is_last ? run->call->num_spans : run->call->num_rows; }

enum { BLOCKS_OF_32 = 1, BLOCKS_OF_256 = 2 };
static int needs(int format) {
    int other = format_of(format).other;
    return other == 32 ? BLOCKS_OF_32 : other == 256 ? BLOCKS_OF_256 : 0;
}

static void prepare_row(Run *run, int what, const float *x, int64_t inputs, int64_t row) {
    for (int is_32 = 0; is_32 < 2; is_32++) {
        if (!(what & (is_32 ? BLOCKS_OF_32 : BLOCKS_OF_256))) continue;
        int block = is_32 ? 32 : 256;
        const Activations *to = is_32 ? &run->quants_32 : &run->quants_256;
        kernels->quantise(x, (int)inputs, block, to->quants + row * inputs, to->scales + row * (inputs / block), to->sums + row * (inputs / 16),
                          to->sums_32 + row * (inputs / 32));
    }
}

/* Rows x [rows, stride] in the form that a format asks for. */
static Activations activations(const Run *run, int format, const float *x, int64_t stride) {
    Activations a = needs(format) == BLOCKS_OF_32 ? run->quants_32 : run->quants_256;
    a.x = x, a.stride = stride;
    return a;
}

/* What the formats of an op's products ask for. */
static int forms_of(const Op *op) {
    int what = 0;
    if (op->code != LINEAR && op->code != EXPERTS_UP && op->code != EXPERTS_DOWN) return 0;
    for (int i = 0; i < op->num_matrices; i++)
        if (op->code == LINEAR || (op->code == EXPERTS_UP ? i % 3 < 2 : i % 3 == 2)) what |= needs(op->matrices[i].format);
    return what;
}

/* Outputs [first, last) of one of a step's matrices, the units of which follow one another. */
static void linear(Run *run, const Op *op, int unit) {
    const Call *call = run->call;
    const Matrix *m = op->matrices;
    int64_t stride = call->widths[op->in[0]];
    for (int count; unit >= (count = units(m->outputs, UNIT)); m++) unit -= count;
    int first = unit * UNIT, last = first + UNIT < m->outputs ? first + UNIT : m->outputs, to = op->out[m - op->matrices];
    Activations a = activations(run, m->format, run->buffers[op->in[0]], stride);
    kernels->product(m, first, last, &a, rows_of(run, op), run->buffers[to] + op->offset, call->widths[to], op->adds);
}

/* ---- routed experts ---- */

/* The experts that a row uses, in ascending order, then their shares, which sum to 1. */
static void route_row(const float *logits, int experts, int used, uint8_t *is_taken, float *ids, float *shares) {
    float highest = logits[0], total = 0;
    for (int i = 1; i < experts; i++) highest = logits[i] > highest ? logits[i] : highest;
    memset(is_taken, 0, (size_t)experts);
    for (int rank = 0; rank < used; rank++) { /* ties go to the lowest */
        int best = -1;
        for (int i = 0; i < experts; i++)
            if (!is_taken[i] && (best < 0 || logits[i] > logits[best])) best = i;
        is_taken[best] = 1;
        ids[rank] = (float)best;
        shares[rank] = expf(logits[best] - highest);
        total += shares[rank];
    }
    for (int i = 0; i < used; i++) shares[i] /= total;
    for (int i = 1; i < used; i++)
        for (int j = i; j > 0 && ids[j - 1] > ids[j]; j--) {
            float id = ids[j], share = shares[j];
            ids[j] = ids[j - 1], shares[j] = shares[j - 1], ids[j - 1] = id, shares[j - 1] = share;
        }
}

/* out [rows, 2 * used]: experts and shares of each row. Then who uses which expert, for the steps that follow. */
static void route(Run *run, const Op *op) {
    int experts = run->call->widths[op->in[0]], used = op->num_used, rows = rows_of(run, op);
    float *out = run->buffers[op->out[0]];
    Routed *to = &run->routed;
    for (int row = 0; row < rows; row++) {
        float *ids = out + (int64_t)row * 2 * used;
        route_row(run->buffers[op->in[0]] + (int64_t)row * experts, experts, used, to->is_taken, ids, ids + used);
    }
    memset(to->end, 0, sizeof *to->end * (size_t)experts);
    for (int i = 0; i < rows * used; i++) to->end[(int)out[i / used * 2 * used + i % used]]++;
    to->count = 0;
    for (int e = 0, total = 0; e < experts; e++) {
        if (to->end[e]) to->expert[to->count++] = e;
        to->end[e] = total += to->end[e];
    }
    for (int i = rows * used - 1; i >= 0; i--) to->users[--to->end[(int)out[i / used * 2 * used + i % used]]] = i;
    for (int j = 0; j < to->count; j++) to->first[j] = to->end[to->expert[j]]; /* which has become the first of its own */
    to->first[to->count] = rows * used;
}

/* Outputs of one expert, [first, last) of them, for up to TOGETHER of its users: of its gate and up, with the gate applied; or of its down. */
enum { TOGETHER = 16 };
static void expert_rows(Run *run, const Op *op, const Matrix *m, int first, int last, const int32_t *users, int count) {
    int32_t from[TOGETHER];
    float both[2][TOGETHER][UNIT], *out = run->buffers[op->out[0]];
    int is_up = op->code == EXPERTS_UP;
    for (int r = 0; r < count; r++) from[r] = is_up ? users[r] / op->num_used : users[r];
    for (int i = 0; i <= is_up; i++) {
        Activations a = activations(run, m[i].format, run->buffers[op->in[0]], m[i].inputs);
        a.rows = from;
        kernels->product(m + i, first, last, &a, count, both[i][0] - first, UNIT, 0); /* which counts from the first output */
    }
    for (int r = 0; r < count; r++) {
        if (is_up) kernels->swiglu(both[0][r], both[1][r], last - first);
        memcpy(out + (int64_t)users[r] * m->outputs + first, both[0][r], sizeof(float) * (size_t)(last - first));
    }
}

/* A unit of the outputs of an expert that somebody uses, for all who do. There may be units of none. */
static void expert(Run *run, const Op *op, int unit) {
    const Routed *routed = &run->routed;
    int which = op->code == EXPERTS_UP ? 0 : 2, chunks = units(op->matrices[which].outputs, UNIT), i = unit / chunks;
    if (i >= routed->count) return;
    const Matrix *m = op->matrices + 3 * routed->expert[i] + which;
    int first = unit % chunks * UNIT, last = first + UNIT < m->outputs ? first + UNIT : m->outputs;
    for (int at = routed->first[i], left; (left = routed->first[i + 1] - at) > 0; at += TOGETHER)
        expert_rows(run, op, m, first, last, routed->users + at, left < TOGETHER ? left : TOGETHER);
}

/* out += shares of the experts' outputs, in ascending order, + the shared expert's with its gate. */
static void mix(Run *run, const Op *op, int row) {
    int used = op->num_used, n = run->call->widths[op->out[0]];
    const float *y = run->buffers[op->in[0]] + (int64_t)row * used * n, *shares = run->buffers[op->in[1]] + (int64_t)row * 2 * used + used;
    const float *shared = run->buffers[op->in[2]] + (int64_t)row * n;
    float gate = 1.0f / (1.0f + expf(-run->buffers[op->in[3]][row])), *out = run->buffers[op->out[0]] + (int64_t)row * n;
    for (int i = 0; i < n; i++) {
        float sum = 0;
        for (int rank = 0; rank < used; rank++) sum += shares[rank] * y[(int64_t)rank * n + i];
        out[i] += sum + shared[i] * gate;
    }
}

/* ---- gated delta net ---- */

/* Pre-convolution column `t` rows after the first that is replayed or computed; before it (t < 0) those of the window. */
static const float *column(const Run *run, const Op *op, const Span *s, int first_row, int t) {
    const Sizes *z = run->call->sizes;
    int channels = 2 * z->key_heads * z->key_dim + z->value_heads * z->value_dim, replayed = s->store == LOG ? s->num_kept : 0;
    int before = s->store == LOG ? 0 : s->num_kept;
    if (t < replayed) return s->columns + op->layer * s->columns_stride + (int64_t)(z->conv_width - 1 + before + t) * channels;
    return run->buffers[op->in[0]] + (int64_t)(first_row + t - replayed) * channels;
}

static void copy_rows(float *to, int64_t to_stride, const float *from, int64_t from_stride, int rows, int count) {
    if (count == PANEL) /* a size that is known is copied in a few instructions */
        for (int i = 0; i < rows; i++) memcpy(to + i * to_stride, from + i * from_stride, sizeof(float) * PANEL);
    else
        for (int i = 0; i < rows; i++) memcpy(to + i * to_stride, from + i * from_stride, sizeof(float) * (size_t)count);
}

static void delta(Run *run, const Op *op, int span, int head, float *scratch) {
    const Sizes *z = run->call->sizes;
    const Span *s = run->call->spans + span;
    int replayed = s->store == LOG ? s->num_kept : 0, rows = replayed + s->num_rows, first_row = run->first_row[span];
    int dk = z->key_dim, dv = z->value_dim, padded_dv = (dv + PANEL - 1) / PANEL * PANEL, heads = z->value_heads, width = z->conv_width;
    if (!rows) return;
    int key_head = z->is_tiled ? head % z->key_heads : head / (heads / z->key_heads), keys = z->key_heads * dk;
    int channels = 2 * keys + heads * dv;
    float *q = scratch, *k = q + (int64_t)rows * dk, *v = k + (int64_t)rows * dk, *decay = v + (int64_t)rows * padded_dv, *beta = decay + rows;
    float *panel = beta + rows, *read = panel + PANEL * dk, *out = read + PANEL;
    int64_t head_size = (int64_t)dk * dv, layer_size = heads * head_size, slot_size = z->num_delta * layer_size;
    float *state = s->states + op->layer * layer_size + head * head_size;
    float *base = s->store == RING ? state + s->position % s->num_slots * slot_size : state;
    for (int t = 0; t < rows; t++) {
        const float *columns[64];
        for (int tap = 0; tap < width; tap++) columns[tap] = column(run, op, s, first_row, t - width + 1 + tap);
        kernels->convolve(columns, op->weights[0], width, channels, key_head * dk, dk, q + (int64_t)t * dk);
        kernels->convolve(columns, op->weights[0], width, channels, keys + key_head * dk, dk, k + (int64_t)t * dk);
        kernels->convolve(columns, op->weights[0], width, channels, 2 * keys + head * dv, dv, v + (int64_t)t * padded_dv);
        kernels->normalise(q + (int64_t)t * dk, dk, 1.0f / sqrtf((float)dk));
        kernels->normalise(k + (int64_t)t * dk, dk, 1.0f);
        for (int i = dv; i < padded_dv; i++) v[(int64_t)t * padded_dv + i] = 0;
        float b, a;
        if (t < replayed) {
            b = s->b[op->layer * s->gates_stride + (int64_t)t * heads + head];
            a = s->a[op->layer * s->gates_stride + (int64_t)t * heads + head];
        } else {
            b = run->buffers[op->in[1]][(int64_t)(first_row + t - replayed) * heads + head];
            a = run->buffers[op->in[2]][(int64_t)(first_row + t - replayed) * heads + head];
        }
        float x = a + op->weights[2][head];
        decay[t] = expf(op->weights[1][head] * ((x > 0 ? x : 0) + log1pf(expf(-fabsf(x)))));
        beta[t] = 1.0f / (1.0f + expf(-b));
    }
    float *outputs = run->buffers[op->out[0]];
    for (int at = 0; at < dv; at += PANEL) {
        int count = dv - at < PANEL ? dv - at : PANEL;
        if (count < PANEL) memset(panel, 0, sizeof(float) * PANEL * (size_t)dk);
        copy_rows(panel, PANEL, base + at, dv, dk, count);
        DeltaRows x = {q, k, v + at, decay, beta, dk, padded_dv};
        kernels->delta_read(panel, k, dk, read);
        for (int t = 0; t < rows; t++) {
            kernels->delta_row(panel, &x, t, t + 1 < rows ? k + (int64_t)(t + 1) * dk : k, read, out);
            float *to = NULL; /* where the state after this row is kept */
            if (s->store == RING) to = state + (s->position + t + 1) % s->num_slots * slot_size;
            else if (t == (s->store == LOG ? replayed : rows) - 1) to = base;
            if (to) copy_rows(to + at, dv, panel, PANEL, dk, count);
            if (t >= replayed)
                for (int i = 0; i < count; i++) outputs[((int64_t)(first_row + t - replayed) * heads + head) * dv + at + i] = out[i];
        }
    }
    for (int row = first_row; row < first_row + s->num_rows; row++) {
        float *o = outputs + ((int64_t)row * heads + head) * dv;
        const float *gate = run->buffers[op->in[3]] + ((int64_t)row * heads + head) * dv;
        float *one = panel; /* of the layout of an output norm: silu(gate) * norm(o) */
        memcpy(one, gate, (size_t)dv * 4);
        kernels->norm(o, op->weights[3], o, dv, z->eps);
        kernels->swiglu(one, o, dv);
        memcpy(o, one, (size_t)dv * 4);
    }
}

/* The window moves over what was kept; new rows go into the log behind it. */
static void keep_columns(Run *run, const Op *op, int span) {
    const Sizes *z = run->call->sizes;
    const Span *s = run->call->spans + span;
    int channels = 2 * z->key_heads * z->key_dim + z->value_heads * z->value_dim, window = z->conv_width - 1, first_row = run->first_row[span];
    float *columns = s->columns + op->layer * s->columns_stride;
    const float *new = run->buffers[op->in[0]] + (int64_t)first_row * channels;
    size_t size = sizeof(float) * (size_t)channels;
    if (s->num_kept) memmove(columns, columns + (int64_t)s->num_kept * channels, window * size);
    if (s->store == CHUNK) {
        int left = window > s->num_rows ? window - s->num_rows : 0; /* of the old window */
        memmove(columns, columns + (int64_t)(window - left) * channels, left * size);
        memcpy(columns + (int64_t)left * channels, new + (int64_t)(s->num_rows - window + left) * channels, (window - left) * size);
        return;
    }
    memcpy(columns + (int64_t)window * channels, new, s->num_rows * size);
    if (s->store == RING) return;
    for (int i = 0; i < 2; i++) {
        float *to = (i ? s->a : s->b) + op->layer * s->gates_stride;
        memcpy(to, run->buffers[op->in[1 + i]] + (int64_t)first_row * z->value_heads, sizeof(float) * (size_t)(s->num_rows * z->value_heads));
    }
}

/* ---- attention ---- */

static float *place(const Sizes *z, const Span *s, const Op *op, float *base, int64_t position, int kv) {
    int64_t page_size = (int64_t)z->kv_heads * PAGE * z->head_dim;
    return base + op->layer * s->layer_stride + s->table[position / PAGE] * page_size + ((int64_t)kv * PAGE + position % PAGE) * z->head_dim;
}

/* Normalises and rotates the keys of a row, and writes its keys and values into its page. */
static void keys(Run *run, const Op *op, int row) {
    const Sizes *z = run->call->sizes;
    const Span *s = run->call->spans + run->span_of[row];
    int dim = z->head_dim, rotary = z->rotary_dim / 2;
    int64_t position = s->position + row - run->first_row[run->span_of[row]];
    int64_t angle = (run->call->by_position ? position : row) * rotary;
    for (int kv = 0; kv < z->kv_heads; kv++) {
        float *k = run->buffers[op->in[0]] + ((int64_t)row * z->kv_heads + kv) * dim;
        kernels->norm(k, op->weights[0], k, dim, z->eps);
        kernels->rotate(k, run->call->cos + angle, run->call->sin + angle, rotary);
        memcpy(place(z, s, op, s->keys, position, kv), k, (size_t)dim * 4);
        memcpy(place(z, s, op, s->values, position, kv), run->buffers[op->in[1]] + ((int64_t)row * z->kv_heads + kv) * dim, (size_t)dim * 4);
    }
}

static Attended attended_at(const Sizes *z, float *at) {
    int group = z->heads / z->kv_heads;
    return (Attended){at, at + group * z->head_dim, at + group * (z->head_dim + 1)};
}

/* One part of a row's attention, after which whoever comes last joins all of them; or all parts, one after another. */
static void attend(Run *run, const Op *op, int row, int kv, int part, float *scratch) {
    const Sizes *z = run->call->sizes;
    int span = op->is_last ? row : run->span_of[row];
    const Span *s = run->call->spans + span;
    int dim = z->head_dim, group = z->heads / z->kv_heads, rotary = z->rotary_dim / 2;
    int last = op->is_last ? s->num_rows - 1 : row - run->first_row[span], seen = (int)s->position + last + 1; /* keys */
    int parts = (seen + PART - 1) / PART, is_split = run->parts > 1;
    if (part >= parts) return;
    int64_t angle = (run->call->by_position ? s->position + last : run->first_row[span] + last) * rotary;
    const float *queries = run->buffers[op->in[0]] + ((int64_t)row * z->heads + kv * group) * 2 * dim;
    float *q = scratch, *own = q + group * dim, *scores = own + 2 * size_of_attended(z), scale = 1.0f / sqrtf((float)dim);
    if (is_split) own = run->attended + ((int64_t)row * z->kv_heads + kv) * run->parts * size_of_attended(z);
    Attended all = attended_at(z, own);
    for (int g = 0; g < group; g++) {
        kernels->norm(queries + g * 2 * dim, op->weights[0], q + g * dim, dim, z->eps);
        kernels->rotate(q + g * dim, run->call->cos + angle, run->call->sin + angle, rotary);
        for (int i = 0; i < dim; i++) q[g * dim + i] *= scale;
    }
    int64_t at = op->layer * s->layer_stride + (int64_t)kv * PAGE * dim;
    for (int p = part; p < (is_split ? part + 1 : parts); p++) {
        Attended here = attended_at(z, own + (is_split ? p : p > 0) * size_of_attended(z));
        int end = (p + 1) * PART < seen ? (p + 1) * PART : seen;
        kernels->attend(q, group, s, s->keys + at, s->values + at, (int64_t)z->kv_heads * PAGE * dim, p * PART, end, dim, scores, &here);
        if (!is_split && p > 0) kernels->join(&all, &here, group, dim);
    }
    if (is_split) {
        int *arrived = run->arrived + (int64_t)row * z->kv_heads + kv;
        if (__atomic_add_fetch(arrived, 1, __ATOMIC_ACQ_REL) < parts) return;
        *arrived = 0; /* for the next layer */
        for (int p = 1; p < parts; p++) {
            Attended other = attended_at(z, own + p * size_of_attended(z));
            kernels->join(&all, &other, group, dim);
        }
    }
    float *out = run->buffers[op->out[0]] + ((int64_t)row * z->heads + kv * group) * dim;
    for (int g = 0; g < group; g++) {
        for (int i = 0; i < dim; i++) all.sums[g * dim + i] /= all.total[g];
        kernels->gate(all.sums + g * dim, queries + g * 2 * dim + dim, out + g * dim, dim);
    }
}

/* ---- steps ---- */

/* Elements of one unit of SWIGLU. */
#define CHUNK_OF_SWIGLU 2048

/* The rows that products of step `op` read, one after another. */
static int num_inputs(const Run *run, const Op *op) { return rows_of(run, op) * (op->code == EXPERTS_DOWN ? op->num_used : 1); }

/* Each op is two steps of the pool's: what products read is brought into their form, and what the op is. */
static int count(const void *what, int step) {
    const Run *run = what;
    const Call *call = run->call;
    const Op *op = call->ops + step / 2;
    int rows = rows_of(run, op), total = 0;
    if (step % 2 == 0) return run->forms[step / 2] ? num_inputs(run, op) : 0;
    switch (op->code) {
    case LINEAR:
        for (int i = 0; i < op->num_matrices; i++) total += units(op->matrices[i].outputs, UNIT);
        return total;
    case ROUTE: return 1;
    case EXPERTS_UP:
    case EXPERTS_DOWN: /* no more experts than there are users */
        total = op->num_matrices / 3 < rows * op->num_used ? op->num_matrices / 3 : rows * op->num_used;
        return total * units(op->matrices[op->code == EXPERTS_UP ? 0 : 2].outputs, UNIT);
    case SWIGLU: return units((int64_t)rows * call->widths[op->in[0]], CHUNK_OF_SWIGLU);
    case DELTA: return call->num_spans * call->sizes->value_heads;
    case COLUMNS:
    case LAST: return call->num_spans;
    case ATTEND: return rows * call->sizes->kv_heads * run->parts;
    default: return rows;
    }
}

static void do_unit(void *what, int step, int unit, int thread) {
    Run *run = what;
    const Call *call = run->call;
    const Op *op = call->ops + step / 2;
    const Sizes *z = call->sizes;
    float *scratch = run->scratch + thread * run->scratch_size;
    if (step % 2 == 0) {
        int inputs = op->matrices[op->code == EXPERTS_DOWN ? 2 : 0].inputs;
        int64_t stride = op->code == LINEAR ? call->widths[op->in[0]] : inputs;
        prepare_row(run, run->forms[step / 2], run->buffers[op->in[0]] + unit * stride, inputs, unit);
        return;
    }
    switch (op->code) {
    case EMBED: {
        int32_t token = call->tokens[unit], n = call->widths[op->out[0]];
        float *to = run->buffers[op->out[0]] + (int64_t)unit * n;
        if (token < 0) memcpy(to, call->rows + (int64_t)(-1 - token) * n, n * sizeof *to);
        else row_of(op->matrices, token, to);
        break;
    }
    case NORM: {
        int n = call->widths[op->in[0]];
        float *to = run->buffers[op->out[0]] + (int64_t)unit * call->widths[op->out[0]] + op->offset;
        kernels->norm(run->buffers[op->in[0]] + (int64_t)unit * n, op->weights[0], to, n, z->eps);
        break;
    }
    case LINEAR: linear(run, op, unit); break;
    case SWIGLU: {
        int64_t at = (int64_t)unit * CHUNK_OF_SWIGLU, left = (int64_t)rows_of(run, op) * call->widths[op->in[0]] - at;
        kernels->swiglu(run->buffers[op->in[0]] + at, run->buffers[op->in[1]] + at, (int)(left < CHUNK_OF_SWIGLU ? left : CHUNK_OF_SWIGLU));
        break;
    }
    case DELTA: delta(run, op, unit / z->value_heads, unit % z->value_heads, scratch); break;
    case COLUMNS: keep_columns(run, op, unit); break;
    case KEYS: keys(run, op, unit); break;
    case ATTEND: attend(run, op, unit / run->parts / z->kv_heads, unit / run->parts % z->kv_heads, unit % run->parts, scratch); break;
    case ROUTE: route(run, op); break;
    case EXPERTS_UP:
    case EXPERTS_DOWN: expert(run, op, unit); break;
    case LAST:
        for (int i = 0; i < op->num_used; i++) {
            int64_t n = call->widths[op->in[i]], row = run->first_row[unit] + call->spans[unit].num_rows - 1;
            memcpy(run->buffers[op->out[i]] + unit * n, run->buffers[op->in[i]] + row * n, (size_t)n * 4);
        }
        break;
    case MIX: mix(run, op, unit); break;
    }
}

int forerun_run(const Call *call, int num_threads) {
    Run run = {.call = call};
    int status = -1;
    if (num_threads > MAX_THREADS) num_threads = MAX_THREADS;
    pool_enter();
    size_t size = lay_out(&run, NULL, num_threads);
    if (size > arena_size) {
        free(arena);
        arena = aligned_alloc(64, (size + size / 4 + 63) / 64 * 64);
        arena_size = arena ? size + size / 4 : 0;
    }
    if (arena) {
        lay_out(&run, arena, num_threads);
        for (int span = 0, row = 0; span < call->num_spans; span++) {
            run.first_row[span] = row;
            for (int i = 0; i < call->spans[span].num_rows; i++) run.span_of[row++] = span;
        }
        for (int i = 0; i < call->num_ops; i++) run.forms[i] = forms_of(call->ops + i);
        memset(run.arrived, 0, sizeof *run.arrived * (size_t)most(call->num_rows, 1) * (size_t)call->sizes->kv_heads);
        Work work = {&run, 2 * call->num_ops, 1, count, do_unit};
        status = pool_run(num_threads, &work);
    }
    pool_leave();
    return status;
}
