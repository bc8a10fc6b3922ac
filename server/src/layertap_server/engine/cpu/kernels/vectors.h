/* Vectors of sixteen floats and the functions on them that the kernels need.
 *
 * They use the vector types of GCC and clang, so that one source serves every processor. The code is compiled
 * on the machine that runs it.
 */
#ifndef LAYERTAP_VECTORS_H
#define LAYERTAP_VECTORS_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES 16
/* The sums of BLOCK rows by CHUNKS vectors fit in the registers. */
#define BLOCK 6
#ifdef __AVX512F__
#define CHUNKS 4
#else
#define CHUNKS 1
#endif

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(LANES * 2)));

static inline vf load(const float *p) {
  vf v;
  memcpy(&v, p, sizeof v);
  return v;
}

static inline void store(float *p, vf v) { memcpy(p, &v, sizeof v); }

static inline vf pick(vi where, vf yes, vf no) { return (vf)((where & (vi)yes) | (~where & (vi)no)); }

/* The larger value of each lane; `b` if either is NaN. A NaN that must be kept therefore has to be in `b`. */
static inline vf larger(vf a, vf b) {
#ifdef __AVX512F__
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return pick(a > b, a, b);
#endif
}

/* exp(x) by the method of Cephes' expf, S. Moshier: range reduction by ln 2 in two parts, then a polynomial
 * of degree 6. The relative error is below 2e-7 for x from -87 to 88. Below -87 the result stays at 1.6e-38;
 * NaN gives NaN. */
static inline vf exp_of(vf x) {
  const float to_round = 12582912.0f; /* 1.5 * 2^23: adding it rounds to the nearest integer */
  x = larger((vf){0} - 87.0f, x);
  vf rounded = x * 1.44269504088896341f + to_round;
  vf n = rounded - to_round;
  vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vf y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  return y * (vf)(((vi)rounded << 23) + 0x3F800000);
}

/* All bits set in each lane where |x| is above a positive limit or x is NaN, otherwise zero. Computed by
 * integer arithmetic on the bits: for vectors wider than the processor's, compilers split a comparison into
 * single lanes. */
static inline vi above(vf x, float limit) {
  vi bits = (vi)((vf){0} + limit) - ((vi)x & 0x7FFFFFFF);
  return bits >> 31;
}

/* Phi(x), the normal distribution function: `inside` where |x| is at most `edge`, and 0 or 1 beyond it. The
 * result is finite even if x is not, so that x * Phi(x) is the same as in torch: NaN for NaN and -inf, inf
 * for inf. */
static inline vf phi_of(vf x, float edge, vf inside) {
  vi one_or_zero = (vi)((vf){0} + 1.0f) & ~((vi)x >> 31);
  return pick(above(x, edge), (vf)one_or_zero, inside);
}

/* x * Phi(x), exact GELU. Where |x| is at most `edge`, Phi(x) - 1/2 is x times a polynomial of x*x. The
 * polynomial is a least-squares fit over Chebyshev polynomials, reweighted until its largest error was
 * minimal: 4e-8 here, 4e-6 in `rough_gelu_of`. The error of the result is below 1.1e-6 for every x. */
static inline vf gelu_of(vf x) {
  const float edge = 5.5f;
  vf u = x * x * (2.0f / (edge * edge)) - 1.0f;
  vf y = u * 0.000538025633f - 0.00136881031f;
  y = y * u + 0.00102401781f;
  y = y * u - 0.00122945826f;
  y = y * u + 0.00423615379f;
  y = y * u - 0.00767460465f;
  y = y * u + 0.0104687661f;
  y = y * u - 0.0146714011f;
  y = y * u + 0.0202879347f;
  y = y * u - 0.0261124596f;
  y = y * u + 0.0320817493f;
  y = y * u - 0.0387872681f;
  y = y * u + 0.0477369875f;
  y = y * u - 0.0641724765f;
  y = y * u + 0.12855193f;
  return x * phi_of(x, edge, x * y + 0.5f);
}

/* The same for results that are stored in 16 bits; the error is below 1.5e-4. */
static inline vf rough_gelu_of(vf x) {
  const float edge = 4.0f;
  vf u = x * x * (2.0f / (edge * edge)) - 1.0f;
  vf y = u * 0.00135272194f - 0.00386476284f;
  y = y * u + 0.0062701148f;
  y = y * u - 0.0117364237f;
  y = y * u + 0.02243126f;
  y = y * u - 0.0370544083f;
  y = y * u + 0.0559546091f;
  y = y * u - 0.0843092203f;
  y = y * u + 0.175949186f;
  return x * phi_of(x, edge, x * y + 0.5f);
}

