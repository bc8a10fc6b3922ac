/* BERT's layers in one call: the threads are started once, and synchronize between the steps. */
#include "maps.h"
#include "norm.h"
#include "product.h"

/* From the attention output to the layer's output, rows are processed in chunks, so that intermediate results
 * stay in the cache. If there are enough rows for every thread, each chunk is processed by one thread, which
 * then does not wait for the others. Otherwise all threads share each chunk. With smaller chunks, the others
 * wait less at the end of a layer for a thread whose core is also used by other work. For float32, whose
 * products take longer, chunks of half the size cost 2 % on an idle machine, and save 8 % next to other work
 * that uses a quarter of a core. */
#define ROWS_ALONE(bf16) ((bf16) ? 256 : 128)
#define ROWS_TOGETHER 768
#define MIN_ROWS_ALONE(bf16) ((bf16) ? 96 : 256) /* per thread, since every thread then reads all weights */

typedef struct {
  linear query_key_value, attention_output, intermediate, output;
  norm attention_norm, output_norm;
  float scaling;
  int num_heads, head_dim, bf16;
} bert_layer;

/* Layer norm of (rows, n). Called by every thread of a parallel region. */
static void normalize(const norm *l, const float *in, int64_t rows, int n, float *out, uint16_t *narrow,
                      int64_t narrow_stride) {
#pragma omp for schedule(static)
  for (int64_t row = 0; row < rows; row++)
    normalize_row(l, in + row * n, n, out + row * n, narrow ? narrow + row * narrow_stride : NULL);
}

/* The intermediate results of a layer. `sums` and `normed` are float32, `narrow` and `normed_narrow` 16 bits
 * (and unused for float32), the others of the layer's type. The first three hold all rows. The others hold
 * one chunk; if chunks are processed by single threads, each thread has its own. */
typedef struct {
  char *query_key_value, *narrow, *attended, *normed_narrow, *widened;
  float *sums, *normed;
} workspace;

/* How the rows are divided. */
typedef struct {
  int64_t num, rows; /* rows: of the largest chunk, rounded up */
  int alone;         /* whether each chunk is processed by one thread */
} chunks;

static chunks divided(int64_t rows, int bf16, int num_threads) {
  const int alone = rows >= (int64_t)num_threads * MIN_ROWS_ALONE(bf16);
  const int64_t share = alone ? num_threads : 1, per_round = share * (alone ? ROWS_ALONE(bf16) : ROWS_TOGETHER);
  const int64_t num = (rows + per_round - 1) / per_round * share;
  return (chunks){num, num ? ((rows + num - 1) / num + 63) / 32 * 32 : 0, alone};
}

/* The first row of chunk i, a multiple of 32; for i == num, the end of the last chunk. */
static int64_t start_of(const chunks *c, int64_t rows, int64_t i) {
  return i == c->num ? rows : rows * i / c->num / 32 * 32;
}

/* Sets the pointers of `w` to places in `memory` for one of the threads. Returns the bytes that all threads
 * need together. */
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

/* The bytes of `memory` that `layertap_bert_layers` needs for this number of rows. */
int64_t layertap_bert_workspace(const bert_layer *l, int64_t rows, int num_threads) {
  workspace w;
  return lay_out(l, rows, num_threads, 0, NULL, &w);
}

/* Computes queries, keys and values of rows [row, last). Called by every thread of a parallel region. */
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

/* Computes the layer's output from the attention output, for rows [row, last). Called by every thread of a
 * parallel region. */
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

/* Runs one layer and writes its maps. Called by every thread of a parallel region. `out` may be the same as
 * `in`, since a row's output is written after the last read of its input. If `out` is NULL, only the maps
 * (and the queries, keys and values) are computed. Returns 0 if this thread did not get enough memory. */
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
  /* In a nested parallel region of one thread, the `omp for` loops of the steps run on that thread alone. */
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

/* Runs consecutive layers of one shape over packed texts. `in` and `out` are (rows, hidden) float32. `maps`
 * has the maps of all layers in order, `num_maps[i]` of them for layer i. On return, the queries, keys and
 * values of the last layer, (rows, 3, heads, head_dim), are at the start of `memory`. With `maps_are_last`,
 * only these and the maps are computed for the last layer. Returns 0 if there is not enough memory. */
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
