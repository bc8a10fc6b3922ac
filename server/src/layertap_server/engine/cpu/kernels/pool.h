/* Pooling: the mean or the maximum of ranges of rows, and L2 normalization of the resulting vectors. */
#include <string.h>

#include "vectors.h"

static inline void add_row(float *sum, const float *row, int n) {
  for (int i = 0; i < n; i++) sum[i] += row[i];
}

/* NaN in either operand gives NaN. */
static inline void keep_larger(float *most, const float *row, int n) {
  for (int i = 0; i < n; i++) most[i] = row[i] > most[i] || row[i] != row[i] ? row[i] : most[i];
}

/* Pools `num` non-empty ranges [starts[i], ends[i]) of rows of n columns: the maximum if `largest`, else the
 * mean. The first `dims` columns of range i are written to out + i * out_row. The rows of a range are always
 * added in order, so that the result does not depend on the other ranges. */
void layertap_pool(const float *rows, int n, const int64_t *starts, const int64_t *ends, int64_t num, int dims,
                   int largest, float *out, int64_t out_row) {
  for (int64_t range = 0; range < num; range++) {
    float *vector = out + range * out_row;
    memcpy(vector, rows + starts[range] * n, dims * sizeof(float));
    for (int64_t row = starts[range] + 1; row < ends[range]; row++) {
      if (largest) keep_larger(vector, rows + row * n, dims);
      else add_row(vector, rows + row * n, dims);
    }
    if (!largest) {
      const float length = (float)(ends[range] - starts[range]);
      for (int i = 0; i < dims; i++) vector[i] /= length;
    }
  }
}

/* Divides each of `num` vectors by its L2 norm, or by epsilon if that is larger. If any element is NaN, the
 * whole vector becomes NaN. */
void layertap_normalize(float *vectors, int64_t num, int dims, float epsilon) {
  for (int64_t row = 0; row < num; row++) {
    float *vector = vectors + row * dims, square = 0;
    vf squares = {0};
    int i = 0;
    for (; i + LANES <= dims; i += LANES) {
      vf v = load(vector + i);
      squares += v * v;
    }
    for (; i < dims; i++) square += vector[i] * vector[i];
    const float norm = __builtin_sqrtf(square + sum_of(squares)), divisor = epsilon > norm ? epsilon : norm;
    for (i = 0; i < dims; i++) vector[i] /= divisor;
  }
}
