// int8 matrix products: weights quantised per output, activations per row.
//
// Rows are multiplied by a Hadamard matrix in blocks of 64 inputs before they are quantised, and weights by the same
// one when they are packed. This leaves the product unchanged and spreads outliers over the block (QuaRot, arXiv
// 2404.00456). Sums of int8 products are exact in int32, so a row's result does not depend on the other rows.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#if defined(__AMX_INT8__) || defined(__AVX512VNNI__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "vector.h"

constexpr int BLOCK = 64;    // inputs of one step of a product, and of one Hadamard block
constexpr int COLUMNS = 32;  // outputs packed together: two tiles of 16
constexpr int GROUP = 4;     // packs of columns that all blocks of rows use in turn, while they are in the CPU's cache
constexpr int STEP = BLOCK * COLUMNS;
constexpr int AHEAD = 4 * STEP;  // bytes of weight fetched ahead

// How the weights of a matrix are stored: in int8 as below, or in one of the formats of blocks.h.
enum Kind : int64_t { INT8, BLOCKS_Q4, BLOCKS_Q4K, BLOCKS_Q8, BLOCKS_Q6K };

struct Matrix {
    const int8_t* weight;  // of INT8: [outputs / 32][inputs / 64][2][16][16][4]: tile, four inputs, output, input
    const float* scale;    // of INT8: [outputs], rounded up to 32
    const float* bias;     // [outputs], rounded up to 32, or null
    int64_t inputs, outputs;
    int64_t kind;
    const Matrix* next;  // further outputs, which are stored in another way and follow these; or null

    int steps() const { return (inputs + BLOCK - 1) / BLOCK; }
    int stride() const { return steps() * BLOCK; }
    int columns() const { return (outputs + COLUMNS - 1) / COLUMNS; }
    int64_t width() const { return outputs + (next ? next->width() : 0); }  // outputs of all parts
};

// Rows in int8 with their scales; room for whole tiles of 16.
struct Quantised {
    std::vector<int8_t> rows;
    std::vector<float> scale;

    void reserve(int count, int stride) {
        count = (count + 15) / 16 * 16;
        if (rows.size() < size_t(count) * stride) rows.resize(size_t(count) * stride);
        if (scale.size() < size_t(count)) scale.resize(count);
    }
};

template <int DISTANCE>
inline Floats exchanged(Floats v) {  // lane i gets lane i ^ DISTANCE
#define LANE(i) ((i) ^ DISTANCE)
#define ALL LANE(0), LANE(1), LANE(2), LANE(3), LANE(4), LANE(5), LANE(6), LANE(7), LANE(8), LANE(9), LANE(10), \
            LANE(11), LANE(12), LANE(13), LANE(14), LANE(15)
#ifdef __clang__
    return __builtin_shufflevector(v, v, ALL);
#else
    return __builtin_shuffle(v, Ints{ALL});
#endif
#undef ALL
#undef LANE
}

template <int DISTANCE>
inline void butterfly(Floats v[4]) {
    Floats sign;
    for (int i = 0; i < LANES; i++) sign[i] = i & DISTANCE ? -1 : 1;
    for (int i = 0; i < 4; i++) v[i] = exchanged<DISTANCE>(v[i]) + v[i] * sign;
}

// Product of a block with the symmetric Hadamard matrix of order 64, over 8.
inline void hadamard(Floats v[4]) {
    butterfly<1>(v);
    butterfly<2>(v);
    butterfly<4>(v);
    butterfly<8>(v);
    const Floats a = v[0] + v[1], b = v[0] - v[1], c = v[2] + v[3], d = v[2] - v[3];
    v[0] = (a + c) * 0.125f, v[1] = (b + d) * 0.125f, v[2] = (a - c) * 0.125f, v[3] = (b - d) * 0.125f;
}

