/* The arithmetic, compiled once for each instruction set over its simd_*.h.
 *
 * Row invariance: a row's result is made of the same operations in the same order whatever rows stand beside it. All
 * reductions here run in one fixed order; several rows at once only share what is loaded.
 * The integer parts are exact, and each instruction set rounds at the same places in quantised products: same bits on all. */

#define ALWAYS static inline __attribute__((always_inline))
#define AHEAD 2048 /* bytes that tiles are fetched before they are used: what comes meanwhile hides behind the arithmetic */
#define ROWS 4 /* rows that share a load of weights */

ALWAYS float vf_sum(VF v) {
    float lanes[LANES];
    vf_store(lanes, v);
    for (int n = LANES / 2; n; n /= 2)
        for (int i = 0; i < n; i++) lanes[i] += lanes[i + n];
    return lanes[0];
}

/* exp in the manner of Cephes (expf.c): 2^n times a polynomial; plain C that compilers make vectors of. Below -87: about 0. */
ALWAYS float exponential(float x) {
    x = x > 88.0f ? 88.0f : x;
    x = x < -87.0f ? -87.0f : x;
    float n = __builtin_rintf(x * 1.44269504088896341f);
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float scale;
    memcpy(&scale, &bits, 4);
    return p * scale;
}

ALWAYS float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

static float dot(const float *x, const float *y, int n) {
    VF sum = vf_set(0);
    int i = 0;
    for (; i + LANES <= n; i += LANES) sum = vf_fma(vf_load(x + i), vf_load(y + i), sum);
    float total = vf_sum(sum);
    for (; i < n; i++) total += x[i] * y[i];
    return total;
}

/* ---- products: tiles of floats ---- */

ALWAYS int64_t row_at(const Activations *a, int row) { return a->rows ? a->rows[row] : row; }

ALWAYS void put_tile(const VF *sums, const Matrix *m, int tile, float *out, int adds) {
    int first = tile * TILE, count = m->outputs - first < TILE ? m->outputs - first : TILE;
    if (count == TILE && !adds)
        for (int part = 0; part < PARTS; part++) vf_store(out + first + part * LANES, sums[part]);
    else if (count == TILE)
        for (int part = 0; part < PARTS; part++) vf_store(out + first + part * LANES, vf_add(vf_load(out + first + part * LANES), sums[part]));
    else {
        float values[TILE];
        for (int part = 0; part < PARTS; part++) vf_store(values + part * LANES, sums[part]);
        for (int i = 0; i < count; i++) out[first + i] = adds ? out[first + i] + values[i] : values[i];
    }
}

/* 16 outputs of `tiles` tiles for `rows` rows, one input after another: each output is one chain of fused multiply-adds. */
ALWAYS void float_tiles(int format, const Matrix *m, int tile, int tiles, const Activations *a, int row, int rows, float *out, int64_t stride,
                        int adds) {
    int64_t size = tile_bytes(format, m->inputs), step = format == F32 || format == BF16 ? 4 * TILE : 2 * TILE;
    const char *w = (const char *)m->data + tile * size;
    const float *x[6];
    VF sum[2][6][PARTS];
    for (int r = 0; r < rows; r++) x[r] = a->x + row_at(a, row + r) * a->stride;
    for (int t = 0; t < tiles; t++)
        for (int r = 0; r < rows; r++)
            for (int part = 0; part < PARTS; part++) sum[t][r][part] = vf_set(0);
    int pairs = format == BF16 ? m->inputs / 2 : m->inputs;
    for (int i = 0; i < pairs; i++)
        for (int t = 0; t < tiles; t++) {
            const char *at = w + t * size + i * step;
            __builtin_prefetch(at + AHEAD);
            VF v[2][PARTS];
            for (int part = 0; part < PARTS; part++)
                if (format == BF16) vf_bf16(at + part * 4 * LANES, &v[0][part], &v[1][part]);
                else v[0][part] = format == F32 ? vf_load((const float *)at + part * LANES) : vf_half(at + part * 2 * LANES);
            for (int r = 0; r < rows; r++)
                for (int k = 0; k < (format == BF16 ? 2 : 1); k++) {
                    VF by = vf_set(x[r][format == BF16 ? 2 * i + k : i]);
                    for (int part = 0; part < PARTS; part++) sum[t][r][part] = vf_fma(v[k][part], by, sum[t][r][part]);
                }
        }
    if (format == BF16 && m->inputs % 2)
        for (int t = 0; t < tiles; t++)
            for (int part = 0; part < PARTS; part++) {
                VF even, odd;
                vf_bf16(w + t * size + pairs * step + part * 4 * LANES, &even, &odd);
                for (int r = 0; r < rows; r++) sum[t][r][part] = vf_fma(even, vf_set(x[r][2 * pairs]), sum[t][r][part]);
            }
    for (int t = 0; t < tiles; t++)
        for (int r = 0; r < rows; r++) put_tile(sum[t][r], m, tile + t, out + (row + r) * stride, adds);
}

