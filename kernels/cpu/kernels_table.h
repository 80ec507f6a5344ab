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

static inline int64_t tile_bytes(int format, int64_t inputs) {
    switch (format) {
    case F32: return inputs * TILE * 4;
    case F16: return inputs * TILE * 2;
    case BF16: return (inputs + 1) / 2 * TILE * 4;
    case Q8_0: return inputs / 32 * Q8_0_BYTES;
    case Q4_0: return inputs / 32 * Q4_0_BYTES;
    case Q4_K: return inputs / 256 * Q4_K_BYTES;
    case Q5_K: return inputs / 256 * Q5_K_BYTES;
    default: return inputs / 256 * Q6_K_BYTES;
    }
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
