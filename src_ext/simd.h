/* Primitives of the kernels: a vector of LANES numbers of type `real`, and what the row losses and the linear layer
 * do with it. FASTLOSS_TYPE chooses `real`, float or double, and `stored`, the type of scores and features in memory,
 * which is converted in registers; the compiler's target chooses the width. GCC and Clang.
 *
 * Comparisons give a `mask`: bits in a register with AVX-512, else a vector of all-ones and zeros. Comparisons with
 * NaN are false. Products and sums in one expression are fused where the target can (-ffp-contract=fast).
 */
#ifndef FASTLOSS_SIMD_H
#define FASTLOSS_SIMD_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif !defined(__GNUC__)
#error "fastloss needs GCC or Clang: it uses their vector extensions"
#endif

#define FL_INLINE static inline __attribute__((always_inline))
#define FL_PASTE_(a, b) a##b
#define FL_PASTE(a, b) FL_PASTE_(a, b)

#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define FL_MASK_REGISTERS 1
#define VBYTES 64
#define FL_PREFIX _mm512_
#define DOT_BLOCK 6 /* classes whose sums stay in registers: with 4 rows of each they fill 24 of 32, */
#define OUTER_BLOCK 12 /* and with 2 vectors of features of each */
#elif defined(__AVX2__)
#define VBYTES 32
#define FL_PREFIX _mm256_
#define DOT_BLOCK 3 /* 12 of 16 registers */
#define OUTER_BLOCK 6
#else
#define VBYTES 16
#define FL_PREFIX _mm_
#define DOT_BLOCK 3
#define OUTER_BLOCK 6
#endif

#define FL_F32 1
#define FL_F64 2
#define FL_F16 3
#define FL_BF16 4
#define FL_U8 5
#define FL_STORED FL_PASTE(FL_, FASTLOSS_TYPE) /* FASTLOSS_TYPE is one of these names without FL_ */
#define FASTLOSS_BITS (FL_STORED == FL_F64 ? 64 : 32)
#if FL_STORED == FL_F64
typedef double stored;
#elif FL_STORED == FL_F32
typedef float stored;
#elif FL_STORED == FL_U8
typedef uint8_t stored;
#else
typedef uint16_t stored; /* the bits of float16 or bfloat16 */
#endif
#define STORED_IS_REAL (FL_STORED == FL_F32 || FL_STORED == FL_F64)
/* uint8 is a type of features alone: what is for scores is left out where it is not called. */
#define ARE_SCORES (FL_STORED != FL_U8)
/* Forms for single options take time to compile: old processors, without AVX2, have those for all of them alone. */
#ifdef __AVX2__
#define MANY_FORMS 1
#else
#define MANY_FORMS 0
#endif
#define STORED_FORMAT (FL_STORED == FL_F64 ? 'd' : FL_STORED == FL_F32 ? 'f' : FL_STORED == FL_U8 ? 'B' : 'H')

#if FASTLOSS_BITS == 32
typedef float real;
typedef int32_t lane_int;
typedef uint32_t lane_bits;
#define FL_SUFFIX ps
#define FL_CHOICE __mmask16
#define FL_MANTISSA 23
#define FL_BIAS 127
#define FL_ROUND 12582912.0f /* 1.5 * 2^23: adding it rounds to an integer, held in the low bits */
#define FL_EXP_LOW -87.33654f /* log of the smallest normal number */
#define REAL_MAX __FLT_MAX__
#define REAL_EPS __FLT_EPSILON__
#define FL_NEAR 256 /* see Origin in losses.pxi */
#define RAISED_BITS 32
#define FL_LN2_HIGH 0.693359375f
#define FL_LN2_LOW -2.12194440e-4f
#define FL_SQRT_HALF 0x3f3504f3
#else
typedef double real;
typedef int64_t lane_int;
typedef uint64_t lane_bits;
#define FL_SUFFIX pd
#define FL_CHOICE __mmask8
#define FL_MANTISSA 52
#define FL_BIAS 1023
#define FL_ROUND 6755399441055744.0
#define FL_EXP_LOW -708.3964185322641
#define REAL_MAX __DBL_MAX__
#define REAL_EPS __DBL_EPSILON__
#define FL_NEAR 1536
#define RAISED_BITS 64
#define FL_LN2_HIGH 6.93147180369123816490e-01
#define FL_LN2_LOW 1.90821492927058770002e-10
#define FL_SQRT_HALF 0x3fe6a09e667f3bcd
#endif

#define RAISED ((real)(1ull << (RAISED_BITS - 1)) * 2) /* 2^RAISED_BITS */
#define LANES ((int)(VBYTES / sizeof(real)))
#define TILE 16 /* rows handled together, a multiple of LANES */
#define ROWS 4  /* rows whose products share the loads of W */
#define VOP(name) FL_PASTE(FL_PASTE(FL_PASTE(FL_PREFIX, name), _), FL_SUFFIX)

typedef real vec __attribute__((vector_size(VBYTES)));
typedef lane_int ivec __attribute__((vector_size(VBYTES)));
typedef lane_bits uvec __attribute__((vector_size(VBYTES)));
typedef real vec_unaligned __attribute__((vector_size(VBYTES), aligned(sizeof(real)), may_alias));
typedef lane_int ivec_unaligned __attribute__((vector_size(VBYTES), aligned(sizeof(lane_int)), may_alias));

