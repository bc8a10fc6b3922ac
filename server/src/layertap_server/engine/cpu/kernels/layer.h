/* BERT's layers in one call: the threads start once, and meet between the steps. */
#include "maps.h"
#include "norm.h"
#include "product.h"

/* From attention's output to the layer's, rows go in chunks: what the steps leave for each other stays in
 * the cache. A thread that has enough rows takes chunks alone, and waits for nobody; else all share them. The
 * smaller the chunks, the less a thread that is held up by other work holds up the rest: of float32, whose
 * products take longer, half as large ones cost 2 % and save 8 beside a thread that takes a quarter of a core. */
#define ROWS_ALONE(bf16) ((bf16) ? 256 : 128)
#define ROWS_TOGETHER 768
#define MIN_ROWS_ALONE(bf16) ((bf16) ? 96 : 256) /* for each thread; a weight is then read by each */

typedef struct {
  linear query_key_value, attention_output, intermediate, output;
  norm attention_norm, output_norm;
  float scaling;
  int num_heads, head_dim, bf16;
} bert_layer;

/* Layer norm of rows (rows, n), by the threads of the region that calls this. */
static void normalize(const norm *l, const float *in, int64_t rows, int n, float *out, uint16_t *narrow,
                      int64_t narrow_stride) {
#pragma omp for schedule(static)
  for (int64_t row = 0; row < rows; row++)
    normalize_row(l, in + row * n, n, out + row * n, narrow ? narrow + row * narrow_stride : NULL);
}

/* Where the steps leave what the next ones read, in 16 bits or float32; sums and normed in float32. From
 * `normed_narrow` on it is of a chunk of rows, once for each thread that takes chunks of its own. */
typedef struct {
  char *query_key_value, *narrow, *attended, *normed_narrow, *widened;
  float *sums, *normed;
} workspace;

/* How the rows are divided. */
typedef struct {
  int64_t num, rows; /* of the largest */
  int alone;
} chunks;

static chunks divided(int64_t rows, int bf16, int num_threads) {
  const int alone = rows >= (int64_t)num_threads * MIN_ROWS_ALONE(bf16);
  const int64_t share = alone ? num_threads : 1, per_round = share * (alone ? ROWS_ALONE(bf16) : ROWS_TOGETHER);
  const int64_t num = (rows + per_round - 1) / per_round * share;
  return (chunks){num, num ? ((rows + num - 1) / num + 63) / 32 * 32 : 0, alone};
}

/* The first row of chunk i; whole blocks of 32. */
static int64_t start_of(const chunks *c, int64_t rows, int64_t i) {
  return i == c->num ? rows : rows * i / c->num / 32 * 32;
}

/* Lays `w` out from `memory` for one of the threads; returns the bytes that all of them take. */
static int64_t lay_out(const bert_layer *l, int64_t rows, int num_threads, int thread, char *memory, workspace *w) {
  const int64_t hidden = stride_of(l->output.n, l->bf16), wide = stride_of(l->intermediate.n, l->bf16);
  const int64_t element = l->bf16 ? 2 : 4;
  const int64_t all = (rows + 31) / 32 * 32;
  const chunks c = divided(rows, l->bf16, num_threads);
  const int64_t sizes[] = {all * l->query_key_value.n * element,
                           l->bf16 ? all * hidden * 2 : 0,
                           all * hidden * element,
                           l->bf16 ? c.rows * hidden * 2 : 0,
                           c.rows * wide * element,
                           c.rows * hidden * 4,
                           c.rows * hidden * 4};
  int64_t at[8] = {0};
  for (int i = 0; i < 7; i++) at[i + 1] = at[i] + (sizes[i] + 63) / 64 * 64;
  const int64_t own = at[7] - at[3];
  char *mine = memory + (c.alone ? thread * own : 0);
  *w = (workspace){memory,       memory + at[1],         memory + at[2],        mine + at[3],
                   mine + at[4], (float *)(mine + at[5]), (float *)(mine + at[6])};
  return at[3] + own * (c.alone ? num_threads : 1);
}

/* Bytes of memory for a pass over so many rows. */
int64_t layertap_bert_workspace(const bert_layer *l, int64_t rows, int num_threads) {
  workspace w;
  return lay_out(l, rows, num_threads, 0, NULL, &w);
}

/* Queries, keys and values of rows [row, last), by the threads of the region that calls this. */
static void project(const bert_layer *l, const workspace *w, const float *in, int64_t row, int64_t last) {
  const int hidden = l->output.n;
  const int64_t stride = stride_of(hidden, l->bf16), qkv_stride = l->query_key_value.n, element = l->bf16 ? 2 : 4;
  uint16_t *narrow = (uint16_t *)w->narrow + row * stride;
  if (l->bf16) narrow_all(in + row * hidden, last - row, hidden, narrow, stride);
  multiply_all(&l->query_key_value, &(operands){.in = l->bf16 ? (const void *)narrow : in + row * hidden,
                                                .stride = stride,
                                                .rows = last - row,
                                                .bf16 = l->bf16,
                                                .out = w->query_key_value + row * qkv_stride * element,
                                                .out_stride = qkv_stride,
                                                .bf16_out = l->bf16});
}

