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

typedef struct {
    void (*product)(const Matrix *m, int first, int last, const Activations *a, int rows, float *out, int64_t stride, int adds);
    void (*quantise)(const float *x, int n, int block, int8_t *quants, float *scales, int16_t *sums, int16_t *sums_32);
    void (*norm)(const float *x, const float *weight, float *out, int n, float eps);
    void (*swiglu)(float *gate, const float *up, int n);
    void (*gate)(const float *x, const float *by, float *out, int n);
    void (*rotate)(float *x, const float *cos, const float *sin, int half_dim);
    void (*attend)(const float *q, int group, const Span *s, const float *keys, const float *values, int64_t page_size, int seen, int dim,
                   float *scores, float *out);
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
    case IQ4_NL: return (Format){32, 18, 2, 4, 0, 32};
    case IQ4_XS: return (Format){256, 136, 10, 4, 0, 32};
    case MXFP4: return (Format){32, 17, 2, 4, 0, 32};
    case Q2_K: return (Format){256, 84, 36, 2, 0, 256};
    case Q3_K: return (Format){256, 110, 18, 2, 1, 256};
    case Q4_K: return (Format){256, 144, 20, 4, 0, 256};
    case Q5_K: return (Format){256, 176, 28, 4, 2, 256};
    default: return (Format){256, 210, 18, 4, 2, 256};
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

/* What quants of 4 bits stand for in IQ4_NL and IQ4_XS, and in MXFP4 (ggml's kvalues_iq4nl and kvalues_mxfp4). */
static inline const int8_t *codes(int format) {
    static const int8_t iq4[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
    static const int8_t mxfp4[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    return format == MXFP4 ? mxfp4 : iq4;
}

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
