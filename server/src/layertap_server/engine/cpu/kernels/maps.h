/* The requested attention maps. They are computed separately, since the attention kernel keeps no maps. */
#ifndef LAYERTAP_MAPS_H
#define LAYERTAP_MAPS_H

#include "attention.h"

/* softmax(QK') of one text, for some heads and rows. */
typedef struct {
  int64_t start;
  int length, num_heads, num_queries; /* num_queries 0: all rows, in order */
  const int *heads, *queries;
  float *out; /* (num_heads, num_queries, length) */
} map;

/* The row, within the text, of the map's query number `nth`. */
static inline int query_row(const map *m, int nth) { return m->num_queries ? m->queries[nth] : nth; }

/* Writes one row of the map from unnormalized weights and their total. If that is NaN, the row is NaN. */
static inline void write_map_row(const map *m, int nth_head, int nth, const float *weights, float total) {
  const float share = 1.0f / total;
  float *out = m->out + ((int64_t)nth_head * (m->num_queries ? m->num_queries : m->length) + nth) * m->length;
  for (int k = 0; k < m->length; k++) out[k] = (weights[k] < 1e-37f ? 0.0f : weights[k]) * share;
}

static int write_map(const problem *p, const map *m, int nth_head) {
  const int dim = up(p->dim, LANES), num_padded = up(m->length, LANES);
  const int num_queries = m->num_queries ? m->num_queries : m->length;
  float *memory = scratch((int64_t)num_padded * dim + LANES * dim + BLOCK * (dim + num_padded));
  if (!memory) return 0;
  float *keys = memory, *block = keys + (int64_t)num_padded * dim;
  float *queries = block + LANES * dim, *scores = queries + BLOCK * dim;
  const int head = m->heads[nth_head];
  read_keys(p, m->start, head, 0, m->length, num_padded, dim, block, keys);
  for (int first = 0; first < num_queries; first += BLOCK) {
    const int num_rows = num_queries - first < BLOCK ? num_queries - first : BLOCK;
    int rows[BLOCK];
    float total[BLOCK];
    for (int q = 0; q < BLOCK; q++) rows[q] = query_row(m, first + (q < num_rows ? q : num_rows - 1));
    weights_of(p, m->start, head, rows, 0, m->length, num_padded, dim, keys, queries, scores, total);
    for (int q = 0; q < num_rows; q++)
      write_map_row(m, nth_head, first + q, scores + (int64_t)q * num_padded, total[q]);
  }
  return 1;
}

#if TILES
/* `write_map` on tiles; dim must be a multiple of 32. */
static int write_map_with_tiles(const problem *p, const map *m, int nth_head) {
  const int dim = p->dim, num_padded = up(m->length, 32), head = m->heads[nth_head];
  const int num_queries = m->num_queries ? m->num_queries : m->length;
  float *memory = scratch((int64_t)num_padded * dim / 2 + 16 * (int64_t)num_padded + 8 * dim);
  if (!memory) return 0;
  float *keys = memory, *scores = keys + (int64_t)num_padded * dim / 2;
  uint16_t *queries = (uint16_t *)(scores + 16 * (int64_t)num_padded);
  read_key_tiles(p, m->start, head, m->length, num_padded, keys);
  for (int first = 0; first < num_queries; first += 16) {
    const int num_rows = num_queries - first < 16 ? num_queries - first : 16;
    for (int q = 0; q < num_rows; q++)
      memcpy(queries + q * dim,
             (const uint16_t *)p->q.data + (m->start + query_row(m, first + q)) * p->q.row + head * p->q.head, dim * 2);
    score_tiles(queries, dim, keys, num_padded, scores);
    for (int q = 0; q < num_rows; q++) {
      float *row_scores = scores + (int64_t)q * num_padded;
      mask_scores(p, query_row(m, first + q), m->length, num_padded, row_scores);
      const float total = softmax(row_scores, num_padded, p->scaling);
      write_map_row(m, nth_head, first + q, row_scores, total);
    }
  }
  return 1;
}
#endif

/* Writes all maps. Called by every thread of a parallel region; all maps are written when it returns. Returns
 * 0 if this thread did not get enough memory. */
static int write_maps(const problem *p, const map *maps, int num_maps) {
  int num_tasks = 0, ok = 1;
  for (int i = 0; i < num_maps; i++) num_tasks += maps[i].num_heads;
  if (uses_tiles(p)) begin_tiles();
#pragma omp for schedule(dynamic, 1)
  for (int task = 0; task < num_tasks; task++) {
    int i = 0, nth_head = task;
    while (nth_head >= maps[i].num_heads) nth_head -= maps[i++].num_heads;
#if TILES
    if (uses_tiles(p))
      ok = write_map_with_tiles(p, maps + i, nth_head) && ok;
    else
#endif
      ok = write_map(p, maps + i, nth_head) && ok;
  }
  if (uses_tiles(p)) end_tiles();
  return ok;
}

/* Returns 0 if there is not enough memory. */
int layertap_maps(const problem *p, const map *maps, int num_maps, int num_threads) {
  int ok = 1;
#pragma omp parallel num_threads(num_threads) reduction(&& : ok)
  ok = write_maps(p, maps, num_maps);
  return ok;
}

#endif
