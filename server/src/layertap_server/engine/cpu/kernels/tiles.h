/* The processor's tile registers (Intel AMX): each has sixteen rows of 64 bytes. Tile instructions multiply
 * 16-bit matrices and sum in float32. TILES is 0 if the code is compiled without them; `has_tiles` is 0 if
 * the code must not use them at run time. */
#ifndef LAYERTAP_TILES_H
#define LAYERTAP_TILES_H

#include <stdint.h>

static int has_tiles = 0;

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define TILES 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Linux allows the use of tiles only to a process that has asked for it. */
__attribute__((constructor)) static void ask_for_tiles(void) {
  has_tiles = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
}

/* Palette 1: all eight tiles have sixteen rows of 64 bytes. This must be a constant: compilers assume that
 * the instruction reads only eight bytes of it, and would leave out stores to the rest. */
static const struct {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes_per_row[16];
  uint8_t rows[16];
} __attribute__((packed, aligned(64))) TILE_SHAPES = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64},
                                                      {16, 16, 16, 16, 16, 16, 16, 16}};

/* Configures the tiles of the calling thread; `end_tiles` releases them. */
static inline void begin_tiles(void) { _tile_loadconfig(&TILE_SHAPES); }

static inline void end_tiles(void) { _tile_release(); }
#else
#define TILES 0
static inline void begin_tiles(void) {}
static inline void end_tiles(void) {}
#endif

#endif
