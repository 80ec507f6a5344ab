/* Token choice: kernels/sampling.py in one pass over a row of logits, with the same noise and the same filters. */
#include "api.h"

#include <stdlib.h>

/* Philox4x64 with 10 rounds (Salmon et al. 2011), as NumPy's Philox(key, counter) gives it: four 64-bit numbers for each counter. */
static void philox(uint64_t key, uint64_t block, uint64_t position, uint64_t out[4]) {
    uint64_t x0 = block, x1 = position, x2 = 0, x3 = 0, key_0 = key, key_1 = 0;
    for (int round = 0; round < 10; round++, key_0 += 0x9E3779B97F4A7C15u, key_1 += 0xBB67AE8584CAA73Bu) {
        unsigned __int128 first = (unsigned __int128)0xD2E7470EE14C6C93u * x0, second = (unsigned __int128)0xCA5A826395121157u * x2;
        x0 = (uint64_t)(second >> 64) ^ x1 ^ key_0, x1 = (uint64_t)second;
        x2 = (uint64_t)(first >> 64) ^ x3 ^ key_1, x3 = (uint64_t)first;
    }
    out[0] = x0, out[1] = x1, out[2] = x2, out[3] = x3;
}

static double uniform(uint64_t bits) { return (double)(int64_t)(bits >> 11) * 0x1p-53; }

static double gumbel(double u) {
    double e = -log1p(-u);
    return -log(e > 1e-300 ? e : 1e-300);
}

/* At least exp(x) for x up to 80, at most 1.07 times as much: between powers of two the mantissa's straight line lies above. */
static inline float above_exp(float x) {
    x = x > -80 ? x : -80;
    int32_t bits = (int32_t)(x * 12102203.2f + 1065353216.0f) + 1024; /* for what floats round */
    memcpy(&x, &bits, 4);
    return x;
}

/* At most what `uniform` makes of the same bits. */
static inline float below_uniform(uint64_t bits) {
    uint32_t some = (uint32_t)(bits >> 32) >> 9 | 0x3f800000;
    float x;
    memcpy(&x, &some, 4);
    return x - 1;
}

/* Which tokens stay: logits of at least `logit`, x of at least `x`, and of those with just `x` the places up to `place`. */
typedef struct {
    float logit;
    double x;
    int64_t place;
} Floor;

/* The k-th highest of n: the root of a heap of the k highest. */
static int kth(const float *logits, int64_t n, int64_t k, float *found) {
    float *heap = malloc((size_t)k * sizeof *heap);
    if (!heap) return -1;
    int64_t count = 0;
    for (int64_t i = 0; i < n; i++) {
        float x = logits[i];
        int64_t at;
        if (count == k && i % 16 == 0 && i + 16 <= n) {
            int num_higher = 0;
            for (int j = 0; j < 16; j++) num_higher += logits[i + j] > heap[0];
            if (!num_higher) {
                i += 15;
                continue;
            }
        }
        if (count < k) {
            for (at = count++; at && heap[(at - 1) / 2] > x; at = (at - 1) / 2) heap[at] = heap[(at - 1) / 2];
        } else if (x > heap[0]) {
            for (at = 0;;) {
                int64_t child = 2 * at + 1;
                if (child >= k) break;
                if (child + 1 < k && heap[child + 1] < heap[child]) child++;
                if (heap[child] >= x) break;
                heap[at] = heap[child], at = child;
            }
        } else
            continue;
        heap[at] = x;
    }
    *found = heap[0];
    free(heap);
    return 0;
}

typedef struct {
    double x;
    int64_t place;
} Token;

static int likelier(const void *one, const void *other) {
    const Token *a = one, *b = other;
    return a->x != b->x ? (a->x < b->x) - (a->x > b->x) : (a->place > b->place) - (a->place < b->place);
}

#define BINS 2048
static int bin_of(double x) { return x > -BINS / 64 ? (int)(-x * 64) : BINS; }

/* Raises the floor to the last of the likeliest tokens above it that together reach a share. Only one bin of a histogram is sorted. */
static int nucleus(const float *logits, int64_t n, float most, double temperature, double top_p, Floor *floor) {
    double mass[BINS + 1] = {0}, total = 0, reached = 0;
    int64_t counts[BINS + 1] = {0}, count = 0;
    for (int64_t i = 0; i < n; i++)
        if (logits[i] >= floor->logit) {
            double x = ((double)logits[i] - most) / temperature;
            mass[bin_of(x)] += exp(x), counts[bin_of(x)]++;
        }
    for (int i = 0; i <= BINS; i++) total += mass[i];
    int bin = 0;
    while (bin < BINS && reached + mass[bin] < top_p * total) reached += mass[bin++];
    Token *tokens = malloc((size_t)(counts[bin] + 1) * sizeof *tokens);
    if (!tokens) return -1;
    for (int64_t i = 0; i < n && count < counts[bin]; i++) {
        double x = ((double)logits[i] - most) / temperature;
        if (logits[i] >= floor->logit && bin_of(x) == bin) tokens[count++] = (Token){x, i};
    }
    qsort(tokens, (size_t)count, sizeof *tokens, likelier);
    int64_t last = 0;
    while (last < count - 1 && (reached += exp(tokens[last].x)) / total < top_p) last++;
    if (count) floor->x = tokens[last].x, floor->place = tokens[last].place;
    free(tokens);
    return 0;
}

