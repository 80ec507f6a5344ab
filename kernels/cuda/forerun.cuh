/* What all CUDA kernels share. Sizes of the model are macros, given when the sources are compiled (device.py).
 *
 * Row invariance: what a row's result is made of, and in which order, depends on the shapes of the weights alone, never on how many rows
 * there are or which. Matrix instructions keep rows apart: a row is a column of their right operand.
 *
 * The same sources run on a CPU, block by block, in tests (tests/kernels/cuda_on_cpu.h), where __CUDACC__ is not defined. */
#ifndef FORERUN_CUH
#define FORERUN_CUH

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

#define WARP 32
#define ALL_LANES 0xffffffffu
/* Positions of one page of keys and values (kernels/model/pages.py), and of one part of an attention. */
#define PAGE 64
#define PART 128
/* Inputs of one scale of quantised rows. */
#define QUANT 32
#define INFINITE __uint_as_float(0x7f800000u)

/* One sequence's part of a batch. Everything but `position`, `base` and the rows stays as it is while a lease lasts. */
struct Span {
    i64 position;     /* of its first row */
    i64 base;         /* position its state is at; the rows from there to `position` are in the log */
    float *states;    /* [layers, Hv, dv, dk], or of a ring [slots, layers, Hv, dv, dk] */
    float *columns;   /* [layers, slots, channels], pre-convolution, in slot position % slots */
    float *gates;     /* [layers, slots, 2 Hv]: b, then a */
    u16 *keys;        /* bfloat16 [layers, pages, KV, PAGE, D] */
    u16 *values;      /* bfloat16 [layers, pages, KV, D, PAGE] */
    const int *table; /* its pages */
    float *hidden;    /* post-norm rows [hidden_slots, hidden], in slot position % hidden_slots */
    const int *coordinates; /* (t, h, w) [num_coordinates, 3] of its first positions; those after them go on by one from `free` */
    const float *given;     /* rows that its prompt has in place of tokens, [., hidden] */
    i64 num_coordinates, free;
    i64 num_pages;    /* of the whole arena */
    int first_row, num_rows;
    int store, state_slots; /* LOG or RING; states in a ring */
    int column_slots, hidden_slots;
};
enum { LOG, RING };

/* How the token of one row is drawn (sampling.cu). */
struct Draw {
    double temperature; /* 0: the highest */
    double top_p;       /* 1: all */
    double log_min_p;   /* below 0 */
    u64 seed;
    i64 position;
    int top_k, reserved; /* 0: all */
};

/* Rows for the next product, in the forms that the matrices want: any pointer may be null. */
struct Rows {
    u16 *halves;    /* bfloat16 [rows, halves_stride]; or, with halves_rows, as place_of_half says */
    u8 *quants;     /* int8 [rows, quants_stride], within 128 inputs as a warp loads them: see quant_place */
    float *scales;  /* [rows, quants_stride / 32] */
    float *sums;    /* of the quants times the scale, likewise */
    float *floats;  /* [rows, n] */
    int halves_stride, quants_stride;
    int halves_rows, reserved; /* that there is room for; 0: they lie one after another */
};

/* Weights as products.cu describes them. */
struct Matrix {
    const uint4 *tiles;   /* [strips, units, 2 or 4, 32 lanes] */
    const uint4 *scales;  /* Q8_0: float16 pairs of outputs g and g + 8 [strips, units, 8, 4]. Of 256: bytes [8, 8, 4], then high bits [lanes] */
    const uint2 *ends;    /* of 256: d of g and g + 8, then dmin of both [strips, units, 8] */
    int outputs, units;
    int format, reserved; /* BF16, ... */
};
enum { BF16, Q8_0, Q4_K, Q5_K, Q6_K }; /* those from Q4_K on have units of 256 inputs */

/* Pieces of 16 bytes that a strip has of a unit in `scales`; of them, those after SCALES are high bits. */
#define SCALES 16
__device__ constexpr int pieces_of(int format) {
    return format == BF16 ? 0 : format == Q8_0 ? 8 : SCALES + (format == Q4_K ? 0 : format == Q5_K ? WARP : 2 * WARP);
}