/* ------------------------------------- bfloat16: conversion, rounding to nearest with ties to even */

/* Set in a NaN that is truncated to bfloat16; without it, a NaN whose high mantissa bits are 0 would become
 * infinity. */
#define QUIET 0x40

static inline uint16_t narrowed_one(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return (uint16_t)(bits >> 16 | QUIET);
  return (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

static inline vf widened(const uint16_t *p) {
  vh half;
  memcpy(&half, p, sizeof half);
  return (vf)(__builtin_convertvector(half, vu) << 16);
}

static inline void narrowed(uint16_t *p, vf v) {
#ifdef __AVX512BF16__
  const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
  memcpy(p, &half, sizeof half);
#else
  vu bits = (vu)v;
  vu rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  vf half_bits = pick(above(v, __builtin_inff()), (vf)(bits >> 16 | QUIET), (vf)rounded);
  vh half = __builtin_convertvector((vu)half_bits, vh);
  memcpy(p, &half, sizeof half);
#endif
}

/* ------------------------------------------------------- shuffles, reductions and transposition */

#define ROTATED(l, s) (((l) + (s)) & 15)
#define LOW(l, s) ((l) & (s) ? 16 + (l) - (s) : (l))
#define HIGH(l, s) ((l) & (s) ? 16 + (l) : (l) + (s))
#define EACH(f, s)                                                                                          \
  f(0, s), f(1, s), f(2, s), f(3, s), f(4, s), f(5, s), f(6, s), f(7, s), f(8, s), f(9, s), f(10, s),       \
      f(11, s), f(12, s), f(13, s), f(14, s), f(15, s)
#ifdef __clang__
#define SHUFFLE(a, b, f, s) __builtin_shufflevector(a, b, EACH(f, s))
#else
#define SHUFFLE(a, b, f, s) __builtin_shuffle(a, b, (vi){EACH(f, s)})
#endif

static inline float largest(vf v) {
  v = larger(v, SHUFFLE(v, v, ROTATED, 8));
  v = larger(v, SHUFFLE(v, v, ROTATED, 4));
  v = larger(v, SHUFFLE(v, v, ROTATED, 2));
  return larger(v, SHUFFLE(v, v, ROTATED, 1))[0];
}

static inline float sum_of(vf v) {
  v += SHUFFLE(v, v, ROTATED, 8);
  v += SHUFFLE(v, v, ROTATED, 4);
  v += SHUFFLE(v, v, ROTATED, 2);
  return (v + SHUFFLE(v, v, ROTATED, 1))[0];
}

#define STAGE(r, s)                                                                                         \
  for (int i = 0; i < LANES; i++)                                                                           \
    if (!(i & (s))) {                                                                                       \
      vf a = r[i], b = r[i + (s)];                                                                          \
      r[i] = SHUFFLE(a, b, LOW, s);                                                                         \
      r[i + (s)] = SHUFFLE(a, b, HIGH, s);                                                                  \
    }

/* Transposes 16 rows of 16 floats. Rows are in_stride floats apart in `in`, and out_stride in `out`. */
static inline void transpose_16x16(const float *in, int in_stride, float *out, int out_stride) {
  vf r[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) r[i] = load(in + i * in_stride);
#pragma GCC unroll 16
  STAGE(r, 1)
#pragma GCC unroll 16
  STAGE(r, 2)
#pragma GCC unroll 16
  STAGE(r, 4)
#pragma GCC unroll 16
  STAGE(r, 8)
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) store(out + i * out_stride, r[i]);
}

/* ------------------------------------------------------------------------------------- memory */

static inline int up(int n, int to) { return (n + to - 1) / to * to; }

/* Scratch memory of the calling thread, kept for its next call; NULL if there is not enough memory. */
static float *scratch(int64_t num_floats) {
  static __thread float *memory = NULL;
  static __thread int64_t size = 0;
  if (num_floats > size) {
    free(memory);
    size = (num_floats + 1023) / 1024 * 1024;
    memory = aligned_alloc(64, size * sizeof(float));
    if (!memory) size = 0;
  }
  return memory;
}

#endif
