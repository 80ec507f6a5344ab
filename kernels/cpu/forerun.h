/* What the C kernels and Python agree on. Everything is little endian; floats are IEEE 754 singles.
 *
 * Rows (R), hidden sizes and head names are those of kernels/backend.py. */
#ifndef FORERUN_H
#define FORERUN_H

#include <stddef.h>
#include <stdint.h>

/* Formats of a matrix, all of them repacked into tiles (pack.c). Up to BF16 they are floats. */
enum {
    F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL, IQ4_XS, MXFP4, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K,
    IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S, NUM_FORMATS
};

/* Outputs of one tile of a repacked matrix, and of one unit of work. */
#define TILE 16
#define UNIT 32
/* Columns of a delta net's state that are worked on together. */
#define PANEL 32
/* Positions of one page of keys and values, as kernels/model/pages.py has it. */
#define PAGE 64

typedef struct {
    const void *data;
    int32_t format, outputs, inputs, reserved;
} Matrix;

/* Rows of activations, quantised where the format of a product asks for it. */
typedef struct {
    const int32_t *rows; /* which of them a product's rows are; NULL: the first ones */
    const float *x;      /* [rows, stride] */
    int64_t stride;
    int8_t *quants; /* [rows, inputs] */
    float *scales;  /* one for 32 or 256 inputs: [rows, inputs / 32] */
    int16_t *sums;  /* of 16 quants each: [rows, inputs / 16] */
    int16_t *sums_32;
} Activations;

/* One sequence's part of a batch. Strides count floats. */
enum { LOG, RING, CHUNK };
typedef struct {
    int64_t position;
    int32_t num_rows, num_kept; /* rows to compute; rows of the log to move the base over first */
    int32_t store, num_slots;   /* LOG, RING or CHUNK (the base moves over all rows); states in a ring */
    float *states;              /* [layers, Hv, dk, dv], or of a ring [slots, layers, Hv, dk, dv] */
    float *columns;             /* [layers, width - 1 + max_rows, channels] */
    float *b, *a;               /* [layers, max_rows, Hv] */
    int64_t columns_stride, gates_stride;
    float *keys, *values;       /* [layers, pages, KV, PAGE, D] */
    int64_t layer_stride;
    const int32_t *table;       /* its pages */
} Span;

typedef struct {
    int32_t hidden, heads, kv_heads, head_dim, rotary_dim;
    int32_t key_heads, value_heads, key_dim, value_dim, conv_width, num_delta;
    int32_t is_tiled; /* value head h reads key head h mod Hk, else h / (Hv / Hk) */
    float eps;
} Sizes;

/* A step of a program. Buffers are numbered; each holds [rows, its width]. */
enum { EMBED, NORM, LINEAR, SWIGLU, DELTA, COLUMNS, KEYS, ATTEND, ROUTE, EXPERTS_UP, EXPERTS_DOWN, MIX, LAST };
#define MAX_OUTPUTS 4
typedef struct {
    int32_t code, layer;
    int32_t in[MAX_OUTPUTS];         /* buffers */
    int32_t out[MAX_OUTPUTS];        /* buffers; of a LINEAR one a matrix */
    int32_t num_matrices, adds;      /* adds: to what `out` holds */
    int32_t offset, num_used;        /* first column of `out`; experts a row uses */
    int32_t is_last, reserved;       /* from LAST on: a buffer holds one row a span */
    const Matrix *matrices;          /* of experts: gate, up, down after one another, for each */
    const float *weights[4];
} Op;

typedef struct {
    const Sizes *sizes;
    const Op *ops;
    int32_t num_ops, num_buffers;
    const int32_t *widths; /* of the buffers */
    const int32_t *tokens; /* [rows]; -1 - i stands for row i of: */
    const float *rows;     /* [., width of what embeddings go into] */
    const float *cos, *sin; /* [rows, rotary_dim / 2], or `by_position` for positions from 0 on */
    const Span *spans;
    int32_t num_spans, num_rows, by_position, reserved;
    float **given; /* [num_buffers]: where a buffer is the caller's, else NULL */
} Call;

#endif
