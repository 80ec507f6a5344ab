/* Runs the CUDA sources of kernels/cuda on a CPU: each thread of a block is a coroutine, blocks run one after another. Barriers and
 * shuffles behave as on a device; shared memory starts as NaNs, and the order in which threads run can be turned round, so that what a
 * missing barrier breaks breaks here. Matrix instructions round at other places than a device's.
 *
 * int run(const char *kernel, const int *grid, const int *block, size_t shared, void **arguments, int backwards) */
#pragma once
#include <math.h>
#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <map>
#include <string>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __constant__ static

struct dim3 {
    unsigned x, y, z;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }

static dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace on_cpu {
const size_t STACK = 65536, SHARED_BYTES = 232448, MAX_THREADS = 1024;
alignas(1024) static char shared[SHARED_BYTES];

struct Group { /* threads that meet: a warp or a block */
    int alive = 0, arrived = 0;
    unsigned generation = 0;
    char exchange[2][32][32];
    void release_if_all() {
        if (alive && arrived == alive) arrived = 0, generation++;
    }
};
struct Thread {
    jmp_buf where;
    dim3 index;
    bool is_done = true, is_new = true;
};
static std::vector<Thread> threads; /* they go on from block to block: to begin one takes system calls */
static std::vector<Group> warps;
static Group block, products; /* the latter: of hopper_products.cu, without the warps that copy */
static char *stacks;
static int now, step;
static jmp_buf scheduler;
static void (*body)(void **);
static void **arguments;

static void resume(int next);
/* Lets others run. False when there are no others. */
static bool yield() {
    int from = now, count = (int)blockDim.x, next = from;
    do next = (next + step + count) % count;
    while (threads[next].is_done && next != from);
    if (next == from) return false;
    if (!_setjmp(threads[from].where)) resume(next);
    return true;
}
static void meet(Group &group) {
    unsigned generation = group.generation;
    group.arrived++;
    group.release_if_all();
    while (group.generation == generation)
        if (!yield()) {
            fprintf(stderr, "a thread waits for ever\n");
            abort();
        }
}
static void begin() {
    for (;;) {
        body(arguments);
        Thread &self = threads[now];
        self.is_done = true;
        Group &warp = warps[now / 32];
        warp.alive--, block.alive--;
        warp.release_if_all(), block.release_if_all();
        if (block.alive) yield();
        else if (!_setjmp(self.where)) _longjmp(scheduler, 1);
    }
}
static void resume(int next) {
    now = next;
    threadIdx = threads[next].index;
    if (!threads[next].is_new) _longjmp(threads[next].where, 1);
    threads[next].is_new = false;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks + STACK * (size_t)next;
    context.uc_stack.ss_size = STACK;
    context.uc_link = nullptr;
    makecontext(&context, begin, 0);
    setcontext(&context);
}
static void run_block(size_t shared_bytes) {
    size_t count = blockDim.x;
    if (!stacks) {
        stacks = (char *)mmap(nullptr, STACK * MAX_THREADS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        threads.resize(MAX_THREADS);
    }
    warps.assign((count + 31) / 32, Group());
    block = products = Group();
    block.alive = (int)count;
    products.alive = 256;
    for (size_t i = 0; i < count; i++) {
        threads[i].index = {(unsigned)i, 0, 0};
        threads[i].is_done = false;
        warps[i / 32].alive++;
    }
    memset(shared, 0xff, shared_bytes);
    if (!_setjmp(scheduler)) resume(step > 0 ? 0 : (int)count - 1);
}

static std::map<std::string, void (*)(void **)> &kernels() {
    static std::map<std::string, void (*)(void **)> all;
    return all;
}
template <class... A, size_t... I> static void call(void (*kernel)(A...), void **given, std::index_sequence<I...>) {
    kernel(*(A *)given[I]...);
}
template <class... A> static void unpack(void (*kernel)(A...), void **given) { call(kernel, given, std::index_sequence_for<A...>()); }

/* What lane `from` of the warp says. */
template <class T> static T exchange(T value, int from) {
    Group &warp = warps[now / 32];
    static_assert(sizeof(T) <= 32, "");
    memcpy(warp.exchange[0][now % 32], &value, sizeof value);
    meet(warp);
    T other;
    memcpy(&other, warp.exchange[0][from], sizeof other);
    meet(warp);
    return other;
}
}  // namespace on_cpu

#define EXPORT(name) \
    static bool exported_##name = (on_cpu::kernels()[#name] = [](void **given) { on_cpu::unpack(name, given); }, true);

extern "C" __attribute__((visibility("default"))) int run(const char *kernel, const int *grid, const int *block, size_t shared, void **given,
                                                          int backwards) {
    auto found = on_cpu::kernels().find(kernel);
    if (found == on_cpu::kernels().end()) return 1;
    if (block[0] > (int)on_cpu::MAX_THREADS || block[1] != 1 || block[2] != 1 || shared > on_cpu::SHARED_BYTES) return 2;
    on_cpu::body = found->second, on_cpu::arguments = given, on_cpu::step = backwards ? -1 : 1;
    gridDim = {(unsigned)grid[0], (unsigned)grid[1], (unsigned)grid[2]};
    blockDim = {(unsigned)block[0], 1, 1};
    int count = grid[0] * grid[1] * grid[2];
    for (int i = 0; i < count; i++) {
        int at = backwards ? count - 1 - i : i;
        blockIdx = {(unsigned)(at % grid[0]), (unsigned)(at / grid[0] % grid[1]), (unsigned)(at / grid[0] / grid[1])};
        on_cpu::run_block(shared);
    }
    return 0;
}

#define SHARED(type, name) type *name = (type *)on_cpu::shared

static inline void __syncthreads() { on_cpu::meet(on_cpu::block); }
static inline void __syncwarp() { on_cpu::meet(on_cpu::warps[on_cpu::now / 32]); }
template <class T> static T __shfl_xor_sync(unsigned, T value, int mask) { return on_cpu::exchange(value, (on_cpu::now % 32) ^ mask); }
template <class T> static T __shfl_sync(unsigned, T value, int lane) { return on_cpu::exchange(value, lane); }

static inline float __uint_as_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
static inline unsigned __float_as_uint(float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    return bits;
}
static inline int __float2int_rn(float x) { return (int)rintf(x); }
#define __expf expf
static inline float __fdividef(float x, float y) { return x / y; }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline int min(int a, int b) { return a < b ? a : b; }
static inline int max(int a, int b) { return a > b ? a : b; }
static inline long long min(long long a, long long b) { return a < b ? a : b; }
static inline long long max(long long a, long long b) { return a > b ? a : b; }
static inline unsigned long long min(unsigned long long a, unsigned long long b) { return a < b ? a : b; }
static inline unsigned long long max(unsigned long long a, unsigned long long b) { return a > b ? a : b; }
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) { return (unsigned __int128)a * b >> 64; }
static inline void __threadfence() {}
template <class T> static T atomicAdd(T *at, T value) {
    T before = *at;
    *at += value;
    return before;
}