/* As many rows at once as registers have room for, and two tiles where they have: one alone waits for its own chains. */
ALWAYS void float_product(int format, const Matrix *m, int first, int last, const Activations *a, int rows, float *out, int64_t stride, int adds) {
    int end = (last + TILE - 1) / TILE, most = format == BF16 ? 5 : 6;
#define TILES(R) (R <= PAIR_ROWS && is_pair ? float_tiles(format, m, tile, 2, a, row, R, out, stride, adds) : \
                  (float_tiles(format, m, tile, 1, a, row, R, out, stride, adds), \
                   is_pair ? float_tiles(format, m, tile + 1, 1, a, row, R, out, stride, adds) : (void)0))
    for (int tile = first / TILE; tile < end; tile += 2) {
        int is_pair = tile + 2 <= end;
        for (int row = 0, now; row < rows; row += now) {
            int left = rows - row;
            now = left <= most ? left : left == 8 ? 4 : most;
            now == 1 ? TILES(1) : now == 2 ? TILES(2) : now == 3 ? TILES(3) : now == 4 ? TILES(4) : now == 5 ? TILES(5) : TILES(6);
        }
    }
#undef TILES
}

/* ---- products: tiles of quants ---- */

typedef struct {
    const int8_t *quants[ROWS];
    const float *scales[ROWS];
    const int16_t *sums[ROWS], *sums_32[ROWS];
} TileRows;

#define EACH_ROW for (int r = 0; r < rows; r++)
#define EACH_PART for (int part = 0; part < PARTS; part++)
#define VECTOR (LANES * 4) /* bytes */

/* Weights that are signed bytes, or codes for them; a scale for 32, or 16. `format` is one that is laid out as the matrix' own, which says what
 * codes mean. Parts come one after another: sums of all rows and the weights they share then fit into the registers. */
ALWAYS void bytes_tile(int format, int own, const uint8_t *w, int inputs, const TileRows *a, int rows, VF acc[ROWS][PARTS]) {
    Format f = format_of(format);
    VI table = vi_weights(vi_table(codes(own)));
    VF step = vf_set(step_of(own));
    int subs = f.inputs / 32, turns = f.scales == 18 ? 2 : 1, groups = 8 / turns, shared = 8 / f.low;
    for (int block = 0; block < inputs / 32; block += subs, w += block_bytes(format)) {
        const uint8_t *low = w + f.scales * TILE, *high = low + f.inputs / 8 * f.low * TILE;
        for (int sub = 0; sub < subs; sub++) EACH_PART {
            VI upper = vi_set(0);
            if (f.high) {
                const uint8_t *at = high + sub * 4 * TILE + part * VECTOR;
                if (part == 0) __builtin_prefetch(at + AHEAD);
                upper = vi_load(at);
            }
            for (int turn = 0; turn < turns; turn++) {
                VI sum[ROWS];
                EACH_ROW sum[r] = vi_start(turns == 1 ? a->sums_32[r][block + sub] : a->sums[r][(block + sub) * 2 + turn]);
                for (int i = 0; i < groups; i++) {
                    int group = turn * groups + i;
                    const uint8_t *at = low + (sub * (8 / shared) + group / shared) * 4 * TILE + part * VECTOR;
                    if (part == 0 && group % shared == 0) __builtin_prefetch(at + AHEAD);
                    VI v = vi_load(at);
                    if (format == Q8_0) v = vi_weights(v);
                    else {
                        v = vi_bits(v, group % shared * f.low, (1 << f.low) - 1);
                        if (f.high) v = vi_or(v, vi_bits(upper, group - f.low, 1 << f.low));
                        v = vi_lookup(table, v);
                    }
                    EACH_ROW sum[r] = vi_dot(sum[r], v, vi_four(a->quants[r] + (block + sub) * 32 + group * 4));
                }
                VF scale = format == MXFP4 ? vf_wide(w + part * LANES * 2) : vf_half(w + part * LANES * 2);
                if (f.scales > 2) scale = vf_mul(vf_mul(scale, step), vi_float(vi_signed(w + (2 + sub * turns + turn) * TILE + part * LANES)));
                EACH_ROW acc[r][part] = vf_add(acc[r][part], vf_mul(vi_float(sum[r]), vf_mul(scale, vf_set(a->scales[r][block + sub]))));
            }
        }
    }
}