// The weights of one output: its int8 times their scale, multiplied by the Hadamard matrix, which is its own inverse.
inline void int8_row(const Matrix& m, int64_t output, float* out) {
    const int64_t tile = output % COLUMNS / LANES, lane = output % LANES;
    const int8_t* weight = m.weight + output / COLUMNS * m.steps() * STEP + tile * STEP / 2 + lane * 4;
    for (int64_t at = 0; at < m.inputs; at += BLOCK, weight += STEP) {
        float row[BLOCK];
        for (int i = 0; i < BLOCK; i++) row[i] = weight[i / 4 * LANES * 4 + i % 4] * m.scale[output];
        Floats v[4];
        for (int j = 0; j < 4; j++) v[j] = load(row + LANES * j);
        hadamard(v);
        for (int j = 0; j < 4 && at + LANES * j < m.inputs; j++) store(out + at + LANES * j, v[j]);
    }
}

// One row of `inputs` floats (a multiple of 16) to int8; overwrites `row`, which has room for whole blocks.
inline void quantise(float* row, int64_t inputs, int8_t* out, float* scale) {
    const int64_t whole = (inputs + BLOCK - 1) / BLOCK * BLOCK;
    for (int64_t i = inputs; i < whole; i++) row[i] = 0;
    Floats peak = {};
    for (int64_t i = 0; i < whole; i += BLOCK) {
        Floats v[4];
        for (int j = 0; j < 4; j++) v[j] = load(row + i + LANES * j);
        hadamard(v);
        for (int j = 0; j < 4; j++) {
            store(row + i + LANES * j, v[j]);
            peak = larger(peak, larger(v[j], -v[j]));
        }
    }
    const float top = largest(peak);
    *scale = top / 127;
    const float inverse = top > 0 ? 127 / top : 0;
    const Floats magic = all(12582912.0f);
    for (int64_t i = 0; i < whole; i += LANES) {
        typedef int8_t Bytes __attribute__((vector_size(16)));
        const Floats rounded = (load(row + i) * inverse + magic) - magic;
        const Bytes bytes = __builtin_convertvector(__builtin_convertvector(rounded, Ints), Bytes);
        std::memcpy(out + i, &bytes, sizeof bytes);
    }
}

// Use of the finished sums of 16 outputs of one row.
struct Store {
    float* out;
    int64_t stride;
    void operator()(int row, int column, Floats v) const { store(out + row * stride + column, v); }
};

struct Add {
    float* out;
    int64_t stride;
    void operator()(int row, int column, Floats v) const {
        float* p = out + row * stride + column;
        store(p, load(p) + v);
    }
};

struct Best {  // the largest output of every row; the first one of equal outputs
    std::vector<float> value;
    std::vector<int64_t> index;
    int64_t outputs;
    Best(int rows, int64_t outputs) : value(rows, -INFINITY), index(rows, 0), outputs(outputs) {}
    void operator()(int row, int column, Floats v) {
        if (!any(v > value[row])) return;
        for (int i = 0; i < LANES && column + i < outputs; i++)
            if (v[i] > value[row]) value[row] = v[i], index[row] = column + i;
    }
};

// Outputs in pairs of tiles (gate, up): silu(gate) * up, 16 at a time.
struct SwiGLU {
    float* out;
    int64_t stride;
};

template <class Sink>
inline void finish(Sink& sink, int row, int column, Floats left, Floats right, int64_t outputs) {
    if (column < outputs) sink(row, column, left);
    if (column + LANES < outputs) sink(row, column + LANES, right);
}

inline void finish(SwiGLU& sink, int row, int column, Floats gate, Floats up, int64_t) {
    store(sink.out + row * sink.stride + column / 2, gate / (1.0f + exponential(-gate)) * up);
}

typedef int32_t Sums[2][2][16][LANES];  // [16 rows][16 outputs] of two tiles by two tiles

