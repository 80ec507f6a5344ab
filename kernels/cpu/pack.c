/* From rows as files have them (ggml-quants.c has the formulas of quantised blocks) to tiles: 16 outputs side by side, so that a vector
 * holds one place of several outputs, nothing is summed across it, and a product reads memory from end to end. Nothing is rounded again. */
#include "kernels_table.h"
#include "api.h"

#include <stdlib.h>

static void get_scales_k4(const uint8_t *packed, int i, uint8_t *scale, uint8_t *minimum) {
    if (i < 4) {
        *scale = packed[i] & 63;
        *minimum = packed[i + 4] & 63;
    } else {
        *scale = (uint8_t)((packed[i + 4] & 15) | packed[i - 4] >> 6 << 4);
        *minimum = (uint8_t)(packed[i + 4] >> 4 | packed[i] >> 6 << 4);
    }
}

/* The quants of one block of one output, unsigned where the tile's are: 32 of Q8_0 and Q4_0, 256 of the others. */
static void quants_of(int format, const uint8_t *block, uint8_t *q) {
    switch (format) {
    case Q8_0: memcpy(q, block + 2, 32); break;
    case Q4_0:
        for (int i = 0; i < 16; i++) q[i] = block[2 + i] & 15, q[16 + i] = block[2 + i] >> 4;
        break;
    case Q4_K:
    case Q5_K:
        for (int i = 0; i < 256; i++) {
            const uint8_t *low = block + (format == Q4_K ? 16 : 48) + i / 64 * 32 + i % 32;
            q[i] = i % 64 < 32 ? *low & 15 : *low >> 4;
            if (format == Q5_K) q[i] |= (uint8_t)((block[16 + i % 32] >> (i / 32) & 1) << 4);
        }
        break;
    default:
        for (int i = 0; i < 256; i++) {
            int of = i % 128;
            const uint8_t *low = block + i / 128 * 64 + of % 64, *high = block + 128 + i / 128 * 32 + of % 32;
            q[i] = (uint8_t)((of < 64 ? *low & 15 : *low >> 4) | (*high >> (of / 32 * 2) & 3) << 4);
        }
    }
}

static int block_values(int format) { return format == BF16 ? 2 : format <= F16 ? 1 : format == Q8_0 || format == Q4_0 ? 32 : 256; }

static int block_bytes(int format) {
    switch (format) {
    case F32:
    case BF16: return 4;
    case F16: return 2;
    case Q8_0: return 34;
    case Q4_0: return 18;
    case Q4_K: return 144;
    case Q5_K: return 176;
    default: return 210;
    }
}

/* Output `o` of one block of a tile, all of whose bytes are zero. */
static void put(int format, const uint8_t *block, int o, uint8_t *tile) {
    uint8_t q[256], *weights;
    if (format <= BF16) {
        memcpy(tile + o * block_bytes(format), block, (size_t)block_bytes(format));
        return;
    }
    quants_of(format, block, q);
    const uint8_t *d = format == Q6_K ? block + 208 : block;
    memcpy(tile + 2 * o, d, 2);
    if (format == Q8_0) {
        for (int i = 0; i < 32; i++) tile[2 * TILE + i / 4 * 4 * TILE + 4 * o + i % 4] = q[i];
        return;
    }
    if (format == Q4_0)
        weights = tile + 2 * TILE;
    else if (format == Q6_K) {
        for (int i = 0; i < 16; i++) tile[2 * TILE + i / 2 * 2 * TILE + 2 * o + i % 2] = block[192 + i];
        weights = tile + 18 * TILE;
    } else {
        uint8_t *scales = tile + 4 * TILE, *minima = scales + (format == Q4_K ? 8 : 16) * TILE;
        memcpy(tile + 2 * TILE + 2 * o, block + 2, 2);
        for (int i = 0; i < 8; i++) {
            uint8_t scale, minimum;
            get_scales_k4(block + 4, i, &scale, &minimum);
            minima[i / 2 * 2 * TILE + 2 * o + i % 2] = minimum;
            if (format == Q4_K) scales[i / 2 * 2 * TILE + 2 * o + i % 2] = scale;
            else scales[i * 2 * TILE + 2 * o] = scales[i * 2 * TILE + 2 * o + 1] = scale; /* 16 weights each */
        }
        weights = minima + 8 * TILE;
    }
    for (int i = 0; i < block_values(format); i++) {
        int group = i / 4;
        weights[group / 2 * 4 * TILE + 4 * o + i % 4] |= (uint8_t)((q[i] & 15) << (group % 2 * 4));
        if (format == Q5_K || format == Q6_K)
            weights[128 * TILE + group / 4 * 4 * TILE + 4 * o + i % 4] |= (uint8_t)(q[i] >> 4 << (group % 4 * 2));
    }
}

