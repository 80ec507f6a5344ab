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

static int word(const uint8_t *p) { return p[0] | p[1] << 8; }
static uint32_t word_32(const uint8_t *p) { return (uint32_t)word(p) | (uint32_t)word(p + 2) << 16; }

/* The signs of eight, of which seven are kept: an even number is negative. */
static int signs_of_7(uint32_t bits) { return (int)(bits & 127) | __builtin_parity(bits & 127) << 7; }

/* Codes of IQ1, IQ2 and IQ3: rows of a codebook, and a bit above each for its sign (formats/grids.py). */
static void codes_of(int format, const uint8_t *block, const uint8_t *codebook, uint8_t *q) {
    int is_iq3 = format == IQ3_XXS || format == IQ3_S, size = is_iq3 ? 4 : 8;
    const uint8_t *of = block + (format == IQ1_M ? 0 : 2);
    for (int g = 0; g < 32; g++) { /* eight values */
        int index[2] = {of[is_iq3 ? 2 * g : g], of[is_iq3 ? 2 * g + 1 : g]}, signs, quarter = g % 4;
        switch (format) {
        case IQ1_S: {
            int high = word(block + 34 + g / 4 * 2);
            index[0] |= (high >> 3 * quarter & 7) << 8;
            signs = high >> 15 ? 255 : 0;
            break;
        }
        case IQ1_M: {
            int high = block[32 + g / 2] >> g % 2 * 4;
            index[0] |= (high & 7) << 8;
            signs = high & 8 ? 255 : 0;
            break;
        }
        case IQ2_XXS:
            index[0] = block[2 + g / 4 * 8 + quarter];
            signs = signs_of_7(word_32(block + 6 + g / 4 * 8) >> 7 * quarter);
            break;
        case IQ2_XS:
            index[0] = word(block + 2 + 2 * g) & 511;
            signs = signs_of_7((uint32_t)word(block + 2 + 2 * g) >> 9);
            break;
        case IQ2_S:
            index[0] |= (block[66 + g / 4] >> 2 * quarter & 3) << 8;
            signs = block[34 + g];
            break;
        case IQ3_XXS: signs = signs_of_7(word_32(block + 66 + g / 4 * 4) >> 7 * quarter); break;
        default:
            index[0] |= (block[66 + g / 4] >> 2 * quarter & 1) << 8;
            index[1] |= (block[66 + g / 4] >> (2 * quarter + 1) & 1) << 8;
            signs = block[74 + g];
        }
        for (int i = 0; i < 8; i++) q[8 * g + i] = (uint8_t)(codebook[index[i / size] * size + i % size] | (signs >> i & 1) << (is_iq3 ? 3 : 2));
    }
}

/* The i-th scale s of a block of those types; it counts 2 s + 1. */
static int scale_of_codes(int format, const uint8_t *block, int i) {
    switch (format) {
    case IQ1_S: return word(block + 34 + 2 * i) >> 12 & 7;
    case IQ1_M: return word(block + 48 + i / 4 * 2) >> i % 4 * 3 & 7;
    case IQ2_XXS: return (int)(word_32(block + 6 + 8 * i) >> 28);
    case IQ3_XXS: return (int)(word_32(block + 66 + 4 * i) >> 28);
    default: return block[(format == IQ2_XS ? 66 : format == IQ2_S ? 74 : 106) + i / 2] >> i % 2 * 4 & 15;
    }
}

/* The quants of one block of one output, unsigned where the tile's are. */
static void quants_of(int format, const uint8_t *block, const uint8_t *codebook, uint8_t *q) {
    const uint8_t *packed = block + (format == MXFP4 ? 1 : format == Q4_1 ? 4 : format == Q5_0 ? 6 : format == Q5_1 || format == IQ4_XS ? 8 : 2);
    if (format >= IQ1_S) {
        codes_of(format, block, codebook, q);
        return;
    }
    switch (format) {
    case Q8_0: memcpy(q, block + 2, 32); break;
    case Q2_K:
    case Q3_K:
        for (int i = 0; i < 256; i++) {
            q[i] = block[(format == Q2_K ? 16 : 32) + i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2) & 3;
            if (format == Q3_K) q[i] |= (uint8_t)((block[i % 32] >> (i / 32) & 1) << 2);
        }
        break;
    case Q4_K:
    case Q5_K:
        for (int i = 0; i < 256; i++) {
            const uint8_t *low = block + (format == Q4_K ? 16 : 48) + i / 64 * 32 + i % 32;
            q[i] = i % 64 < 32 ? *low & 15 : *low >> 4;
            if (format == Q5_K) q[i] |= (uint8_t)((block[16 + i % 32] >> (i / 32) & 1) << 4);
        }
        break;
    case Q6_K:
        for (int i = 0; i < 256; i++) {
            int of = i % 128;
            const uint8_t *low = block + i / 128 * 64 + of % 64, *high = block + 128 + i / 128 * 32 + of % 32;
            q[i] = (uint8_t)((of < 64 ? *low & 15 : *low >> 4) | (*high >> (of / 32 * 2) & 3) << 4);
        }
        break;
    default:
        for (int i = 0; i < format_of(format).inputs; i++) {
            q[i] = packed[i / 32 * 16 + i % 16] >> (i % 32 / 16 * 4) & 15;
            if (format == Q5_0 || format == Q5_1) q[i] |= (uint8_t)((word_32(packed - 4) >> i & 1) << 4);
        }
    }
}