#ifdef __AMX_INT8__
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
inline void multiply(const Matrix& m, const int8_t* rows, int, const int8_t* weight, bool first, Sums& sums) {
    const int stride = m.stride();
    settle();
    _tile_zero(0);
    _tile_zero(1);
    if (HEIGHT > 1) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int step = 0; step < m.steps(); step++, weight += STEP, rows += BLOCK) {
        if (first)
            for (int i = 0; i < STEP; i += 64) _mm_prefetch((const char*)weight + AHEAD + i, _MM_HINT_T0);
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
    _tile_stored(0, sums[0][0], 64);
    _tile_stored(1, sums[0][1], 64);
    if (HEIGHT > 1) {
        _tile_stored(2, sums[1][0], 64);
        _tile_stored(3, sums[1][1], 64);
    }
    settle();
}
#else
struct Tiles {
    ~Tiles() {}
};

#ifdef __AVX512VNNI__
// COUNT rows, whose sums stay in registers. The instruction takes the rows as unsigned: 128 is added to each of their
// numbers by flipping its highest bit, and 128 times the weights is subtracted from the sums.
template <int COUNT>
inline void dots(const Matrix& m, const int8_t* rows, const int8_t* weight, bool first, Sums& sums, int at) {
    const int stride = m.stride();
    const __m512i flip = _mm512_set1_epi8(char(0x80));
    __m512i dot[COUNT][2] = {}, added[2] = {};
    for (int step = 0; step < m.steps(); step++, rows += BLOCK)
        for (int four = 0; four < BLOCK; four += 4) {
            const int8_t* w = weight + step * STEP + 16 * four;
            if (first) {
                _mm_prefetch((const char*)w + AHEAD, _MM_HINT_T0);
                _mm_prefetch((const char*)w + AHEAD + STEP / 2, _MM_HINT_T0);
            }
            const __m512i left = _mm512_loadu_si512(w), right = _mm512_loadu_si512(w + STEP / 2);
            added[0] = _mm512_dpbusd_epi32(added[0], flip, left);
            added[1] = _mm512_dpbusd_epi32(added[1], flip, right);
            for (int row = 0; row < COUNT; row++) {
                int32_t inputs;
                std::memcpy(&inputs, rows + int64_t(row) * stride + four, sizeof inputs);
                const __m512i x = _mm512_xor_si512(_mm512_set1_epi32(inputs), flip);
                dot[row][0] = _mm512_dpbusd_epi32(dot[row][0], x, left);
                dot[row][1] = _mm512_dpbusd_epi32(dot[row][1], x, right);
            }
        }
    for (int row = 0; row < COUNT; row++)
        for (int tile = 0; tile < 2; tile++) {
            int32_t* out = sums[(at + row) / 16][tile][(at + row) % 16];
            _mm512_storeu_si512(out, _mm512_sub_epi32(dot[row][tile], added[tile]));
        }
}

constexpr int HELD = 8;  // rows whose sums fit the registers
using Dots = void (*)(const Matrix&, const int8_t*, const int8_t*, bool, Sums&, int);
constexpr Dots DOTS[] = {nullptr, dots<1>, dots<2>, dots<3>, dots<4>, dots<5>, dots<6>, dots<7>, dots<8>};
#elif defined(__AVX2__)
// COUNT rows, whose sums stay in registers. The instruction takes one side as unsigned, so the sign of the weights is
// moved to the rows. No number is below -127, so two products fit 16 bits.
template <int COUNT>
inline void dots(const Matrix& m, const int8_t* rows, const int8_t* weight, bool first, Sums& sums, int at) {
    const int stride = m.stride();
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i dot[COUNT][4] = {};
    for (int step = 0; step < m.steps(); step++, rows += BLOCK)
        for (int four = 0; four < BLOCK; four += 4) {
            const int8_t* w = weight + step * STEP + 16 * four;
            if (first) {
                _mm_prefetch((const char*)w + AHEAD, _MM_HINT_T0);
                _mm_prefetch((const char*)w + AHEAD + STEP / 2, _MM_HINT_T0);
            }
            for (int part = 0; part < 4; part++) {
                const __m256i own = _mm256_loadu_si256((const __m256i*)(w + part / 2 * (STEP / 2) + part % 2 * 32));
                const __m256i size = _mm256_abs_epi8(own);
                for (int row = 0; row < COUNT; row++) {
                    int32_t inputs;
                    std::memcpy(&inputs, rows + int64_t(row) * stride + four, sizeof inputs);
                    const __m256i signed_inputs = _mm256_sign_epi8(_mm256_set1_epi32(inputs), own);
                    const __m256i pairs = _mm256_maddubs_epi16(size, signed_inputs);
                    dot[row][part] = _mm256_add_epi32(dot[row][part], _mm256_madd_epi16(pairs, ones));
                }
            }
        }
    for (int row = 0; row < COUNT; row++)
        for (int part = 0; part < 4; part++) {
            int32_t* out = sums[(at + row) / 16][part / 2][(at + row) % 16] + part % 2 * 8;
            _mm256_storeu_si256((__m256i*)out, dot[row][part]);
        }
}

