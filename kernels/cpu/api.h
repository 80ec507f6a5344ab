/* The C interface that Python calls, and what its files share. */
#ifndef FORERUN_API_H
#define FORERUN_API_H

#include "kernels_table.h"
#include "pool.h"

#define API __attribute__((visibility("default")))

/* The instruction set to use: "" for the best this processor has, or avx512, avx2, neon, portable. Returns its name, NULL if it cannot be. */
API const char *forerun_use(const char *name);
/* Bytes of a matrix once repacked; inputs are whole blocks of its format. */
API int64_t forerun_packed_bytes(int format, int64_t outputs, int64_t inputs);
/* Repacks the blocks of a file into tiles. 0, or -1 when memory ran out. */
API int forerun_pack(int format, int outputs, int inputs, const void *raw, void *tiles, int num_threads);
/* Runs a program over all rows of a call. 0, or -1 when memory ran out, and then nothing has been touched. */
API int forerun_run(const Call *call, int num_threads);

/* How tokens are chosen: SamplingParams, but for what changes the logits. Temperature is above 0. */
typedef struct {
    double temperature, top_p, min_p;
    int64_t top_k;
    uint64_t seed;
} Sampling;
/* The tokens at `position`... from logits [rows, size]. 0, or -1 when memory ran out. */
API int forerun_draw(const float *logits, int num_rows, int64_t size, const Sampling *sampling, uint64_t position, int64_t *tokens);

/* One output's weights, as float32. */
void row_of(const Matrix *m, int output, float *out);

#endif
