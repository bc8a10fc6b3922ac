/* Attention over packed texts on the CPU: each text attends to itself alone, no padding, no masks.
 *
 * For each text and head, blocks of QUERIES rows: scores against transposed keys, softmax in place,
 * product with the values; all in float32, whatever the type of the tensors. Vector types of the
 * compiler (GCC or clang), no intrinsics, so that one source serves every processor; compiled on
 * the machine that runs it. exp: Cephes' expf, S. Moshier (range reduction by ln 2 in two parts,
 * polynomial of degree 6), relative error below 2e-7.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
#define QUERIES 6 /* rows in a block; with CHUNKS vectors of keys they fill the registers */
#ifdef __AVX512F__
#define CHUNKS 4
#else
#define CHUNKS 1
#endif
#define ROWS_PER_TASK 96 /* queries of one text and head that one thread takes; a multiple of QUERIES */
#define OUTSIDE -1e30f   /* score of a key that is not there: its weight is below 1e-37 */

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(LANES * 2)));

/* Where element (row, head, dim) of a tensor lies, in elements; dim has stride 1. */
typedef struct {
  void *data;
  int64_t row, head;
} tensor;

static inline vf load(const float *p) {
  vf v;
  memcpy(&v, p, sizeof v);
  return v;
}

static inline void store(float *p, vf v) { memcpy(p, &v, sizeof v); }

static inline vf pick(vi where, vf yes, vf no) { return (vf)((where & (vi)yes) | (~where & (vi)no)); }

static inline vf larger(vf a, vf b) { return pick(a > b, a, b); }

