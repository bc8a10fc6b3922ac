/* BERT's layer in one call: the threads start once, and meet between its steps. */
#include "attention.h"
#include "product.h"

/* Rows that go together from the attention's output to the layer's: what they leave for each other
 * stays in the cache. */
#define ROWS_TOGETHER 768

typedef struct {
  linear query_key_value, attention_output, intermediate, output;
  const float *attention_gamma, *attention_beta, *output_gamma, *output_beta;
  float attention_epsilon, output_epsilon, scaling;
  int num_heads, head_dim, bf16;
} bert_layer;

/* out = (in - mean) / sqrt(variance + epsilon) * gamma + beta of each row; in 16 bits too where asked. */
static void normalize(const float *in, int64_t rows, int n, const float *gamma, const float *beta, float epsilon,
                      float *out, uint16_t *narrow, int64_t narrow_stride) {
#pragma omp for schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    const float *x = in + row * n;
    float *y = out + row * n;
    uint16_t *z = narrow ? narrow + row * narrow_stride : NULL;
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
    const float scale = 1.0f / __builtin_sqrtf((square + sum_of(squares)) / n + epsilon);
    for (i = 0; i + LANES <= n; i += LANES) {
      vf v = (load(x + i) - mean) * scale * load(gamma + i) + load(beta + i);
      store(y + i, v);
      if (z) narrowed(z + i, v);
    }
    for (; i < n; i++) {
      y[i] = (x[i] - mean) * scale * gamma[i] + beta[i];
      if (z) z[i] = narrowed_one(y[i]);
    }
  }
}

/* Where the steps leave what the next ones read, in 16 bits or float32; sums and normed in float32. */
typedef struct {
  char *query_key_value, *narrow, *attended, *normed_narrow, *widened;
  float *sums, *normed;
} workspace;

/* Lays `w` out from `memory`; returns the bytes that it takes. */
static int64_t lay_out(const bert_layer *l, int64_t rows, char *memory, workspace *w) {
  const int64_t hidden = stride_of(l->output.n, l->bf16), wide = stride_of(l->intermediate.n, l->bf16);
  const int64_t element = l->bf16 ? 2 : 4;
  const int64_t all = (rows + 31) / 32 * 32, together = all < ROWS_TOGETHER ? all : ROWS_TOGETHER;
  const int64_t sizes[] = {all * l->query_key_value.n * element,
                           l->bf16 ? all * hidden * 2 : 0,
                           all * hidden * element,
                           l->bf16 ? together * hidden * 2 : 0,
                           together * wide * element,
                           together * hidden * 4,
                           together * hidden * 4};
  int64_t at[8] = {0};
  for (int i = 0; i < 7; i++) at[i + 1] = at[i] + (sizes[i] + 63) / 64 * 64;
  *w = (workspace){memory,         memory + at[1],          memory + at[2],         memory + at[3],
                   memory + at[4], (float *)(memory + at[5]), (float *)(memory + at[6])};
  return at[7];
}

/* Bytes of memory for a pass over so many rows. */
int64_t layertap_bert_workspace(const bert_layer *l, int64_t rows) {
  workspace w;
  return lay_out(l, rows, NULL, &w);
}

/* The layer over packed texts. in and out are (rows, hidden) float32; the queries, keys and values,
 * (rows, 3, heads, head_dim), are left at the start of `memory`, and without `out` nothing else is
 * done. Returns 0 when memory was short. */
int layertap_bert_layer(const bert_layer *l, const float *in, const int64_t *cu_seqlens, int num_texts, char *memory,
                        float *out, int num_threads) {
  const int64_t rows = cu_seqlens[num_texts];
  const int hidden = l->output.n, wide = l->intermediate.n, bf16 = l->bf16, dim = l->head_dim;
  const int64_t qkv_stride = 3 * (int64_t)hidden;
  const int64_t stride = stride_of(hidden, bf16), wide_stride = stride_of(wide, bf16);
  const int64_t element = bf16 ? 2 : 4;
  workspace w;
  lay_out(l, rows, memory, &w);
  const problem attention = {.q = {w.query_key_value, qkv_stride, dim},
                             .k = {w.query_key_value + hidden * element, qkv_stride, dim},
                             .v = {w.query_key_value + 2 * hidden * element, qkv_stride, dim},
                             .out = {w.attended, stride, dim},
                             .bf16 = bf16,
                             .num_heads = l->num_heads,
                             .dim = dim,
                             .scaling = l->scaling};
  int ok = 1;
#pragma omp parallel num_threads(num_threads) reduction(&& : ok)
  {
    if (bf16) narrow_all(in, rows, hidden, (uint16_t *)w.narrow, stride);
    multiply_all(&l->query_key_value, &(operands){.in = bf16 ? (const void *)w.narrow : in,
                                                  .stride = stride,
                                                  .rows = rows,
                                                  .bf16 = bf16,
                                                  .out = w.query_key_value,
                                                  .out_stride = qkv_stride,
                                                  .bf16_out = bf16});
    if (out) ok = attend_all(&attention, cu_seqlens, num_texts);
    for (int64_t row = 0; out && row < rows; row += ROWS_TOGETHER) {
      const int64_t num_rows = rows - row < ROWS_TOGETHER ? rows - row : ROWS_TOGETHER;
      multiply_all(&l->attention_output, &(operands){.in = w.attended + row * stride * element,
                                                     .stride = stride,
                                                     .rows = num_rows,
                                                     .bf16 = bf16,
                                                     .out = w.sums,
                                                     .out_stride = hidden,
                                                     .residual = in + row * hidden});
      normalize(w.sums, num_rows, hidden, l->attention_gamma, l->attention_beta, l->attention_epsilon, w.normed,
                bf16 ? (uint16_t *)w.normed_narrow : NULL, stride);
      multiply_all(&l->intermediate, &(operands){.in = bf16 ? (void *)w.normed_narrow : w.normed,
                                                 .stride = stride,
                                                 .rows = num_rows,
                                                 .bf16 = bf16,
                                                 .out = w.widened,
                                                 .out_stride = wide_stride,
                                                 .bf16_out = bf16,
                                                 .gelu = 1});
      multiply_all(&l->output, &(operands){.in = w.widened,
                                           .stride = wide_stride,
                                           .rows = num_rows,
                                           .bf16 = bf16,
                                           .out = w.sums,
                                           .out_stride = hidden,
                                           .residual = w.normed});
      normalize(w.sums, num_rows, hidden, l->output_gamma, l->output_beta, l->output_epsilon, out + row * hidden,
                NULL, 0);
    }
  }
  return ok;
}