/* ---- loads, stores, constants ---- */
FL_INLINE vec vload(const real *p) { return (vec)(*(const vec_unaligned *)p); }
FL_INLINE void vstore(real *p, vec v) { *(vec_unaligned *)p = v; }
FL_INLINE ivec iload(const lane_int *p) { return (ivec)(*(const ivec_unaligned *)p); }
FL_INLINE void istore(lane_int *p, ivec v) { *(ivec_unaligned *)p = v; }
FL_INLINE vec vset(real x) {
#ifdef __x86_64__
    return VOP(set1)(x);
#else
    vec v;
    for (int k = 0; k < LANES; k++) v[k] = x;
    return v;
#endif
}
FL_INLINE ivec iset(lane_int i) { return (ivec){0} + i; }
FL_INLINE ivec iota(void) {
    static const lane_int count[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return iload(count);
}
/* i / n, rounded down, for small numbers: of half a step more, so that no rounding shows. */
FL_INLINE ivec quotients(ivec i, lane_int n) {
    return __builtin_convertvector((__builtin_convertvector(i, vec) + (real)0.5) * ((real)1 / n), ivec);
}

/* ---- pieces: 128 bits of a vector, GROUP numbers; the first n of them from memory (zeros else) and to it, n in [1, GROUP].
 * Tails of rows are written by pieces where there are no mask registers: a store with a mask in a vector takes 13 cycles on
 * Zen 4 (16 rows of 2 floats: 200 cycles, by pieces 20). ---- */
#define GROUP ((int)(16 / sizeof(real)))
#ifdef __x86_64__
typedef real piece __attribute__((vector_size(16)));
#if FASTLOSS_BITS == 32
FL_INLINE piece piece_load(const real *p, ptrdiff_t n) {
    if (n == 4) return (piece)_mm_loadu_ps(p);
    if (n == 1) return (piece)_mm_load_ss(p);
    const __m128 two = _mm_castsi128_ps(_mm_loadl_epi64((const void *)p));
    return (piece)(n == 2 ? two : _mm_movelh_ps(two, _mm_load_ss(p + 2)));
}
FL_INLINE void piece_store(real *p, piece v, ptrdiff_t n) {
    if (n == 4) _mm_storeu_ps(p, v);
    else if (n == 1) _mm_store_ss(p, v);
    else _mm_storel_pi((__m64 *)p, v);
    if (n == 3) _mm_store_ss(p + 2, _mm_movehl_ps(v, v));
}
#else
FL_INLINE piece piece_load(const real *p, ptrdiff_t n) { return n == 2 ? _mm_loadu_pd(p) : _mm_load_sd(p); }
FL_INLINE void piece_store(real *p, piece v, ptrdiff_t n) {
    if (n == 2) _mm_storeu_pd(p, v);
    else _mm_store_sd(p, v);
}
#endif
/* Piece k of a vector; k is a constant. */
FL_INLINE piece piece_of(vec v, int k) {
#if VBYTES == 64
    return k ? (piece)_mm512_extractf32x4_ps((__m512)v, k) : (piece)_mm512_castps512_ps128((__m512)v);
#elif VBYTES == 32
    return k ? (piece)_mm256_extractf128_ps((__m256)v, 1) : (piece)_mm256_castps256_ps128((__m256)v);
#else
    return (piece)v;
#endif
}
#endif

/* ---- comparisons and choice: vlt a < b, vle a <= b, veq a == b; choose(m, a, b) is a where m, else b ---- */
#ifdef FL_MASK_REGISTERS
typedef FL_CHOICE mask;
#define FL_COMPARE(name) FL_PASTE(FL_PASTE(FL_PREFIX, name), FL_PASTE(_, FL_PASTE(FL_SUFFIX, _mask)))
FL_INLINE mask vlt(vec a, vec b) { return FL_COMPARE(cmp)(a, b, _CMP_LT_OQ); }
FL_INLINE mask vle(vec a, vec b) { return FL_COMPARE(cmp)(a, b, _CMP_LE_OQ); }
FL_INLINE mask veq(vec a, vec b) { return FL_COMPARE(cmp)(a, b, _CMP_EQ_OQ); }
FL_INLINE vec choose(mask m, vec a, vec b) { return VOP(mask_blend)(m, b, a); }
#if FASTLOSS_BITS == 32
FL_INLINE mask ieq(ivec a, ivec b) { return _mm512_cmpeq_epi32_mask((__m512i)a, (__m512i)b); }
FL_INLINE mask ige(ivec a, ivec b) { return _mm512_cmpge_epi32_mask((__m512i)a, (__m512i)b); }
FL_INLINE ivec ichoose(mask m, ivec a, ivec b) { return (ivec)_mm512_mask_blend_epi32(m, (__m512i)b, (__m512i)a); }
#else
FL_INLINE mask ieq(ivec a, ivec b) { return _mm512_cmpeq_epi64_mask((__m512i)a, (__m512i)b); }
FL_INLINE mask ige(ivec a, ivec b) { return _mm512_cmpge_epi64_mask((__m512i)a, (__m512i)b); }
FL_INLINE ivec ichoose(mask m, ivec a, ivec b) { return (ivec)_mm512_mask_blend_epi64(m, (__m512i)b, (__m512i)a); }
#endif
FL_INLINE mask mor(mask a, mask b) { return a | b; }
FL_INLINE mask mandnot(mask a, mask b) { return a & (mask)~b; }
/* The same of some lanes: above_of, where a is not up to b, so that NaN is; differ_of; and the larger, else a. */
FL_INLINE mask first_bits(ptrdiff_t n) { return (mask)((1u << n) - 1u); }
FL_INLINE mask above_of(mask m, vec a, vec b) { return FL_COMPARE(mask_cmp)(m, a, b, _CMP_NLE_UQ); }
FL_INLINE mask equal_of(mask m, vec a, vec b) { return FL_COMPARE(mask_cmp)(m, a, b, _CMP_EQ_OQ); }
FL_INLINE mask unordered_of(mask m, vec a, vec b) { return FL_COMPARE(mask_cmp)(m, a, b, _CMP_UNORD_Q); }
FL_INLINE vec max_of(mask m, vec a, vec b) { return VOP(mask_max)(a, m, a, b); }
#if FASTLOSS_BITS == 32
FL_INLINE mask differ_of(mask m, ivec a, ivec b) { return _mm512_mask_cmpneq_epi32_mask(m, (__m512i)a, (__m512i)b); }
#else
FL_INLINE mask differ_of(mask m, ivec a, ivec b) { return _mm512_mask_cmpneq_epi64_mask(m, (__m512i)a, (__m512i)b); }
#endif
FL_INLINE int all_lanes(mask m) { return m == (mask)((1u << LANES) - 1u); }
FL_INLINE int none_of(mask m) { return m == 0; }
FL_INLINE uint64_t bits_of(mask m) { return m; } /* one for each lane */
/* Where one of both is NaN. */
FL_INLINE mask unordered(vec a, vec b) { return FL_COMPARE(cmp)(a, b, _CMP_UNORD_Q); }
/* The first n lanes of p, the others `fill`; and the first n lanes of v to p. n in [0, LANES]. */
FL_INLINE vec vload_part(const real *p, ptrdiff_t n, real fill) {
    return VOP(mask_loadu)(vset(fill), (mask)((1u << n) - 1u), p);
}
FL_INLINE void vstore_part(real *p, vec v, ptrdiff_t n) { VOP(mask_storeu)(p, (mask)((1u << n) - 1u), v); }
#else
typedef ivec mask;
FL_INLINE mask vlt(vec a, vec b) { return (mask)(a < b); }
FL_INLINE mask vle(vec a, vec b) { return (mask)(a <= b); }
FL_INLINE mask veq(vec a, vec b) { return (mask)(a == b); }
FL_INLINE mask ieq(ivec a, ivec b) { return (mask)(a == b); }
FL_INLINE mask ige(ivec a, ivec b) { return (mask)(a >= b); }
FL_INLINE mask mor(mask a, mask b) { return a | b; }
FL_INLINE mask mandnot(mask a, mask b) { return a & ~b; }
FL_INLINE mask first_bits(ptrdiff_t n) { return (mask)(iota() < iset((lane_int)n)); }
FL_INLINE mask above_of(mask m, vec a, vec b) { return m & ~(mask)(a <= b); }
FL_INLINE mask equal_of(mask m, vec a, vec b) { return m & (mask)(a == b); }
FL_INLINE mask unordered_of(mask m, vec a, vec b) { return m & (mask)((a != a) | (b != b)); }
FL_INLINE mask differ_of(mask m, ivec a, ivec b) { return m & (mask)(a != b); }
FL_INLINE int all_lanes(mask m) {
#ifdef __x86_64__
    return VOP(movemask)((vec)m) == (1 << LANES) - 1;
#else
    lane_int all = -1;
    for (int k = 0; k < LANES; k++) all &= m[k];
    return all != 0;
#endif
}
FL_INLINE mask unordered(vec a, vec b) { return (mask)((a != a) | (b != b)); }
FL_INLINE int none_of(mask m) { return all_lanes(~m); }
FL_INLINE uint64_t bits_of(mask m) {
#ifdef __x86_64__
    return (unsigned)VOP(movemask)((vec)m);
#else
    uint64_t bits = 0;
    for (int k = 0; k < LANES; k++) bits |= (uint64_t)(m[k] != 0) << k;
    return bits;
#endif
}
FL_INLINE vec choose(mask m, vec a, vec b) {
#ifdef __SSE4_1__
    return VOP(blendv)(b, a, (vec)m);
#else
    return (vec)((m & (ivec)a) | (~m & (ivec)b));
#endif
}
FL_INLINE ivec ichoose(mask m, ivec a, ivec b) { return (m & a) | (~m & b); }
#ifdef __AVX2__
FL_INLINE ivec first_lanes(ptrdiff_t n) { return (ivec)(iota() < iset((lane_int)n)); }
FL_INLINE vec vload_part(const real *p, ptrdiff_t n, real fill) {
    ivec m = first_lanes(n);
    return choose((mask)m, VOP(maskload)((const void *)p, (__m256i)m), vset(fill));
}
FL_INLINE void vstore_part(real *p, vec v, ptrdiff_t n) {
    piece some = piece_of(v, 0);
    if (n >= GROUP) {
        piece_store(p, some, GROUP);
        p += GROUP, n -= GROUP, some = piece_of(v, 1);
    }
    if (n) piece_store(p, some, n);
}
#else
FL_INLINE vec vload_part(const real *p, ptrdiff_t n, real fill) {
    vec v = vset(fill);
    for (int k = 0; k < LANES; k++)
        if (k < n) v[k] = p[k];
    return v;
}
FL_INLINE void vstore_part(real *p, vec v, ptrdiff_t n) {
    for (int k = 0; k < LANES; k++)
        if (k < n) p[k] = v[k];
}
#endif
#endif

FL_INLINE int first_bit(uint64_t bits) { return __builtin_ctzll(bits); } /* of bits that are not all 0 */
FL_INLINE int count_bits(uint64_t bits) { return __builtin_popcountll(bits); }

/* |v|, and its bits, which are ordered as sizes are, with NaN above all; and |v| with the sign of another. */
FL_INLINE ivec sign_bits(void) { return (ivec)vset(-(real)0.0); }
FL_INLINE ivec size_bits(vec v) { return (ivec)v & ~sign_bits(); }
FL_INLINE vec vabs(vec v) { return (vec)size_bits(v); }
FL_INLINE vec with_sign(vec size, vec v) { return (vec)((ivec)size | ((ivec)v & sign_bits())); }

/* a + b, but a where m. */
FL_INLINE vec add_unless(mask m, vec a, vec b) {
#ifdef FL_MASK_REGISTERS
    return VOP(mask_add)(a, (mask)~m, a, b);
#else
    return a + choose(m, vset(0), b);
#endif
}

/* a + b c, but a where m. */
FL_INLINE vec add_product_unless(mask m, vec a, vec b, vec c) {
#ifdef FL_MASK_REGISTERS
    return VOP(mask3_fmadd)(b, c, a, (mask)~m);
#else
    return a + choose(m, vset(0), b * c);
#endif
}

/* a + b where m, else a. */
FL_INLINE vec add_where(mask m, vec a, vec b) {
#ifdef FL_MASK_REGISTERS
    return VOP(mask_add)(a, m, a, b);
#else
    return a + choose(m, b, vset(0));
#endif
}

/* a b - c, rounded once where the target can, and the same wherever it stands: what a compiler fuses depends on its place. */
FL_INLINE vec product_less(vec a, vec b, vec c) {
#if defined(__x86_64__) && defined(__FMA__)
    return VOP(fmsub)(a, b, c);
#elif defined(__x86_64__)
    return a * b - c;
#else
    for (int k = 0; k < LANES; k++) a[k] = sizeof(real) == 4 ? (real)fmaf((float)a[k], (float)b[k], (float)-c[k]) : (real)fma(a[k], b[k], -c[k]);
    return a;
#endif
}

/* a - b q, where q is a / b as rounded and b an integer of few bits: in two parts, of which the first is exact. */
FL_INLINE vec rest_of_quotient(vec a, vec b, vec q) {
    vec high = (vec)((ivec)q & ~(ivec)iset((lane_int)(((lane_int)1 << FL_MANTISSA / 2) - 1)));
    return (a - high * b) - (q - high) * b;
}

/* total - weight * d, but total where weight is 0: d may be infinite there. */
FL_INLINE vec less_product(vec total, vec weight, vec d) {
#ifdef FL_MASK_REGISTERS
    return VOP(mask3_fnmadd)(weight, d, total, FL_COMPARE(cmp)(weight, vset(0), _CMP_NEQ_UQ));
#else
    return total - weight * choose(veq(weight, vset(0)), weight, d);
#endif
}

/* The bits of both; and whether numbers joined so are all in [0, 2): neither a sign nor the highest bit of an exponent. */
FL_INLINE vec join_bits(vec a, vec b) { return (vec)((ivec)a | (ivec)b); }
FL_INLINE int all_below_2(vec v) { return all_lanes(ieq((ivec)v >> (FASTLOSS_BITS - 2), iset(0))); }

/* The larger, and the smaller, of two. Where one is NaN the smaller is the second; of the larger that is not said. */
FL_INLINE vec vmax(vec a, vec b) {
#ifdef __x86_64__
    return VOP(max)(a, b);
#else
    return choose(vlt(a, b), b, a);
#endif
}
FL_INLINE vec vmin(vec a, vec b) {
#ifdef __x86_64__
    return VOP(min)(a, b);
#else
    return choose(vlt(a, b), a, b);
#endif
}
#ifndef FL_MASK_REGISTERS
FL_INLINE vec max_of(mask m, vec a, vec b) { return choose(m, vmax(a, b), a); }
#endif
/* Integers as numbers. */
FL_INLINE vec numbers_of(ivec i) { return __builtin_convertvector(i, vec); }

/* ---- numbers as they are stored, converted in registers; to 16 bits rounded to nearest, ties to even ---- */
#if STORED_IS_REAL
FL_INLINE vec sload(const stored *p) { return vload(p); }
FL_INLINE vec sload_part(const stored *p, ptrdiff_t n, real fill) { return vload_part(p, n, fill); }
FL_INLINE void sstore(stored *p, vec v) { vstore(p, v); }
FL_INLINE void sstore_part(stored *p, vec v, ptrdiff_t n) { vstore_part(p, v, n); }
FL_INLINE real sone(const stored *p) { return *p; }
FL_INLINE void sstore_one(stored *p, real x) { *p = x; }
#ifdef FL_MASK_REGISTERS
typedef vec raw;
FL_INLINE raw raw_load(raw v, mask m, const stored *p) { return VOP(mask_loadu)(v, m, p); }
FL_INLINE void raw_store(stored *p, mask m, raw v) { VOP(mask_storeu)(p, m, v); }
FL_INLINE vec raw_widen(raw v) { return v; }
FL_INLINE raw raw_narrow(vec v) { return v; }
#endif
#else
#if FL_STORED == FL_U8
#define FL_STORED_BITS 8
#else
#define FL_STORED_BITS 16
#endif
#define FL_PACKED_BYTES (VBYTES * FL_STORED_BITS / 32)
typedef stored packed __attribute__((vector_size(LANES * sizeof(stored))));
FL_INLINE vec widen(packed p) {
#if FL_STORED == FL_F16 && defined(FL_MASK_REGISTERS)
    return (vec)_mm512_cvtph_ps((__m256i)p);
#elif FL_STORED == FL_F16 && defined(__F16C__)
    return (vec)_mm256_cvtph_ps((__m128i)p);
#else
#if defined(__x86_64__) && defined(__SSE4_1__) /* what __builtin_convertvector means; GCC 12 moves bytes one by one */
#if FL_PACKED_BYTES == 32
    const __m256i all = (__m256i)p;
#elif FL_PACKED_BYTES == 16
    const __m128i all = (__m128i)p;
#elif FL_PACKED_BYTES == 8
    const __m128i all = _mm_cvtsi64_si128((long long)p);
#else
    const __m128i all = _mm_cvtsi32_si128((int)p);
#endif
    ivec bits = (ivec)FL_PASTE(FL_PREFIX, FL_PASTE(cvtepu, FL_PASTE(FL_STORED_BITS, _epi32)))(all);
#else
    ivec bits = __builtin_convertvector(p, ivec);
#endif
#if FL_STORED == FL_U8
    return __builtin_convertvector(bits, vec);
#elif FL_STORED == FL_BF16
    return (vec)(bits << 16);
#else
    /* The product mends the exponent's bias, of numbers below the normal ones too. */
    ivec size = (bits & iset(0x7fff)) << 13, special = (ivec)(size >= iset(0x7c00 << 13));
    ivec finite = (ivec)((vec)size * vset(0x1p112f));
    return (vec)((special & (size | iset(0x7f800000))) | (~special & finite) | ((bits & iset(0x8000)) << 16));
#endif
#endif
}
FL_INLINE packed narrow(vec v) {
#if FL_STORED == FL_F16 && defined(FL_MASK_REGISTERS)
    return (packed)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif FL_STORED == FL_F16 && defined(__F16C__)
    return (packed)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#elif FL_STORED == FL_U8
    return __builtin_convertvector(__builtin_convertvector(v, ivec), packed);
#else
    ivec bits = (ivec)v;
#if FL_STORED == FL_BF16
    /* NaN stays NaN: it came of a bfloat16, or of arithmetic, so that the bits that are rounded are 0. */
    return __builtin_convertvector((bits + iset(0x7fff) + ((bits >> 16) & iset(1))) >> 16, packed);
#else
    ivec nan = (ivec)(v != v);
    ivec sign = (bits >> 16) & iset(0x8000), size = bits & iset(0x7fffffff);
    ivec normal = (size - iset(112 << 23) + iset(0xfff) + ((size >> 13) & iset(1))) >> 13;
    ivec small = (ivec)((vec)size + vset(0.5f)) - (ivec)vset(0.5f); /* below 2^-14: the sum rounds */
    ivec is_small = (ivec)(size < iset(0x38800000)), is_large = (ivec)(size >= iset(0x47800000));
    ivec half = (is_large & iset(0x7c00)) | (is_small & small) | (~(is_large | is_small) & normal);
    return __builtin_convertvector(half | (nan & iset(0x200)) | sign, packed);
#endif
#endif
}
FL_INLINE vec sload(const stored *p) {
    packed few;
    memcpy(&few, p, sizeof few);
    return widen(few);
}
FL_INLINE void sstore(stored *p, vec v) {
    packed few = narrow(v);
    memcpy(p, &few, sizeof few);
}
#ifdef FL_MASK_REGISTERS
typedef packed raw;
#if FL_STORED == FL_U8
FL_INLINE raw raw_load(raw v, mask m, const stored *p) { return (raw)_mm_mask_loadu_epi8((__m128i)v, m, p); }
FL_INLINE void raw_store(stored *p, mask m, raw v) { _mm_mask_storeu_epi8(p, m, (__m128i)v); }
#else
FL_INLINE raw raw_load(raw v, mask m, const stored *p) { return (raw)_mm256_mask_loadu_epi16((__m256i)v, m, p); }
FL_INLINE void raw_store(stored *p, mask m, raw v) { _mm256_mask_storeu_epi16(p, m, (__m256i)v); }
#endif
FL_INLINE vec raw_widen(raw v) { return widen(v); }
FL_INLINE raw raw_narrow(vec v) { return narrow(v); }
FL_INLINE vec sload_part(const stored *p, ptrdiff_t n, real fill) {
    mask m = (mask)((1u << n) - 1u);
    return choose(m, widen(raw_load((raw){0}, m, p)), vset(fill));
}
FL_INLINE void sstore_part(stored *p, vec v, ptrdiff_t n) { raw_store(p, (mask)((1u << n) - 1u), narrow(v)); }
#else
FL_INLINE vec sload_part(const stored *p, ptrdiff_t n, real fill) {
    packed few = {0};
    vec v;
    for (int k = 0; k < LANES; k++)
        if (k < n) few[k] = p[k];
    v = widen(few);
    for (int k = 0; k < LANES; k++)
        if (k >= n) v[k] = fill;
    return v;
}
FL_INLINE void sstore_part(stored *p, vec v, ptrdiff_t n) {
    packed few = narrow(v);
    for (int k = 0; k < LANES; k++)
        if (k < n) p[k] = few[k];
}
#endif
FL_INLINE real sone(const stored *p) {
    packed few = {0};
    few[0] = *p;
    return widen(few)[0];
}
FL_INLINE void sstore_one(stored *p, real x) { *p = narrow(vset(x))[0]; }
#endif

/* *rest is what the sum a + b, as rounded, lacks (2Sum: no assumption on which is larger). */
FL_INLINE vec exact_sum(vec a, vec b, vec *rest) {
    vec sum = a + b, b_part = sum - a;
    *rest = (a - (sum - b_part)) + (b - b_part);
    return sum;
}

/* total + m m, for total >= 0; what that lacks, as rounded, is added to *low: all of it, but where a square is added to less than
 * itself. Then the sum doubles, so that all such steps together lose less than a unit in the last place (0.94 at most as
 * measured). The square's own rounding is in it too, with fused multiply-adds. */
FL_INLINE vec add_square(vec total, vec m, vec *low) {
#if (defined(__x86_64__) && defined(__FMA__)) || defined(__ARM_FEATURE_FMA)
    vec sum = total + m * m;
    *low += product_less(m, m, sum - total);
#else
    vec rest, sum = exact_sum(total, m * m, &rest);
    *low += rest;
#endif
    return sum;
}

/* ---- over the lanes ---- */
#ifdef __clang__
#define FL_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FL_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif
#if VBYTES == 64 && FASTLOSS_BITS == 32
#define FL_ZIP_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define FL_ZIP_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif VBYTES / (FASTLOSS_BITS / 8) == 8
#define FL_ZIP_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define FL_ZIP_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#elif VBYTES / (FASTLOSS_BITS / 8) == 4
#define FL_ZIP_LOW 0, 4, 1, 5
#define FL_ZIP_HIGH 2, 6, 3, 7
#else
#define FL_ZIP_LOW 0, 2
#define FL_ZIP_HIGH 1, 3
#endif
FL_INLINE vec zip_low(vec a, vec b) { return FL_SHUFFLE(a, b, FL_ZIP_LOW); }
FL_INLINE vec zip_high(vec a, vec b) { return FL_SHUFFLE(a, b, FL_ZIP_HIGH); }

FL_INLINE real first_lane(vec v) { return v[0]; }
FL_INLINE lane_int ifirst(ivec v) { return v[0]; }
#ifdef FL_MASK_REGISTERS
#define FL_INTEGER(name) FL_PASTE(FL_PASTE(_mm512_, name), FL_PASTE(_epi, FASTLOSS_BITS_))
#if FASTLOSS_BITS == 32
#define FASTLOSS_BITS_ 32
#else
#define FASTLOSS_BITS_ 64
#endif
FL_INLINE ivec imin(ivec a, ivec b) { return (ivec)FL_INTEGER(min)((__m512i)a, (__m512i)b); }
FL_INLINE ivec imax(ivec a, ivec b) { return (ivec)FL_INTEGER(max)((__m512i)a, (__m512i)b); }
FL_INLINE lane_int lane_least(ivec v) { return FL_INTEGER(reduce_min)((__m512i)v); }
#else
FL_INLINE ivec imin(ivec a, ivec b) {
    ivec less = (ivec)(a < b);
    return (less & a) | (~less & b);
}
FL_INLINE ivec imax(ivec a, ivec b) { return imin(b, a) ^ a ^ b; }
FL_INLINE lane_int lane_least(ivec v) {
    lane_int least = v[0];
    for (int k = 1; k < LANES; k++) least = v[k] < least ? v[k] : least;
    return least;
}
#endif

FL_INLINE real lane_greatest(vec v) {
#ifdef FL_MASK_REGISTERS
    return FL_PASTE(FL_PREFIX, FL_PASTE(reduce_max_, FL_SUFFIX))(v);
#else
    real top = v[0];
    for (int k = 1; k < LANES; k++) top = top < v[k] ? v[k] : top;
    return top;
#endif
}

/* Entries of a table that fits in a register, TABLE numbers (0: there is no way); by the low bits of what `entries` gives. */
#ifdef FL_MASK_REGISTERS
#define TABLE LANES
FL_INLINE vec look_up(vec table, ivec at) { return FL_PASTE(FL_PREFIX, FL_PASTE(permutexvar_, FL_SUFFIX))((__m512i)at, table); }
#elif VBYTES == 32
#define TABLE LANES
FL_INLINE vec look_up(vec table, ivec at) { return (vec)_mm256_permutevar8x32_ps((__m256)table, (__m256i)at); }
#else
#define TABLE 0
FL_INLINE vec look_up(vec table, ivec at) { return table; }
#endif
FL_INLINE ivec ilook_up(ivec table, ivec at) { return (ivec)look_up((vec)table, at); }
/* What look_up is given for entries `at`: where it takes halves of numbers, the places of both. */
FL_INLINE ivec entries(ivec at) {
#if VBYTES == 32 && FASTLOSS_BITS == 64
    return (at + at) | ((at + at + iset(1)) << 32);
#else
    return at;
#endif
}

/* How many bits are set of the n <= 16 from number `at` on, of 32 * LANES, or if `more` 64: bits p[0] & 1, p[0] & 2 and so on. */
FL_INLINE ivec few_bits(const char *p, ivec at, int n, int more) {
#if defined(FL_MASK_REGISTERS) && FASTLOSS_BITS == 32
    const ivec word = at >> 4; /* of 16 bits, and the next */
    const __m512i words = _mm512_loadu_si512(p), both = (__m512i)(word | (word + 1) << 16);
    uvec v = (uvec)(more ? _mm512_permutex2var_epi16(words, both, _mm512_loadu_si512(p + 64)) : _mm512_permutexvar_epi16(both, words));
    v >>= (uvec)(at & 15);
#elif defined(__AVX2__)
    const int size = 8 * sizeof(real);
    const ivec word = at / size, start = at % size, words = iload((const void *)p);
    ivec first = ilook_up(words, entries(word)), next = ilook_up(words, entries(word + 1));
    if (more && size == 32) {
        const ivec others = iload((const void *)(p + VBYTES));
        first = ichoose(ige(word, iset(LANES)), ilook_up(others, word), first);
        next = ichoose(ige(word + 1, iset(LANES)), ilook_up(others, word + 1), next);
    }
    uvec v = (uvec)first >> (uvec)start | (uvec)next << 1 << (uvec)(size - 1 - start);
#else
    uvec v;
    for (int k = 0; k < LANES; k++) {
        v[k] = 0;
        for (lane_int i = at[k]; i < at[k] + n; i++) v[k] |= (lane_int)(p[i / 8] >> i % 8 & 1) << (i - at[k]);
    }
#endif
    v &= (uvec)iset((1 << n) - 1);
    v -= v >> 1 & 0x5555;
    v = (v & 0x3333) + (v >> 2 & 0x3333);
    v = (v + (v >> 4)) & 0x0f0f;
    return (ivec)((v + (v >> 8)) & 0xff);
}
/* How many bits are set of each n < 64, of which there are as many as lanes, from bit `first` < 8 on. */
FL_INLINE ivec bit_counts(const char *p, int first, int n) {
    const ivec at = iota() * (lane_int)n + (lane_int)first;
    if (n <= 16) return few_bits(p, at, n, 0);
    ivec count = few_bits(p, at, 16, n > 32);
    for (int k = 16; k < n; k += 16) count += few_bits(p, at + k, n - k < 16 ? n - k : 16, n > 32);
    return count;
}

/* ---- sums over lanes of several vectors at once, in two steps, by shuffles within 128 bits and then of 128 bits ----
 * fold_group: GROUP vectors, one a row, become one, in which each 128 bits hold a partial sum of each row. fold_groups: such
 * vectors, of LANES rows, become the sums of the rows. */
#ifdef __x86_64__
#define FL_PAIR(a, b, type) \
    ((vec)FL_PASTE(FL_PREFIX, unpacklo_##type)(a, b) + (vec)FL_PASTE(FL_PREFIX, unpackhi_##type)(a, b))
#elif FASTLOSS_BITS == 32
#define FL_PAIR_ps(a, b) (FL_SHUFFLE(a, b, 0, 4, 1, 5) + FL_SHUFFLE(a, b, 2, 6, 3, 7))
#define FL_PAIR_pd(a, b) (FL_SHUFFLE((vec)a, (vec)b, 0, 1, 4, 5) + FL_SHUFFLE((vec)a, (vec)b, 2, 3, 6, 7))
#define FL_PAIR(a, b, type) FL_PAIR_##type(a, b)
#else
#define FL_PAIR(a, b, type) (FL_SHUFFLE(a, b, 0, 2) + FL_SHUFFLE(a, b, 1, 3))
#endif
FL_INLINE vec fold_group(const vec *r) {
#if FASTLOSS_BITS == 32
    typedef double pairs __attribute__((vector_size(VBYTES)));
    pairs a = (pairs)FL_PAIR(r[0], r[1], ps), b = (pairs)FL_PAIR(r[2], r[3], ps);
    return FL_PAIR(a, b, pd);
#else
    return FL_PAIR(r[0], r[1], pd);
#endif
}
FL_INLINE vec fold_groups(const vec *p) {
#if VBYTES == 64
#define FL_QUARTERS(a, b, which) ((vec)_mm512_shuffle_f32x4((__m512)(a), (__m512)(b), which))
    vec a = FL_QUARTERS(p[0], p[1], 0x44) + FL_QUARTERS(p[0], p[1], 0xee);
    vec b = FL_QUARTERS(p[2], p[3], 0x44) + FL_QUARTERS(p[2], p[3], 0xee);
    return FL_QUARTERS(a, b, 0x88) + FL_QUARTERS(a, b, 0xdd);
#elif VBYTES == 32
    __m256 a = (__m256)p[0], b = (__m256)p[1];
    return (vec)_mm256_permute2f128_ps(a, b, 0x20) + (vec)_mm256_permute2f128_ps(a, b, 0x31);
#else
    return p[0];
#endif
}
/* Lane k of the result is the sum of the lanes of p[k]. */
FL_INLINE vec transposed_sum(const vec *p) {
    vec groups[LANES / GROUP];
#pragma GCC unroll 4
    for (int k = 0; k < LANES / GROUP; k++) groups[k] = fold_group(p + k * GROUP);
    return fold_groups(groups);
}

/* fold_groups and transposed_sum; *rest is what the sums of 128 bits lack, as rounded. */
FL_INLINE vec fold_groups_in_full(const vec *p, vec *rest) {
#if VBYTES == 64
    vec low_a, low_b;
    vec a = exact_sum(FL_QUARTERS(p[0], p[1], 0x44), FL_QUARTERS(p[0], p[1], 0xee), &low_a);
    vec b = exact_sum(FL_QUARTERS(p[2], p[3], 0x44), FL_QUARTERS(p[2], p[3], 0xee), &low_b);
    vec sum = exact_sum(FL_QUARTERS(a, b, 0x88), FL_QUARTERS(a, b, 0xdd), rest);
    *rest += FL_QUARTERS(low_a, low_b, 0x88) + FL_QUARTERS(low_a, low_b, 0xdd);
    return sum;
#elif VBYTES == 32
    __m256 a = (__m256)p[0], b = (__m256)p[1];
    return exact_sum((vec)_mm256_permute2f128_ps(a, b, 0x20), (vec)_mm256_permute2f128_ps(a, b, 0x31), rest);
#else
    *rest = vset(0);
    return p[0];
#endif
}
FL_INLINE vec transposed_sum_in_full(const vec *p, vec *rest) {
    vec groups[LANES / GROUP];
#pragma GCC unroll 4
    for (int k = 0; k < LANES / GROUP; k++) groups[k] = fold_group(p + k * GROUP);
    return fold_groups_in_full(groups, rest);
}

/* Of LANES rows of c numbers, of `whole` (a constant, at most 3) vectors and `some` numbers more each, the sums over vectors: written out,
 * so that they stay in registers until they are folded. */
FL_INLINE void sums_over_vectors(int whole, const real *p, ptrdiff_t c, ptrdiff_t some, vec *sums) {
#pragma GCC unroll 16
    for (int k = 0; k < LANES; k++, p += c) {
        sums[k] = vload_part(p + whole * LANES, some, 0);
        if (whole & 1) sums[k] = vload(p) + sums[k];
        if (whole & 2) sums[k] = (vload(p + (whole - 2) * LANES) + vload(p + (whole - 1) * LANES)) + sums[k];
    }
}

/* ---- transposes: log2(LANES) rounds of zipping the first half of the vectors with the second ----
 * The rounds are written out, so that all vectors stay in registers.
 */
FL_INLINE void zip_round(vec *r, int width) {
    vec t[LANES];
#pragma GCC unroll 8
    for (int k = 0; k < width / 2; k++) {
        t[2 * k] = zip_low(r[k], r[k + width / 2]);
        t[2 * k + 1] = zip_high(r[k], r[k + width / 2]);
    }
#pragma GCC unroll 16
    for (int k = 0; k < width; k++) r[k] = t[k];
}
FL_INLINE void transpose(vec r[LANES]) {
    zip_round(r, LANES);
    if (LANES > 2) zip_round(r, LANES);
    if (LANES > 4) zip_round(r, LANES);
    if (LANES > 8) zip_round(r, LANES);
}

/* Lane k of the result is the maximum of the lanes of p[k]: the same rounds, which join what they bring together. */
#define FL_MAX_ROUND(HALF)                                                                                         \
    if (LANES > HALF)                                                                                              \
        _Pragma("GCC unroll 8") for (int k = 0; k < HALF; k++)                                                     \
            r[k] = vmax(zip_low(r[k], r[(k + HALF) % LANES]), zip_high(r[k], r[(k + HALF) % LANES]));
FL_INLINE vec transposed_max(const vec *p) {
    vec r[LANES];
#pragma GCC unroll 16
    for (int k = 0; k < LANES; k++) r[k] = p[k];
    FL_MAX_ROUND(8) FL_MAX_ROUND(4) FL_MAX_ROUND(2) FL_MAX_ROUND(1)
    return r[0];
}
/* The sums without loss: *rest is what they lack, as rounded, and the sums of the lanes of low[k], if it is not NULL. */
#define FL_EXACT_ROUND(HALF)                                                                              \
    if (LANES > HALF) {                                                                                   \
        _Pragma("GCC unroll 8") for (int k = 0; k < HALF; k++) {                                          \
            const int other = (k + HALF) % LANES;                                                         \
            vec lost, small = vset(0);                                                                    \
            if (has_low) small = zip_low(l[k], l[other]) + zip_high(l[k], l[other]);                      \
            r[k] = exact_sum(zip_low(r[k], r[other]), zip_high(r[k], r[other]), &lost);                   \
            l[k] = has_low ? small + lost : lost;                                                         \
        }                                                                                                 \
        has_low = 1;                                                                                      \
    }
FL_INLINE vec exact_transposed_sum(const vec *p, const vec *low, vec *rest) {
    vec r[LANES], l[LANES];
    int has_low = low != NULL;
#pragma GCC unroll 16
    for (int k = 0; k < LANES; k++) r[k] = p[k], l[k] = has_low ? low[k] : vset(0);
    FL_EXACT_ROUND(8) FL_EXACT_ROUND(4) FL_EXACT_ROUND(2) FL_EXACT_ROUND(1)
    *rest = l[0];
    return r[0];
}

/* The same for less: *rest is what the sums of all rounds but the first of four lack; where there are fewer, of all. */
FL_INLINE vec near_exact_transposed_sum(const vec *p, vec *rest) {
#if VBYTES == 64 && FASTLOSS_BITS == 32
    typedef double pairs __attribute__((vector_size(VBYTES)));
    vec groups[LANES / GROUP], lost[LANES / GROUP], sum;
#pragma GCC unroll 4
    for (int k = 0; k < LANES / GROUP; k++) {
        const vec *r = p + k * GROUP;
        pairs a = (pairs)FL_PAIR(r[0], r[1], ps), b = (pairs)FL_PAIR(r[2], r[3], ps);
        groups[k] = exact_sum((vec)_mm512_unpacklo_pd(a, b), (vec)_mm512_unpackhi_pd(a, b), &lost[k]);
    }
    sum = fold_groups_in_full(groups, rest);
    *rest += fold_groups(lost);
    return sum;
#else
    return exact_transposed_sum(p, NULL, rest);
#endif
}

/* The inverse of a zip round, on `width` vectors: even and odd lanes of neighbours apart. */
#if VBYTES / (FASTLOSS_BITS / 8) == 16
#define FL_EVENS 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define FL_ODDS 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif VBYTES / (FASTLOSS_BITS / 8) == 8
#define FL_EVENS 0, 2, 4, 6, 8, 10, 12, 14
#define FL_ODDS 1, 3, 5, 7, 9, 11, 13, 15
#elif VBYTES / (FASTLOSS_BITS / 8) == 4
#define FL_EVENS 0, 2, 4, 6
#define FL_ODDS 1, 3, 5, 7
#else
#define FL_EVENS 0, 2
#define FL_ODDS 1, 3
#endif
FL_INLINE vec even_lanes(vec a, vec b) { return FL_SHUFFLE(a, b, FL_EVENS); }
FL_INLINE vec odd_lanes(vec a, vec b) { return FL_SHUFFLE(a, b, FL_ODDS); }

/* Rows of c numbers, 2 to 4, that lie end to end in c vectors: a vector of each column (split), and back (join). */
#if VBYTES / (FASTLOSS_BITS / 8) == 16
#define FL_EACH(f, k) \
    f(0, k), f(1, k), f(2, k), f(3, k), f(4, k), f(5, k), f(6, k), f(7, k), f(8, k), f(9, k), f(10, k), f(11, k), f(12, k), \
        f(13, k), f(14, k), f(15, k)
#elif VBYTES / (FASTLOSS_BITS / 8) == 8
#define FL_EACH(f, k) f(0, k), f(1, k), f(2, k), f(3, k), f(4, k), f(5, k), f(6, k), f(7, k)
#elif VBYTES / (FASTLOSS_BITS / 8) == 4
#define FL_EACH(f, k) f(0, k), f(1, k), f(2, k), f(3, k)
#else
#define FL_EACH(f, k) f(0, k), f(1, k)
#endif
/* Of threes: lane i of column k among the first two vectors, then with the third; lane i of vector k among the first two columns,
 * then with the third. */
#define FL_SPLIT_TWO(i, k) (3 * (i) + (k) < 2 * LANES ? 3 * (i) + (k) : 0)
#define FL_SPLIT_THIRD(i, k) (3 * (i) + (k) < 2 * LANES ? (i) : 3 * (i) + (k) - LANES)
#define FL_JOIN_TWO(i, k) (((k) * LANES + (i)) % 3 * LANES % (2 * LANES) + ((k) * LANES + (i)) / 3)
#define FL_JOIN_THIRD(i, k) (((k) * LANES + (i)) % 3 < 2 ? (i) : LANES + ((k) * LANES + (i)) / 3)
FL_INLINE void split_rows(int c, vec *r) {
    const vec a = r[0], b = r[1], x = r[c - 2], y = r[c - 1];
    if (c == 3) {
        r[0] = FL_SHUFFLE(FL_SHUFFLE(a, b, FL_EACH(FL_SPLIT_TWO, 0)), y, FL_EACH(FL_SPLIT_THIRD, 0));
        r[1] = FL_SHUFFLE(FL_SHUFFLE(a, b, FL_EACH(FL_SPLIT_TWO, 1)), y, FL_EACH(FL_SPLIT_THIRD, 1));
        r[2] = FL_SHUFFLE(FL_SHUFFLE(a, b, FL_EACH(FL_SPLIT_TWO, 2)), y, FL_EACH(FL_SPLIT_THIRD, 2));
        return;
    }
    r[0] = even_lanes(a, b), r[1] = odd_lanes(a, b);
    if (c == 4) {
        const vec even = r[0], odd = r[1], more_even = even_lanes(x, y), more_odd = odd_lanes(x, y);
        r[0] = even_lanes(even, more_even), r[2] = odd_lanes(even, more_even);
        r[1] = even_lanes(odd, more_odd), r[3] = odd_lanes(odd, more_odd);
    }
}
FL_INLINE void join_rows(int c, vec *r) {
    const vec a = r[0], b = r[1], x = r[c - 2], y = r[c - 1];
    if (c == 3) {
        r[0] = FL_SHUFFLE(FL_SHUFFLE(a, b, FL_EACH(FL_JOIN_TWO, 0)), y, FL_EACH(FL_JOIN_THIRD, 0));
        r[1] = FL_SHUFFLE(FL_SHUFFLE(a, b, FL_EACH(FL_JOIN_TWO, 1)), y, FL_EACH(FL_JOIN_THIRD, 1));
        r[2] = FL_SHUFFLE(FL_SHUFFLE(a, b, FL_EACH(FL_JOIN_TWO, 2)), y, FL_EACH(FL_JOIN_THIRD, 2));
    } else if (c == 2) {
        r[0] = zip_low(a, b), r[1] = zip_high(a, b);
    } else {
        const vec even = zip_low(a, x), more_even = zip_high(a, x), odd = zip_low(b, y), more_odd = zip_high(b, y);
        r[0] = zip_low(even, odd), r[1] = zip_high(even, odd);
        r[2] = zip_low(more_even, more_odd), r[3] = zip_high(more_even, more_odd);
    }
}
#ifdef FL_MASK_REGISTERS
FL_INLINE void unzip_round(vec *r, int width) {
    vec t[LANES];
#pragma GCC unroll 8
    for (int k = 0; k < width / 2; k++) {
        t[k] = even_lanes(r[2 * k], r[2 * k + 1]);
        t[k + width / 2] = odd_lanes(r[2 * k], r[2 * k + 1]);
    }
#pragma GCC unroll 16
    for (int k = 0; k < width; k++) r[k] = t[k];
}
/* n <= width columns of LANES rows, where `width`, a power of two, is less than LANES: a vector holds LANES / width rows. */
FL_INLINE void gather_narrow(int width, const stored *from, ptrdiff_t row_stride, ptrdiff_t n, real *to) {
    vec r[LANES];
    const int rows = LANES / width;
    const unsigned few = (1u << n) - 1u, every = ((1u << LANES) - 1u) / ((1u << width) - 1u);
    if (row_stride == n && n == width) {
#pragma GCC unroll 8
        for (int k = 0; k < width; k++) r[k] = sload(from + k * LANES);
    } else if (row_stride == n) {
#pragma GCC unroll 8
        for (int k = 0; k < width; k++)
            r[k] = VOP(maskz_expand)((mask)(few * every), sload_part(from + k * rows * n, rows * n, 0));
    } else {
#pragma GCC unroll 8
        for (int k = 0; k < width; k++) {
            raw some = {0};
#pragma GCC unroll 8
            for (int i = 0; i < rows; i++)
                some = raw_load(some, (mask)(few << i * width), from + (k * rows + i) * row_stride - i * width);
            r[k] = raw_widen(some);
        }
    }
    unzip_round(r, width);
    if (width > 2) unzip_round(r, width);
    if (width > 4) unzip_round(r, width);
#pragma GCC unroll 8
    for (int k = 0; k < width; k++)
        if (k < n) vstore(to + k * TILE, r[k]);
}
FL_INLINE void scatter_narrow(int width, stored *to, ptrdiff_t row_stride, ptrdiff_t n, const real *from) {
    vec r[LANES];
    const int rows = LANES / width;
    const unsigned few = (1u << n) - 1u, every = ((1u << LANES) - 1u) / ((1u << width) - 1u);
#pragma GCC unroll 8
    for (int k = 0; k < width; k++) r[k] = vload(from + (k < n ? k : 0) * TILE);
    zip_round(r, width);
    if (width > 2) zip_round(r, width);
    if (width > 4) zip_round(r, width);
    if (row_stride == n && n == width) {
#pragma GCC unroll 8
        for (int k = 0; k < width; k++) sstore(to + k * LANES, r[k]);
    } else if (row_stride == n) {
#pragma GCC unroll 8
        for (int k = 0; k < width; k++)
            sstore_part(to + k * rows * n, VOP(maskz_compress)((mask)(few * every), r[k]), rows * n);
    } else {
#pragma GCC unroll 8
        for (int k = 0; k < width; k++) {
            raw some = raw_narrow(r[k]);
#pragma GCC unroll 8
            for (int i = 0; i < rows; i++)
                raw_store(to + (k * rows + i) * row_stride - i * width, (mask)(few << i * width), some);
        }
    }
}
#endif

/* ---- columns of rows, by pieces: a vector is joined from pieces of the rows k, k + GROUP, k + 2 GROUP, …; a transpose within
 * pieces, of GROUP such vectors, makes vectors of one column each. Shuffles within 128 bits are the cheapest, and pieces
 * seldom cross a line of the cache. ---- */
#if defined(__x86_64__) && FL_STORED != FL_U8
#define FL_PIECES 1
#if STORED_IS_REAL
FL_INLINE vec join_pieces(const stored *p, ptrdiff_t step, ptrdiff_t n) {
#if VBYTES == 64
    __m512 v = _mm512_castps128_ps512((__m128)piece_load(p, n));
    v = _mm512_insertf32x4(v, (__m128)piece_load(p + step, n), 1);
    v = _mm512_insertf32x4(v, (__m128)piece_load(p + 2 * step, n), 2);
    return (vec)_mm512_insertf32x4(v, (__m128)piece_load(p + 3 * step, n), 3);
#elif VBYTES == 32
    const __m256 v = _mm256_castps128_ps256((__m128)piece_load(p, n));
    return (vec)_mm256_insertf128_ps(v, (__m128)piece_load(p + step, n), 1);
#else
    return (vec)piece_load(p, n);
#endif
}
FL_INLINE void part_pieces(stored *p, ptrdiff_t step, vec v, ptrdiff_t n) {
    piece_store(p, piece_of(v, 0), n);
    if (LANES > GROUP) piece_store(p + step, piece_of(v, 1), n);
    if (LANES > 2 * GROUP) {
        piece_store(p + 2 * step, piece_of(v, 2 % (LANES / GROUP)), n);
        piece_store(p + 3 * step, piece_of(v, 3 % (LANES / GROUP)), n);
    }
}
#else
/* GROUP numbers of 16 bits are 64. */
typedef uint64_t pieces __attribute__((vector_size(LANES * sizeof(stored))));
FL_INLINE uint64_t short_load(const stored *p, ptrdiff_t n) {
    uint64_t all = 0;
    if (n == 4) memcpy(&all, p, 8);
    else if (n == 1) all = p[0];
    else {
        uint32_t two;
        memcpy(&two, p, 4);
        all = n == 2 ? two : two | (uint64_t)p[2] << 32;
    }
    return all;
}
FL_INLINE void short_store(stored *p, uint64_t all, ptrdiff_t n) {
    if (n == 4) memcpy(p, &all, 8);
    else if (n == 1) p[0] = (stored)all;
    else {
        const uint32_t two = (uint32_t)all;
        memcpy(p, &two, 4);
        if (n == 3) p[2] = (stored)(all >> 32);
    }
}
FL_INLINE vec join_pieces(const stored *p, ptrdiff_t step, ptrdiff_t n) {
    pieces all;
#pragma GCC unroll 4
    for (int k = 0; k < LANES / GROUP; k++) all[k] = short_load(p + k * step, n);
    return widen((packed)all);
}
FL_INLINE void part_pieces(stored *p, ptrdiff_t step, vec v, ptrdiff_t n) {
    const pieces all = (pieces)narrow(v);
#pragma GCC unroll 4
    for (int k = 0; k < LANES / GROUP; k++) short_store(p + k * step, all[k], n);
}
#endif
FL_INLINE void transpose_pieces(vec r[GROUP]) {
    vec a = VOP(unpacklo)(r[0], r[1]), b = VOP(unpackhi)(r[0], r[1]);
#if FASTLOSS_BITS == 32
    vec c = VOP(unpacklo)(r[2], r[3]), d = VOP(unpackhi)(r[2], r[3]);
    r[0] = VOP(shuffle)(a, c, 0x44), r[1] = VOP(shuffle)(a, c, 0xee);
    r[2] = VOP(shuffle)(b, d, 0x44), r[3] = VOP(shuffle)(b, d, 0xee);
#else
    r[0] = a, r[1] = b;
#endif
}
FL_INLINE void gather_group(const stored *from, ptrdiff_t row_stride, ptrdiff_t n, real *to) {
    vec r[GROUP];
#pragma GCC unroll 4
    for (int k = 0; k < GROUP; k++) r[k] = join_pieces(from + k * row_stride, GROUP * row_stride, n);
    transpose_pieces(r);
#pragma GCC unroll 4
    for (int k = 0; k < GROUP; k++)
        if (k < n) vstore(to + k * TILE, r[k]);
}
FL_INLINE void scatter_group(stored *to, ptrdiff_t row_stride, ptrdiff_t n, const real *from) {
    vec r[GROUP];
#pragma GCC unroll 4
    for (int k = 0; k < GROUP; k++) r[k] = k < n ? vload(from + k * TILE) : vset(0);
    transpose_pieces(r);
#pragma GCC unroll 4
    for (int k = 0; k < GROUP; k++) part_pieces(to + k * row_stride, GROUP * row_stride, r[k], n);
}
/* The number of columns is a constant in each call, so that no piece has to ask for it. Not inline: that made the other
 * layouts slower, by 2 to 5 % of a small row loss. */
#define FL_BY_PIECES(do_group, at)                                                             \
    for (; j + GROUP <= n; j += GROUP) do_group(at + j, row_stride, GROUP, tile + j * TILE);   \
    if (n - j == 1) do_group(at + j, row_stride, 1, tile + j * TILE);                          \
    else if (n - j == 2) do_group(at + j, row_stride, 2, tile + j * TILE);                     \
    else if (n - j == 3) do_group(at + j, row_stride, 3, tile + j * TILE);
static __attribute__((noinline)) void gather_pieces(const stored *from, ptrdiff_t row_stride, ptrdiff_t n, real *tile) {
    ptrdiff_t j = 0;
    FL_BY_PIECES(gather_group, from)
}
static __attribute__((noinline)) void scatter_pieces(stored *to, ptrdiff_t row_stride, ptrdiff_t n, const real *tile) {
    ptrdiff_t j = 0;
    FL_BY_PIECES(scatter_group, to)
}
#endif

/* n <= LANES columns of LANES rows, row-major at `from`, as n vectors TILE apart; and back. Rows from `rows` on are
 * taken as zeros, and not written. */
FL_INLINE void gather_columns(const stored *from, ptrdiff_t row_stride, ptrdiff_t rows, ptrdiff_t n, real *to) {
    vec r[LANES];
#ifdef FL_MASK_REGISTERS
    if (rows >= LANES && n <= LANES / 2) {
        if (n <= 2) gather_narrow(2, from, row_stride, n, to);
        else if (n <= 4) gather_narrow(4, from, row_stride, n, to);
        else gather_narrow(LANES / 2, from, row_stride, n, to);
        return;
    }
#endif
#ifdef FL_PIECES
    if (rows >= LANES) {
        gather_pieces(from, row_stride, n, to);
        return;
    }
#endif
#pragma GCC unroll 16
    for (int k = 0; k < LANES; k++) r[k] = k < rows ? sload_part(from + k * row_stride, n, 0) : vset(0);
    transpose(r);
#pragma GCC unroll 16
    for (int k = 0; k < LANES; k++)
        if (k < n) vstore(to + k * TILE, r[k]);
}
FL_INLINE void scatter_columns(stored *to, ptrdiff_t row_stride, ptrdiff_t rows, ptrdiff_t n, const real *from) {
    vec r[LANES];
#ifdef FL_MASK_REGISTERS
    if (rows >= LANES && n <= LANES / 2) {
        if (n <= 2) scatter_narrow(2, to, row_stride, n, from);
        else if (n <= 4) scatter_narrow(4, to, row_stride, n, from);
        else scatter_narrow(LANES / 2, to, row_stride, n, from);
        return;
    }
#endif
#ifdef FL_PIECES
    if (rows >= LANES) {
        scatter_pieces(to, row_stride, n, from);
        return;
    }
#endif
#pragma GCC unroll 16
    for (int k = 0; k < LANES; k++) r[k] = k < n ? vload(from + k * TILE) : vset(0);
    transpose(r);
#pragma GCC unroll 16
    for (int k = 0; k < LANES; k++)
        if (k < rows) sstore_part(to + k * row_stride, r[k], n);
}

/* The same of rows that are anywhere: `columns` from `first` on of LANES rows of numbers to compute in. */
FL_INLINE void gather_rows(const real *const *rows, ptrdiff_t first, ptrdiff_t columns, real *to) {
    vec r[LANES];
    if (columns <= 4) { /* a transpose would move mostly nothing */
        for (int k = 0; k < LANES; k++)
            for (ptrdiff_t j = 0; j < columns; j++) to[j * TILE + k] = rows[k][first + j];
        return;
    }
#pragma GCC unroll 16
    for (int k = 0; k < LANES; k++) r[k] = vload_part(rows[k] + first, columns, 0);
    transpose(r);
#pragma GCC unroll 16
    for (int k = 0; k < LANES; k++)
        if (k < columns) vstore(to + k * TILE, r[k]);
}

/* ---- exp and log ----
 * x = n log 2 + r, with n a multiple of a step of 1 / FL_STEPS and r at most half a step times log 2. FL_LN2_HIGH has so few
 * bits that its products with n are exact: r is x - n log 2 rounded once.
 */
#ifdef FL_MASK_REGISTERS
#define FL_STEPS LANES
#else
#define FL_STEPS 1
#endif
#define FL_LOG2_E ((real)1.4426950408889634)
#define FL_LN2 0.6931471805599453
#define FL_MAGIC ((real)FL_ROUND / FL_STEPS) /* adding it rounds to a multiple of a step */

/* The multiple of a step that is nearest to x / log 2; and x - n log 2. |x| < FL_NEAR. */
FL_INLINE vec nearest_steps(vec x) { return (x * vset(FL_LOG2_E) + vset(FL_MAGIC)) - vset(FL_MAGIC); }
FL_INLINE vec round_to_step(vec x) { return (x + vset(FL_MAGIC)) - vset(FL_MAGIC); }
FL_INLINE vec less_steps(vec x, vec n) { return x - n * vset(FL_LN2_HIGH) - n * vset(FL_LN2_LOW); }

#ifdef FL_MASK_REGISTERS
/* 2^(k / LANES): as many as a register holds. */
static const real fl_powers[LANES] = {
#if FASTLOSS_BITS == 32
    1, 0x1.0b5586p+0f, 0x1.172b84p+0f, 0x1.2387a6p+0f, 0x1.306fep+0f, 0x1.3dea64p+0f, 0x1.4bfdaep+0f, 0x1.5ab07ep+0f,
    0x1.6a09e6p+0f, 0x1.7a1148p+0f, 0x1.8ace54p+0f, 0x1.9c4918p+0f, 0x1.ae89fap+0f, 0x1.c199bep+0f, 0x1.d5818ep+0f,
    0x1.ea4afap+0f,
#else
    1.0, 0x1.172b83c7d517bp+0, 0x1.306fe0a31b715p+0, 0x1.4bfdad5362a27p+0,
    0x1.6a09e667f3bcdp+0, 0x1.8ace5422aa0dbp+0, 0x1.ae89f995ad3adp+0, 0x1.d5818dcfba487p+0,
#endif
};
/* What they lack, as rounded, relative to them. */
static const real fl_powers_low[LANES] = {
#if FASTLOSS_BITS == 32
    0, 0x1.8d96d4p-25f, -0x1.9c0c22p-27f, 0x1.964904p-25f, 0x1.12500p-25f, 0x1.370be4p-25f, -0x1.0a3550p-25f, -0x1.00d8acp-27f,
    0x1.26055cp-26f, -0x1.05cb44p-25f, 0x1.67a1cap-28f, 0x1.a3b5e4p-28f, -0x1.f9c304p-27f, -0x1.6961b4p-28f, -0x1.a5217cp-28f,
    0x1.61428ep-28f
#else
    0, -0x1.01b15eaa59348p-55, 0x1.34d754db0abb6p-55, 0x1.690cebb7aafb0p-56,
    -0x1.3b3efbf5e2228p-54, 0x1.db72fc1f0eab4p-55, 0x1.c1a7792cb3387p-55, 0x1.4a385a63d07a7p-56,
#endif
};
/* exp(unit r) - 1 for at most half a step, such that adding 1 gives exp to 1e-8 in float, 4e-18 in double: its Taylor series.
 * unit, a constant: 1, or log 2 for r in steps. */
static const double fl_expm1[] = {
#if FASTLOSS_BITS == 32
    1.0 / 6, 0.5, 1,
#else
    1.0 / 40320, 1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1,
#endif
};
#else
/* The same; the coefficients interpolate (exp(r) - 1 - r) / r^2 at Chebyshev points: 1e-8 in float, 1.7e-17 in double. */
static const double fl_expm1[] = {
#if FASTLOSS_BITS == 32
    0x1.6d1109p-10, 0x1.120b6ep-7, 0x1.555519p-5, 0x1.5554ddp-3, 0.5, 1,
#else
    0x1.af38a9b0ec855p-26, 0x1.289185613a3d6p-22, 0x1.71de0dae63bb3p-19, 0x1.a019b90d2ae7ap-16, 0x1.a01a01a7c41d5p-13,
    0x1.6c16c1788bd90p-10, 0x1.11111111109b3p-7, 0x1.5555555553d63p-5, 0x1.5555555555556p-3, 0x1.0000000000001p-1, 1,
#endif
};
#endif
#define FL_EXPM1 ((int)(sizeof fl_expm1 / sizeof *fl_expm1))
FL_INLINE vec expm1_series(vec r, double unit) {
    double powers[FL_EXPM1];
    powers[FL_EXPM1 - 1] = unit;
#pragma GCC unroll 12
    for (int k = FL_EXPM1 - 2; k >= 0; k--) powers[k] = powers[k + 1] * unit;
    vec q = vset((real)(fl_expm1[0] * powers[0]));
#pragma GCC unroll 12
    for (int k = 1; k < FL_EXPM1; k++) q = q * r + vset((real)(fl_expm1[k] * powers[k]));
    return q;
}
FL_INLINE vec expm1_of(vec r, double unit) { return expm1_series(r, unit) * r; }
FL_INLINE vec expm1_in_step(vec r) { return expm1_of(r, 1); }
/* 2^n (1 + q), for t = FL_MAGIC + n. */
FL_INLINE vec power_of_2(vec t, vec q) {
#ifdef FL_MASK_REGISTERS
#if FASTLOSS_BITS == 32
    vec power = _mm512_permutexvar_ps((__m512i)t, vload(fl_powers)); /* by the low bits of t */
#else
    vec power = _mm512_permutexvar_pd((__m512i)t, vload(fl_powers));
#endif
    return VOP(scalef)(power * q + power, t - vset(FL_MAGIC));
#else
    ivec scale = ((ivec)t << FL_MANTISSA) + iset((lane_int)FL_BIAS << FL_MANTISSA);
    return choose(vlt(t, vset(FL_MAGIC - (FL_BIAS - 1))), vset(0), (q + vset(1)) * (vec)scale);
#endif
}
/* 2^-n, and what that, as rounded, lacks. */
FL_INLINE vec less_powers(vec n, vec *low) {
    vec t = vset(FL_MAGIC) - n;
#ifdef FL_MASK_REGISTERS
    const vec power = power_of_2(t, vset(0));
    *low = power * look_up(vload(fl_powers_low), (ivec)t);
    return power;
#else
    *low = vset(0);
    return power_of_2(t, vset(0));
#endif
}
/* exp(x - from log 2), or NaN; `from` is a multiple of a step, |from| < 2 FL_NEAR. Below the
 * smallest normal number 0, where results are flushed to zero. No difference x - from log 2 is ever rounded: where x is
 * near 0 and the result near 1e-30, its rounding alone would be 16 units of the result. */
FL_INLINE vec vexp(vec x, vec from) {
    vec start = vset(FL_MAGIC) - from;
#ifdef FL_MASK_REGISTERS
    x = VOP(max)(vset(2 * (real)FL_EXP_LOW - FL_NEAR), x); /* NaN stays, -inf becomes what still gives 0 */
#endif
    vec t = x * vset(FL_LOG2_E) + start;
    return power_of_2(t, expm1_in_step(less_steps(x, t - start)));
}
/* What a temperature T makes of the numbers that divide x into steps. */
typedef struct {
    real per_step; /* 1 / (T log 2) */
    real high, low; /* T log 2, in two parts, of which the first has as few bits as FL_LN2_HIGH */
    real unit; /* 1 / T */
} Steps;
FL_INLINE Steps plain_steps(void) { return (Steps){FL_LOG2_E, FL_LN2_HIGH, FL_LN2_LOW, 1}; }
/* Of no usual temperature: 0 all. */
FL_INLINE Steps steps_of(double temperature) {
    if (!(temperature > 1e-6 && temperature < 1e6)) return (Steps){0, 0, 0, 0};
    int exponent;
    const double step = temperature * FL_LN2, bits = FASTLOSS_BITS == 32 ? 512 : 4294967296.0;
    const double mantissa = frexp(step, &exponent), high = ldexp(rint(mantissa * bits) / bits, exponent);
    return (Steps){(real)(1 / step), (real)high, (real)(step - high), (real)(1 / temperature)};
}
/* exp(x / T - from log 2) for normal results up to 2 RAISED: with plain_steps the bits of vexp; or `in_full`, what the parts of
 * powers of 2 lack, as rounded, in it: then it is off by little more than its own rounding. Whole powers of 2 are added to
 * exponents, which is half the work of `scalef`. */
FL_INLINE vec usual_exp(int in_full, Steps s, vec x, vec from) {
    vec start = vset(FL_MAGIC) - from;
    vec t = x * vset(s.per_step) + start, n = t - start;
    vec r = (x - n * vset(s.high) - n * vset(s.low)) * vset(s.unit), q = expm1_series(r, 1);
#ifdef FL_MASK_REGISTERS
    q = in_full ? q * r + look_up(vload(fl_powers_low), (ivec)t) : q * r;
    const int shift = FL_MANTISSA - (LANES == 16 ? 4 : 3); /* from the lowest bit of t, which is a step, to its place in exponents */
    const ivec powers = (ivec)vload(fl_powers) - (iota() << shift); /* without what is shifted of a part of a power */
#if FASTLOSS_BITS == 32
    const ivec part = (ivec)_mm512_permutexvar_epi32((__m512i)t, (__m512i)powers);
#else
    const ivec part = (ivec)_mm512_permutexvar_epi64((__m512i)t, (__m512i)powers);
#endif
    const vec power = (vec)(part + ((ivec)t << shift));
    return power * q + power;
#else
    return (q * r + vset(1)) * (vec)(((ivec)t << FL_MANTISSA) + iset((lane_int)FL_BIAS << FL_MANTISSA));
#endif
}
/* The same of any x, but where results are above 2 RAISED; of what is lower 0. */
FL_INLINE vec any_exp(int in_full, Steps s, vec x, vec from) {
#ifdef FL_MASK_REGISTERS
    return usual_exp(in_full, s, VOP(max)((from - vset(FL_BIAS)) * vset(s.high + s.low), x), from); /* NaN stays; 0 is an exponent of 0 */
#else
    vec e = usual_exp(in_full, s, x, from);
    return choose(vlt(x, (from - vset(FL_BIAS - 1)) * vset(s.high + s.low)), vset(0), e);
#endif
}
/* vexp, bit for bit, but where results are above 2 RAISED: there vexp goes on to infinity. */
FL_INLINE vec raised_exp(vec x, vec from) {
#ifdef FL_MASK_REGISTERS
    return any_exp(0, plain_steps(), x, from);
#else
    return vexp(x, from);
#endif
}
/* 2^(x - from), for results up to 2 RAISED; `from` is a multiple of a step, and both are below 2^17 in size. No product is
 * rounded here, so that it takes three multiplications less than exp: but x, as it is given, has been. */
FL_INLINE vec vexp2(vec x, vec from) {
    vec start = vset(FL_MAGIC) - from, t = x + start;
    return power_of_2(t, expm1_of(x - (t - start), FL_LN2));
}

/* 1 / v, for v in [1, 2^116]; to a unit in the last place. */
FL_INLINE vec reciprocal(vec v) {
#ifdef FL_MASK_REGISTERS
    vec r = VOP(rcp14)(v);
    r = r * (vset(2) - v * r);
#if FASTLOSS_BITS == 64
    r = r * (vset(2) - v * r);
#endif
    return r;
#else
    return vset(1) / v;
#endif
}

/* tanh x for |x| < NEAR_TANH: an odd polynomial, whose coefficients interpolate (tanh(x) / x - 1) / x^2 at Chebyshev points
 * of x^2 (1.3e-9 in float, 1.1e-17 in double). */
#define NEAR_TANH ((real)0.5)
FL_INLINE vec tanh_near(vec x) {
    vec z = x * x;
#if FASTLOSS_BITS == 32
    vec q = vset(-0x1.c7033cp-8f);
    q = q * z + vset(0x1.5fc692p-6f);
    q = q * z + vset(-0x1.b9d2aep-5f);
    q = q * z + vset(0x1.11108p-3f);
    q = q * z + vset(-0x1.555554p-2f);
#else
    vec q = vset(0x1.f2ddeb9a07da7p-15);
    q = q * z + vset(-0x1.cf9f3fe656023p-13);
    q = q * z + vset(0x1.32b0b92ad1a40p-11);
    q = q * z + vset(-0x1.7d68abe445c4bp-10);
    q = q * z + vset(0x1.d6d0a485132ebp-9);
    q = q * z + vset(-0x1.226e27ed0ac68p-7);
    q = q * z + vset(0x1.664f484114832p-6);
    q = q * z + vset(-0x1.ba1ba1b9783d6p-5);
    q = q * z + vset(0x1.1111111110c21p-3);
    q = q * z + vset(-0x1.5555555555555p-2);
#endif
    return q * z * x + x;
}
/* tanh(x) / x for |x| < NEAR_TANH, as a polynomial of x^2 that interpolates at Chebyshev points (1.3e-8 in float, 2.6e-18 in
 * double); and an odd polynomial of such coefficients. */
#define BENDS (FASTLOSS_BITS == 32 ? 5 : 11)
static const double fl_bends[BENDS] = {
#if FASTLOSS_BITS == 32
    1.0, -0x1.5554a4p-2, 0x1.10e412p-3, -0x1.b20cp-5, 0x1.18ae12p-6,
#else
    1.0, -0x1.5555555555528p-2, 0x1.111111110d80bp-3, -0x1.ba1ba1b69e862p-5, 0x1.664f47a21804ap-6, -0x1.226e144e92c9fp-7,
    0x1.d6cdb982a0186p-9, -0x1.7d468c7fdfcd5p-10, 0x1.31c0fe1baace7p-11, -0x1.c85eda5c362b1p-13, 0x1.db16c18e08ce1p-15,
#endif
};
FL_INLINE vec odd_polynomial(const real *of, int size, vec x) {
    vec z = x * x, q = vset(of[size - 1]);
#pragma GCC unroll 20
    for (int k = size - 2; k >= 0; k--) q = q * z + vset(of[k]);
    return q * x;
}
/* tanh(v log 2 / 2) for |v| < 116, to a unit of 1; and unit / 4 / cosh^2 there, small values too to their last places. */
FL_INLINE vec tanh_of_steps(vec v, vec unit, vec *slope) {
    vec t = vset(FL_MAGIC) - v, e = power_of_2(t, expm1_of((vset(FL_MAGIC) - t) - v, FL_LN2));
    vec r = reciprocal(vset(1) + e), rest = e * r;
    *slope = rest * (r * unit);
    return r - rest;
}
/* tanh x, and 1 - |tanh x| in full: far from 0 by exp(-2 |x|). Not inline: it is seldom needed, and takes many registers. */
static __attribute__((noinline)) vec vtanh(vec x, vec *short_of_one) {
    vec size = vabs(x), e = vexp(vset(-2) * size, vset(0)), one = vset(1);
    vec r = reciprocal(one + e), far = (one - e) * r;
    *short_of_one = vset(2) * e * r;
    return choose(vlt(size, vset(NEAR_TANH)), tanh_near(x), with_sign(far, x));
}

/* The logarithm of normal u > 0, as fdlibm has it: u = 2^k m, f = m - 1, s = f / (2 + f), a series in s^2. log_parts gives k and f;
 * log_rest log(u (1 + low)) - k FL_LN2_HIGH, for small low. */
FL_INLINE vec log_parts(vec u, vec *f) {
    ivec k = ((ivec)u - iset(FL_SQRT_HALF)) >> FL_MANTISSA;
    *f = (vec)((ivec)u - (k << FL_MANTISSA)) - vset(1);
    return (vec)((ivec)vset(FL_ROUND) + k) - vset(FL_ROUND);
}
FL_INLINE vec log_rest(vec k, vec f, vec low) {
    vec s = f / (vset(2) + f), z = s * s;
#if FASTLOSS_BITS == 32
    vec series = vset(0xf89e26p-26f);
    series = series * z + vset(0x91e9eep-25f);
    series = series * z + vset(0xccce13p-25f);
    series = series * z + vset(0xaaaaaap-24f);
#else
    vec series = vset(1.479819860511658591e-01);
    series = series * z + vset(1.531383769920937332e-01);
    series = series * z + vset(1.818357216161805012e-01);
    series = series * z + vset(2.222219843214978396e-01);
    series = series * z + vset(2.857142874366239149e-01);
    series = series * z + vset(3.999999999940941908e-01);
    series = series * z + vset(6.666666666666735130e-01);
#endif
    vec half = f * f * vset((real)0.5);
    return f - (half - (s * (half + z * series) + (k * vset(FL_LN2_LOW) + low)));
}
/* plus + log(u (1 + low)) for normal u > 0 and small low; NaN for u NaN or inf. *rest is what the result, as rounded, lacks.
 * What the sum of k FL_LN2_HIGH and `plus` loses is added to the small parts: the error is that of one rounding, and 0.2 units
 * of 1. */
FL_INLINE vec vlog(vec u, vec low, vec plus, vec *rest) {
    vec f, lost, k = log_parts(u, &f), base = exact_sum(k * vset(FL_LN2_HIGH), plus, &lost);
    low = choose(veq(base - base, vset(0)), low + lost, vset(0)); /* NaN where base is infinite */
    return exact_sum(base, log_rest(k, f, low), rest) + (u - u);
}
/* log(u (1 + low) 2^powers) for normal u > 0, small low and a small whole number of powers: the same bits if they are in u instead.
 * NaN for low NaN alone. */
FL_INLINE vec log_in_full(vec u, vec low, vec powers) {
    vec f, k = log_parts(u, &f) + powers;
    return k * vset(FL_LN2_HIGH) + log_rest(k, f, low);
}

/* log(1 + e) for e in [0, 1], small ones to their last place: a polynomial that interpolates log(1 + e) / e at Chebyshev points
 * (1.4e-8 in float, 3.7e-17 in double). */
FL_INLINE vec vlog1p(vec e) {
    static const real of[] = {
#if FASTLOSS_BITS == 32
        -0x1.a04acap-9, 0x1.402f4cp-6, -0x1.cdd008p-5, 0x1.afdde8p-4, -0x1.38b908p-3, 0x1.92b430p-3, -0x1.ff0254p-3,
        0x1.554bd6p-2, -0x1.ffffb8p-2, 1.0,
#else
        0x1.9a004c84084e0p-16, -0x1.287a021efa782p-12, 0x1.973f42066f721p-10, -0x1.63519a2dd08cdp-8, 0x1.bd9ad19516ef7p-7,
        -0x1.b08481a18afc3p-6, 0x1.57749615e42c9p-5, -0x1.d47fac36af36dp-5, 0x1.1f58b67138a6ap-4, -0x1.4a9617b9e5c0cp-4,
        0x1.7103376ed9709p-4, -0x1.98c573ff70c85p-4, 0x1.c6f38e1160d29p-4, -0x1.fff9fe090b88ap-4, 0x1.2491f582de2a4p-3,
        -0x1.55554eddbccaep-3, 0x1.99999943a6bf4p-3, -0x1.fffffffd41267p-3, 0x1.555555554f5c4p-2, -0x1.fffffffffff5ap-2, 1.0,
#endif
    };
    vec q = vset(of[0]);
#pragma GCC unroll 20
    for (int k = 1; k < (int)(sizeof of / sizeof *of); k++) q = q * e + vset(of[k]);
    return q * e;
}

/* ---- results too small to be normal become 0 within a kernel; the thread's mode is put back after it ---- */
FL_INLINE unsigned flush_to_zero(void) {
#ifdef __x86_64__
    unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8000u);
    return before;
#else
    return 0;
#endif
}
FL_INLINE void restore_mode(unsigned before) {
#ifdef __x86_64__
    _mm_setcsr(before);
#else
    (void)before;
#endif
}

/* In a loop, keeps it from being made into scatters, which take longer. */
FL_INLINE void one_by_one(void) { __asm__ volatile(""); }

/* ---- sums of row losses: one double for each lane of a tile ---- */
FL_INLINE void add_products(double sums[TILE], const real *a, const real *b) {
    for (int k = 0; k < TILE; k++) sums[k] += (double)a[k] * (double)b[k];
}

/* ---- the linear layer on panels ----
 * A panel holds a block of k classes (at most DOT_BLOCK of W, OUTER_BLOCK of dW): for each vector of LANES features, k
 * vectors, one a class. Both products ask for lines of later rows as they go, one for each few multiplications: asked for
 * in a burst, lines are dropped, and each then costs a wait for memory.
 */
/* Stores that go past the caches, to multiples of VBYTES; `streamed` ends them, before another thread may look. */
#ifdef __x86_64__
FL_INLINE void vstream(real *p, vec v) { VOP(stream)(p, v); }
FL_INLINE void streamed(void) { _mm_sfence(); }
#else
FL_INLINE void vstream(real *p, vec v) { vstore(p, v); }
FL_INLINE void streamed(void) {}
#endif
/* Into the second-level cache. */
FL_INLINE void prefetch(const void *p) { __builtin_prefetch(p, 0, 2); }
FL_INLINE void prefetch_to_write(const void *p) { __builtin_prefetch(p, 1, 2); }
/* n bytes past the caches. */
FL_INLINE void stream_bytes(char *to, const char *from, ptrdiff_t n) {
    ptrdiff_t k = (ptrdiff_t)(-(uintptr_t)to % 64);
    k = k < n ? k : n;
    memcpy(to, from, (size_t)k);
    for (; k + VBYTES <= n; k += VBYTES) vstream((real *)(to + k), vload((const real *)(from + k)));
    memcpy(to + k, from + k, (size_t)(n - k));
}

/* Where a product finds what it asks for: in AHEAD rows for each ROWS rows (the first product) or TILE rows (the second),
 * from `at` bytes on; each place advances by `step` bytes. */
#define AHEAD 4
typedef struct {
    const stored *const *rows;
    ptrdiff_t at, step;
} Ahead;
#define FL_PLACES(AHEAD_OF)                                                                       \
    const char *next[AHEAD];                                                                      \
    _Pragma("GCC unroll 4") for (int i = 0; i < AHEAD; i++) next[i] = (const char *)(AHEAD_OF)[i] + ahead->at;

/* sums[class][group of rows] = or += x[row] . w[class], in partial sums (fold_group), over n vectors of features and,
 * where there is one, the `last`, for ROWS rows and k classes; less the centre, unless it is NULL. `lines` places are
 * asked for with each vector. */
#define FL_DOT_STEP(K, X0, X1, X2, X3, V)                                                               \
    {                                                                                                   \
        vec f[ROWS] = {sload(X0), sload(X1), sload(X2), sload(X3)};                                     \
        if (centre)                                                                                     \
            _Pragma("GCC unroll 4") for (int r = 0; r < ROWS; r++) f[r] -= vload(centre + (V) * LANES); \
        _Pragma("GCC unroll 16") for (int c = 0; c < K; c++) {                                          \
            vec weight = vload(w + ((V) * K + c) * LANES);                                              \
            _Pragma("GCC unroll 4") for (int r = 0; r < ROWS; r++) a[c][r] += f[r] * weight;            \
        }                                                                                               \
    }
#define FL_DOT(K)                                                                                           \
    FL_INLINE void dot_##K(int lines, const stored *const *x, const stored *const *last, ptrdiff_t at,      \
                           ptrdiff_t n, const real *centre, const real *w, vec *sums, int first,            \
                           const Ahead *ahead) {                                                            \
        const stored *x0 = x[0] + at, *x1 = x[1] + at, *x2 = x[2] + at, *x3 = x[3] + at;                    \
        FL_PLACES(ahead->rows)                                                                              \
        const ptrdiff_t step = ahead->step;                                                                 \
        vec a[K][ROWS];                                                                                     \
        _Pragma("GCC unroll 16") for (int c = 0; c < K; c++)                                                \
            _Pragma("GCC unroll 4") for (int r = 0; r < ROWS; r++) a[c][r] = vset(0);                       \
        for (ptrdiff_t v = 0; v < n; v++) {                                                                 \
            _Pragma("GCC unroll 4") for (int i = 0; i < lines; i++) prefetch(next[i] + v * step);           \
            FL_DOT_STEP(K, x0 + v * LANES, x1 + v * LANES, x2 + v * LANES, x3 + v * LANES, v)               \
        }                                                                                                   \
        if (last) FL_DOT_STEP(K, last[0], last[1], last[2], last[3], n)                                     \
        _Pragma("GCC unroll 16") for (int c = 0; c < K; c++)                                                \
            _Pragma("GCC unroll 4") for (int r = 0; r < ROWS; r += GROUP) {                                 \
                vec *to = sums + (c * TILE + r) / GROUP, sum = fold_group(a[c] + r);                        \
                *to = first ? sum : *to + sum;                                                              \
            }                                                                                               \
    }

/* dw[class] = or += the sum over rows of g[class][row] x[row], over one or two vectors of features, for some tiles of rows,
 * whose g are g_step numbers apart, and k classes; less the centre, unless it is NULL. With each row one place is asked for,
 * in turn. */
#define FL_OUTER(K, N)                                                                                      \
    FL_INLINE void outer_##K##_##N(int tiles, const stored *const *x, ptrdiff_t at, const real *centre,     \
                                   const real *g, ptrdiff_t g_step, real *dw, int first,                    \
                                   const Ahead *ahead) {                                                    \
        const ptrdiff_t step = ahead->step;                                                                 \
        vec a[N][K];                                                                                        \
        _Pragma("GCC unroll 2") for (int v = 0; v < N; v++)                                                 \
            _Pragma("GCC unroll 16") for (int c = 0; c < K; c++)                                            \
                a[v][c] = first ? vset(0) : vload(dw + (v * K + c) * LANES);                                \
        for (int t = 0; t < tiles; t++) {                                                                   \
            FL_PLACES(ahead->rows + t * AHEAD)                                                              \
            _Pragma("GCC unroll 16") for (int r = 0; r < TILE; r++) {                                       \
                vec f[N];                                                                                   \
                _Pragma("GCC unroll 2") for (int v = 0; v < N; v++) {                                       \
                    f[v] = sload(x[r] + at + v * LANES);                                                    \
                    if (centre) f[v] -= vload(centre + v * LANES);                                          \
                }                                                                                           \
                prefetch(next[r % AHEAD] + r / AHEAD * step);                                               \
                _Pragma("GCC unroll 16") for (int c = 0; c < K; c++) {                                      \
                    vec factor = vset(g[c * TILE + r]);                                                     \
                    _Pragma("GCC unroll 2") for (int v = 0; v < N; v++) a[v][c] += factor * f[v];           \
                }                                                                                           \
            }                                                                                               \
            x += TILE, g += g_step;                                                                         \
        }                                                                                                   \
        _Pragma("GCC unroll 2") for (int v = 0; v < N; v++)                                                 \
            _Pragma("GCC unroll 16") for (int c = 0; c < K; c++) vstore(dw + (v * K + c) * LANES, a[v][c]); \
    }