/* Quants of a turn, one of 8 of 32 inputs, from nibbles and high bits: one of each byte (Q5_K) or two (Q6_K, whose 0 to 63 mean -32 to 31). */
template <int FORMAT> __device__ __forceinline__ u32 quants_of(u32 nibbles, u32 bits, int turn) {
    u32 low = nibbles >> 4 * (turn % 2) & 0x0f0f0f0f;
    if (FORMAT == Q4_K) return low;
    if (FORMAT == Q5_K) return low | (bits >> turn & 0x01010101) << 4;
    low |= (bits >> 2 * (turn % 4) & 0x03030303) << 4;
    return ((low | 0x80808080) - 0x20202020) ^ 0x80808080; /* no byte borrows of another */
}

/* To one of several matrices of so many strips that lie one after another in m. */
template <int FORMAT> __device__ __forceinline__ void skip_to(Matrix &m, int number, int strips) {
    const i64 skipped = (i64)number * strips * m.units;
    m.tiles += skipped * (FORMAT == BF16 ? 2 : 4) * WARP, m.outputs = strips * 16;
    m.scales += skipped * pieces_of(FORMAT);
    if (FORMAT >= Q4_K) m.ends += skipped * 8;
}

/* What a product knows of the launches after it. */
struct Ahead {
    const u8 *weights; /* that the next product begins with */
    int bytes;         /* of them that may come into the second-level cache once this product's own are read */
    int is_spread;     /* the next launch's blocks should find all multiprocessors free, not those that are free first */
};

#ifdef __CUDACC__
#define SHARED(type, name)                          \
    extern __shared__ __align__(16) char shared_[]; \
    type *name = (type *)shared_
#define EXPORT(name)
#if __CUDA_ARCH__ >= 900
/* Programmatic dependent launch: a kernel may begin before the one before it has ended, and waits here before it touches what that one
 * writes or reads. Every kernel lets the next begin once it has waited itself, no sooner: so what the one before the last wrote is there from
 * the first instruction on, and blocks that have nothing to do yet do not take the memory's time from those that have. */
__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
#else
__device__ __forceinline__ void wait_for_previous() {}
__device__ __forceinline__ void let_next_begin() {}
#endif

/* Weights are read once: they leave no trace in the first-level cache. */
__device__ __forceinline__ uint4 load_once(const uint4 *at) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
    return v;
}
__device__ __forceinline__ uint2 load_once(const uint2 *at) {
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(at));
    return v;
}

/* A hint, which may be given before wait_for_previous, whatever is still written there: the 128 bytes around an address will be read. */
__device__ __forceinline__ void expect(const void *at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

/* Begins to copy 16 bytes into shared memory, or zeros; a thread's copies up to `end_of_copies` are a group, and it waits for all but its
 * newest N groups. */
__device__ __forceinline__ void copy_async(void *to, const void *from, bool is_there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from), "r"(is_there ? 16 : 0) : "memory");
}
__device__ __forceinline__ void end_of_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

/* Two floats as bfloat16, rounded to nearest, the first in the low half. */
__device__ __forceinline__ u32 to_halves(float low, float high) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

/* The 16-bit float of IEEE 754. */
__device__ __forceinline__ float from_half(u16 bits) {
    float value;
    asm("{ .reg .b16 h; mov.b16 h, %1; cvt.f32.f16 %0, h; }" : "=f"(value) : "h"(bits));
    return value;
}

/* c [16, 8] += a [16, 16] times b [16, 8], in the registers of a warp as PTX lays them out (m16n8k16). */
__device__ __forceinline__ void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* c = a [16, 32] times b [32, 8], of int8. */
__device__ __forceinline__ void multiply_bytes(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
                 : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(0));
}
#endif

/* Sums of strips and tiles, at the beginning. */
template <int STRIPS, int TILES> __device__ __forceinline__ void clear(float (&sums)[STRIPS][TILES][4]) {
#pragma unroll
    for (int s = 0; s < STRIPS; s++)
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
            for (int i = 0; i < 4; i++) sums[s][t][i] = 0;
}

__device__ __forceinline__ float low_half(u32 both) { return __uint_as_float(both << 16); }
__device__ __forceinline__ float high_half(u32 both) { return __uint_as_float(both & 0xffff0000u); }

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }
__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }

/* Sum over the lanes of a warp, in one fixed order; all lanes get it. */
__device__ __forceinline__ float warp_sum(float x, int width = WARP) {
    for (int distance = width / 2; distance; distance /= 2) x += __shfl_xor_sync(ALL_LANES, x, distance);
    return x;
}
__device__ __forceinline__ float warp_max(float x, int width = WARP) {
    for (int distance = width / 2; distance; distance /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, distance));
    return x;
}

/* Sum over a block of whole warps; `scratch` holds a float a warp. All threads get it. */
__device__ __forceinline__ float block_sum(float x, float *scratch) {
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
    __syncthreads();
    return warp_sum(threadIdx.x % WARP < blockDim.x / WARP ? scratch[threadIdx.x % WARP] : 0.0f);
}

/* The hint for so many bytes; by a block. */
__device__ __forceinline__ void expect(const void *from, int bytes) {
    for (int at = 128 * threadIdx.x; at < bytes; at += 128 * blockDim.x) expect((const char *)from + at);
}

/* Where input i stands in a quantised row: of 128 inputs, lane group c = i / 8 % 4 finds its 8 of each of the four blocks of 32 side by
 * side, as the 32 bytes it loads. */
__device__ __forceinline__ int quant_place(int i) { return i / 128 * 128 + i / 8 % 4 * 32 + i / 32 % 4 * 8 + i % 8; }

/* Where a value of a row stands with halves_rows, [inputs / 64, halves_rows, 64]: of 64 inputs, each 32 are in the order in which four lanes
 * have them in two matrix instructions (a lane's 8 in four pieces of 16 bytes), and a row's pieces are exchanged by its number, so that the
 * same piece of 8 rows lies in different banks of shared memory. */
__device__ __forceinline__ u16 *place_of_half(const Rows &x, i64 row, int input) {
    const int piece = (input % 64 / 32 * 4 + input / 2 % 4) ^ (int)(row % 8);
    return x.halves + (input / 64 * (i64)x.halves_rows + row) * 64 + piece * 8 + input % 32 / 8 * 2 + input % 2;
}

/* Writes n values from shared memory, times `factor`, as a row for the next product; by a whole block of whole warps. n is a multiple of 4;
 * a thread reads fours of them that are its number and multiples of blockDim.x apart. */
__device__ __forceinline__ void emit(const float *values, int n, const Rows &to, i64 row, int first = 0, float factor = 1.0f) {
    for (int start = 4 * (threadIdx.x / WARP * WARP); start < n; start += 4 * blockDim.x) {
        int at = start + 4 * (threadIdx.x % WARP);
        bool is_there = at < n;
        float4 v = is_there ? *(const float4 *)(values + at) : make_float4(0, 0, 0, 0);
        v.x *= factor, v.y *= factor, v.z *= factor, v.w *= factor;
        if (to.floats && is_there) *(float4 *)(to.floats + row * n + at) = v;
        if (to.halves && is_there) {
            const uint2 both = make_uint2(to_halves(v.x, v.y), to_halves(v.z, v.w));
            if (!to.halves_rows) *(uint2 *)(to.halves + row * to.halves_stride + first + at) = both;
            else *(u32 *)place_of_half(to, row, first + at) = both.x, *(u32 *)place_of_half(to, row, first + at + 2) = both.y;
        }
        if (to.quants) { /* 8 lanes hold the 32 values of a scale */
            float most = fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
            most = warp_max(most, 8);
            float scale = most / 127.0f, inverse = most > 0 ? 127.0f / most : 0;
            int q0 = __float2int_rn(v.x * inverse), q1 = __float2int_rn(v.y * inverse);
            int q2 = __float2int_rn(v.z * inverse), q3 = __float2int_rn(v.w * inverse);
            float sum = warp_sum((float)(q0 + q1 + q2 + q3), 8);
            if (is_there) {
                u32 packed = (u32)(q0 & 255) | (u32)(q1 & 255) << 8 | (u32)(q2 & 255) << 16 | (u32)(q3 & 255) << 24;
                *(u32 *)(to.quants + row * to.quants_stride + quant_place(first + at)) = packed;
                if (at % QUANT == 0) {
                    i64 block = row * (to.quants_stride / QUANT) + (first + at) / QUANT;
                    to.scales[block] = scale;
                    to.sums[block] = sum * scale;
                }
            }
        }
    }
}
#endif
