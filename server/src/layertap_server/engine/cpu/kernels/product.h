/* Matrix products with a weight that is packed once, fused with bias, GELU and residual.
 *
 * Computes out = gelu(in W' + bias) or in W' + bias + residual, and writes each element once. W (n, k) is
 * packed into panels of `panel_of` columns, in the order in which they are read. float32 uses vectors; 16
 * bits use the processor's tiles (AMX), which take 16-bit inputs and sum in float32.
 *
 * The order in which a row is summed does not depend on the other rows, so that a text's results do not
 * depend on its batch, to the bit. No kernel is prepared or kept for a number of rows.
 */
#include <omp.h>

#include "tiles.h"
#include "vectors.h"

/* A product is divided into items: some rows times one group of panels. Threads take items one by one. */
#define WIDTH (CHUNKS * LANES) /* columns of a float32 panel */
#define K_AHEAD 32             /* a row of a panel is prefetched this many steps before its use */
#define MIN_ITEM_ROWS 96       /* the fewest rows of an item; a multiple of BLOCK and of 32 */
#define ITEMS_PER_THREAD 3     /* wanted at least, so that all threads finish at about the same time */
/* The rest is for tiles. A block of rows is multiplied by PANELS_TOGETHER panels, K_TOGETHER columns of the
 * block at a time, which stay in the L1 cache meanwhile. */
#define K_TOGETHER 256
#define PANELS_TOGETHER 4
/* Floats between the starts of two rows of sums. With a power of two, rows would share cache sets. */
#define SUMS_STRIDE (32 * PANELS_TOGETHER + LANES)
#define SPAN 64      /* columns of the previous block's sums that are finished in each step of a product */
#define ROWS_AHEAD 2 /* a row's output and residual are prefetched this many rows before it is finished */
#define FETCHED 256  /* bytes of the next group of panels prefetched in each step; 256 rows fetch all of it */

typedef struct {
  const void *weight; /* packed */
  const float *bias;  /* n, padded with zeros to a whole panel */
  int k, n;           /* inputs, outputs */
} linear;

typedef struct {
  const void *in; /* float32, or 16 bits; 16-bit memory must be readable up to a multiple of 32 rows */
  int64_t stride; /* elements between the starts of two rows of `in` */
  int64_t rows;
  int bf16;       /* whether `in` and W are in 16 bits */
  void *out;
  int64_t out_stride;
  int bf16_out, gelu;
  const float *residual; /* (rows, n), or NULL */
} operands;

/* -------------------------------------------------------------------------------------- packing */

static inline int panel_of(int bf16) { return bf16 ? 32 : WIDTH; }

/* The elements of a packed weight; 0 if this processor has no kernel for it. */
int64_t layertap_packed_size(int n, int k, int bf16) {
  if (bf16 && (!has_tiles || k % 32)) return 0;
  return (int64_t)up(n, panel_of(bf16)) * k;
}

/* Packs (n, k) rows: float32 as [n / WIDTH][k][WIDTH], 16 bits as
 * [n / 32][k / 32][2 tiles][16 pairs of k][16 columns][2 of a pair]. */
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

/* ------------------------------------------ finishing sums: bias, residual, GELU and conversion */

/* Finishes one vector, sums plus bias, and writes its first `part` lanes to out[at]. */
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

/* Finishes `width` sums of a row; all pointers are to its first column. */
static inline __attribute__((always_inline)) void finish_row(const float *sums, const float *bias,
                                                             const float *residual, void *out, int width,
                                                             const int bf16_out, const int gelu) {
  int c = 0;
#pragma GCC unroll 4
  for (; c + LANES <= width; c += LANES)
    finish_vector(load(sums + c) + load(bias + c), residual, out, c, bf16_out, gelu, LANES);
  if (c < width) finish_vector(load(sums + c) + load(bias + c), residual, out, c, bf16_out, gelu, width - c);
}

/* Finishes a block of sums, (num_rows, stride), and writes it to rows [row, row + num_rows) and columns
 * [column, column + width) of the output. */
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

