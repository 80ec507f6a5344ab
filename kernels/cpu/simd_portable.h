/* Vectors of 8 in plain C (GCC and Clang vector types): what any machine can run. */
#define LANES 8
#define PARTS 2
#define SUMS 8 /* vectors of sums that fit into registers, beside what they are made of */
#define PAIR_ROWS 2 /* for which the sums of two tiles fit into registers */
typedef float VF __attribute__((vector_size(32)));
typedef int32_t VI __attribute__((vector_size(32)));
typedef VI VS;

static inline VF vf_load(const float *p) { VF v; memcpy(&v, p, sizeof v); return v; }
static inline void vf_store(float *p, VF v) { memcpy(p, &v, sizeof v); }
static inline VF vf_set(float x) { return (VF){x, x, x, x, x, x, x, x}; }
static inline VF vf_add(VF a, VF b) { return a + b; }
static inline VF vf_mul(VF a, VF b) { return a * b; }
static inline VF vf_fma(VF a, VF b, VF c) { return a * b + c; }
static inline void vf_sum_8(const VF *v, float *sums) {
    for (int i = 0; i < 8; i++)
        sums[i] = ((v[i][0] + v[i][1]) + (v[i][2] + v[i][3])) + ((v[i][4] + v[i][5]) + (v[i][6] + v[i][7]));
}
static inline VF vf_half(const void *p) {
    VF v;
    for (int i = 0; i < LANES; i++) v[i] = half((const uint8_t *)p + 2 * i);
    return v;
}
static inline VF vf_wide(const void *p) {
    VI v;
    for (int i = 0; i < LANES; i++) v[i] = ((const int8_t *)p)[2 * i + 1] * (1 << 24) | ((const uint8_t *)p)[2 * i] << 16;
    VF floats;
    memcpy(&floats, &v, sizeof v);
    return floats;
}
static inline void vf_bf16(const void *p, VF *even, VF *odd) {
    VI v;
    memcpy(&v, p, sizeof v);
    VI low = v << 16, high = v & (int32_t)0xffff0000;
    memcpy(even, &low, sizeof low);
    memcpy(odd, &high, sizeof high);
}

static inline VI vi_load(const void *p) { VI v; memcpy(&v, p, sizeof v); return v; }
static inline VI vi_set(int x) { return (VI){x, x, x, x, x, x, x, x}; }
static inline VI vi_signed(const void *p) {
    VI v;
    for (int i = 0; i < LANES; i++) v[i] = ((const int8_t *)p)[i];
    return v;
}
static inline VI vi_table(const int8_t *p) { VI v; memcpy(&v, p, 16); memcpy((char *)&v + 16, p, 16); return v; }
static __attribute__((noinline)) VI vi_lookup(VI table, VI at) { /* inlined it takes compilers long */
    int8_t bytes[32], places[32];
    memcpy(bytes, &table, 32);
    memcpy(places, &at, 32);
    for (int i = 0; i < 32; i++) places[i] = bytes[places[i]];
    memcpy(&at, places, 32);
    return at;
}
static inline VI vi_four(const int8_t *p) { int x; memcpy(&x, p, 4); return vi_set(x); }
static inline VI vi_add(VI a, VI b) { return a + b; }
static inline VI vi_sub(VI a, VI b) { return a - b; }
static inline VI vi_up(VI v, int n) { return v * (1 << n); }
static inline VF vi_float(VI v) { return __builtin_convertvector(v, VF); }
static inline VI vi_bits(VI v, int by, int mask) { return (by < 0 ? v << -by : v >> by) & mask * 0x01010101; }
static inline VI vi_or(VI a, VI b) { return a | b; }

static inline VI vi_start(int sum) { (void)sum; return vi_set(0); }
static inline VI vi_weights(VI w) { return w; }
static inline VI vi_dot(VI sum, VI w, VI a) {
    for (int place = 24; place >= 0; place -= 8) sum += (w << place >> 24) * (a << place >> 24);
    return sum;
}

#define GROUPS_OF_SIX 4
static inline VS vs_zero(void) { return vi_set(0); }
static inline VS vs_dot(VS sum, VI w, VI a) { return vi_dot(sum, w, a); }
static inline VI vs_sum(VS sum) { return sum; }

static inline VI vp_unsigned(const void *p) {
    VI v;
    for (int i = 0; i < LANES; i++) v[i] = ((const uint8_t *)p)[2 * i] | ((const uint8_t *)p)[2 * i + 1] << 16;
    return v;
}
static inline VI vp_signed(const void *p) {
    VI v;
    for (int i = 0; i < LANES; i++) v[i] = (((const int8_t *)p)[2 * i] & 0xffff) | ((const int8_t *)p)[2 * i + 1] * 65536;
    return v;
}
static inline VI vp_first(VI pairs) { return pairs << 16 >> 16; }
static inline VI vp_second(VI pairs) { return pairs >> 16; }
static inline VI vp_dot(VI pairs, const int16_t *two) { return vp_first(pairs) * two[0] + vp_second(pairs) * two[1]; }
static inline VI vs_scaled(VS sum, VI scale) { return sum * scale; }
