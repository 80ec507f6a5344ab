/* What kernels share that are for compute capability 9.0 alone: copies of whole pieces of memory, barriers that wait for them, and matrix
 * instructions of four warps together (wgmma). */
#ifndef FORERUN_HOPPER_CUH
#define FORERUN_HOPPER_CUH
#include "forerun.cuh"

#ifdef __CUDACC__
/* Barriers in shared memory: a phase is over when as many threads have arrived as it was made for, and all bytes that they expect are there. Who
 * makes them shows them, and the block's threads meet. */
__device__ __forceinline__ u32 in_shared(const void *at) { return (u32)__cvta_generic_to_shared(at); }
__device__ __forceinline__ void make_barrier(u64 *at, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(in_shared(at)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void arrive(u64 *at) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(in_shared(at)) : "memory"); }
__device__ __forceinline__ void arrive_and_expect(u64 *at, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(in_shared(at)), "r"(bytes) : "memory");
}
/* Until a phase is over: of the first one `parity` is 0, of the next 1, and so on. */
__device__ __forceinline__ void wait_for(u64 *at, int parity) {
    u32 is_over = 0;
    while (!is_over)
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(is_over)
                     : "r"(in_shared(at)), "r"(parity)
                     : "memory");
}
/* Begins to copy multiples of 16 bytes into shared memory, which a barrier expects. */
__device__ __forceinline__ void copy_piece(void *to, const void *from, int bytes, u64 *barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(in_shared(to)), "l"(from), "r"(bytes),
                 "r"(in_shared(barrier))
                 : "memory");
}

/* What a thread has written to shared memory, or copied there 16 bytes at a time and waited for: to copies of pieces, and to products. Then it may
 * tell others. */
__device__ __forceinline__ void show_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/* Between what a warp does with registers and the products that have them. */
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void end_of_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wait_for_products() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

/* Of a thread: all warps of a block of THREADS have 168 at first. By four warps together. */
__device__ __forceinline__ void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 40;"); }
__device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 232;"); }
/* The warps that multiply. */
__device__ __forceinline__ void meet_of_products() { asm volatile("bar.sync 1, 256;" ::: "memory"); }

#define TO_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, " \
    "%25, %26, %27, %28, %29, %30, %31"
#define TO_64 TO_32 \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, " \
    "%55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TO_128 TO_64 \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, " \
    "%87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108," \
    " %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define SUMS_4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define SUMS_16(i) SUMS_4(i), SUMS_4(i + 4), SUMS_4(i + 8), SUMS_4(i + 12)
#define SUMS_64(i) SUMS_16(i), SUMS_16(i + 16), SUMS_16(i + 32), SUMS_16(i + 48)

/* Rows of 128 bytes in shared memory, from a multiple of 1024 on, whose pieces of 16 are exchanged by the row's number in 8 (a swizzle of 128
 * bytes); the step-th 32 bytes of each. */
__device__ __forceinline__ u64 operand(const u8 *rows, int step) {
    return (u64)((in_shared(rows) + 32 * step) >> 4 & 0x3fff) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

/* c [64, ROWS] += a [64, 16] times rows, the step-th 16 inputs of a stage: a strip of each of four warps as m16n8k16 has it, c as tiles of 8
 * rows side by side. Nobody touches c, and nobody writes a, until the products have been waited for. */
template <int ROWS> __device__ __forceinline__ void multiply_rows(float (&c)[ROWS / 2], const uint4 &a, const u8 *rows, int step) {
    if constexpr (ROWS == 128)
        asm volatile("{ .reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" TO_64
                     "}, {%64, %65, %66, %67}, %68, p, 1, 1, 0; }"
                     : SUMS_64(0)
                     : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(operand(rows, step)));
    else
        asm volatile("{ .reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" TO_128
                     "}, {%128, %129, %130, %131}, %132, p, 1, 1, 0; }"
                     : SUMS_64(0), SUMS_64(64)
                     : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(operand(rows, step)));
}

/* The same of 64 rows, with a in shared memory as they are: 16 rows for each of four warps. */
__device__ __forceinline__ void multiply_both(float (&c)[32], const u8 *a, const u8 *rows, int step) {
    asm volatile("{ .reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" TO_32
                 "}, %32, %33, p, 1, 1, 0, 0; }"
                 : SUMS_16(0), SUMS_16(16)
                 : "l"(operand(a, step)), "l"(operand(rows, step)));
}
#endif
#endif