/* From what attention left of rows [row, last) to the layer's output, by the threads of the region that calls this. */
static void feed_forward(const bert_layer *l, const workspace *w, const float *in, int64_t row, int64_t last,
                         float *out) {
  const int hidden = l->output.n, bf16 = l->bf16;
  const int64_t stride = stride_of(hidden, bf16), wide_stride = stride_of(l->intermediate.n, bf16);
  const int64_t num_rows = last - row, element = bf16 ? 2 : 4;
  multiply_all(&l->attention_output, &(operands){.in = w->attended + row * stride * element,
                                                 .stride = stride,
                                                 .rows = num_rows,
                                                 .bf16 = bf16,
                                                 .out = w->sums,
                                                 .out_stride = hidden,
                                                 .residual = in + row * hidden});
  normalize(&l->attention_norm, w->sums, num_rows, hidden, w->normed, bf16 ? (uint16_t *)w->normed_narrow : NULL,
            stride);
  multiply_all(&l->intermediate, &(operands){.in = bf16 ? (void *)w->normed_narrow : w->normed,
                                             .stride = stride,
                                             .rows = num_rows,
                                             .bf16 = bf16,
                                             .out = w->widened,
                                             .out_stride = wide_stride,
                                             .bf16_out = bf16,
                                             .gelu = 1});
  multiply_all(&l->output, &(operands){.in = w->widened,
                                       .stride = wide_stride,
                                       .rows = num_rows,
                                       .bf16 = bf16,
                                       .out = w->sums,
                                       .out_stride = hidden,
                                       .residual = w->normed});
  normalize(&l->output_norm, w->sums, num_rows, hidden, out + row * hidden, NULL, 0);
}

/* One layer and its maps, by the threads of the region that calls this. `out` may be `in`: a row's output is
 * written when nobody reads its input any more; without it, the maps are all. Returns 0 when memory was short. */
static int run_layer(const bert_layer *l, const chunks *c, const workspace *w, const float *in,
                     const int64_t *cu_seqlens, int num_texts, const map *maps, int num_maps, float *out) {
  const int64_t rows = cu_seqlens[num_texts];
  const int hidden = l->output.n, bf16 = l->bf16, dim = l->head_dim;
  const int64_t qkv_stride = 3 * (int64_t)hidden, stride = stride_of(hidden, bf16), element = bf16 ? 2 : 4;
  const problem attention = {.q = {w->query_key_value, qkv_stride, dim},
                             .k = {w->query_key_value + hidden * element, qkv_stride, dim},
                             .v = {w->query_key_value + 2 * hidden * element, qkv_stride, dim},
                             .out = {w->attended, stride, dim},
                             .bf16 = bf16,
                             .num_heads = l->num_heads,
                             .dim = dim,
                             .scaling = l->scaling};
  /* A region of one thread within: what the steps share out falls to it. */
  if (c->alone) {
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < c->num; i++) {
#pragma omp parallel num_threads(1)
      project(l, w, in, start_of(c, rows, i), start_of(c, rows, i + 1));
    }
  } else {
    project(l, w, in, 0, rows);
  }
  int ok = num_maps ? write_maps(&attention, maps, num_maps) : 1;
  if (!out) return ok;
  ok = attend_all(&attention, cu_seqlens, num_texts) && ok;
  if (c->alone) {
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < c->num; i++) {
#pragma omp parallel num_threads(1)
      feed_forward(l, w, in, start_of(c, rows, i), start_of(c, rows, i + 1), out);
    }
  } else {
    for (int64_t i = 0; i < c->num; i++) feed_forward(l, w, in, start_of(c, rows, i), start_of(c, rows, i + 1), out);
  }
  return ok;
}

/* Layers of one shape, one after the other, over packed texts. in and out are (rows, hidden) float32; `maps` has
 * those of each layer, as many as `num_maps` says. The last layer's queries, keys and values, (rows, 3, heads,
 * head_dim), are left at the start of `memory`; where `maps_are_last`, nothing more of it is computed. Returns 0
 * when memory was short. */
int layertap_bert_layers(const bert_layer *const *layers, int num_layers, const float *in, const int64_t *cu_seqlens,
                         int num_texts, const map *maps, const int *num_maps, char *memory, float *out,
                         int maps_are_last, int num_threads) {
  const int64_t rows = cu_seqlens[num_texts];
  const chunks c = divided(rows, layers[0]->bf16, num_threads);
  int ok = 1;
#pragma omp parallel num_threads(num_threads) reduction(&& : ok)
  {
    workspace w;
    lay_out(layers[0], rows, num_threads, omp_get_thread_num(), memory, &w);
    const map *next = maps;
    for (int i = 0; i < num_layers; i++) {
      const int is_last = maps_are_last && i == num_layers - 1;
      ok = run_layer(layers[i], &c, &w, i ? out : in, cu_seqlens, num_texts, next, num_maps[i], is_last ? NULL : out) &&
           ok;
      next += num_maps[i];
    }
  }
  return ok;
}
