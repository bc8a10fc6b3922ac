/* Products of rows with a weight that is packed once, and what directly follows them.
 *
 * out = gelu(in W' + bias) or in W' + bias + residual, written once. W (n, k) is packed in panels
 * of PANEL columns, in the order in which they are read. float32 by vectors; 16 bits by the
 * processor's tiles (AMX), which take 16-bit inputs and sum in float32.
 *
 * Each row is summed in the same order whatever stands beside it, so that a text's results are the
 * same to the bit in any company; no kernel is chosen, or kept, by the number of rows.
 */
#include <omp.h>

#include "tiles.h"
#include "vectors.h"

#define WIDTH (CHUNKS * LANES) /* columns of a float32 panel */
#define K_AHEAD 32             /* how far before its use a row of a panel is fetched */
#define MIN_ITEM_ROWS 96       /* rows that a thread takes of a panel, at least; a multiple of BLOCK and of 32 */
#define ITEMS_PER_THREAD 3     /* items that should be there for each thread, so that none waits long for another */
/* 16 bits, tiles. Of a block of rows, this much of k stays in the first cache for this many panels. */
#define K_TOGETHER 256
#define PANELS_TOGETHER 4
/* Floats from row to row of their sums: a whole power of two of bytes, and rows fell on each other's places. */
#define SUMS_STRIDE (32 * PANELS_TOGETHER + LANES)
#define SPAN 64     /* columns of a row that are finished beside one step of the next products */
#define ROWS_AHEAD 2 /* how many rows before its use what a row of sums is finished with, and its place, are fetched */
#define FETCHED 256 /* bytes of the next panels that are fetched at each step: all of them within 256 rows */

typedef struct {
  const void *weight; /* packed */
  const float *bias;  /* n, and zeros up to a whole panel */
  int k, n;
} linear;

typedef struct {
  const void *in; /* float32, or 16 bits for the tiles: readable up to a multiple of 32 rows */
  int64_t stride; /* of its rows, in elements */
  int64_t rows;
  int bf16;       /* whether in and W are */
  void *out;
  int64_t out_stride;
  int bf16_out, gelu;
  const float *residual; /* (rows, n), or NULL */
} operands;

/* -------------------------------------------------------------------------------------- packing */

static inline int panel_of(int bf16) { return bf16 ? 32 : WIDTH; }

/* Elements of a packed weight; 0 where this processor has no kernel for it. */
int64_t layertap_packed_size(int n, int k, int bf16) {
  if (bf16 && (!has_tiles || k % 32)) return 0;
  return (int64_t)up(n, panel_of(bf16)) * k;
}

/* (n, k) rows to panels: float32 [n / WIDTH][k][WIDTH]; 16 bits [n / 32][k / 32][2 tiles][16 pairs of k][16][2]. */
void layertap_pack(const void *weight, int n, int k, int bf16, void *packed) {
  const int width = panel_of(bf16);
#pragma omp parallel for
  for (int first = 0; first < n; first += width) {
    for (int c = 0; c < width; c++) {
      const int64_t row = (int64_t)(first + c) * k;
      for (int i = 0; i < k; i++) {
        if (bf16) {
          const int64_t tile = ((int64_t)first / 32 * (k / 32) + i / 32) * 2 + c / 16;
          ((uint16_t *)packed)[tile * 512 + (i % 32) / 2 * 32 + c % 16 * 2 + i % 2] =
              first + c < n ? ((const uint16_t *)weight)[row + i] : 0;
        } else {
          ((float *)packed)[(int64_t)first * k + (int64_t)i * width + c] =
              first + c < n ? ((const float *)weight)[row + i] : 0.0f;
        }
      }
    }
  }
}

/* -------------------------------------------------------------------- what follows a product */

/* One vector of sums, of which `part` lanes are columns, to its place. */
static inline __attribute__((always_inline)) void finish_vector(vf v, const float *residual, void *out, int64_t at,
                                                                const int bf16_out, const int gelu, const int part) {
  if (residual) {
    vf more = {0};
    memcpy(&more, residual + at, part * sizeof(float));
    v += more;
  }
  if (gelu) v = bf16_out ? rough_gelu_of(v) : gelu_of(v);
  if (bf16_out) {
    uint16_t narrow[LANES];
    narrowed(narrow, v);
    memcpy((uint16_t *)out + at, narrow, part * sizeof *narrow);
  } else {
    memcpy((float *)out + at, &v, part * sizeof(float));
  }
}

