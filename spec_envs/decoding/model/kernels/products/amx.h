// AMX: tiles of 16 rows by 16 outputs, two by two.
#pragma once
#include <immintrin.h>

#include "panel.h"

struct alignas(64) TileShape {
    uint8_t palette = 1, start = 0, unused[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Some compilers do not know that tile instructions read memory, so earlier stores have to be completed first.
inline void settle() { asm volatile("" ::: "memory"); }

struct Tiles {  // configures the tile registers of this thread while it is in scope
    Tiles() {
        static constexpr TileShape shape;
        settle();
        _tile_loadconfig(&shape);
    }
    ~Tiles() { _tile_release(); }
};

template <int HEIGHT>  // tiles of 16 rows: 1 or 2
inline void multiply_tiles(const Pass& pass, Sums* sums) {
    const int stride = pass.steps * BLOCK;
    const int8_t *weight = pass.weight, *rows = pass.rows, *ahead = pass.ahead;
    settle();
    _tile_zero(0);
    _tile_zero(1);
    if (HEIGHT > 1) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int step = 0; step < pass.steps; step++, weight += STEP, rows += BLOCK) {
        if (step == pass.turn) ahead = pass.then;
        for (int i = 0; i < pass.fetched * BLOCK / 4; i += 64) _mm_prefetch((const char*)ahead + i, _MM_HINT_T0);
        ahead += pass.fetched * BLOCK / 4;
        _tile_loadd(4, weight, 64);
        _tile_loadd(5, weight + STEP / 2, 64);
        _tile_loadd(6, rows, stride);
        if (HEIGHT > 1) _tile_loadd(7, rows + 16 * stride, stride);
        _tile_dpbssd(0, 6, 4);
        _tile_dpbssd(1, 6, 5);
        if (HEIGHT > 1) {
            _tile_dpbssd(2, 7, 4);
            _tile_dpbssd(3, 7, 5);
        }
    }
    _tile_stored(0, sums[0], sizeof *sums);
    _tile_stored(1, sums[0] + LANES, sizeof *sums);
    if (HEIGHT > 1) {
        _tile_stored(2, sums[16], sizeof *sums);
        _tile_stored(3, sums[16] + LANES, sizeof *sums);
    }
    settle();
}

struct Products {
    static constexpr int KIND = 2, HELD = 32, TILE = 16;
    static int parts(int) { return 1; }
    static int steps_ahead(int) { return 4; }

    static void multiply(const Pass& pass, Sums* sums) {
        if (pass.count > TILE)
            multiply_tiles<2>(pass, sums);
        else
            multiply_tiles<1>(pass, sums);
    }
};