FL_DOT(1) FL_DOT(2) FL_DOT(3)
FL_OUTER(1, 1) FL_OUTER(2, 1) FL_OUTER(3, 1) FL_OUTER(4, 1) FL_OUTER(5, 1) FL_OUTER(6, 1)
FL_OUTER(1, 2) FL_OUTER(2, 2) FL_OUTER(3, 2) FL_OUTER(4, 2) FL_OUTER(5, 2) FL_OUTER(6, 2)
#if OUTER_BLOCK > 6
FL_DOT(4) FL_DOT(5) FL_DOT(6)
FL_OUTER(7, 1) FL_OUTER(8, 1) FL_OUTER(9, 1) FL_OUTER(10, 1) FL_OUTER(11, 1) FL_OUTER(12, 1)
FL_OUTER(7, 2) FL_OUTER(8, 2) FL_OUTER(9, 2) FL_OUTER(10, 2) FL_OUTER(11, 2) FL_OUTER(12, 2)
#endif

/* lines: 1, 2 or AHEAD */
static inline void dot_panel(int k, int lines, const stored *const *x, const stored *const *last, ptrdiff_t at, ptrdiff_t n,
                             const real *centre, const real *w, vec *sums, int first, const Ahead *ahead) {
#define FL_LINES(K, LINES)                                                              \
    {                                                                                   \
        if (centre) dot_##K(LINES, x, last, at, n, centre, w, sums, first, ahead);      \
        else dot_##K(LINES, x, last, at, n, NULL, w, sums, first, ahead);               \
    }
#define FL_CASE(K)                         \
    case K:                                \
        if (lines == 1) FL_LINES(K, 1)     \
        else if (lines == 2) FL_LINES(K, 2)\
        else FL_LINES(K, AHEAD)            \
        break;
    switch (k) {
    FL_CASE(1) FL_CASE(2) FL_CASE(3)
#if DOT_BLOCK > 3
    FL_CASE(4) FL_CASE(5) FL_CASE(6)
#endif
    }
#undef FL_CASE
#undef FL_LINES
}
static inline void outer_panel(int k, int two, int tiles, const stored *const *x, ptrdiff_t at, const real *centre,
                               const real *g, ptrdiff_t g_step, real *dw, int first, const Ahead *ahead) {
#define FL_VECTORS(K, N)                                                                        \
    {                                                                                           \
        if (centre) outer_##K##_##N(tiles, x, at, centre, g, g_step, dw, first, ahead);         \
        else outer_##K##_##N(tiles, x, at, NULL, g, g_step, dw, first, ahead);                  \
    }
#define FL_CASE(K)                \
    case K:                       \
        if (two) FL_VECTORS(K, 2) \
        else FL_VECTORS(K, 1)     \
        break;
    switch (k) {
    FL_CASE(1) FL_CASE(2) FL_CASE(3) FL_CASE(4) FL_CASE(5) FL_CASE(6)
#if OUTER_BLOCK > 6
    FL_CASE(7) FL_CASE(8) FL_CASE(9) FL_CASE(10) FL_CASE(11) FL_CASE(12)
#endif
    }
#undef FL_CASE
#undef FL_VECTORS
}

#endif