typedef struct {
    int format, outputs, inputs;
    const uint8_t *raw;
    uint8_t *tiles;
} Packing;

static int num_tiles(const void *what, int step) {
    (void)step;
    return (((const Packing *)what)->outputs + TILE - 1) / TILE;
}

static void pack_tile(void *what, int step, int tile, int thread) {
    (void)step, (void)thread;
    const Packing *p = what;
    int blocks = p->inputs / block_values(p->format), bytes = block_bytes(p->format), odd = p->format == BF16 && p->inputs % 2;
    int64_t size = tile_bytes(p->format, p->inputs), step_size = size / (blocks + odd), row_bytes = (int64_t)blocks * bytes + 2 * odd;
    memset(p->tiles + tile * size, 0, (size_t)size);
    for (int o = 0; o < TILE && tile * TILE + o < p->outputs; o++) {
        const uint8_t *row = p->raw + (tile * TILE + o) * row_bytes;
        for (int b = 0; b < blocks; b++) put(p->format, row + (int64_t)b * bytes, o, p->tiles + tile * size + b * step_size);
        if (odd) memcpy(p->tiles + tile * size + blocks * step_size + 4 * o, row + (int64_t)blocks * bytes, 2);
    }
}

API int64_t forerun_packed_bytes(int format, int64_t outputs, int64_t inputs) {
    return (outputs + TILE - 1) / TILE * tile_bytes(format, inputs);
}

int forerun_pack(int format, int outputs, int inputs, const void *raw, void *tiles, int num_threads) {
    Packing packing = {format, outputs, inputs, raw, tiles};
    Work work = {&packing, 1, 0, num_tiles, pack_tile};
    pool_enter();
    int status = pool_run(num_threads, &work);
    pool_leave();
    return status;
}

static int quant_at(const uint8_t *weights, int i, int o, int has_six) {
    int group = i / 4, q = weights[group / 2 * 4 * TILE + 4 * o + i % 4] >> (group % 2 * 4) & 15;
    if (has_six) q |= (weights[128 * TILE + group / 4 * 4 * TILE + 4 * o + i % 4] >> (group % 4 * 2) & 3) << 4;
    return q;
}

void row_of(const Matrix *m, int output, float *out) {
    int o = output % TILE;
    int64_t size = tile_bytes(m->format, m->inputs);
    const uint8_t *tile = (const uint8_t *)m->data + output / TILE * size;
    if (m->format <= BF16) {
        for (int i = 0; i < m->inputs; i++) {
            uint32_t bits = 0;
            if (m->format == F32) memcpy(&bits, tile + ((int64_t)i * TILE + o) * 4, 4);
            else if (m->format == BF16) memcpy((char *)&bits + 2, tile + ((int64_t)i / 2 * TILE + o) * 4 + i % 2 * 2, 2);
            memcpy(out + i, &bits, 4);
            if (m->format == F16) out[i] = half(tile + ((int64_t)i * TILE + o) * 2);
        }
        return;
    }
    int blocks = m->inputs / block_values(m->format);
    int64_t step = size / blocks;
    for (int b = 0; b < blocks; b++, tile += step, out += block_values(m->format)) {
        float d = half(tile + 2 * o);
        if (m->format == Q8_0)
            for (int i = 0; i < 32; i++) out[i] = d * (float)(int8_t)tile[2 * TILE + i / 4 * 4 * TILE + 4 * o + i % 4];
        else if (m->format == Q4_0)
            for (int i = 0; i < 32; i++) out[i] = d * (float)(quant_at(tile + 2 * TILE, i, o, 0) - 8);
        else if (m->format == Q6_K)
            for (int i = 0; i < 256; i++) {
                int scale = (int8_t)tile[2 * TILE + i / 32 * 2 * TILE + 2 * o + i / 16 % 2];
                out[i] = d * (float)scale * (float)(quant_at(tile + 18 * TILE, i, o, 1) - 32);
            }
        else {
            const uint8_t *scales = tile + 4 * TILE, *minima = scales + (m->format == Q4_K ? 8 : 16) * TILE;
            float dmin = half(tile + 2 * TILE + 2 * o);
            for (int i = 0; i < 256; i++) {
                int sub = i / 32, minimum = minima[sub / 2 * 2 * TILE + 2 * o + sub % 2];
                int scale = m->format == Q4_K ? scales[sub / 2 * 2 * TILE + 2 * o + sub % 2] : scales[sub * 2 * TILE + 2 * o];
                out[i] = d * (float)scale * (float)quant_at(minima + 8 * TILE, i, o, m->format == Q5_K) - dmin * (float)minimum;
            }
        }
    }
}