/* Tokens that are looked at together, and those of one unit of work. */
#define SOME 64
#define PART 1024

/* What is known of a row before its parts are looked at: the token with the highest logit and what it has with its noise. */
typedef struct {
    Floor floor;
    double temperature;
    float most, limit; /* no token with a lower logit than `limit` stays */
    Token best;
    int has_failed;
} Row;

typedef struct {
    const float *logits;
    int64_t size;
    const Sampling *sampling;
    const uint64_t *positions;
    int num_rows, num_parts;
    Row *rows;
    Token *found; /* [rows, parts]: the best of each, with its noise */
} Draw;

static void begin(Draw *draw, int number) {
    const float *logits = draw->logits + number * draw->size;
    const Sampling *s = draw->sampling + number;
    Row *row = draw->rows + number;
    float most = highest(logits, draw->size);
    int64_t n = draw->size, best_at = 0;
    while (best_at < n - 1 && logits[best_at] != most) best_at++;
    *row = (Row){.floor = {-INFINITY, -INFINITY, n}, .most = most, .best = {0, best_at}};
    if (s->temperature == 0) return;

    row->temperature = s->temperature > 1e-6 ? s->temperature : 1e-6;
    Floor *floor = &row->floor;
    if (s->top_k > 0 && s->top_k < n) row->has_failed = kth(logits, n, s->top_k, &floor->logit);
    if (s->top_p < 1 && !row->has_failed) row->has_failed = nucleus(logits, n, most, row->temperature, s->top_p, floor);
    if (s->min_p > 0 && log(s->min_p) > floor->x) floor->x = log(s->min_p), floor->place = n;
    uint64_t bits[4];
    philox(s->seed, (uint64_t)best_at / 4 + 1, draw->positions[number], bits);
    row->best.x = gumbel(uniform(bits[best_at % 4]));
    double lowest = most + floor->x * row->temperature;
    row->limit = (float)(lowest - 1e-6 * (fabs(lowest) + fabs((double)most))); /* no more than a quick look: it rounds */
    row->limit = row->limit > floor->logit ? row->limit : floor->logit;
}

/* The best of a part and of `begin`. Who is to have more than the best so far, with its noise, needs noise of which
 * -log(1 - u) < exp(x - best), and u is less than -log(1 - u): few have, and for these alone there are logarithms. */
static Token best_of(const Draw *draw, int number, int part) {
    const float *logits = draw->logits + number * draw->size;
    const Row *row = draw->rows + number;
    const Floor *floor = &row->floor;
    uint64_t seed = draw->sampling[number].seed, position = draw->positions[number];
    float per = (float)(1 / row->temperature);
    int64_t n = draw->size, end = (part + 1) * (int64_t)PART < n ? (part + 1) * (int64_t)PART : n;
    Token best = row->best;
    if (draw->sampling[number].temperature == 0) return best;
    for (int64_t start = part * (int64_t)PART; start < end; start += SOME) {
        int count = end - start < SOME ? (int)(end - start) : SOME, num_left = 0;
        const float *l = logits + start;
        uint64_t bits[SOME];
        int32_t is_left[SOME] = {0};
        for (int j = 0; j < count; j++) num_left += l[j] >= row->limit;
        if (!num_left) continue;
        for (int j = 0; j < SOME; j += 4) philox(seed, (uint64_t)(start + j) / 4 + 1, position, bits + j);
        for (int j = 0; j < count; j++)
            is_left[j] = (below_uniform(bits[j]) <= above_exp((l[j] - row->most) * per - (float)best.x)) & (l[j] >= row->limit);
        for (int j = 0; j < count; j++) {
            if (!is_left[j]) continue;
            Token one = {((double)l[j] - row->most) / row->temperature, start + j};
            if (one.x < floor->x || (one.x == floor->x && one.place > floor->place)) continue;
            one.x += gumbel(uniform(bits[j]));
            if (likelier(&one, &best) < 0) best = one;
        }
    }
    return best;
}

/* Rows first, then their parts. */
static int count(const void *what, int step) {
    const Draw *draw = what;
    return draw->num_rows * (step ? draw->num_parts : 1);
}

static void do_unit(void *what, int step, int unit, int thread) {
    Draw *draw = what;
    (void)thread;
    if (!step) begin(draw, unit);
    else draw->found[unit] = best_of(draw, unit / draw->num_parts, unit % draw->num_parts);
}

int forerun_draw(const float *logits, int num_rows, int64_t size, const Sampling *sampling, const uint64_t *positions, int64_t *tokens) {
    Draw draw = {logits, size, sampling, positions, num_rows, (int)((size + PART - 1) / PART), NULL, NULL};
    Work work = {&draw, 2, 0, count, do_unit};
    draw.rows = malloc((size_t)num_rows * (sizeof *draw.rows + (size_t)draw.num_parts * sizeof *draw.found));
    if (!draw.rows) return -1;
    draw.found = (Token *)(draw.rows + num_rows);
    pool_enter();
    int status = pool_run(0, &work);
    pool_leave();
    for (int row = 0; row < num_rows && !status; row++) {
        Token best = draw.rows[row].best;
        for (int part = 0; part < draw.num_parts; part++)
            if (likelier(draw.found + row * draw.num_parts + part, &best) < 0) best = draw.found[row * draw.num_parts + part];
        status = draw.rows[row].has_failed, tokens[row] = best.place;
    }
    free(draw.rows);
    return status;
}