/* 32 inputs with weights of 4 bits: group g and g + 1 in the halves of one byte. */
ALWAYS void nibbles(const uint8_t *w, const TileRows *a, int at, int rows, int part, VS sum[ROWS]) {
    EACH_ROW sum[r] = vs_zero();
    for (int pair = 0; pair < 4; pair++) {
        if (part == 0) __builtin_prefetch(w + AHEAD + pair * 4 * TILE);
        VI both = vi_load(w + pair * 4 * TILE + part * VECTOR), low = vi_bits(both, 0, 15), high = vi_bits(both, 4, 15);
        EACH_ROW {
            sum[r] = vs_dot(sum[r], low, vi_four(a->quants[r] + at + pair * 8));
            sum[r] = vs_dot(sum[r], high, vi_four(a->quants[r] + at + pair * 8 + 4));
        }
    }
}

/* 32 inputs with weights of 5 bits, too much for sums of 16 bits; the fifth ones are in a plane of their own. */
ALWAYS void fives(const uint8_t *w, const TileRows *a, int at, int rows, int part, VI sum[ROWS]) {
    VI upper = vi_load(w + 16 * TILE + part * VECTOR);
    if (part == 0) __builtin_prefetch(w + AHEAD + 16 * TILE);
    EACH_ROW sum[r] = vi_set(0);
    for (int group = 0; group < 8; group++) {
        if (part == 0 && group % 2 == 0) __builtin_prefetch(w + AHEAD + group * 2 * TILE);
        VI v = vi_bits(vi_load(w + group / 2 * 4 * TILE + part * VECTOR), group % 2 * 4, 15);
        v = vi_or(v, vi_bits(upper, group - 4, 16));
        EACH_ROW sum[r] = vi_dot(sum[r], v, vi_four(a->quants[r] + at + group * 4));
    }
}

/* A block: d, with 8 or 16 added to the weights, or d and what all of them have added. */
ALWAYS void nibbles_tile(int format, const uint8_t *w, int inputs, const TileRows *a, int rows, VF acc[ROWS][PARTS]) {
    Format f = format_of(format);
    for (int block = 0; block < inputs / 32; block++, w += block_bytes(format)) EACH_PART {
        VI sum[ROWS];
        if (f.high) fives(w + f.scales * TILE, a, block * 32, rows, part, sum);
        else {
            VS sums[ROWS];
            nibbles(w + f.scales * TILE, a, block * 32, rows, part, sums);
            EACH_ROW sum[r] = vs_sum(sums[r]);
        }
        VF d = vf_half(w + part * LANES * 2), least = vf_half(w + 2 * TILE + part * LANES * 2);
        EACH_ROW {
            int of_others = a->sums_32[r][block];
            VF by = vf_set(a->scales[r][block]), value;
            if (f.scales == 2) value = vf_mul(vi_float(vi_sub(sum[r], vi_set((f.high ? 16 : 8) * of_others))), vf_mul(d, by));
            else value = vf_mul(vf_add(vf_mul(d, vi_float(sum[r])), vf_mul(least, vf_set((float)of_others))), by);
            acc[r][part] = vf_add(acc[r][part], value);
        }
    }
}

/* Adds d * scaled - dmin * minima, both of them exact integers, times the activations' scale. */
ALWAYS void k_block(const uint8_t *w, const TileRows *a, int block, int rows, int part, int has_minima, const VI *scaled, const VI *minima,
                    VF acc[ROWS][PARTS]) {
    VF d = vf_half(w + part * LANES * 2), dmin = vf_set(0);
    if (has_minima) dmin = vf_mul(vf_half(w + 2 * TILE + part * LANES * 2), vf_set(-1));
    EACH_ROW {
        VF value = vf_mul(d, vi_float(scaled[r]));
        if (has_minima) value = vf_add(value, vf_mul(dmin, vi_float(minima[r])));
        acc[r][part] = vf_add(acc[r][part], vf_mul(value, vf_set(a->scales[r][block])));
    }
}

