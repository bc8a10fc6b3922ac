/* BERT's embeddings: the layer norm of the sum of a token's word, type and position embeddings. */
#include "norm.h"

typedef struct {
  const float *rows;
  int64_t num;
} table;

typedef struct {
  table words, types, positions;
  norm norm;
  int n;
} bert_embeddings;

/* The embedding of an id; NULL if the id is outside of the table. */
static inline const float *entry(const table *t, int64_t id, int n) {
  return id >= 0 && id < t->num ? t->rows + id * n : NULL;
}

/* Writes (rows, n) to `out`. Returns 0 if an id is outside of its table. */
int layertap_bert_embeddings(const bert_embeddings *e, const int64_t *words, const int64_t *types,
                             const int64_t *positions, int64_t rows, float *out, int num_threads) {
  const int n = e->n;
  int ok = 1;
#pragma omp parallel for num_threads(num_threads) schedule(static) reduction(&& : ok)
  for (int64_t row = 0; row < rows; row++) {
    const float *word = entry(&e->words, words[row], n), *type = entry(&e->types, types[row], n);
    const float *position = entry(&e->positions, positions[row], n);
    ok = ok && word && type && position;
    if (!ok) continue;
    float *sum = out + row * n;
    for (int i = 0; i < n; i++) sum[i] = word[i] + type[i] + position[i];
    normalize_row(&e->norm, sum, n, sum, NULL);
  }
  return ok;
}
