/* Layer norm of rows. */
#ifndef LAYERTAP_NORM_H
#define LAYERTAP_NORM_H

#include "vectors.h"

typedef struct {
  const float *gamma, *beta;
  float epsilon;
} norm;

/* out = (x - mean) / sqrt(variance + epsilon) * gamma + beta for one row; `out` may be `x`. Also writes the
 * result in 16 bits to `narrow`, unless that is NULL. */
static inline void normalize_row(const norm *l, const float *x, int n, float *out, uint16_t *narrow) {
  vf sums = {0}, squares = {0};
  float sum = 0, square = 0;
  int i = 0;
  for (; i + LANES <= n; i += LANES) sums += load(x + i);
  for (; i < n; i++) sum += x[i];
  const float mean = (sum + sum_of(sums)) / n;
  for (i = 0; i + LANES <= n; i += LANES) {
    vf off = load(x + i) - mean;
    squares += off * off;
  }
  for (; i < n; i++) square += (x[i] - mean) * (x[i] - mean);
  const float scale = 1.0f / __builtin_sqrtf((square + sum_of(squares)) / n + l->epsilon);
  for (i = 0; i + LANES <= n; i += LANES) {
    vf v = (load(x + i) - mean) * scale * load(l->gamma + i) + load(l->beta + i);
    store(out + i, v);
    if (narrow) narrowed(narrow + i, v);
  }
  for (; i < n; i++) {
    out[i] = (x[i] - mean) * scale * l->gamma[i] + l->beta[i];
    if (narrow) narrow[i] = narrowed_one(out[i]);
  }
}

#endif
