// int8 matrix products: weights quantised per output, activations per row.
//
// Rows are multiplied by a Hadamard matrix in blocks of 64 inputs before they are quantised, and weights by the same
// one when they are packed. This leaves the product unchanged and spreads outliers over the block (QuaRot, arXiv
// 2404.00456). Sums of int8 products are exact in int32, so a row's result does not depend on the other rows.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#if defined(__AMX_INT8__)
#include "products/amx.h"
#elif defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#include "products/vnni.h"
#elif defined(__AVX2__)
#include "products/avx2.h"
#else
#include "products/portable.h"
#endif

#ifndef __AMX_INT8__
struct Tiles {
    ~Tiles() {}
};
#endif

constexpr int MANY = 64;  // of more rows, all passes use a group of panels in turn, while it is in the CPU's cache
constexpr int GROUP = 4;

// How the weights of a matrix are stored: in int8 as below, or in one of the formats of blocks.h.
enum Kind : int64_t { INT8, BLOCKS_Q4, BLOCKS_Q4K, BLOCKS_Q8, BLOCKS_Q6K };

struct Matrix {
    const int8_t* weight;  // of INT8: panels, [outputs / 32] as Pass has one
    const float* scale;    // of INT8: [outputs], rounded up to 32
    const float* bias;     // [outputs], rounded up to 32, or null
    int64_t inputs, outputs;
    int64_t kind;
    const Matrix* next;  // further outputs, which are stored in another way and follow these; or null

    int steps() const { return (inputs + BLOCK - 1) / BLOCK; }
    int stride() const { return steps() * BLOCK; }
    int columns() const { return (outputs + COLUMNS - 1) / COLUMNS; }
    int64_t width() const { return outputs + (next ? next->width() : 0); }  // outputs of all parts
    const int8_t* panel(int column) const { return weight + int64_t(column) * steps() * STEP; }  // of INT8
};

// Rows in int8 with their scales; room for whole tiles of 16.
struct Quantised {
    std::vector<int8_t> rows;
    std::vector<float> scale;
    std::vector<int32_t> total;  // sum of the row's numbers

    void reserve(int count, int stride) {
        count = (count + 15) / 16 * 16;
        if (rows.size() < size_t(count) * stride) rows.resize(size_t(count) * stride);
        if (scale.size() < size_t(count)) scale.resize(count), total.resize(count);
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
    const int8_t* weight = m.panel(output / COLUMNS) + tile * STEP / 2 + lane * 4;
    for (int64_t at = 0; at < m.inputs; at += BLOCK, weight += STEP) {
        float row[BLOCK];
        for (int i = 0; i < BLOCK; i++) row[i] = weight[i / 4 * LANES * 4 + i % 4] * m.scale[output];
        Floats v[4];
        for (int j = 0; j < 4; j++) v[j] = load(row + LANES * j);
        hadamard(v);
        for (int j = 0; j < 4 && at + LANES * j < m.inputs; j++) store(out + at + LANES * j, v[j]);
    }
}

// One row of `inputs` floats (a multiple of 16) to int8, with the sum of its numbers; overwrites `row`, which has room
// for whole blocks.
inline void quantise(float* row, int64_t inputs, int8_t* out, float* scale, int32_t* total) {
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
    Ints sums = {};
    for (int64_t i = 0; i < whole; i += LANES) {
        typedef int8_t Bytes __attribute__((vector_size(16)));
        const Ints numbers = __builtin_convertvector((load(row + i) * inverse + magic) - magic, Ints);
        const Bytes bytes = __builtin_convertvector(numbers, Bytes);
        std::memcpy(out + i, &bytes, sizeof bytes);
        sums += numbers;
    }
    *total = 0;
    for (int i = 0; i < LANES; i++) *total += sums[i];
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

// Pass `i` of all over panel `c`, for `count` rows from `row` on. Meanwhile weights are read from memory: a single pass
// reads a little ahead of itself, and each of several reads a part of the panel `later`.
inline Pass pass_over(const Matrix& m, int c, const Quantised& x, int row, int count, int i, int passes,
                      const int8_t* later) {
    const int steps = m.steps(), parts = passes * Products::parts(count), distance = Products::steps_ahead(count);
    Pass pass = {m.panel(c), x.rows.data() + int64_t(row) * m.stride(), x.total.data() + row, count, steps};
    pass.ahead = parts == 1 ? pass.weight + distance * STEP : later + int64_t(steps) * STEP * i / passes;
    pass.then = later;
    pass.turn = parts == 1 ? steps - distance : steps;
    pass.fetched = (STEP / BLOCK * 4 + parts - 1) / parts;
    return pass;
}

// The share of columns [begin, end) of a product, for all rows; call within the scope of a Tiles. `following` is what
// this thread reads from memory next, or null.
template <class Sink>
void product(const Matrix& m, const Quantised& x, int count, int begin, int end, Sink& sink, const int8_t* following) {
    alignas(64) Sums sums[Products::HELD];
    const int tiles = (count + Products::TILE - 1) / Products::TILE, held = Products::HELD / Products::TILE;
    const int passes = (tiles + held - 1) / held, group = count > MANY ? GROUP : 1;
    for (int first = begin; first < end; first += group)
        for (int i = 0; i < passes; i++)
            for (int c = first; c < std::min(end, first + group); c++) {
                const int row = tiles * i / passes * Products::TILE;
                const int here = std::min(tiles * (i + 1) / passes * Products::TILE, count) - row;
                const int8_t* later = c + group < end ? m.panel(c + group) : following ? following : m.panel(c);
                Products::multiply(pass_over(m, c, x, row, here, i, passes, later), sums);
                const int column = c * COLUMNS;
                const Floats scale[2] = {load(m.scale + column), load(m.scale + column + LANES)};
                Floats bias[2] = {};
                if (m.bias) bias[0] = load(m.bias + column), bias[1] = load(m.bias + column + LANES);
                for (int r = 0; r < here; r++) {
                    const float own = x.scale[row + r];
                    Floats v[2];
                    for (int tile = 0; tile < 2; tile++) {
                        Ints whole;
                        std::memcpy(&whole, sums[r] + tile * LANES, sizeof whole);
                        v[tile] = __builtin_convertvector(whole, Floats) * (scale[tile] * own) + bias[tile];
                    }
                    finish(sink, row + r, column, v[0], v[1], m.outputs);
                }
            }
}