/* Sum of minima times the sums of activations, two of them a pair. */
ALWAYS void minima_of(const uint8_t *pairs, const int16_t *const *sums, int at, int count, int rows, int part, VI *minima) {
    EACH_ROW minima[r] = vi_set(0);
    for (int pair = 0; pair < count / 2; pair++) {
        VI m = vp_unsigned(pairs + pair * 2 * TILE + part * LANES * 2);
        EACH_ROW minima[r] = vi_add(minima[r], vp_dot(m, sums[r] + at + 2 * pair));
    }
}

/* A block: d, dmin (halves), scales and minima (pairs of bytes), weights. */
ALWAYS void q4_k_tile(const uint8_t *w, int inputs, const TileRows *a, int rows, VF acc[ROWS][PARTS]) {
    for (int block = 0; block < inputs / 256; block++, w += block_bytes(Q4_K)) EACH_PART {
        const uint8_t *scales = w + 4 * TILE, *weights = scales + 16 * TILE;
        VI scaled[ROWS], minima[ROWS];
        EACH_ROW scaled[r] = vi_set(0);
        for (int pair = 0; pair < 4; pair++) {
            VI pairs = vp_unsigned(scales + pair * 2 * TILE + part * LANES * 2);
            for (int sub = 0; sub < 2; sub++) {
                VS sum[ROWS];
                nibbles(weights + (pair * 2 + sub) * 16 * TILE, a, block * 256 + pair * 64 + sub * 32, rows, part, sum);
                VI scale = sub ? vp_second(pairs) : vp_first(pairs);
                EACH_ROW scaled[r] = vi_add(scaled[r], vs_scaled(sum[r], scale));
            }
        }
        minima_of(scales + 8 * TILE, a->sums_32, block * 8, 8, rows, part, minima);
        k_block(w, a, block, rows, part, 1, scaled, minima, acc);
    }
}

/* Types with a scale for 16 weights, which have 4 (Q3_K) or 32 (Q6_K) added where scales are signed. A block: d, or d and dmin (halves); scales,
 * and minima of 16 (Q2_K) or 32 (Q5_K); two planes of weights, or one (Q2_K). */
ALWAYS void sixteens_tile(int format, const uint8_t *w, int inputs, const TileRows *a, int rows, VF acc[ROWS][PARTS]) {
    Format f = format_of(format);
    int has_minima = format == Q2_K || format == Q5_K;
    for (int block = 0; block < inputs / 256; block++, w += block_bytes(format)) EACH_PART {
        const uint8_t *scales = w + (has_minima ? 4 : 2) * TILE, *low = w + f.scales * TILE, *high = low + 32 * f.low * TILE;
        VI scaled[ROWS], others[ROWS];
        EACH_ROW scaled[r] = others[r] = vi_set(0);
        for (int pair = 0; pair < 8; pair++) {
            const uint8_t *at = scales + pair * 2 * TILE + part * LANES * 2;
            VI pairs = has_minima ? vp_unsigned(at) : vp_signed(at);
            if (!has_minima) EACH_ROW others[r] = vi_add(others[r], vp_dot(pairs, a->sums[r] + block * 16 + 2 * pair));
            for (int sub = 0; sub < 2; sub++) {
                VI scale = sub ? vp_second(pairs) : vp_first(pairs);
                int sixteen = pair * 2 + sub, first_high = f.high == 1 ? sub * 4 : 0;
                const uint8_t *upper_at = high + (f.high == 1 ? pair : sixteen) * 4 * TILE + part * VECTOR;
                if (f.high && part == 0) __builtin_prefetch(upper_at + AHEAD);
                VI upper = f.high ? vi_load(upper_at) : vi_set(0);
                VS sum[ROWS];
                EACH_ROW sum[r] = vs_zero();
                for (int two = 0; two < 2; two++) {
                    const uint8_t *both_at = low + (f.low == 4 ? sixteen * 2 + two : sixteen) * 4 * TILE + part * VECTOR;
                    if (part == 0) __builtin_prefetch(both_at + AHEAD);
                    VI both = vi_load(both_at), v[2];
                    for (int i = 0; i < 2; i++) {
                        int group = two * 2 + i;
                        v[i] = vi_bits(both, group * f.low % 8, (1 << f.low) - 1);
                        if (f.high) v[i] = vi_or(v[i], vi_bits(upper, (first_high + group) * f.high - f.low, ((1 << f.high) - 1) << f.low));
                    }
                    EACH_ROW {
                        const int8_t *q = a->quants[r] + block * 256 + sixteen * 16 + two * 8;
                        sum[r] = vs_dot(vs_dot(sum[r], v[0], vi_four(q)), v[1], vi_four(q + 4));
                        if (two == 1 || (f.low == 4 && GROUPS_OF_SIX == 2)) {
                            scaled[r] = vi_add(scaled[r], vs_scaled(sum[r], scale));
                            sum[r] = vs_zero();
                        }
                    }
                }
            }
        }
        if (format == Q2_K) minima_of(scales + 16 * TILE, a->sums, block * 16, 16, rows, part, others);
        else if (format == Q5_K) minima_of(scales + 16 * TILE, a->sums_32, block * 8, 8, rows, part, others);
        else EACH_ROW scaled[r] = vi_sub(scaled[r], vi_up(others[r], format == Q3_K ? 2 : 5));
        k_block(w, a, block, rows, part, has_minima, scaled, others, acc);
    }
}