/* One row of sums, to columns [column, column + width) of its places in the output. */
static inline __attribute__((always_inline)) void finish_row(const float *sums, const float *bias,
                                                             const float *residual, void *out, int width,
                                                             const int bf16_out, const int gelu) {
  int c = 0;
#pragma GCC unroll 4
  for (; c + LANES <= width; c += LANES)
    finish_vector(load(sums + c) + load(bias + c), residual, out, c, bf16_out, gelu, LANES);
  if (c < width) finish_vector(load(sums + c) + load(bias + c), residual, out, c, bf16_out, gelu, width - c);
}

/* A block of sums (num_rows, stride) to rows [row, row + num_rows) and columns [column, column + width). */
static inline __attribute__((always_inline)) void finish(const linear *l, const operands *o, const float *sums,
                                                         int stride, int64_t row, int num_rows, int column, int width) {
  const float *bias = l->bias + column;
  const int element = o->bf16_out ? 2 : 4;
  if (l->n - column < width) width = l->n - column;
  for (int r = 0; r < num_rows; r++, row++, sums += stride) {
    const float *residual = o->residual ? o->residual + row * l->n + column : NULL;
    char *out = (char *)o->out + (row * o->out_stride + column) * element;
    if (o->gelu && o->bf16_out)
      finish_row(sums, bias, residual, out, width, 1, 1);
    else if (o->gelu)
      finish_row(sums, bias, residual, out, width, 0, 1);
    else if (o->bf16_out)
      finish_row(sums, bias, residual, out, width, 1, 0);
    else
      finish_row(sums, bias, residual, out, width, 0, 0);
  }
}

/* -------------------------------------------------------------------------------------- float32 */

/* sums (rows, WIDTH) = in (rows, k) times a panel. */
static inline __attribute__((always_inline)) void multiply(const float *in, int64_t stride, int k,
                                                           const float *panel, float *sums, const int rows) {
  vf sum[BLOCK][CHUNKS];
#pragma GCC unroll 6
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int c = 0; c < CHUNKS; c++) sum[r][c] = (vf){0};
  for (int i = 0; i < k; i++) {
    vf weight[CHUNKS];
#pragma GCC unroll 4
    for (int c = 0; c < CHUNKS; c++) {
      weight[c] = load(panel + (int64_t)i * WIDTH + c * LANES);
      __builtin_prefetch(panel + (int64_t)(i + K_AHEAD) * WIDTH + c * LANES);
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
      for (int c = 0; c < CHUNKS; c++) sum[r][c] += in[r * stride + i] * weight[c];
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int c = 0; c < CHUNKS; c++) store(sums + r * WIDTH + c * LANES, sum[r][c]);
}

static void multiply_item(const linear *l, const operands *o, int64_t row, int64_t last, int column) {
  const float *panel = (const float *)l->weight + (int64_t)column * l->k;
  float sums[BLOCK * WIDTH];
  for (int rows; row < last; row += rows) {
    rows = last - row < BLOCK ? (int)(last - row) : BLOCK;
    const float *in = (const float *)o->in + row * o->stride;
    switch (rows) {
      case 6: multiply(in, o->stride, l->k, panel, sums, 6); break;
      case 5: multiply(in, o->stride, l->k, panel, sums, 5); break;
      case 4: multiply(in, o->stride, l->k, panel, sums, 4); break;
      case 3: multiply(in, o->stride, l->k, panel, sums, 3); break;
      case 2: multiply(in, o->stride, l->k, panel, sums, 2); break;
      default: multiply(in, o->stride, l->k, panel, sums, 1);
    }
    finish(l, o, sums, WIDTH, row, rows, column, WIDTH);
  }
}

/* ---------------------------------------------------------------------------------- 16 bits, tiles */

#if TILES
/* Sums that are whole, and wait for what follows them: it is done beside the next products, since vectors
 * and tiles are computed by different units. */
typedef struct {
  const float *sums; /* (rows, SUMS_STRIDE) */
  int64_t row, last;
  int column, num_columns, done; /* of the row's columns */
} unfinished;

