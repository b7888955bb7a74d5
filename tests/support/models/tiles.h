// The tile instructions of AMX over plain arrays, to test the code that uses them on processors without them. It is
// included before everything else (g++ -include) in a build without AMX.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#define __AMX_TILE__ 1
#define __AMX_INT8__ 1
#define __AMX_BF16__ 1

namespace tiles {

struct Tile {
    alignas(64) uint8_t data[16][64];
};

struct Shape {
    uint8_t palette, start, unused[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

static thread_local Tile registers[8];
static thread_local Shape shape;  // palette 0: not configured

inline void configure(const void* p) { std::memcpy(&shape, p, sizeof shape); }

inline void release() { shape = {}; }

// A processor refuses tiles that have not been configured.
inline Tile& tile(int i) {
    if (shape.palette != 1) std::abort();
    return registers[i];
}

inline void zero(int i) { std::memset(&tile(i), 0, sizeof(Tile)); }

inline void load(int i, const void* p, int64_t stride) {
    zero(i);
    const uint8_t* from = (const uint8_t*)p;
    for (int r = 0; r < shape.rows[i]; r++) std::memcpy(tile(i).data[r], from + r * stride, shape.bytes[i]);
}

inline void store(int i, void* p, int64_t stride) {
    for (int r = 0; r < shape.rows[i]; r++) std::memcpy((uint8_t*)p + r * stride, tile(i).data[r], shape.bytes[i]);
}

// sums [row][column] += rows [row][k][step] * columns [k][column][step], for `step` numbers of 4 bytes together.
template <class Sum, class Number, class Value>
inline void multiply(int sums, int rows, int columns, Value value) {
    constexpr int TOGETHER = 4 / sizeof(Number);
    Sum total[16][16];
    Number left[16][16][TOGETHER], right[16][16][TOGETHER];
    std::memcpy(total, tile(sums).data, sizeof total);
    std::memcpy(left, tile(rows).data, sizeof left);
    std::memcpy(right, tile(columns).data, sizeof right);
    for (int r = 0; r < 16; r++)
        for (int k = 0; k < 16; k++)
            for (int c = 0; c < 16; c++)
                for (int i = 0; i < TOGETHER; i++) total[r][c] += value(left[r][k][i]) * value(right[k][c][i]);
    std::memcpy(tile(sums).data, total, sizeof total);
}

inline float from_bfloat16(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline void multiply_int8(int sums, int rows, int columns) {
    multiply<int32_t, int8_t>(sums, rows, columns, [](int8_t x) { return int32_t(x); });
}

inline void multiply_bfloat16(int sums, int rows, int columns) {
    multiply<float, uint16_t>(sums, rows, columns, from_bfloat16);
}

}  // namespace tiles

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbssd
#undef _tile_dpbf16ps
#define _tile_loadconfig tiles::configure
#define _tile_release tiles::release
#define _tile_zero tiles::zero
#define _tile_loadd tiles::load
#define _tile_stored tiles::store
#define _tile_dpbssd tiles::multiply_int8
#define _tile_dpbf16ps tiles::multiply_bfloat16
