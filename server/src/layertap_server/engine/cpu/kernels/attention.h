/* Attention over packed texts: each text attends only to itself, without padding or masks.
 *
 * For each text and head, blocks of BLOCK rows are processed: scores with the transposed keys, softmax in
 * place, and the product with the values, all in float32 for tensors of either type. If the processor has
 * tiles, they compute the two products of 16-bit tensors, and the weights between them are 16 bits too.
 */
#ifndef LAYERTAP_ATTENTION_H
#define LAYERTAP_ATTENTION_H

#include "tiles.h"
#include "vectors.h"

#define ROWS_PER_TASK 96         /* queries of one text and head in one task; a multiple of BLOCK */
#define MASKED -__builtin_inff() /* the score of a masked key; its weight is below 1e-37 */

/* Element (row, head, d) is at index row * t.row + head * t.head + d of the data. */
typedef struct {
  void *data;
  int64_t row, head;
} tensor;

/* --------------------------- rows of a tensor as float32, padded with zeros from dim to `padded` */

static inline void read_row(float *out, const tensor *t, int bf16, int64_t row, int head, int dim, int padded) {
  const int64_t at = row * t->row + head * t->head;
  int d = 0;
  if (bf16) {
    const uint16_t *p = (const uint16_t *)t->data + at;
    for (; d + LANES <= dim; d += LANES) store(out + d, widened(p + d));
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
  int d = 0;
  for (; d + LANES <= dim; d += LANES) narrowed(p + d, load(in + d));
  for (; d < dim; d++) p[d] = narrowed_one(in[d]);
}

/* ------------------------------------------------------------------------------------- products */

/* scores[q][0..16*chunks) = queries[q] . keys, for BLOCK rows q; keys are transposed (dim, key_stride). */
static inline __attribute__((always_inline)) void score(const float *queries, int dim, const float *keys,
                                                        int key_stride, float *scores, int score_stride,
                                                        const int chunks) {
  vf sum[BLOCK][CHUNKS];
#pragma GCC unroll 6
  for (int q = 0; q < BLOCK; q++)
#pragma GCC unroll 4
    for (int c = 0; c < chunks; c++) sum[q][c] = (vf){0};
  for (int d = 0; d < dim; d++) {
    vf key[CHUNKS];
#pragma GCC unroll 4
    for (int c = 0; c < chunks; c++) key[c] = load(keys + (int64_t)d * key_stride + c * LANES);
#pragma GCC unroll 6
    for (int q = 0; q < BLOCK; q++)
#pragma GCC unroll 4
      for (int c = 0; c < chunks; c++) sum[q][c] += queries[q * dim + d] * key[c];
  }
#pragma GCC unroll 6
  for (int q = 0; q < BLOCK; q++)
#pragma GCC unroll 4
    for (int c = 0; c < chunks; c++) store(scores + q * score_stride + c * LANES, sum[q][c]);
}

/* out[q][0..16*chunks) = sum over k of weights[q][k] * values[k], for BLOCK rows q. */
static inline __attribute__((always_inline)) void weigh(const float *weights, int weight_stride, int num_keys,
                                                        const float *values, int value_stride, float *out,
                                                        int out_stride, const int chunks) {
  vf sum[BLOCK][CHUNKS];
#pragma GCC unroll 6
  for (int q = 0; q < BLOCK; q++)
#pragma GCC unroll 4
    for (int c = 0; c < chunks; c++) sum[q][c] = (vf){0};
  for (int k = 0; k < num_keys; k++) {
    vf value[CHUNKS];
#pragma GCC unroll 4
    for (int c = 0; c < chunks; c++) value[c] = load(values + (int64_t)k * value_stride + c * LANES);
#pragma GCC unroll 6
    for (int q = 0; q < BLOCK; q++)
#pragma GCC unroll 4
      for (int c = 0; c < chunks; c++) sum[q][c] += weights[q * weight_stride + k] * value[c];
  }
#pragma GCC unroll 6
  for (int q = 0; q < BLOCK; q++)
#pragma GCC unroll 4
    for (int c = 0; c < chunks; c++) store(out + q * out_stride + c * LANES, sum[q][c]);
}

/* Replaces scores, which are scaled here, by unnormalized weights; returns their sum. num_padded is a
 * multiple of LANES. */
static inline float softmax(float *scores, int num_padded, float scaling) {
  vf top = load(scores);
  for (int k = LANES; k < num_padded; k += LANES) top = larger(top, load(scores + k));
  const float highest = largest(top);
  vf total = {0};
  for (int k = 0; k < num_padded; k += LANES) {
    vf weight = exp_of((load(scores + k) - highest) * scaling);
    store(scores + k, weight);
    total += weight;
  }
  return sum_of(total);
}

/* ---------------------------------------------------------------------------------------- tasks */

typedef struct {
  tensor q, k, v, out;
  int bf16, num_heads, dim, window; /* window 0: all keys; else keys with |i - j| < window */
  float scaling;
} problem;

/* Reads keys [low, low + num_keys) of one text and head, transposed to (dim, num_padded) and padded with
 * zeros. */
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

static inline float masked(float score) { return score != score ? score : MASKED; }

/* Masks the keys that row `at` does not attend to: the padding, and the keys outside of its window. As with a
 * mask that is added to the scores, NaN outside of the window stays NaN. */
static inline void mask_scores(const problem *p, int at, int num_keys, int num_padded, float *scores) {
  for (int k = num_keys; k < num_padded; k++) scores[k] = MASKED;
  if (p->window) {
    for (int k = 0; k <= at - p->window; k++) scores[k] = masked(scores[k]);
    for (int k = at + p->window; k < num_keys; k++) scores[k] = masked(scores[k]);
  }
}

/* Writes the unnormalized weights of BLOCK rows over the keys of `read_keys` to `scores`, and their sums to
 * `total`. */
static void weights_of(const problem *p, int64_t start, int head, const int *rows, int low, int num_keys,
                       int num_padded, int dim, const float *keys, float *queries, float *scores, float *total) {
  for (int q = 0; q < BLOCK; q++) {
    read_row(queries + q * dim, &p->q, p->bf16, start + rows[q], head, p->dim, dim);
    for (int d = 0; d < dim; d += LANES) store(queries + q * dim + d, load(queries + q * dim + d) * p->scaling);
  }
  int k = 0;
  for (; k + CHUNKS * LANES <= num_padded; k += CHUNKS * LANES)
    score(queries, dim, keys + k, num_padded, scores + k, num_padded, CHUNKS);
  for (; k < num_padded; k += LANES) score(queries, dim, keys + k, num_padded, scores + k, num_padded, 1);
  for (int q = 0; q < BLOCK; q++) {
    float *row_scores = scores + (int64_t)q * num_padded;
    mask_scores(p, rows[q] - low, num_keys, num_padded, row_scores);
    total[q] = softmax(row_scores, num_padded, 1.0f);
  }
}

/* Attention of query rows [first, last) of one text and head. Returns 0 if there is not enough memory. */
static int attend(const problem *p, int64_t start, int length, int head, int first, int last) {
  const int dim = up(p->dim, LANES);
  int low = 0, high = length; /* the keys within the window of any of these rows */
  if (p->window) {
    low = first - p->window + 1 > 0 ? first - p->window + 1 : 0;
    high = last + p->window - 1 < length ? last + p->window - 1 : length;
  }
  const int num_keys = high - low, num_padded = up(num_keys, LANES);

  float *memory = scratch((int64_t)num_padded * dim * 2 + LANES * dim + BLOCK * (2 * dim + num_padded));
  if (!memory) return 0;
  float *keys = memory, *values = keys + (int64_t)num_padded * dim, *block = values + (int64_t)num_padded * dim;
  float *queries = block + LANES * dim, *out = queries + BLOCK * dim, *scores = out + BLOCK * dim;

  read_keys(p, start, head, low, num_keys, num_padded, dim, block, keys);
  for (int k = 0; k < num_keys; k++)
    read_row(values + (int64_t)k * dim, &p->v, p->bf16, start + low + k, head, p->dim, dim);

  for (int row = first; row < last; row += BLOCK) {
    const int num_rows = last - row < BLOCK ? last - row : BLOCK;
    int rows[BLOCK];
    float total[BLOCK];
    /* The last row is repeated to fill a block. */
    for (int q = 0; q < BLOCK; q++) rows[q] = row + (q < num_rows ? q : num_rows - 1);
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

#if TILES
/* Reads the keys of one text and head as tiles of 16 keys by 32 dims:
 * [keys / 16][dims / 32][16 pairs of dims][16 keys][2 of a pair]. */
static void read_key_tiles(const problem *p, int64_t start, int head, int num_keys, int num_padded, float *keys) {
  const uint16_t *k = (const uint16_t *)p->k.data + start * p->k.row + head * p->k.head;
  float block[LANES * LANES];
  for (int first = 0; first < num_padded; first += 16)
    for (int d = 0; d < p->dim; d += 32, keys += 256) {
      for (int i = 0; i < 16; i++) {
        if (first + i < num_keys)
          memcpy(block + i * LANES, k + (first + i) * p->k.row + d, 64);
        else
          memset(block + i * LANES, 0, 64);
      }
      transpose_16x16(block, LANES, keys, LANES);
    }
}

/* Reads the values as tiles of 32 keys by 16 dims:
 * [keys / 32][dims / 16][16 pairs of keys][16 dims][2 of a pair]. */
static void read_value_tiles(const problem *p, int64_t start, int head, int num_keys, int num_padded,
                             uint32_t *values) {
  const uint16_t *v = (const uint16_t *)p->v.data + start * p->v.row + head * p->v.head;
  for (int first = 0; first < num_padded; first += 32)
    for (int d = 0; d < p->dim; d += 16)
      for (int i = first; i < first + 32; i += 2, values += 16) {
        vh even = {0}, odd = {0};
        if (i < num_keys) memcpy(&even, v + i * p->v.row + d, sizeof even);
        if (i + 1 < num_keys) memcpy(&odd, v + (i + 1) * p->v.row + d, sizeof odd);
        vu pairs = __builtin_convertvector(even, vu) | __builtin_convertvector(odd, vu) << 16;
        memcpy(values, &pairs, sizeof pairs);
      }
}

/* The unscaled scores of 16 queries, (16, dim), as (16, num_padded). */
static void score_tiles(const uint16_t *queries, int dim, const float *keys, int num_padded, float *scores) {
  for (int key = 0; key < num_padded; key += 32) {
    const float *tiles = keys + (int64_t)key * dim / 2, *more = tiles + 8 * dim;
    _tile_zero(0);
    _tile_zero(1);
    for (int d = 0; d < dim; d += 32) {
      _tile_loadd(4, queries + d, dim * 2);
      _tile_loadd(5, tiles + d * 8, 64);
      _tile_loadd(6, more + d * 8, 64);
      _tile_dpbf16ps(0, 4, 5);
      _tile_dpbf16ps(1, 4, 6);
    }
    _tile_stored(0, scores + key, num_padded * 4);
    _tile_stored(1, scores + key + 16, num_padded * 4);
  }
}

/* Computes unnormalized 16-bit weights from unscaled scores, padded with zeros. Returns the sum of the
 * weights before they were rounded to 16 bits. */
static inline float narrow_softmax(const float *scores, int num_keys, int num_padded, float scaling, uint16_t *weights) {
  vf top = load(scores), total = {0};
  for (int k = LANES; k < num_keys; k += LANES) top = larger(top, load(scores + k));
  const float highest = largest(top);
  if (num_keys <= num_padded - LANES) memset(weights + num_padded - LANES, 0, LANES * sizeof *weights);
  for (int k = 0; k < num_keys; k += LANES) {
    vf weight = exp_of((load(scores + k) - highest) * scaling);
    narrowed(weights + k, weight);
    total += weight;
  }
  return sum_of(total);
}

/* `attend` on tiles; dim must be a multiple of 32. */
static int attend_with_tiles(const problem *p, int64_t start, int length, int head, int first, int last) {
  const int dim = p->dim;
  int low = 0, high = length;
  if (p->window) {
    low = first - p->window + 1 > 0 ? first - p->window + 1 : 0;
    high = last + p->window - 1 < length ? last + p->window - 1 : length;
  }
  const int num_keys = high - low, num_padded = up(num_keys, 32);
  const int64_t cached = (int64_t)num_padded * dim / 2;
  float *memory = scratch(2 * cached + 16 * (int64_t)(num_padded + num_padded / 2 + dim + dim / 2));
  if (!memory) return 0;
  float *keys = memory, *scores = keys + 2 * cached, *out = scores + 16 * (int64_t)num_padded;
  uint32_t *values = (uint32_t *)(keys + cached);
  uint16_t *weights = (uint16_t *)(out + 16 * dim), *queries = weights + 16 * (int64_t)num_padded;
  read_key_tiles(p, start + low, head, num_keys, num_padded, keys);
  read_value_tiles(p, start + low, head, num_keys, num_padded, values);

  for (int row = first; row < last; row += 16) {
    const int num_rows = last - row < 16 ? last - row : 16;
    for (int q = 0; q < num_rows; q++)
      memcpy(queries + q * dim, (const uint16_t *)p->q.data + (start + row + q) * p->q.row + head * p->q.head, dim * 2);
    score_tiles(queries, dim, keys, num_padded, scores);
    float total[16];
    for (int q = 0; q < num_rows; q++) {
      float *row_scores = scores + (int64_t)q * num_padded;
      mask_scores(p, row + q - low, num_keys, num_padded, row_scores);
      total[q] = narrow_softmax(row_scores, num_keys, num_padded, p->scaling, weights + (int64_t)q * num_padded);
    }
    for (int d = 0; d < dim; d += 32) {
      _tile_zero(0);
      _tile_zero(1);
      for (int key = 0; key < num_padded; key += 32) {
        const uint32_t *tiles = values + (int64_t)key * dim / 2 + d * 16;
        _tile_loadd(4, weights + key, num_padded * 2);
        _tile_loadd(5, tiles, 64);
        _tile_loadd(6, tiles + 256, 64);
        _tile_dpbf16ps(0, 4, 5);
        _tile_dpbf16ps(1, 4, 6);
      }
      _tile_stored(0, out + d, dim * 4);
      _tile_stored(1, out + d + 16, dim * 4);
    }
    for (int q = 0; q < num_rows; q++) {
      const float share = 1.0f / total[q];
      for (int d = 0; d < dim; d += LANES) store(out + q * dim + d, load(out + q * dim + d) * share);
      write_row(&p->out, 1, start + row + q, head, dim, out + q * dim);
    }
  }
  return 1;
}
#endif

static inline int uses_tiles(const problem *p) { return has_tiles && p->bf16 && p->dim % 32 == 0; }

/* Attention of all texts; text i covers rows cu_seqlens[i] to cu_seqlens[i + 1]. Called by every thread of a
 * parallel region. Returns 0 if this thread did not get enough memory. */
static int attend_all(const problem *p, const int64_t *cu_seqlens, int num_texts) {
  int64_t num_tasks = 0;
  for (int t = 0; t < num_texts; t++)
    num_tasks += (int64_t)p->num_heads * ((cu_seqlens[t + 1] - cu_seqlens[t] + ROWS_PER_TASK - 1) / ROWS_PER_TASK);
  int ok = 1;
  /* Each thread gets task numbers in ascending order, and moves on to the text that the task belongs to. */
  int text = 0;
  int64_t before = 0; /* number of tasks of the texts before this one */
  if (uses_tiles(p)) begin_tiles();
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
#if TILES
    if (uses_tiles(p))
      ok = attend_with_tiles(p, cu_seqlens[text], length, head, first, last) && ok;
    else
#endif
      ok = attend(p, cu_seqlens[text], length, head, first, last) && ok;
  }
  if (uses_tiles(p)) end_tiles();
  return ok;
}

/* Returns 0 if there is not enough memory. */
int layertap_attention(const problem *p, const int64_t *cu_seqlens, int num_texts, int num_threads) {
  int ok = 1;
#pragma omp parallel num_threads(num_threads) reduction(&& : ok)
  ok = attend_all(p, cu_seqlens, num_texts);
  return ok;
}

#endif