/* Where a tile has the i-th weight of output `o`: a plane has `bits` of each, those of four inputs in four bytes that follow each other. */
static int place(int bits, int i, int o) { return i / 4 / (8 / bits) * 4 * TILE + 4 * o + i % 4; }
static int shift(int bits, int i) { return i / 4 % (8 / bits) * bits; }

/* Where the i-th of scales of several inputs each is, two beside one another. */
static int pair(int i, int o) { return i / 2 * 2 * TILE + 2 * o + i % 2; }

static void put_scales(int format, const uint8_t *block, int o, uint8_t *tile) {
    Format f = format_of(format);
    uint8_t *first = tile + 2 * o, *scales = tile + (format == Q2_K || format == Q4_K || format == Q5_K ? 4 : 2) * TILE, *minima;
    switch (format) {
    case MXFP4: { /* 2^(e - 128) as a bfloat16; below 2^-126 it counts as zero, as all numbers do that are so small (pool.h) */
        uint16_t power = (uint16_t)(block[0] < 2 ? 0x20 << block[0] : (block[0] - 1) << 7);
        memcpy(first, &power, 2);
        break;
    }
    case IQ4_XS:
        memcpy(first, block, 2);
        for (int i = 0; i < 8; i++) {
            int low = block[4 + i / 2] >> (i % 2 * 4) & 15, high = block[2 + i / 4] >> (i % 4 * 2) & 3;
            scales[i * TILE + o] = (uint8_t)((low | high << 4) - 32);
        }
        break;
    case Q2_K:
        memcpy(first, block + 80, 2);
        memcpy(first + 2 * TILE, block + 82, 2);
        for (int i = 0; i < 16; i++) scales[pair(i, o)] = block[i] & 15, scales[16 * TILE + pair(i, o)] = block[i] >> 4;
        break;
    case Q3_K:
        memcpy(first, block + 108, 2);
        for (int i = 0; i < 16; i++) {
            int low = block[96 + i % 8] >> (i / 8 * 4) & 15, high = block[104 + i % 4] >> (i / 4 * 2) & 3;
            scales[pair(i, o)] = (uint8_t)((low | high << 4) - 32);
        }
        break;
    case Q4_K:
    case Q5_K:
        memcpy(first, block, 2);
        memcpy(first + 2 * TILE, block + 2, 2);
        minima = tile + (f.scales - 8) * TILE;
        for (int i = 0; i < 8; i++) {
            uint8_t scale;
            get_scales_k4(block + 4, i, &scale, minima + pair(i, o));
            if (format == Q4_K) scales[pair(i, o)] = scale;
            else scales[pair(2 * i, o)] = scales[pair(2 * i + 1, o)] = scale; /* 16 weights each */
        }
        break;
    case Q6_K:
        memcpy(first, block + 208, 2);
        for (int i = 0; i < 16; i++) scales[pair(i, o)] = block[192 + i];
        break;
    default:
        memcpy(first, block, 2);
        if (format == Q4_1 || format == Q5_1) memcpy(first + 2 * TILE, block + 2, 2);
        if (format == IQ1_M) { /* in the upper bits of four words of scales */
            uint16_t d = 0;
            for (int i = 0; i < 4; i++) d |= (uint16_t)(word(block + 48 + 2 * i) >> 12 << 4 * i);
            memcpy(first, &d, 2);
        }
        if (format >= IQ1_S)
            for (int i = 0; i < f.scales - 2; i++) scales[i * TILE + o] = (uint8_t)(2 * scale_of_codes(format, block, i) + 1);
    }
}

/* Output `o` of one block of a tile, all of whose bytes are zero. */
static void put(int format, const uint8_t *block, const uint8_t *codebook, int o, uint8_t *tile) {
    Format f = format_of(format);
    if (format <= BF16) {
        memcpy(tile + o * f.bytes, block, (size_t)f.bytes);
        return;
    }
    uint8_t q[256], *low = tile + f.scales * TILE, *high = low + f.inputs * f.low / 8 * TILE;
    put_scales(format, block, o, tile);
    quants_of(format, block, codebook, q);
    for (int i = 0; i < f.inputs; i++) {
        low[place(f.low, i, o)] |= (uint8_t)((q[i] & ((1 << f.low) - 1)) << shift(f.low, i));
        if (f.high) high[place(f.high, i, o)] |= (uint8_t)(q[i] >> f.low << shift(f.high, i));
    }
}