static inline void wait_for_previous() {}
static inline void let_next_begin() {}
template <class T> static T load_once(const T *at) { return *at; }
static inline void expect(const void *at) { (void)*(const volatile char *)at; } /* a real address */
static inline void copy_async(void *to, const void *from, bool is_there) {
    if (is_there) memcpy(to, from, 16);
    else memset(to, 0, 16);
}
static inline void end_of_copies() {}
template <int N> static void wait_for_copies() {}

static inline unsigned round_to_half(float x) {
    unsigned bits = __float_as_uint(x);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
static inline unsigned to_halves(float low, float high) { return round_to_half(low) | round_to_half(high) << 16; }
static inline float from_half(unsigned short bits) {
    _Float16 h;
    memcpy(&h, &bits, 2);
    return (float)h;
}

namespace on_cpu {
struct Operands {
    unsigned a[4], b[2];
};
template <class T> static T element(unsigned word, int i);
template <> float element<float>(unsigned word, int i) { return __uint_as_float(i ? word & 0xffff0000u : word << 16); }
template <> int element<int>(unsigned word, int i) { return (int8_t)(word >> 8 * i); }

template <class T> static void matrix_product(T (&c)[4], const Operands &mine) {
    const int each = sizeof(T) == 4 && T(0.5) != T(0) ? 2 : 4; /* values a register */
    Group &warp = warps[now / 32];
    int lane = now % 32;
    memcpy(warp.exchange[1][lane], &mine, sizeof mine);
    meet(warp);
    Operands all[32];
    for (int i = 0; i < 32; i++) memcpy(&all[i], warp.exchange[1][i], sizeof mine);
    meet(warp);
    for (int i = 0; i < 4; i++) {
        int row = lane / 4 + (i / 2) * 8, column = lane % 4 * 2 + i % 2;
        T sum = 0;
        for (int k = 0; k < 8 * each; k++) {
            int part = k / (4 * each), at = k % (4 * each), from = at / each;
            T x = element<T>(all[row % 8 * 4 + from].a[row / 8 + 2 * part], at % each);
            T y = element<T>(all[column * 4 + from].b[part], at % each);
            sum += x * y;
        }
        c[i] += sum;
    }
}
}  // namespace on_cpu
static inline void multiply(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    on_cpu::matrix_product<float>(c, {{a0, a1, a2, a3}, {b0, b1}});
}
static inline void multiply_bytes(int (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    c[0] = c[1] = c[2] = c[3] = 0;
    on_cpu::matrix_product<int>(c, {{a0, a1, a2, a3}, {b0, b1}});
}

/* What hopper.cuh asks of a device. Products are computed when they are waited for: rows that something else is copied over before are wrong. */
namespace on_cpu {
struct Barrier {
    unsigned short expected, missing;
    int bytes : 31;
    unsigned phase : 1;
    void end_if_all() {
        if (!missing && !bytes) missing = expected, phase ^= 1;
    }
};
static_assert(sizeof(Barrier) == 8, "");
struct Product {
    float *sums;
    int rows, step;
    const unsigned char *from;
    unsigned a[32][4];
    const unsigned char *rows_of_a; /* or null */
};
static std::vector<Product> begun[MAX_THREADS];
}  // namespace on_cpu
static inline void make_barrier(unsigned long long *at, int arrivals) {
    *(on_cpu::Barrier *)at = {(unsigned short)arrivals, (unsigned short)arrivals, 0, 0};
}
static inline void show_shared() {}
static inline void arrive_and_expect(unsigned long long *at, int bytes) {
    on_cpu::Barrier &barrier = *(on_cpu::Barrier *)at;
    barrier.missing--, barrier.bytes += bytes;
    barrier.end_if_all();
}
static inline void arrive(unsigned long long *at) { arrive_and_expect(at, 0); }
static inline void wait_for(unsigned long long *at, int parity) {
    while (((volatile on_cpu::Barrier *)at)->phase == (unsigned)parity)
        if (!on_cpu::yield()) {
            fprintf(stderr, "a thread waits for ever\n");
            abort();
        }
}
static inline void copy_piece(void *to, const void *from, int bytes, unsigned long long *at) {
    if ((size_t)to % 16 || (size_t)from % 16 || bytes % 16) abort();
    memcpy(to, from, bytes);
    on_cpu::Barrier &barrier = *(on_cpu::Barrier *)at;
    barrier.bytes -= bytes;
    barrier.end_if_all();
}
static inline unsigned in_shared(const void *at) { return (unsigned)((const char *)at - on_cpu::shared); }
static inline void give_registers() {}
static inline void take_registers() {}
static inline void meet_of_products() { on_cpu::meet(on_cpu::products); }
static inline void begin_products() {}
static inline void end_of_products() {}
template <int ROWS> static void multiply_rows(float (&c)[ROWS / 2], const uint4 &a, const unsigned char *rows, int step) {
    on_cpu::Group &warp = on_cpu::warps[on_cpu::now / 32];
    on_cpu::Product product = {c, ROWS, step, rows, {}, nullptr};
    memcpy(warp.exchange[1][on_cpu::now % 32], &a, sizeof a);
    on_cpu::meet(warp);
    for (int i = 0; i < 32; i++) memcpy(product.a[i], warp.exchange[1][i], sizeof a);
    on_cpu::meet(warp);
    on_cpu::begun[on_cpu::now].push_back(product);
}
static inline void multiply_both(float (&c)[32], const unsigned char *a, const unsigned char *rows, int step) {
    on_cpu::begun[on_cpu::now].push_back({c, 64, step, rows, {}, a + on_cpu::now / 32 % 4 * 16 * 128});
}
static inline float half_of(const unsigned char *rows, int row, int step, int k) { /* which are exchanged */
    unsigned short bits;
    memcpy(&bits, rows + row * 128 + ((step * 2 + k / 8) ^ row % 8) * 16 + k % 8 * 2, 2);
    return __uint_as_float((unsigned)bits << 16);
}
static inline void wait_for_products() {
    int lane = on_cpu::now % 32;
    for (const on_cpu::Product &p : on_cpu::begun[on_cpu::now]) {
        float a[2][16];
        for (int half = 0; half < 2; half++)
            for (int k = 0; k < 16; k++)
                a[half][k] = p.rows_of_a ? half_of(p.rows_of_a, lane / 4 + 8 * half, p.step, k)
                                         : on_cpu::element<float>(p.a[lane / 4 * 4 + k % 8 / 2][half + k / 8 * 2], k % 2);
        for (int column = lane % 4 * 2; column < p.rows; column += column % 2 ? 7 : 1) {
            float b[16], sums[2] = {0, 0};
            for (int k = 0; k < 16; k++) b[k] = half_of(p.from, column, p.step, k);
            for (int k = 0; k < 16; k++) sums[0] += a[0][k] * b[k], sums[1] += a[1][k] * b[k];
            for (int half = 0; half < 2; half++) p.sums[column / 8 * 4 + half * 2 + column % 2] += sums[half];
        }
    }
    on_cpu::begun[on_cpu::now].clear();
}