/* sums (rows, WIDTH) = in (rows, k) times one panel. */
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
/* A block of complete sums that is not finished yet. It is finished in between the steps of the next block's
 * product: vector and tile instructions run in different units of the processor, so at the same time. */
typedef struct {
  const float *sums; /* (rows, SUMS_STRIDE) */
  int64_t row, last;
  int column, num_columns, done; /* done: finished columns of row `row` */
} unfinished;

/* Prefetches into the L1 cache what `finish` reads and writes for a row, apart from the sums. A store that
 * misses the cache would delay the tile stores behind it. */
static inline __attribute__((always_inline)) void prefetch_for_finish(const linear *l, const operands *o, int64_t row,
                                                                   int column, int width) {
  const int element = o->bf16_out ? 2 : 4;
  const char *out = (const char *)o->out + (row * o->out_stride + column) * element;
  for (int i = 0; i < width * element; i += 64) __builtin_prefetch(out + i, 1);
  for (int i = 0; o->residual && i < width; i += LANES) __builtin_prefetch(o->residual + row * l->n + column + i);
}

/* Finishes the next SPAN columns of the current row, or the rest of it. */
static inline __attribute__((always_inline)) void finish_next(const linear *l, const operands *o, unfinished *u) {
  const int left = u->num_columns - u->done, column = u->column + u->done, width = left < SPAN ? left : SPAN;
  prefetch_for_finish(l, o, u->row + ROWS_AHEAD, column, width);
  finish(l, o, u->sums + u->done, 0, u->row, 1, column, width);
  u->done += SPAN;
  if (left <= SPAN) {
    u->done = 0;
    u->sums += SUMS_STRIDE;
    u->row++;
  }
}

/* Multiplies k columns of a block of rows by a panel: two tiles of rows (one if not `tall`) times two tiles
 * of columns. Adds the product to sums (32, SUMS_STRIDE), or stores it there if it `begins` them. Each load
 * is placed just before its use; in this order, tiles arrive from the L2 cache as fast as they are used.
 * Meanwhile the memory at `ahead` is prefetched into the L2 cache, and the sums of `before` are finished. */
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
    while (before.row < before.last) finish_next(l, o, &before); /* too few steps, if k is small */
    before = (unfinished){sums, row, row + rows, column, num_columns, 0};
  }
  while (before.row < before.last) finish_next(l, o, &before);
}
#endif

/* ---------------------------------------------------------------------------------- both types */

/* Computes a whole product. Called by every thread of a parallel region; `out` is complete on return. */
static void multiply_all(const linear *l, const operands *o) {
  if (!o->rows) return;
  const int columns = up(l->n, panel_of(o->bf16));
  const int together = !o->bf16 ? 1 : o->rows > 32 ? PANELS_TOGETHER : 2, width = panel_of(o->bf16) * together;
  const int64_t num_groups = (columns + width - 1) / width;
  /* The more rows an item has, the less often a panel is read from memory. */
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

/* ------------------------------------------------------------------------------ a single product */

/* Converts rows to 16 bits; n is a multiple of LANES. Called by every thread of a parallel region. */
static void narrow_all(const float *in, int64_t rows, int n, uint16_t *out, int64_t stride) {
#pragma omp for schedule(static)
  for (int64_t row = 0; row < rows; row++)
    for (int i = 0; i < n; i += LANES) narrowed(out + row * stride + i, load(in + row * n + i));
}

/* Elements between the starts of two rows of a product's input. Rows of 16 bits are an odd number of cache
 * lines apart: sixteen of them are read at once, and might otherwise map to the same cache sets. */
static inline int64_t stride_of(int k, int bf16) { return bf16 && k / 32 % 2 == 0 ? k + 32 : k; }

/* The size, in 16-bit elements, of `narrow` for `layertap_product`. */
int64_t layertap_narrow_size(int k, int64_t rows) { return (rows + 31) / 32 * 32 * stride_of(k, 1); }

/* One product of a contiguous input (rows, k). For a 16-bit product, the input is copied into `narrow` with
 * the stride that the tiles need; with `wide_in`, it is float32 and is converted. */
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