static inline vf exp_of(vf x) {
  const float to_round = 12582912.0f; /* 1.5 * 2^23: adding it rounds to the nearest integer */
  x = larger(x, (vf){0} - 87.0f);
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

/* ------------------------------------------------- rows of a tensor as float32, zero behind dim */

static inline void read_row(float *out, const tensor *t, int bf16, int64_t row, int head, int dim, int padded) {
  const int64_t at = row * t->row + head * t->head;
  int d = 0;
  if (bf16) {
    const uint16_t *p = (const uint16_t *)t->data + at;
    for (; d + LANES <= dim; d += LANES) {
      vh half;
      memcpy(&half, p + d, sizeof half);
      store(out + d, (vf)(__builtin_convertvector(half, vu) << 16));
    }
    for (; d < dim; d++) {
      uint32_t bits = (uint32_t)p[d] << 16;
      memcpy(out + d, &bits, 4);
    }
  } else {
    memcpy(out, (const float *)t->data + at, dim * sizeof(float));
    d = dim;
  }
  for (; d < padded; d++) out[d] = 0.0f;
}

static inline void write_row(const tensor *t, int bf16, int64_t row, int head, int dim, const float *in) {
  const int64_t at = row * t->row + head * t->head;
  if (!bf16) {
    memcpy((float *)t->data + at, in, dim * sizeof(float));
    return;
  }
  uint16_t *p = (uint16_t *)t->data + at;
  for (int d = 0; d < dim; d++) { /* to the nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, in + d, 4);
    p[d] = (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
  }
}

/* -------------------------------------------------------------------- shuffles, and what they give */

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

/* (16, stride) rows to (16, out_stride) columns. */
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

/* ------------------------------------------------------------------------------------- products */

/* scores[q][0..16*chunks) = queries[q] . keys, for QUERIES rows; keys are (dim, stride). */
static inline __attribute__((always_inline)) void score(const float *queries, int dim, const float *keys,
                                                        int key_stride, float *scores, int score_stride,
                                                        const int chunks) {
  vf sum[QUERIES][CHUNKS];
#pragma GCC unroll 6
  for (int q = 0; q < QUERIES; q++)
#pragma GCC unroll 4
    for (int c = 0; c < chunks; c++) sum[q][c] = (vf){0};
  for (int d = 0; d < dim; d++) {
    vf key[CHUNKS];
#pragma GCC unroll 4
    for (int c = 0; c < chunks; c++) key[c] = load(keys + (int64_t)d * key_stride + c * LANES);
#pragma GCC unroll 6
    for (int q = 0; q < QUERIES; q++)
#pragma GCC unroll 4
      for (int c = 0; c < chunks; c++) sum[q][c] += queries[q * dim + d] * key[c];
  }
#pragma GCC unroll 6
  for (int q = 0; q < QUERIES; q++)
#pragma GCC unroll 4
    for (int c = 0; c < chunks; c++) store(scores + q * score_stride + c * LANES, sum[q][c]);
}

/* out[q][0..16*chunks) = sum over keys of weights[q][key] * values[key]. */
static inline __attribute__((always_inline)) void weigh(const float *weights, int weight_stride, int num_keys,
                                                        const float *values, int value_stride, float *out,
                                                        int out_stride, const int chunks) {
  vf sum[QUERIES][CHUNKS];
#pragma GCC unroll 6
  for (int q = 0; q < QUERIES; q++)
#pragma GCC unroll 4
    for (int c = 0; c < chunks; c++) sum[q][c] = (vf){0};
  for (int k = 0; k < num_keys; k++) {
    vf value[CHUNKS];
#pragma GCC unroll 4
    for (int c = 0; c < chunks; c++) value[c] = load(values + (int64_t)k * value_stride + c * LANES);
#pragma GCC unroll 6
    for (int q = 0; q < QUERIES; q++)
#pragma GCC unroll 4
      for (int c = 0; c < chunks; c++) sum[q][c] += weights[q * weight_stride + k] * value[c];
  }
#pragma GCC unroll 6
  for (int q = 0; q < QUERIES; q++)
#pragma GCC unroll 4
    for (int c = 0; c < chunks; c++) store(out + q * out_stride + c * LANES, sum[q][c]);
}

/* Scores to weights that sum to the returned total; num_padded is a multiple of LANES. */
static inline float softmax(float *scores, int num_padded) {
  vf top = load(scores);
  for (int k = LANES; k < num_padded; k += LANES) top = larger(top, load(scores + k));
  const float highest = largest(top);
  vf total = {0};
  for (int k = 0; k < num_padded; k += LANES) {
    vf weight = exp_of(load(scores + k) - highest);
    store(scores + k, weight);
    total += weight;
  }
  return sum_of(total);
}

/* ---------------------------------------------------------------------------------------- tasks */

typedef struct {
  tensor q, k, v, out;
  int bf16, num_heads, dim, window; /* window 0: every key; else keys with |i - j| < window */
  float scaling;
} problem;

static float *scratch(int64_t num_floats) {
  static __thread float *memory = NULL;
  static __thread int64_t size = 0;
  if (num_floats > size) {
    free(memory);
    size = (num_floats + 1023) / 1024 * 1024;
    memory = aligned_alloc(64, size * sizeof(float));
  }
  return memory;
}

static inline int up(int n, int to) { return (n + to - 1) / to * to; }

/* Keys [low, low + num_keys) of one text and head, transposed to (dim, num_padded); zeros fill up. */
static void read_keys(const problem *p, int64_t start, int head, int low, int num_keys, int num_padded, int dim,
                      float *block, float *keys) {
  for (int k = 0; k < num_padded; k += LANES) {
    for (int l = 0; l < LANES; l++) {
      if (k + l < num_keys)
        read_row(block + l * dim, &p->k, p->bf16, start + low + k + l, head, p->dim, dim);
      else
        memset(block + l * dim, 0, dim * sizeof(float));
    }
    for (int d = 0; d < dim; d += LANES) transpose_16x16(block + d, dim, keys + (int64_t)d * num_padded + k, num_padded);
  }
}

/* Unnormalized weights of QUERIES rows over those keys, in `scores`; their sums in `total`. */
static void weights_of(const problem *p, int64_t start, int head, const int *rows, int low, int num_keys,
                       int num_padded, int dim, const float *keys, float *queries, float *scores, float *total) {
  for (int q = 0; q < QUERIES; q++) {
    read_row(queries + q * dim, &p->q, p->bf16, start + rows[q], head, p->dim, dim);
    for (int d = 0; d < dim; d += LANES) store(queries + q * dim + d, load(queries + q * dim + d) * p->scaling);
  }
  int k = 0;
  for (; k + CHUNKS * LANES <= num_padded; k += CHUNKS * LANES)
    score(queries, dim, keys + k, num_padded, scores + k, num_padded, CHUNKS);
  for (; k < num_padded; k += LANES) score(queries, dim, keys + k, num_padded, scores + k, num_padded, 1);
  for (int q = 0; q < QUERIES; q++) {
    float *mine = scores + (int64_t)q * num_padded;
    for (k = num_keys; k < num_padded; k++) mine[k] = OUTSIDE;
    if (p->window) {
      const int at = rows[q] - low;
      for (k = 0; k <= at - p->window; k++) mine[k] = OUTSIDE;
      for (k = at + p->window; k < num_keys; k++) mine[k] = OUTSIDE;
    }
    total[q] = softmax(mine, num_padded);
  }
}

/* Rows [first, last) of the queries of one text and head. Returns 0 when memory is short. */
static int attend(const problem *p, int64_t start, int length, int head, int first, int last) {
  const int dim = up(p->dim, LANES);
  int low = 0, high = length; /* the keys that these rows can see */
  if (p->window) {
    low = first - p->window + 1 > 0 ? first - p->window + 1 : 0;
    high = last + p->window - 1 < length ? last + p->window - 1 : length;
  }
  const int num_keys = high - low, num_padded = up(num_keys, LANES);

  float *memory = scratch((int64_t)num_padded * dim * 2 + LANES * dim + QUERIES * (2 * dim + num_padded));
  if (!memory) return 0;
  float *keys = memory, *values = keys + (int64_t)num_padded * dim, *block = values + (int64_t)num_padded * dim;
  float *queries = block + LANES * dim, *out = queries + QUERIES * dim, *scores = out + QUERIES * dim;

  read_keys(p, start, head, low, num_keys, num_padded, dim, block, keys);
  for (int k = 0; k < num_keys; k++)
    read_row(values + (int64_t)k * dim, &p->v, p->bf16, start + low + k, head, p->dim, dim);

  for (int row = first; row < last; row += QUERIES) {
    const int num_rows = last - row < QUERIES ? last - row : QUERIES;
    int rows[QUERIES];
    float total[QUERIES];
    for (int q = 0; q < QUERIES; q++) rows[q] = row + (q < num_rows ? q : num_rows - 1); /* a short block repeats */
    weights_of(p, start, head, rows, low, num_keys, num_padded, dim, keys, queries, scores, total);
    int d = 0;
    for (; d + CHUNKS * LANES <= dim; d += CHUNKS * LANES)
      weigh(scores, num_padded, num_keys, values + d, dim, out + d, dim, CHUNKS);
    if (CHUNKS > 2)
      for (; d + 2 * LANES <= dim; d += 2 * LANES)
        weigh(scores, num_padded, num_keys, values + d, dim, out + d, dim, 2 < CHUNKS ? 2 : 1);
    for (; d < dim; d += LANES) weigh(scores, num_padded, num_keys, values + d, dim, out + d, dim, 1);

    for (int q = 0; q < num_rows; q++) {
      const float share = 1.0f / total[q];
      for (d = 0; d < dim; d += LANES) store(out + q * dim + d, load(out + q * dim + d) * share);
      write_row(&p->out, p->bf16, start + row + q, head, p->dim, out + q * dim);
    }
  }
  return 1;
}

/* The attention map that somebody asked for: softmax(QK') of one text, chosen heads and rows. */
typedef struct {
  int64_t start;
  int length, num_heads, num_queries; /* num_queries 0: every row, in order */
  const int *heads, *queries;
  float *out; /* (num_heads, num_queries, length) */
} map;

static int write_map(const problem *p, const map *m, int nth_head) {
  const int dim = up(p->dim, LANES), num_padded = up(m->length, LANES);
  const int num_queries = m->num_queries ? m->num_queries : m->length;
  float *memory = scratch((int64_t)num_padded * dim + LANES * dim + QUERIES * (dim + num_padded));
  if (!memory) return 0;
  float *keys = memory, *block = keys + (int64_t)num_padded * dim;
  float *queries = block + LANES * dim, *scores = queries + QUERIES * dim;
  const int head = m->heads[nth_head];
  read_keys(p, m->start, head, 0, m->length, num_padded, dim, block, keys);
  for (int first = 0; first < num_queries; first += QUERIES) {
    const int num_rows = num_queries - first < QUERIES ? num_queries - first : QUERIES;
    int rows[QUERIES];
    float total[QUERIES];
    for (int q = 0; q < QUERIES; q++) {
      const int nth = first + (q < num_rows ? q : num_rows - 1);
      rows[q] = m->num_queries ? m->queries[nth] : nth;
    }
    weights_of(p, m->start, head, rows, 0, m->length, num_padded, dim, keys, queries, scores, total);
    for (int q = 0; q < num_rows; q++) {
      const float share = 1.0f / total[q], *weights = scores + (int64_t)q * num_padded;
      float *out = m->out + ((int64_t)nth_head * num_queries + first + q) * m->length;
      for (int k = 0; k < m->length; k++) out[k] = weights[k] < 1e-37f ? 0.0f : weights[k] * share;
    }
  }
  return 1;
}

/* Returns 0 when memory was short. */
int layertap_maps(const problem *p, const map *maps, int num_maps, int num_threads) {
  int num_tasks = 0;
  for (int i = 0; i < num_maps; i++) num_tasks += maps[i].num_heads;
  int ok = 1;
#pragma omp parallel for num_threads(num_threads) schedule(dynamic, 1) reduction(&& : ok)
  for (int task = 0; task < num_tasks; task++) {
    int i = 0, nth_head = task;
    while (nth_head >= maps[i].num_heads) nth_head -= maps[i++].num_heads;
    ok = write_map(p, maps + i, nth_head) && ok;
  }
  return ok;
}

/* Text i covers rows cu_seqlens[i] to cu_seqlens[i + 1]. Returns 0 when memory was short. */
int layertap_attention(const problem *p, const int64_t *cu_seqlens, int num_texts, int num_threads) {
  int64_t num_tasks = 0;
  for (int t = 0; t < num_texts; t++)
    num_tasks += (int64_t)p->num_heads * ((cu_seqlens[t + 1] - cu_seqlens[t] + ROWS_PER_TASK - 1) / ROWS_PER_TASK);
  int ok = 1;
#pragma omp parallel num_threads(num_threads) reduction(&& : ok)
  {
    /* Each thread walks the same list, and computes the tasks that it drew. */
    int text = 0;
    int64_t before = 0; /* tasks of the texts before this one */
#pragma omp for schedule(dynamic, 4)
    for (int64_t task = 0; task < num_tasks; task++) {
      int length = (int)(cu_seqlens[text + 1] - cu_seqlens[text]);
      int blocks = (length + ROWS_PER_TASK - 1) / ROWS_PER_TASK;
      while (task >= before + (int64_t)p->num_heads * blocks) {
        before += (int64_t)p->num_heads * blocks;
        text++;
        length = (int)(cu_seqlens[text + 1] - cu_seqlens[text]);
        blocks = (length + ROWS_PER_TASK - 1) / ROWS_PER_TASK;
      }
      const int head = (int)((task - before) / blocks), block = (int)((task - before) % blocks);
      const int first = block * ROWS_PER_TASK;
      const int last = first + ROWS_PER_TASK < length ? first + ROWS_PER_TASK : length;
      ok = attend(p, cu_seqlens[text], length, head, first, last) && ok;
    }
  }
  return ok;
}
