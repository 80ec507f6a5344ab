/* 128-bit vectors with dot products (Armv8.2): 4 floats, or a tile's 16 outputs in four parts. */
#include <arm_neon.h>

#define LANES 4
#define PARTS 4
#define SUMS 16 /* vectors of sums that fit into registers, beside what they are made of */
#define PAIR_ROWS 2 /* for which the sums of two tiles fit into registers */
typedef float32x4_t VF;
typedef int32x4_t VI;
typedef int32x4_t VS;

static inline VF vf_load(const float *p) { return vld1q_f32(p); }
static inline void vf_store(float *p, VF v) { vst1q_f32(p, v); }
static inline VF vf_set(float x) { return vdupq_n_f32(x); }
static inline VF vf_add(VF a, VF b) { return vaddq_f32(a, b); }
static inline VF vf_mul(VF a, VF b) { return vmulq_f32(a, b); }
static inline VF vf_fma(VF a, VF b, VF c) { return vfmaq_f32(c, a, b); }
static inline void vf_sum_8(const VF *v, float *sums) {
    for (int i = 0; i < 8; i += 4)
        vst1q_f32(sums + i, vpaddq_f32(vpaddq_f32(v[i], v[i + 1]), vpaddq_f32(v[i + 2], v[i + 3])));
}
static inline VF vf_half(const void *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *)p))); }
static inline VF vf_wide(const void *p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16((const uint16_t *)p), 16)); }
static inline void vf_bf16(const void *p, VF *even, VF *odd) {
    uint32x4_t v = vreinterpretq_u32_u16(vld1q_u16((const uint16_t *)p));
    *even = vreinterpretq_f32_u32(vshlq_n_u32(v, 16));
    *odd = vreinterpretq_f32_u32(vandq_u32(v, vdupq_n_u32(0xffff0000)));
}

#define BYTES(v) vreinterpretq_u8_s32(v)
#define WORDS(v) vreinterpretq_s32_u8(v)
static inline VI vi_load(const void *p) { return WORDS(vld1q_u8((const uint8_t *)p)); }
static inline VI vi_set(int x) { return vdupq_n_s32(x); }
static inline VI vi_signed(const void *p) {
    int32_t four;
    memcpy(&four, p, 4);
    return vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)))));
}
static inline VI vi_table(const int8_t *p) { return vi_load(p); }
static inline VI vi_lookup(VI table, VI at) { return WORDS(vqtbl1q_u8(BYTES(table), BYTES(at))); }
static inline VI vi_four(const int8_t *p) { int x; memcpy(&x, p, 4); return vdupq_n_s32(x); }
static inline VI vi_add(VI a, VI b) { return vaddq_s32(a, b); }
static inline VI vi_sub(VI a, VI b) { return vsubq_s32(a, b); }
static inline VI vi_up(VI v, int n) { return vshlq_s32(v, vdupq_n_s32(n)); }
static inline VF vi_float(VI v) { return vcvtq_f32_s32(v); }
static inline VI vi_bits(VI v, int by, int mask) {
    return WORDS(vandq_u8(vshlq_u8(BYTES(v), vdupq_n_s8((int8_t)-by)), vdupq_n_u8((uint8_t)mask)));
}
static inline VI vi_or(VI a, VI b) { return vorrq_s32(a, b); }

static inline VI vi_start(int sum) { (void)sum; return vdupq_n_s32(0); }
static inline VI vi_weights(VI w) { return w; }
static inline VI vi_dot(VI sum, VI w, VI a) { return vdotq_s32(sum, vreinterpretq_s8_s32(w), vreinterpretq_s8_s32(a)); }

#define GROUPS_OF_SIX 4
static inline VS vs_zero(void) { return vdupq_n_s32(0); }
static inline VS vs_dot(VS sum, VI w, VI a) { return vi_dot(sum, w, a); }
static inline VI vs_sum(VS sum) { return sum; }

static inline VI vp_unsigned(const void *p) { return vreinterpretq_s32_u16(vmovl_u8(vld1_u8((const uint8_t *)p))); }
static inline VI vp_signed(const void *p) { return vreinterpretq_s32_s16(vmovl_s8(vld1_s8((const int8_t *)p))); }
static inline VI vp_first(VI pairs) { return vshrq_n_s32(vshlq_n_s32(pairs, 16), 16); }
static inline VI vp_second(VI pairs) { return vshrq_n_s32(pairs, 16); }
static inline VI vp_dot(VI pairs, const int16_t *two) {
    return vmlaq_n_s32(vmulq_n_s32(vp_first(pairs), two[0]), vp_second(pairs), two[1]);
}
static inline VI vs_scaled(VS sum, VI scale) { return vmulq_s32(sum, scale); }
