/* Everything else, and what the others are tested against. */
#include "kernels_table.h"
#include "simd_portable.h"
#define SUFFIX kernels_portable
#include "kernels.h"