ALWAYS void tile_rows(const Matrix *m, int tile, const Activations *a, int row, int rows, float *out, int64_t stride, int adds) {
    int inputs = m->inputs, num_scales = inputs / format_of(m->format).other;
    TileRows of;
    EACH_ROW {
        int64_t at = row_at(a, row + r);
        of.quants[r] = a->quants + at * inputs;
        of.scales[r] = a->scales + at * num_scales;
        of.sums[r] = a->sums + at * (inputs / 16);
        of.sums_32[r] = a->sums_32 + at * (inputs / 32);
    }
    VF acc[ROWS][PARTS];
    EACH_ROW EACH_PART acc[r][part] = vf_set(0);
    const uint8_t *w = (const uint8_t *)m->data + tile * tile_bytes(m->format, inputs);
    switch (m->format) {
    case Q8_0: bytes_tile(Q8_0, Q8_0, w, inputs, &of, rows, acc); break;
    case Q4_0: nibbles_tile(Q4_0, w, inputs, &of, rows, acc); break;
    case Q4_1: nibbles_tile(Q4_1, w, inputs, &of, rows, acc); break;
    case Q5_0: nibbles_tile(Q5_0, w, inputs, &of, rows, acc); break;
    case Q5_1: nibbles_tile(Q5_1, w, inputs, &of, rows, acc); break;
    case IQ4_NL: bytes_tile(IQ4_NL, IQ4_NL, w, inputs, &of, rows, acc); break;
    case MXFP4: bytes_tile(MXFP4, MXFP4, w, inputs, &of, rows, acc); break;
    case IQ4_XS:
    case IQ3_XXS:
    case IQ3_S: bytes_tile(IQ4_XS, m->format, w, inputs, &of, rows, acc); break;
    case IQ1_S:
    case IQ2_XXS: bytes_tile(IQ2_XXS, m->format, w, inputs, &of, rows, acc); break;
    case IQ1_M:
    case IQ2_XS:
    case IQ2_S: bytes_tile(IQ2_S, m->format, w, inputs, &of, rows, acc); break;
    case Q2_K: sixteens_tile(Q2_K, w, inputs, &of, rows, acc); break;
    case Q3_K: sixteens_tile(Q3_K, w, inputs, &of, rows, acc); break;
    case Q4_K: q4_k_tile(w, inputs, &of, rows, acc); break;
    case Q5_K: sixteens_tile(Q5_K, w, inputs, &of, rows, acc); break;
    default: sixteens_tile(Q6_K, w, inputs, &of, rows, acc);
    }
    EACH_ROW put_tile(acc[r], m, tile, out + (row + r) * stride, adds);
}

