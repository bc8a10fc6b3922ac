/* Vectors of ranges of rows: the mean or the largest of each column, and their L2 norm made one. */
#include <string.h>

#include "vectors.h"

static inline void add_row(float *sum, const float *row, int n) {
  for (int i = 0; i < n; i++) sum[i] += row[i];
}

static inline void keep_larger(float *most, const float *row, int n) {
  for (int i = 0; i < n; i++) most[i] = row[i] > most[i] || row[i] != row[i] ? row[i] : most[i];
}

/* Of each range [starts, ends) of rows, which are n wide and none of which is empty, the first `dims` columns into
 * a row of `out`, which are `out_row` apart. Rows are added in their order, whatever else there is. */
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

/* Divides each of `num` vectors by its L2 norm, or by epsilon where that is larger; all of it becomes NaN where
 * any of it is. */
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
