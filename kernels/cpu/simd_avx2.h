/* 256-bit vectors: 8 floats, or a tile's 16 outputs in two halves. */
#include <immintrin.h>

#define LANES 8
#define PARTS 2
#define SUMS 8 /* vectors of sums that fit into registers, beside what they are made of */
#define PAIR_ROWS 2 /* for which the sums of two tiles fit into registers */
typedef __m256 VF;
typedef __m256i VI;
typedef __m256i VS; /* a sub-block's sums: 16 bits while they fit */

static inline VF vf_load(const float *p) { return _mm256_loadu_ps(p); }
static inline void vf_store(float *p, VF v) { _mm256_storeu_ps(p, v); }
static inline VF vf_set(float x) { return _mm256_set1_ps(x); }
static inline VF vf_add(VF a, VF b) { return _mm256_add_ps(a, b); }
static inline VF vf_mul(VF a, VF b) { return _mm256_mul_ps(a, b); }
static inline VF vf_fma(VF a, VF b, VF c) { return _mm256_fmadd_ps(a, b, c); }
/* The sums of 8 vectors. */
static inline void vf_sum_8(const VF *v, float *sums) {
    __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
    _mm256_storeu_ps(sums, _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31)));
}
static inline VF vf_half(const void *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
/* LANES bfloat16. */
static inline VF vf_wide(const void *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
/* 2 * LANES bfloat16: those at even places, and those at odd ones. */
static inline void vf_bf16(const void *p, VF *even, VF *odd) {
    __m256i v = _mm256_loadu_si256((const __m256i *)p);
    *even = _mm256_castsi256_ps(_mm256_slli_epi32(v, 16));
    *odd = _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32((int)0xffff0000)));
}

static inline VI vi_load(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
static inline VI vi_set(int x) { return _mm256_set1_epi32(x); }
/* LANES signed bytes. */
static inline VI vi_signed(const void *p) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
/* 16 bytes, and those of them that bytes from 0 to 15 stand for. */
static inline VI vi_table(const int8_t *p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p)); }
static inline VI vi_lookup(VI table, VI at) { return _mm256_shuffle_epi8(table, at); }
static inline VI vi_four(const int8_t *p) { int x; memcpy(&x, p, 4); return _mm256_set1_epi32(x); }
static inline VI vi_add(VI a, VI b) { return _mm256_add_epi32(a, b); }
static inline VI vi_sub(VI a, VI b) { return _mm256_sub_epi32(a, b); }
static inline VI vi_up(VI v, int n) { return _mm256_slli_epi32(v, n); }
static inline VF vi_float(VI v) { return _mm256_cvtepi32_ps(v); }
/* Each byte moved down by so many places (up, if there are less than none), and of it the bits of `mask`, to which no other byte's come. */
static inline VI vi_bits(VI v, int by, int mask) {
    return _mm256_and_si256(by < 0 ? _mm256_slli_epi16(v, -by) : _mm256_srli_epi16(v, by), _mm256_set1_epi8((char)mask));
}
static inline VI vi_or(VI a, VI b) { return _mm256_or_si256(a, b); }

/* Signed bytes: a dot of 4, added to each output. `start` undoes what an instruction set adds: nothing here. */
static inline VI vi_start(int sum) { (void)sum; return _mm256_setzero_si256(); }
static inline VI vi_weights(VI w) { return w; }
static inline VI vi_dot(VI sum, VI w, VI a) {
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

/* Unsigned weights of 2 to 6 bits. 16 bits hold 8 sums of 4 products with 4 bits, 2 with 6. */
#define GROUPS_OF_SIX 2
static inline VS vs_zero(void) { return _mm256_setzero_si256(); }
static inline VS vs_dot(VS sum, VI w, VI a) { return _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, a)); }
static inline VI vs_sum(VS sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }

/* Pairs of 16 bits a lane, from bytes. */
static inline VI vp_unsigned(const void *p) { return _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)p)); }
static inline VI vp_signed(const void *p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p)); }
static inline VI vp_dot(VI pairs, const int16_t *two) { int x; memcpy(&x, two, 4); return _mm256_madd_epi16(pairs, _mm256_set1_epi32(x)); }
/* The first or second of each pair, as vs_scaled takes it. */
static inline VI vp_first(VI pairs) {
    return _mm256_shuffle_epi8(pairs, _mm256_setr_epi8(0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13,
                                                       0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13));
}
static inline VI vp_second(VI pairs) {
    return _mm256_shuffle_epi8(pairs, _mm256_setr_epi8(2, 3, 2, 3, 6, 7, 6, 7, 10, 11, 10, 11, 14, 15, 14, 15,
                                                       2, 3, 2, 3, 6, 7, 6, 7, 10, 11, 10, 11, 14, 15, 14, 15));
}
static inline VI vs_scaled(VS sum, VI scale) { return _mm256_madd_epi16(sum, scale); }