static __attribute__((noinline)) void tile_1(const Matrix *m, int t, const Activations *a, int row, float *out, int64_t stride, int adds) {
    tile_rows(m, t, a, row, 1, out, stride, adds);
}
static __attribute__((noinline)) void tile_2(const Matrix *m, int t, const Activations *a, int row, float *out, int64_t stride, int adds) {
    tile_rows(m, t, a, row, 2, out, stride, adds);
}
static __attribute__((noinline)) void tile_3(const Matrix *m, int t, const Activations *a, int row, float *out, int64_t stride, int adds) {
    tile_rows(m, t, a, row, 3, out, stride, adds);
}
static __attribute__((noinline)) void tile_4(const Matrix *m, int t, const Activations *a, int row, float *out, int64_t stride, int adds) {
    tile_rows(m, t, a, row, 4, out, stride, adds);
}

/* Outputs [first, last) of every row; first is a multiple of TILE. */
static void product(const Matrix *m, int first, int last, const Activations *a, int rows, float *out, int64_t stride, int adds) {
    if (m->format == F32) float_product(F32, m, first, last, a, rows, out, stride, adds);
    else if (m->format == F16) float_product(F16, m, first, last, a, rows, out, stride, adds);
    else if (m->format == BF16) float_product(BF16, m, first, last, a, rows, out, stride, adds);
    else
        for (int tile = first / TILE; tile * TILE < last; tile++)
            for (int row = 0; row < rows;) {
                int left = rows - row;
                switch (left < ROWS ? left : ROWS) {
                case 1: tile_1(m, tile, a, row, out, stride, adds); break;
                case 2: tile_2(m, tile, a, row, out, stride, adds); break;
                case 3: tile_3(m, tile, a, row, out, stride, adds); break;
                default: tile_4(m, tile, a, row, out, stride, adds);
                }
                row += left < ROWS ? left : ROWS;
            }
}

/* ---- activations for products ---- */

/* Bytes with one scale for `block` values (32 as Q8_0, 256 as Q8_K in ggml), and the sums of 16. */
static void quantise(const float *x, int n, int block, int8_t *quants, float *scales, int16_t *sums, int16_t *sums_32) {
    for (int at = 0; at < n; at += block) {
        int32_t highest = 0;
        for (int i = 0; i < block; i++) {
            int32_t bits;
            memcpy(&bits, x + at + i, 4);
            bits &= 0x7fffffff;
            highest = bits > highest ? bits : highest;
        }
        float most;
        memcpy(&most, &highest, 4);
        float inverse = most > 0 ? 127.0f / most : 0;
        scales[at / block] = most / 127.0f;
        for (int i = 0; i < block; i++) quants[at + i] = (int8_t)(int32_t)__builtin_rintf(x[at + i] * inverse);
        for (int i = 0; i < block; i += 16) {
            int sum = 0;
            for (int j = 0; j < 16; j++) sum += quants[at + i + j];
            sums[(at + i) / 16] = (int16_t)sum;
        }
        for (int i = at / 32; i < (at + block) / 32; i++) sums_32[i] = (int16_t)(sums[2 * i] + sums[2 * i + 1]);
    }
}

/* ---- everything else ---- */

static void norm(const float *x, const float *weight, float *out, int n, float eps) {
    float scale = 1.0f / sqrtf(dot(x, x, n) / (float)n + eps);
    for (int i = 0; i < n; i++) out[i] = x[i] * scale * weight[i];
}

static void swiglu(float *gate, const float *up, int n) {
    for (int i = 0; i < n; i++) gate[i] = gate[i] * sigmoid(gate[i]) * up[i];
}

static void gate(const float *x, const float *by, float *out, int n) {
    for (int i = 0; i < n; i++) out[i] = x[i] * sigmoid(by[i]);
}

static void rotate(float *x, const float *cos, const float *sin, int half_dim) {
    for (int i = 0; i < half_dim; i++) {
        float first = x[i], second = x[half_dim + i];
        x[i] = first * cos[i] - second * sin[i];
        x[half_dim + i] = second * cos[i] + first * sin[i];
    }
}