/* What `finish` of a row reads and writes, but for the sums, to the first cache: a store that misses it holds up
 * those of the tiles behind it. */
static inline __attribute__((always_inline)) void fetch_for_finish(const linear *l, const operands *o, int64_t row,
                                                                   int column, int width) {
  const int element = o->bf16_out ? 2 : 4;
  const char *out = (const char *)o->out + (row * o->out_stride + column) * element;
  for (int i = 0; i < width * element; i += 64) __builtin_prefetch(out + i, 1);
  for (int i = 0; o->residual && i < width; i += LANES) __builtin_prefetch(o->residual + row * l->n + column + i);
}

/* SPAN columns of a row, or what is left of it. */
static inline __attribute__((always_inline)) void finish_next(const linear *l, const operands *o, unfinished *u) {
  const int left = u->num_columns - u->done, column = u->column + u->done, width = left < SPAN ? left : SPAN;
  fetch_for_finish(l, o, u->row + ROWS_AHEAD, column, width);
  finish(l, o, u->sums + u->done, 0, u->row, 1, column, width);
  u->done += SPAN;
  if (left <= SPAN) {
    u->done = 0;
    u->sums += SUMS_STRIDE;
    u->row++;
  }
}

/* Adds to sums (32, SUMS_STRIDE), or begins them, the product of k columns of some rows with a panel: two tiles
 * of rows, or one where they are not `tall`, times two of columns. Each load stands just before its use:
 * in this order tiles from the second cache come as fast as they are used up. Meanwhile the panels `ahead`
 * are fetched into that cache, and what was summed `before` is finished. */
