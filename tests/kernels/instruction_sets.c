/* Every instruction set of this processor against plain C, without Python: run by test_cpu.py natively and, where there are a cross
 * compiler and an emulator, for processors that are not there. Prints the sets compared. Exit status 1: they differ. */
#include "api.h"

#include <stdio.h>
#include <stdlib.h>

static uint64_t seed = 88172645463325252u;
static uint32_t draw(void) { /* xorshift64 */
    seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
    return (uint32_t)(seed >> 32);
}
static float normal(void) { return ((float)(draw() % 2001) - 1000) / 700; }

enum { OUTPUTS = 45, INPUTS = 512, MOST = 7 };
/* Where a block has halves. */
static const int halves[NUM_FORMATS][2] = {
    [F32] = {-1}, [F16] = {0, 0}, [BF16] = {-1}, [Q8_0] = {0, 0}, [Q4_0] = {0, 0}, [Q4_1] = {0, 2}, [Q5_0] = {0, 0}, [Q5_1] = {0, 2}, [IQ4_NL] = {0, 0}, [IQ4_XS] = {0, 0},
    [MXFP4] = {-1}, [Q2_K] = {80, 82}, [Q3_K] = {108, 108}, [Q4_K] = {0, 2}, [Q5_K] = {0, 2}, [Q6_K] = {208, 208}, [IQ1_M] = {-1},
};

int main(void) {
    static const char *names[] = {"portable", "avx512", "avx2", "neon"};
    static float results[NUM_FORMATS][MOST][OUTPUTS], x[MOST][INPUTS], y[MOST][OUTPUTS];
    int failed = 0;
    for (int r = 0; r < MOST; r++)
        for (int i = 0; i < INPUTS; i++) x[r][i] = normal() * (r == 3 ? 1e-3f : 1);
    uint8_t *raw[NUM_FORMATS], *tiles[NUM_FORMATS], codebook[2048 * 8];
    for (size_t i = 0; i < sizeof codebook; i++) codebook[i] = (uint8_t)(draw() % 3);
    for (int format = 0; format < NUM_FORMATS; format++) {
        Format f = format_of(format);
        int blocks = OUTPUTS * INPUTS / f.inputs;
        raw[format] = malloc((size_t)blocks * f.bytes);
        for (int b = 0; b < blocks; b++) {
            uint8_t *block = raw[format] + (size_t)b * f.bytes;
            for (int i = 0; i < f.bytes; i++) block[i] = (uint8_t)draw();
            float value = normal(), two[2] = {normal(), normal()};
            uint32_t bits[2];
            memcpy(bits, two, 8);
            uint16_t upper[2] = {(uint16_t)(bits[0] >> 16), (uint16_t)(bits[1] >> 16)}, one_and_some = (uint16_t)(0x3800 | (draw() & 0x83ff)); /* a half of 0.5 to 1 */
            if (format == F32) memcpy(block, &value, 4);
            if (format == BF16) memcpy(block, upper, 4);
            if (format == MXFP4) block[0] = (uint8_t)(118 + draw() % 14);
            if (format == IQ1_M) /* its half lies in four words */
                for (int i = 0; i < 4; i++) block[49 + 2 * i] = (uint8_t)((block[49 + 2 * i] & 15) | (one_and_some >> 4 * i & 15) << 4);
            for (int i = 0; i < 2 && halves[format][i] >= 0; i++) memcpy(block + halves[format][i], &one_and_some, 2);
        }
        tiles[format] = aligned_alloc(64, ((size_t)forerun_packed_bytes(format, OUTPUTS, INPUTS) + 63) / 64 * 64);
        forerun_pack(format, OUTPUTS, INPUTS, raw[format], codebook, tiles[format], 2);
    }
    for (int n = 0; n < 4; n++) {
        if (!forerun_use(names[n])) continue;
        printf("%s ", names[n]);
        for (int format = 0; format < NUM_FORMATS; format++)
            for (int rows = 1; rows <= MOST; rows++) {
                Matrix matrix = {tiles[format], format, OUTPUTS, INPUTS, 0};
                Op op = {.code = LINEAR, .in = {0}, .out = {1}, .num_matrices = 1, .matrices = &matrix};
                Sizes sizes = {.heads = 1, .kv_heads = 1, .head_dim = 32, .key_dim = 16, .value_dim = 16};
                int32_t widths[] = {INPUTS, OUTPUTS};
                float *given[] = {x[0], y[0]};
                Call call = {.sizes = &sizes, .ops = &op, .num_ops = 1, .num_buffers = 2, .widths = widths, .num_rows = rows, .given = given};
                if (forerun_run(&call, 2)) return 2;
                if (n == 0 && rows == MOST) memcpy(results[format], y, sizeof y);
                for (int r = 0; n && r < rows; r++)
                    for (int o = 0; o < OUTPUTS; o++) {
                        float expected = results[format][r][o], off = y[r][o] - expected;
                        if (format >= Q8_0 ? off != 0 : !(off * off <= 1e-8f * (1 + expected * expected)))
                            failed = 1, printf("format %d, %d rows: [%d][%d] is %g, not %g\n", format, rows, r, o, y[r][o], expected);
                    }
            }
    }
    printf("\n");
    return failed;
}
