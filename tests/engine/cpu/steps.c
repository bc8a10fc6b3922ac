/* Single functions of the kernels, for tests with all kinds of numbers. n is a multiple of LANES. */
#include "norm.h"

void exponentials(const float *in, int64_t n, float *out) {
  for (int64_t i = 0; i < n; i += LANES) store(out + i, exp_of(load(in + i)));
}

void gelus(const float *in, int64_t n, float *out) {
  for (int64_t i = 0; i < n; i += LANES) store(out + i, gelu_of(load(in + i)));
}

void rough_gelus(const float *in, int64_t n, float *out) {
  for (int64_t i = 0; i < n; i += LANES) store(out + i, rough_gelu_of(load(in + i)));
}

void to_16_bits(const float *in, int64_t n, uint16_t *out) {
  for (int64_t i = 0; i < n; i += LANES) narrowed(out + i, load(in + i));
}

void to_16_bits_one_by_one(const float *in, int64_t n, uint16_t *out) {
  for (int64_t i = 0; i < n; i++) out[i] = narrowed_one(in[i]);
}

void norms(const norm *l, const float *in, int64_t rows, int n, float *out, uint16_t *narrow) {
  for (int64_t row = 0; row < rows; row++) normalize_row(l, in + row * n, n, out + row * n, narrow + row * n);
}