/* Scores of a query with the 8 keys from `keys` on. */
ALWAYS void scores_of(const float *q, const float *keys, int dim, float *scores) {
    VF sum[8];
    for (int p = 0; p < 8; p++) sum[p] = vf_set(0);
    int i = 0;
    for (; i + LANES <= dim; i += LANES) {
        VF x = vf_load(q + i);
        for (int p = 0; p < 8; p++) sum[p] = vf_fma(x, vf_load(keys + p * dim + i), sum[p]);
    }
    vf_sum_8(sum, scores);
    for (; i < dim; i++)
        for (int p = 0; p < 8; p++) scores[p] += q[i] * keys[p * dim + i];
}

/* Adds a page's values, `count` of them, by the scores of up to 4 queries, from column `at` on: so many vectors of columns at once as long as
 * there are so many. Returns the first column that is left. One position after another: it is the same sum however many columns there are. */
ALWAYS int values_of(const float *scores, int64_t stride, int queries, int vectors, const float *values, int count, int dim, int at, float *out) {
    VF sum[4][8];
    for (; at + vectors * LANES <= dim; at += vectors * LANES) {
        for (int g = 0; g < queries; g++)
            for (int i = 0; i < vectors; i++) sum[g][i] = vf_load(out + g * dim + at + i * LANES);
        for (int p = 0; p < count; p++)
            for (int i = 0; i < vectors; i++) {
                VF value = vf_load(values + (int64_t)p * dim + at + i * LANES);
                for (int g = 0; g < queries; g++) sum[g][i] = vf_fma(value, vf_set(scores[g * stride + p]), sum[g][i]);
            }
        for (int g = 0; g < queries; g++)
            for (int i = 0; i < vectors; i++) vf_store(out + g * dim + at + i * LANES, sum[g][i]);
    }
    return at;
}

/* All query heads of one key-value head, one row, over positions [first, last), of which the first begins a page: q [group, D] scaled; scores holds
 * as many floats, rounded up to 8, for each of them. */
static void attend(const float *q, int group, const Span *s, const float *keys, const float *values, int64_t page_size, int first, int last, int dim,
                   float *scores, Attended *out) {
    int seen = last - first;
    int64_t stride = (seen + 7) / 8 * 8;
    const int32_t *table = s->table + first / PAGE;
    for (int p = 0; p < seen; p += 8) { /* keys after the last one seen are in the same page, and their scores are not used */
        const float *key = keys + table[p / PAGE] * page_size + (int64_t)(p % PAGE) * dim;
        for (int g = 0; g < group; g++) scores_of(q + g * dim, key, dim, scores + g * stride + p);
    }
    for (int g = 0; g < group; g++) {
        float *row = scores + g * stride, most = highest(row, seen), lanes[16] = {0}, total = 0;
        for (int p = 0; p < seen; p++) row[p] = exponential(row[p] - most);
        int p = 0;
        for (; p + 16 <= seen; p += 16)
            for (int i = 0; i < 16; i++) lanes[i] += row[p + i];
        for (; p < seen; p++) lanes[p % 16] += row[p];
        for (int i = 0; i < 16; i++) total += lanes[i];
        out->most[g] = most, out->total[g] = total;
    }
    memset(out->sums, 0, sizeof(float) * (size_t)group * dim);
    for (int begin = 0; begin < seen; begin += PAGE) {
        const float *page = values + table[begin / PAGE] * page_size;
        int here = seen - begin < PAGE ? seen - begin : PAGE;
        for (int g = 0; g < group; g += 4) {
            int count = group - g < 4 ? group - g : 4, at = 0;
            const float *from = scores + g * stride + begin;
            float *to = out->sums + g * dim;
#define VALUES(Q, V) at = values_of(from, stride, Q, V, page, here, dim, at, to)
            switch (count) {
            case 1: VALUES(1, SUMS < 8 ? SUMS : 8), VALUES(1, 1); break;
            case 2: VALUES(2, SUMS / 2), VALUES(2, 1); break;
            case 3: VALUES(3, SUMS / 4), VALUES(3, 1); break;
            default: VALUES(4, SUMS / 4), VALUES(4, 1);
            }
#undef VALUES
            for (; at < dim; at++)
                for (int i = 0; i < count; i++)
                    for (int p = 0; p < here; p++) to[i * dim + at] += page[(int64_t)p * dim + at] * from[i * stride + p];
        }
    }
}