typedef struct {
    int format, outputs, inputs;
    const uint8_t *raw, *codebook;
    uint8_t *tiles;
} Packing;

static int num_tiles(const void *what, int step) {
    (void)step;
    return (((const Packing *)what)->outputs + TILE - 1) / TILE;
}

static void pack_tile(void *what, int step, int tile, int thread) {
    (void)step, (void)thread;
    const Packing *p = what;
    Format f = format_of(p->format);
    int blocks = p->inputs / f.inputs, odd = p->format == BF16 && p->inputs % 2;
    int64_t size = tile_bytes(p->format, p->inputs), block = block_bytes(p->format), row_bytes = (int64_t)blocks * f.bytes + 2 * odd;
    memset(p->tiles + tile * size, 0, (size_t)size);
    for (int o = 0; o < TILE && tile * TILE + o < p->outputs; o++) {
        const uint8_t *row = p->raw + (tile * TILE + o) * row_bytes;
        for (int b = 0; b < blocks; b++) put(p->format, row + (int64_t)b * f.bytes, p->codebook, o, p->tiles + tile * size + b * block);
        if (odd) memcpy(p->tiles + tile * size + blocks * block + 4 * o, row + (int64_t)blocks * f.bytes, 2);
    }
}

void forerun_layout(int32_t layout[NUM_LAYOUT]) {
    const int32_t mine[NUM_LAYOUT] = {INTERFACE, ARITHMETIC, NUM_FORMATS, sizeof(Matrix), sizeof(Span), sizeof(Op), sizeof(Call),
                                      sizeof(Sampling), sizeof(Wanted), sizeof(HeadBuffers)};
    memcpy(layout, mine, sizeof mine);
}

API int64_t forerun_packed_bytes(int format, int64_t outputs, int64_t inputs) {
    return (outputs + TILE - 1) / TILE * tile_bytes(format, inputs);
}

int forerun_pack(int format, int outputs, int inputs, const void *raw, const void *codebook, void *tiles, int num_threads) {
    Packing packing = {format, outputs, inputs, raw, codebook, tiles};
    Work work = {&packing, 1, 0, num_tiles, pack_tile};
    pool_enter();
    int status = pool_run(num_threads, &work);
    pool_leave();
    return status;
}

static int quant_at(Format f, const uint8_t *tile, int i, int o) {
    const uint8_t *low = tile + f.scales * TILE, *high = low + f.inputs * f.low / 8 * TILE;
    int q = low[place(f.low, i, o)] >> shift(f.low, i) & ((1 << f.low) - 1);
    return f.high ? q | (high[place(f.high, i, o)] >> shift(f.high, i) & ((1 << f.high) - 1)) << f.low : q;
}

/* The i-th weight of output `o` in a block: as put_scales and put laid it out. */
static float weight_at(int format, Format f, const uint8_t *tile, int i, int o) {
    float d = half(tile + 2 * o), least = half(tile + 2 * TILE + 2 * o);
    int q = quant_at(f, tile, i, o);
    switch (format) {
    case Q8_0: return d * (float)(int8_t)q;
    case Q4_0: return d * (float)(q - 8);
    case Q4_1: return d * (float)q + least;
    case Q5_0: return d * (float)(q - 16);
    case Q5_1: return d * (float)q + least;
    case IQ4_NL: return d * (float)codes(format)[q];
    case IQ4_XS: return d * (float)(int8_t)tile[2 * TILE + i / 32 * TILE + o] * (float)codes(format)[q];
    case MXFP4: {
        uint32_t bits = (uint32_t)(tile[2 * o] | tile[2 * o + 1] << 8) << 16;
        memcpy(&d, &bits, 4);
        return d * (float)codes(format)[q];
    }
    case Q2_K: return d * (float)tile[4 * TILE + pair(i / 16, o)] * (float)q - least * (float)tile[20 * TILE + pair(i / 16, o)];
    case Q3_K: return d * (float)(int8_t)tile[2 * TILE + pair(i / 16, o)] * (float)(q - 4);
    case Q4_K: return d * (float)tile[4 * TILE + pair(i / 32, o)] * (float)q - least * (float)tile[12 * TILE + pair(i / 32, o)];
    case Q5_K: return d * (float)tile[4 * TILE + pair(i / 16, o)] * (float)q - least * (float)tile[20 * TILE + pair(i / 32, o)];
    case Q6_K: return d * (float)(int8_t)tile[2 * TILE + pair(i / 16, o)] * (float)(q - 32);
    default: return d * step_of(format) * (float)tile[2 * TILE + i / (f.scales == 18 ? 16 : 32) * TILE + o] * (float)codes(format)[q];
    }
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
    Format f = format_of(m->format);
    for (int at = 0; at < m->inputs; at += f.inputs, tile += block_bytes(m->format))
        for (int i = 0; i < f.inputs; i++) out[at + i] = weight_at(m->format, f, tile, i, o);
}
