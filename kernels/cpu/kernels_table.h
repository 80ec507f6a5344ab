/* What each instruction set offers: the functions of kernels.h, and what they share with program.c and pack.c. */
#ifndef FORERUN_KERNELS_TABLE_H
#define FORERUN_KERNELS_TABLE_H

#include "forerun.h"
#include <math.h>
#include <string.h>

/* Rows of the gated delta rule for one head: q, k [rows, dk]; v [rows, v_stride], of which PANEL columns count. */
typedef struct {
    const float *q, *k, *v, *decay, *beta;
    int dk;
    int64_t v_stride;
} DeltaRows;

/* What some positions say to the query heads of a key-value head: sums of values by exp(score - most), [group, D], and of those, [group]. */
typedef struct {
    float *sums, *most, *total;
} Attended;

typedef struct {
    void (*product)(const Matrix *m, int first, int last, const Activations *a, int rows, float *out, int64_t stride, int adds);
    void (*quantise)(const float *x, int n, int block, int8_t *quants, float *scales, int16_t *sums, int16_t *sums_32);
    void (*norm)(const float *x, const float *weight, float *out, int n, float eps);
    void (*swiglu)(float *gate, const float *up, int n);
    void (*gate)(const float *x, const float *by, float *out, int n);
    void (*rotate)(float *x, const float *cos, const float *sin, int half_dim);
    void (*attend)(const float *q, int group, const Span *s, const float *keys, const float *values, int64_t page_size, int first, int last, int dim,
                   float *scores, Attended *out);
    void (*join)(Attended *one, const Attended *other, int group, int dim);
    void (*convolve)(const float *const *columns, const float *weight, int width, int channels, int first, int n, float *out);
    void (*normalise)(float *x, int n, float scale);
    void (*delta_read)(const float *panel, const float *k, int dk, float *read);
    void (*delta_row)(float *panel, const DeltaRows *x, int t, const float *next_k, float *read, float *out);
    float (*share)(const float *logits, int64_t n, int64_t of);
} Kernels;

/* A block of a format: how many inputs, bytes in a file, and in a tile, of each output, bytes of scales before the weights, bits of a weight
 * in the first plane of weights, and in the second; and for how many inputs the other side of a product has a scale (0: it is in floats). */
typedef struct {
    int inputs, bytes, scales, low, high, other;
} Format;

static inline Format format_of(int format) {
    switch (format) {
    case F32: return (Format){1, 4, 0, 32, 0, 0};
    case F16: return (Format){1, 2, 0, 16, 0, 0};
    case BF16: return (Format){2, 4, 0, 16, 0, 0};
    case Q8_0: return (Format){32, 34, 2, 8, 0, 32};
    case Q4_0: return (Format){32, 18, 2, 4, 0, 32};
    case Q4_1: return (Format){32, 20, 4, 4, 0, 32};
    case Q5_0: return (Format){32, 22, 2, 4, 1, 32};
    case Q5_1: return (Format){32, 24, 4, 4, 1, 32};
    case IQ4_NL: return (Format){32, 18, 2, 4, 0, 32};
    case IQ4_XS: return (Format){256, 136, 10, 4, 0, 32};
    case MXFP4: return (Format){32, 17, 2, 4, 0, 32};
    case Q2_K: return (Format){256, 84, 36, 2, 0, 256};
    case Q3_K: return (Format){256, 110, 18, 2, 1, 256};
    case Q4_K: return (Format){256, 144, 20, 4, 0, 256};
    case Q5_K: return (Format){256, 176, 28, 4, 2, 256};
    case Q6_K: return (Format){256, 210, 18, 4, 2, 256};
    case IQ1_S: return (Format){256, 50, 10, 2, 1, 32};
    case IQ1_M: return (Format){256, 56, 18, 2, 1, 32};
    case IQ2_XXS: return (Format){256, 66, 10, 2, 1, 32};
    case IQ2_XS: return (Format){256, 74, 18, 2, 1, 32};
    case IQ2_S: return (Format){256, 82, 18, 2, 1, 32};
    case IQ3_XXS: return (Format){256, 98, 10, 4, 0, 32};
    default: return (Format){256, 110, 10, 4, 0, 32};
    }
}

/* Bytes of a block of a tile. */
static inline int64_t block_bytes(int format) {
    Format f = format_of(format);
    return (f.scales + f.inputs * (f.low + f.high) / 8) * TILE;
}

static inline int64_t tile_bytes(int format, int64_t inputs) {
    int of = format_of(format).inputs;
    return (inputs + of - 1) / of * block_bytes(format);
}

/* What quants of 3 or 4 bits stand for where they are codes (ggml's kvalues_iq4nl and kvalues_mxfp4; formats/grids.py), in steps of: */
static inline const int8_t *codes(int format) {
    static const int8_t iq4[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
    static const int8_t mxfp4[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    static const int8_t iq1[16] = {-7, 1, 9, 0, -9, -1, 7}, iq2[16] = {8, 25, 43, 0, -8, -25, -43};
    static const int8_t iq3_xxs[16] = {4, 12, 20, 28, 36, 44, 52, 62, -4, -12, -20, -28, -36, -44, -52, -62};
    static const int8_t iq3_s[16] = {1, 3, 5, 7, 9, 11, 13, 15, -1, -3, -5, -7, -9, -11, -13, -15};
    switch (format) {
    case MXFP4: return mxfp4;
    case IQ1_S:
    case IQ1_M: return iq1;
    case IQ2_XXS:
    case IQ2_XS:
    case IQ2_S: return iq2;
    case IQ3_XXS: return iq3_xxs;
    case IQ3_S: return iq3_s;
    default: return iq4;
    }
}

static inline float step_of(int format) { return format < IQ1_S || format == IQ3_S ? 1 : format == IQ3_XXS ? 0.25f : 0.125f; }

static inline float highest(const float *x, int64_t n) {
    enum { WIDE = 16 };
    float lanes[WIDE], most;
    int64_t i = 0;
    for (int j = 0; j < WIDE; j++) lanes[j] = x[0];
    for (; i + WIDE <= n; i += WIDE)
        for (int j = 0; j < WIDE; j++) lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
    for (; i < n; i++) lanes[0] = x[i] > lanes[0] ? x[i] : lanes[0];
    most = lanes[0];
    for (int j = 1; j < WIDE; j++) most = lanes[j] > most ? lanes[j] : most;
    return most;
}

/* An IEEE 754 half, at any address. */
static inline float half(const void *p) {
    uint16_t bits;
    memcpy(&bits, p, 2);
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3ff, whole;
    float x;
    if (exponent == 0) { /* zero or subnormal: a multiple of 2^-24 */
        x = (float)fraction * 5.9604644775390625e-8f;
        memcpy(&whole, &x, 4);
    } else
        whole = (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
    whole |= sign;
    memcpy(&x, &whole, 4);
    return x;
}

#endif
