/* Compiled for this instruction set alone; program.c asks the processor before it calls anything here. */
#include "kernels_table.h"
#if defined(__aarch64__)
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
#include "simd_neon.h"
#define SUFFIX kernels_neon
#include "kernels.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#else
typedef int nothing_here;
#endif
