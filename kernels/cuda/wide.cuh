/* What products of many rows (wide.cu, hopper_products.cu) share: a block has 8 strips of outputs, and takes 64 inputs at a time; weights become
 * bfloat16, whatever they are stored as. */
#ifndef FORERUN_WIDE_CUH
#define FORERUN_WIDE_CUH
#include "forerun.cuh"

#define WARPS 8
#define BLOCK_STRIPS 8
#define STAGE_INPUTS 64 /* two units of 32 */

/* What a strip has of a stage: TILES tiles of 16 bytes a lane, in shared memory; scales and high bits, in registers. */
template <int FORMAT> struct Weights;

template <> struct Weights<BF16> {
    static const int TILES = 4;
    __device__ __forceinline__ void load(const Matrix &, i64, int) {}
    __device__ __forceinline__ void operands(const uint4 *tiles, int unit, uint4 (&a)[2]) const {
        a[0] = tiles[unit * 2 * WARP], a[1] = tiles[(unit * 2 + 1) * WARP];
    }
};

/* Four quants of two bytes each in the words of a register, times a scale for outputs g and g + 8. */
__device__ __forceinline__ uint4 scaled_halves(float q0, float q1, float q2, float q3, float q4, float q5, float q6, float q7, float low, float high) {
    return make_uint4(to_halves(q0 * low, q1 * low), to_halves(q4 * high, q5 * high), to_halves(q2 * low, q3 * low), to_halves(q6 * high, q7 * high));
}
__device__ __forceinline__ float quant(u32 word, int i) { return (float)(signed char)(word >> 8 * i); }

template <> struct Weights<Q8_0> {
    static const int TILES = 2; /* a matrix has four in a unit */
    uint2 scales;
    __device__ __forceinline__ void load(const Matrix &m, i64 strip, int stage) {
        scales = ((const uint2 *)(m.scales + (strip * m.units + stage / 2) * 8 + threadIdx.x % WARP / 4))[stage % 2];
    }
    __device__ __forceinline__ void operands(const uint4 *tiles, int unit, uint4 (&a)[2]) const {
        u32 scale = unit ? scales.y : scales.x;
        float low = from_half((u16)scale), high = from_half((u16)(scale >> 16));
        uint4 t = tiles[unit * WARP];
        a[0] = scaled_halves(quant(t.x, 0), quant(t.x, 1), quant(t.x, 2), quant(t.x, 3), quant(t.y, 0), quant(t.y, 1), quant(t.y, 2), quant(t.y, 3), low, high);
        a[1] = scaled_halves(quant(t.z, 0), quant(t.z, 1), quant(t.z, 2), quant(t.z, 3), quant(t.w, 0), quant(t.w, 1), quant(t.w, 2), quant(t.w, 3), low, high);
    }
};

/* Of units of 256. */
template <int FORMAT> struct Weights {
    static const int TILES = 1; /* of both units: low nibbles, then high ones */
    uint2 scales;               /* bytes of each: scale of g and g + 8, then minimum, or scale of the other 16 inputs, of both */
    uint2 ends;
    uint4 bits;
    int turn; /* of the first unit, among 8 */
    __device__ __forceinline__ void load(const Matrix &m, i64 strip, int stage) {
        const int lane = threadIdx.x % WARP;
        const i64 unit = strip * m.units + stage / 4;
        const uint4 *rest = m.scales + unit * pieces_of(FORMAT);
        turn = stage % 4 * 2;
        scales = ((const uint2 *)(rest + lane / 4 * 2))[stage % 4];
        ends = m.ends[unit * 8 + lane / 4];
        bits = FORMAT == Q4_K ? uint4{} : rest[SCALES + (FORMAT == Q6_K ? turn / 4 * WARP : 0) + lane];
    }
    __device__ __forceinline__ void operands(const uint4 *tiles, int unit, uint4 (&a)[2]) const {
        const uint4 tile = tiles[0];
        const u32 bytes = unit ? scales.y : scales.x, words[4] = {tile.x, tile.y, tile.z, tile.w}, high_bits[4] = {bits.x, bits.y, bits.z, bits.w};
        const bool is_second = FORMAT == Q6_K && threadIdx.x % 4 >= 2; /* lanes of the other 16 inputs */
        u32 found[2][4];
#pragma unroll
        for (int high = 0; high < 2; high++) {
            const u32 first = bytes >> 8 * high, second = bytes >> (16 + 8 * high);
            float d = from_half((u16)(ends.x >> 16 * high)), least = 0;
            if (FORMAT == Q6_K) d *= (float)(signed char)(is_second ? second : first);
            else d *= (float)(first & 255), least = from_half((u16)(ends.y >> 16 * high)) * (float)(second & 255);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const u32 word = quants_of<FORMAT>(words[half * 2 + high], high_bits[half * 2 + high], turn + unit);
#pragma unroll
                for (int pair = 0; pair < 2; pair++)
                    found[half][pair * 2 + high] = to_halves(quant(word, 2 * pair) * d - least, quant(word, 2 * pair + 1) * d - least);
            }
        }
        a[0] = make_uint4(found[0][0], found[0][1], found[0][2], found[0][3]);
        a[1] = make_uint4(found[1][0], found[1][1], found[1][2], found[1][3]);
    }
};
#endif