static inline __attribute__((always_inline)) void multiply_tiles(const linear *l, const operands *o, const uint16_t *in,
                                                                 int k, const uint16_t *panel, float *sums,
                                                                 int begins, const int tall, const char *ahead,
                                                                 unfinished *before) {
  const int64_t bytes = o->stride * 2;
  const int width = SUMS_STRIDE * 4;
  float *below = sums + 16 * SUMS_STRIDE;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  if (!begins) {
    _tile_loadd(0, sums, width);
    _tile_loadd(1, sums + 16, width);
    if (tall) {
      _tile_loadd(2, below, width);
      _tile_loadd(3, below + 16, width);
    }
  }
  for (int i = 0; i < k; i += 32, panel += 2 * 512, ahead += FETCHED) {
    for (int line = 0; line < FETCHED; line += 64) _mm_prefetch(ahead + line, _MM_HINT_T1);
    _tile_loadd(6, panel, 64);
    _tile_loadd(4, in + i, bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (tall) {
      _tile_loadd(5, in + 16 * o->stride + i, bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    _tile_loadd(7, panel + 512, 64);
    _tile_dpbf16ps(1, 4, 7);
    if (tall) _tile_dpbf16ps(3, 5, 7);
    if (before->row < before->last) finish_next(l, o, before);
  }
  _tile_stored(0, sums, width);
  _tile_stored(1, sums + 16, width);
  if (tall) {
    _tile_stored(2, below, width);
    _tile_stored(3, below + 16, width);
  }
}

static void multiply_item_tiles(const linear *l, const operands *o, int64_t row, int64_t last, int column,
                                int num_columns) {
  float both[2][32 * SUMS_STRIDE] __attribute__((aligned(64)));
  unfinished before = {0};
  const uint16_t *panels = (const uint16_t *)l->weight + (int64_t)column * l->k;
  const int64_t bytes = (int64_t)num_columns * l->k * 2;
  const char *ahead = (const char *)panels + bytes, *end = ahead + bytes;
  for (int block = 0; row < last; row += 32, block ^= 1) {
    const int rows = last - row < 32 ? (int)(last - row) : 32;
    float *sums = both[block];
    const uint16_t *in = (const uint16_t *)o->in + row * o->stride;
    for (int i = 0; i < l->k; i += K_TOGETHER) {
      const int k = l->k - i < K_TOGETHER ? l->k - i : K_TOGETHER;
      for (int c = 0; c < num_columns; c += 32) {
        const uint16_t *panel = panels + (int64_t)c * l->k + i * 32;
        if (rows > 16)
          multiply_tiles(l, o, in + i, k, panel, sums + c, i == 0, 1, ahead, &before);
        else
          multiply_tiles(l, o, in + i, k, panel, sums + c, i == 0, 0, ahead, &before);
        if (ahead < end) ahead += k / 32 * FETCHED;
      }
    }
    while (before.row < before.last) finish_next(l, o, &before); /* k was short */
    before = (unfinished){sums, row, row + rows, column, num_columns, 0};
  }
  while (before.row < before.last) finish_next(l, o, &before);
}
#endif

/* ------------------------------------------------------------------------------------------ both */

/* By the threads of the region that calls this; all of it is there when it returns. */
static void multiply_all(const linear *l, const operands *o) {
  if (!o->rows) return;
  const int columns = up(l->n, panel_of(o->bf16));
  const int together = !o->bf16 ? 1 : o->rows > 32 ? PANELS_TOGETHER : 2, width = panel_of(o->bf16) * together;
  const int64_t num_groups = (columns + width - 1) / width;
  /* The more rows, the less often a panel comes from memory. */
  int64_t item_rows = (o->rows + MIN_ITEM_ROWS - 1) / MIN_ITEM_ROWS * MIN_ITEM_ROWS;
  const int64_t enough = (int64_t)omp_get_num_threads() * ITEMS_PER_THREAD;
  while (item_rows > MIN_ITEM_ROWS && (o->rows + item_rows - 1) / item_rows * num_groups < enough)
    item_rows = (item_rows / 2 + MIN_ITEM_ROWS - 1) / MIN_ITEM_ROWS * MIN_ITEM_ROWS;
  const int64_t num_chunks = (o->rows + item_rows - 1) / item_rows;
  if (o->bf16) begin_tiles();
#pragma omp for schedule(dynamic, 1)
  for (int64_t item = 0; item < num_groups * num_chunks; item++) {
    const int64_t row = item % num_chunks * item_rows;
    const int64_t last = row + item_rows < o->rows ? row + item_rows : o->rows;
    const int column = (int)(item / num_chunks) * width;
#if TILES
    if (o->bf16)
      multiply_item_tiles(l, o, row, last, column, columns - column < width ? columns - column : width);
    else
#endif
      multiply_item(l, o, row, last, column);
  }
  if (o->bf16) end_tiles();
}

/* ----------------------------------------------------------------------------- a product by itself */

/* Rows to 16 bits; n is a multiple of LANES. */
static void narrow_all(const float *in, int64_t rows, int n, uint16_t *out, int64_t stride) {
#pragma omp for schedule(static)
  for (int64_t row = 0; row < rows; row++)
    for (int i = 0; i < n; i += LANES) narrowed(out + row * stride + i, load(in + row * n + i));
}

/* Elements from row to row of what a product reads. Rows of 16 bits lie an odd number of cache
 * lines apart: sixteen are read at once, and would else fall on each other's places. */
static inline int64_t stride_of(int k, int bf16) { return bf16 && k / 32 % 2 == 0 ? k + 32 : k; }

/* 16-bit elements that `layertap_product` needs for its input. */
int64_t layertap_narrow_size(int k, int64_t rows) { return (rows + 31) / 32 * 32 * stride_of(k, 1); }

/* As `multiply_all`, of (rows, k) without gaps. A 16-bit product may read float32 rows (`wide_in`): they are
 * laid out for the tiles, in 16 bits, in `narrow`. */
void layertap_product(const linear *l, const operands *o, int wide_in, uint16_t *narrow, int num_threads) {
  operands laid_out = *o;
  laid_out.stride = stride_of(l->k, o->bf16);
  if (o->bf16) laid_out.in = narrow;
#pragma omp parallel num_threads(num_threads)
  {
    if (o->bf16 && wide_in) {
      narrow_all(o->in, o->rows, l->k, narrow, laid_out.stride);
    } else if (o->bf16) {
#pragma omp for schedule(static)
      for (int64_t row = 0; row < o->rows; row++)
        memcpy(narrow + row * laid_out.stride, (const uint16_t *)o->in + row * l->k, l->k * sizeof *narrow);
    }
    multiply_all(l, &laid_out);
  }
}
