/* The C interface that Python calls, and what its files share. */
#ifndef FORERUN_API_H
#define FORERUN_API_H

#include "kernels_table.h"
#include "pool.h"

#define API __attribute__((visibility("default")))

/* What this was compiled for, to be compared with what calls it: INTERFACE, which every change here changes, ARITHMETIC (backend.py), numbers and
 * sizes. */
#define INTERFACE 1
#define ARITHMETIC 2
#define NUM_LAYOUT 10
API void forerun_layout(int32_t layout[NUM_LAYOUT]);
/* The instruction set to use: "" for the best this processor has, or avx512, avx2, neon, portable. Returns its name, NULL if it cannot be. */
API const char *forerun_use(const char *name);
/* Bytes of a matrix once repacked; inputs are whole blocks of its format. */
API int64_t forerun_packed_bytes(int format, int64_t outputs, int64_t inputs);
/* Repacks the blocks of a file into tiles; `codebook` [entries, 8 or 4] is that of IQ1, IQ2 or IQ3. 0, or -1 when memory ran out. */
API int forerun_pack(int format, int outputs, int inputs, const void *raw, const void *codebook, void *tiles, int num_threads);
/* Runs a program over all rows of a call. 0, or -1 when memory ran out, and then nothing has been touched. */
API int forerun_run(const Call *call, int num_threads);

/* How a token is chosen: SamplingParams, but for what changes the logits. */
typedef struct {
    double temperature, top_p, min_p;
    int64_t top_k;
    uint64_t seed;
} Sampling;
/* The tokens at so many positions, from logits [rows, size], on as many threads as the last program. 0, or -1 when memory ran out. */
API int forerun_draw(const float *logits, int num_rows, int64_t size, const Sampling *sampling, const uint64_t *positions, int64_t *tokens);

/* What is drafted for a sequence: at most `limit` tokens, the likeliest ones if the temperature is 0; none after one that is less likely than
 * `least`, nor after those that are less likely together than `floor`. */
typedef struct {
    Sampling sampling;
    double floor, least;
    int32_t limit, reserved;
} Wanted;
/* Runs a head's program over the rows of a call, then over one row for each token drafted: that token, with the output before it in place of
 * a hidden row. Buffers: the hidden rows, which are given, the outputs and the logits of each sequence's last row, which are not. `counts`
 * [sequences] tells how many of tokens and shares [sequences, most] there are: a share is how likely the head held a token. 0, or -1 when
 * memory ran out. */
typedef struct {
    int32_t hidden, out, logits;
} HeadBuffers;
API int forerun_draft(const Call *call, int num_threads, HeadBuffers of, const Wanted *wanted, int most, int32_t *tokens, float *shares,
                      int32_t *counts);

/* Of the instruction set in use. */
extern const Kernels *kernels;
/* One output's weights, as float32. */
void row_of(const Matrix *m, int output, float *out);

#endif
