/* The AVX-512 and AMX instructions that the kernels use, in plain C, for tests on processors without them. */
#ifndef EMULATED_IMMINTRIN_H
#define EMULATED_IMMINTRIN_H

#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef float __m512 __attribute__((vector_size(64)));
typedef uint16_t __m256bh __attribute__((vector_size(32)));

#define EACH_LANE for (int l = 0; l < 16; l++)

/* The second operand if either is NaN. */
static inline __m512 _mm512_max_ps(__m512 a, __m512 b) {
  EACH_LANE b[l] = a[l] > b[l] ? a[l] : b[l];
  return b;
}

/* Rounds to nearest, ties to even; denormal numbers become zero, and NaN becomes quiet NaN. */
static inline __m256bh _mm512_cvtneps_pbh(__m512 v) {
  __m256bh half;
  EACH_LANE {
    uint32_t bits;
    const float x = v[l];
    memcpy(&bits, &x, 4);
    if (x != x)
      bits = bits >> 16 | 0x40;
    else if (!(bits & 0x7F800000))
      bits = bits >> 16 & 0x8000;
    else
      bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    half[l] = (uint16_t)bits;
  }
  return half;
}

#define _MM_HINT_T1 2
#define _mm_prefetch(place, hint) ((void)(place))

/* Eight tiles of 16 rows of 64 bytes; each thread has its own. */
static __thread uint32_t emulated_tiles[8][16][16];

#define syscall(...) 0 /* permission to use tiles is always given */
#define _tile_loadconfig(shape) ((void)(shape))
#define _tile_release() ((void)0)
#define _tile_zero(tile) memset(emulated_tiles[tile], 0, sizeof emulated_tiles[tile])
#define _tile_loadd(tile, from, stride) emulated_load(tile, (const char *)(from), stride)
#define _tile_stored(tile, to, stride) emulated_store(tile, (char *)(to), stride)
#define _tile_dpbf16ps(sums, rows, columns) emulated_product(sums, rows, columns)

static inline void emulated_load(int tile, const char *from, int64_t stride) {
  for (int row = 0; row < 16; row++) memcpy(emulated_tiles[tile][row], from + row * stride, 64);
}

static inline void emulated_store(int tile, char *to, int64_t stride) {
  for (int row = 0; row < 16; row++) memcpy(to + row * stride, emulated_tiles[tile][row], 64);
}

static inline float emulated_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

/* Adds the products of pairs of 16-bit numbers: (16, 16 pairs) times (16 pairs, 16). */
static inline void emulated_product(int sums, int rows, int columns) {
  for (int row = 0; row < 16; row++) {
    __m512 sum;
    memcpy(&sum, emulated_tiles[sums][row], 64);
    for (int pair = 0; pair < 16; pair++) {
      const uint32_t two = emulated_tiles[rows][row][pair];
      const float low = emulated_float(two << 16), high = emulated_float(two & 0xFFFF0000);
      typedef uint32_t lanes __attribute__((vector_size(64)));
      lanes others;
      memcpy(&others, emulated_tiles[columns][pair], 64);
      sum += low * (__m512)(others << 16);
      sum += high * (__m512)(others & 0xFFFF0000);
    }
    memcpy(emulated_tiles[sums][row], &sum, 64);
  }
}

#endif
