/* 512-bit vectors with VNNI: 16 floats, or all outputs of a tile. */
#include <immintrin.h>

#define LANES 16
#define PARTS 1
#define SUMS 16 /* vectors of sums that fit into registers, beside what they are made of */
#define PAIR_ROWS 6 /* for which the sums of two tiles fit into registers */
typedef __m512 VF;
typedef __m512i VI;
typedef __m512i VS;

static inline VF vf_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void vf_store(float *p, VF v) { _mm512_storeu_ps(p, v); }
static inline VF vf_set(float x) { return _mm512_set1_ps(x); }
static inline VF vf_add(VF a, VF b) { return _mm512_add_ps(a, b); }
static inline VF vf_mul(VF a, VF b) { return _mm512_mul_ps(a, b); }
static inline VF vf_fma(VF a, VF b, VF c) { return _mm512_fmadd_ps(a, b, c); }
static inline void vf_sum_8(const VF *v, float *sums) {
    __m256 h[8];
    for (int i = 0; i < 8; i++) h[i] = _mm256_add_ps(_mm512_castps512_ps256(v[i]), _mm512_extractf32x8_ps(v[i], 1));
    __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(h[0], h[1]), _mm256_hadd_ps(h[2], h[3]));
    __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(h[4], h[5]), _mm256_hadd_ps(h[6], h[7]));
    _mm256_storeu_ps(sums, _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31)));
}
static inline VF vf_half(const void *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
static inline VF vf_wide(const void *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
static inline void vf_bf16(const void *p, VF *even, VF *odd) {
    __m512i v = _mm512_loadu_si512(p);
    *even = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
    *odd = _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32((int)0xffff0000)));
}

static inline VI vi_load(const void *p) { return _mm512_loadu_si512(p); }
static inline VI vi_set(int x) { return _mm512_set1_epi32(x); }
static inline VI vi_signed(const void *p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)); }
static inline VI vi_table(const int8_t *p) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)p)); }
static inline VI vi_lookup(VI table, VI at) { return _mm512_shuffle_epi8(table, at); }
static inline VI vi_four(const int8_t *p) { int x; memcpy(&x, p, 4); return _mm512_set1_epi32(x); }
static inline VI vi_add(VI a, VI b) { return _mm512_add_epi32(a, b); }
static inline VI vi_sub(VI a, VI b) { return _mm512_sub_epi32(a, b); }
static inline VI vi_up(VI v, int n) { return _mm512_slli_epi32(v, (unsigned)n); }
static inline VF vi_float(VI v) { return _mm512_cvtepi32_ps(v); }
static inline VI vi_bits(VI v, int by, int mask) {
    return _mm512_and_si512(by < 0 ? _mm512_slli_epi16(v, (unsigned)-by) : _mm512_srli_epi16(v, (unsigned)by), _mm512_set1_epi8((char)mask));
}
static inline VI vi_or(VI a, VI b) { return _mm512_or_si512(a, b); }

/* VPDPBUSD wants one side unsigned: weights get 128 added, which adds 128 times the sum of the activations. */
static inline VI vi_start(int sum) { return _mm512_set1_epi32(-128 * sum); }
static inline VI vi_weights(VI w) { return _mm512_xor_si512(w, _mm512_set1_epi8((char)128)); }
static inline VI vi_dot(VI sum, VI w, VI a) { return _mm512_dpbusd_epi32(sum, w, a); }

#define GROUPS_OF_SIX 4
static inline VS vs_zero(void) { return _mm512_setzero_si512(); }
static inline VS vs_dot(VS sum, VI w, VI a) { return _mm512_dpbusd_epi32(sum, w, a); }
static inline VI vs_sum(VS sum) { return sum; }

static inline VI vp_unsigned(const void *p) { return _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)p)); }
static inline VI vp_signed(const void *p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)p)); }
static inline VI vp_dot(VI pairs, const int16_t *two) { int x; memcpy(&x, two, 4); return _mm512_madd_epi16(pairs, _mm512_set1_epi32(x)); }
static inline VI vp_first(VI pairs) { return _mm512_srai_epi32(_mm512_slli_epi32(pairs, 16), 16); }
static inline VI vp_second(VI pairs) { return _mm512_srai_epi32(pairs, 16); }
static inline VI vs_scaled(VS sum, VI scale) { return _mm512_mullo_epi32(sum, scale); }