constexpr int HELD = 2;
using Dots = void (*)(const Matrix&, const int8_t*, const int8_t*, bool, Sums&, int);
constexpr Dots DOTS[] = {nullptr, dots<1>, dots<2>};
#endif

#if defined(__AVX512VNNI__) || defined(__AVX2__)
template <int HEIGHT>
inline void multiply(const Matrix& m, const int8_t* rows, int count, const int8_t* weight, bool first, Sums& sums) {
    for (int row = 0; row < count; row += HELD)
        DOTS[std::min(HELD, count - row)](m, rows + int64_t(row) * m.stride(), weight, first && row == 0, sums, row);
}
#else
template <int HEIGHT>
inline void multiply(const Matrix& m, const int8_t* rows, int count, const int8_t* weight, bool, Sums& sums) {
    const int stride = m.stride();
    std::memset(sums, 0, sizeof sums);
    for (int step = 0; step < m.steps(); step++, weight += STEP)
        for (int row = 0; row < count; row++)
            for (int tile = 0; tile < 2; tile++) {
                int32_t* out = sums[row / 16][tile][row % 16];
                const int8_t* w = weight + tile * STEP / 2;
                const int8_t* x = rows + int64_t(row) * stride + step * BLOCK;
                for (int four = 0; four < BLOCK; four += 4, w += 64)
                    for (int i = 0; i < LANES; i++)
                        out[i] += x[four] * w[4 * i] + x[four + 1] * w[4 * i + 1] + x[four + 2] * w[4 * i + 2] +
                                  x[four + 3] * w[4 * i + 3];
            }
}
#endif
#endif

// The share of columns [begin, end) of a product, for all rows; call within the scope of a Tiles.
template <class Sink>
void product(const Matrix& m, const Quantised& x, int count, int begin, int end, Sink& sink) {
    alignas(64) Sums sums;
    for (int group = begin; group < end; group += GROUP)
        for (int row = 0; row < count; row += 32)
            for (int c = group; c < std::min(end, group + GROUP); c++) {
                const int8_t* rows = x.rows.data() + int64_t(row) * m.stride();
                const int8_t* weight = m.weight + int64_t(c) * m.steps() * STEP;
                const int here = std::min(32, count - row), column = c * COLUMNS;
                if (here > 16)
                    multiply<2>(m, rows, here, weight, row == 0, sums);
                else
                    multiply<1>(m, rows, here, weight, row == 0, sums);
                const Floats scale[2] = {load(m.scale + column), load(m.scale + column + LANES)};
                Floats bias[2] = {};
                if (m.bias) bias[0] = load(m.bias + column), bias[1] = load(m.bias + column + LANES);
                for (int i = 0; i < here; i++) {
                    const float own = x.scale[row + i];
                    Floats v[2];
                    for (int tile = 0; tile < 2; tile++) {
                        Ints whole;
                        std::memcpy(&whole, sums[i / 16][tile][i % 16], sizeof whole);
                        v[tile] = __builtin_convertvector(whole, Floats) * (scale[tile] * own) + bias[tile];
                    }
                    finish(sink, row + i, column, v[0], v[1], m.outputs);
                }
            }
}