/* What later positions say is added to what those before them do. */
static void join(Attended *one, const Attended *other, int group, int dim) {
    for (int g = 0; g < group; g++) {
        float most = one->most[g] > other->most[g] ? one->most[g] : other->most[g];
        float by = exponential(one->most[g] - most), its = exponential(other->most[g] - most);
        for (int i = g * dim; i < (g + 1) * dim; i++) one->sums[i] = one->sums[i] * by + other->sums[i] * its;
        one->most[g] = most, one->total[g] = one->total[g] * by + other->total[g] * its;
    }
}

/* silu of a causal convolution of channels [first, first + n): one row of it. `columns` are the width rows it sees, oldest first. */
static void convolve(const float *const *columns, const float *weight, int width, int channels, int first, int n, float *out) {
    for (int i = 0; i < n; i++) out[i] = columns[0][first + i] * weight[first + i];
    for (int tap = 1; tap < width; tap++)
        for (int i = 0; i < n; i++) out[i] += columns[tap][first + i] * weight[(int64_t)tap * channels + first + i];
    for (int i = 0; i < n; i++) out[i] = out[i] * sigmoid(out[i]);
}

static void normalise(float *x, int n, float scale) {
    float by = 1.0f / sqrtf(dot(x, x, n) + 1e-6f);
    for (int i = 0; i < n; i++) x[i] = x[i] * by * scale;
}

/* The gated delta rule (arXiv:2412.06464) over rows, on PANEL columns of one head's state:
 *     S = decay S;  S += k (x) beta (v - k S);  out = q S
 * `panel` is [dk, PANEL]. One pass a row: while row t is written and its output [PANEL] made, what row t + 1 reads [PANEL] is summed up. */
static void delta_read(const float *panel, const float *k, int dk, float *read) {
    VF sum[PANEL / LANES];
    for (int i = 0; i < PANEL / LANES; i++) sum[i] = vf_set(0);
    for (int j = 0; j < dk; j++)
        for (int i = 0; i < PANEL / LANES; i++) sum[i] = vf_fma(vf_load(panel + j * PANEL + i * LANES), vf_set(k[j]), sum[i]);
    for (int i = 0; i < PANEL / LANES; i++) vf_store(read + i * LANES, sum[i]);
}

static void delta_row(float *panel, const DeltaRows *x, int t, const float *next_k, float *read, float *out) {
    const float *k = x->k + (int64_t)t * x->dk, *q = x->q + (int64_t)t * x->dk, *v = x->v + t * x->v_stride;
    VF decay = vf_set(x->decay[t]), write[PANEL / LANES], sum[PANEL / LANES], next[PANEL / LANES];
    float w[PANEL];
    for (int i = 0; i < PANEL; i++) w[i] = x->beta[t] * (v[i] - x->decay[t] * read[i]);
    for (int i = 0; i < PANEL / LANES; i++) write[i] = vf_load(w + i * LANES), sum[i] = next[i] = vf_set(0);
    for (int j = 0; j < x->dk; j++)
        for (int i = 0; i < PANEL / LANES; i++) {
            float *at = panel + j * PANEL + i * LANES;
            VF s = vf_fma(vf_set(k[j]), write[i], vf_mul(decay, vf_load(at)));
            vf_store(at, s);
            sum[i] = vf_fma(s, vf_set(q[j]), sum[i]);
            next[i] = vf_fma(s, vf_set(next_k[j]), next[i]);
        }
    for (int i = 0; i < PANEL / LANES; i++) vf_store(out + i * LANES, sum[i]), vf_store(read + i * LANES, next[i]);
}

/* ---- likelihood ---- */

/* softmax(logits)[of] */
static float share(const float *logits, int64_t n, int64_t of) {
    enum { WIDE = 16 };
    float sums[WIDE] = {0}, most = highest(logits, n), sum = 0;
    int64_t i = 0;
    for (; i + WIDE <= n; i += WIDE)
        for (int j = 0; j < WIDE; j++) sums[j] += exponential(logits[i + j] - most);
    for (; i < n; i++) sums[0] += exponential(logits[i] - most);
    for (int j = 0; j < WIDE; j++) sum += sums[j];
    return exponential(logits[of] - most) / sum;
}

const Kernels SUFFIX = {
    .product = product, .quantise = quantise, .norm = norm, .swiglu = swiglu, .gate = gate, .rotate = rotate, .attend = attend, .join = join,
    .convolve = convolve, .normalise = normalise, .delta_read = delta_read, .delta_row = delta_row,
    .share = share,
};
