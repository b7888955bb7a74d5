// Sums held in registers: the loop of all vector instructions.
//
// An instruction set is a type V with
//     Word, OUTPUTS                 a vector that has one sum of each of so many outputs
//     Weights(p)                    four weights of each of these outputs
//     start(total)                  sums of a row before the first product
//     added(sums, weights, inputs)  sums with the products of four inputs
//     store(p, sums)
//     WHOLE                         rows whose sums of a whole panel fit the registers
//     HELD, VECTORS                 rows of which the sums of so many vectors fit
#pragma once
#include <immintrin.h>

#include <cstring>
#include <utility>

#include "panel.h"

// The products of all rows of a pass with some outputs of the panel, from `first` on. Index sequences unroll rows and
// vectors, because compilers keep an array of vectors in registers only if no loop indexes it.
template <class V, int... VECTOR, int... SUM>
inline void hold(const Pass& pass, int first, Sums* sums, std::integer_sequence<int, VECTOR...>,
                 std::integer_sequence<int, SUM...>) {
    constexpr int VECTORS = sizeof...(VECTOR), OUTPUTS = VECTORS * V::OUTPUTS;
    const int64_t stride = int64_t(pass.steps) * BLOCK, fetched = pass.fetched;
    const int8_t *weight = pass.weight + first * BLOCK, *rows = pass.rows;
    const int8_t* ahead = pass.ahead + first / OUTPUTS * (stride / 4) * fetched;
    const auto inputs = [&](int row) {
        int32_t four;
        std::memcpy(&four, rows + row * stride, sizeof four);
        return four;
    };
    typename V::Word held[] = {V::start(pass.totals[SUM / VECTORS])...};
    for (int step = 0; step < pass.steps; step++, weight += STEP) {
        if (step == pass.turn) ahead = pass.then;
        for (int four = 0; four < BLOCK; four += 4, rows += 4, ahead += fetched) {
            for (int i = 0; i < 4 * OUTPUTS; i += 64) _mm_prefetch((const char*)ahead + i, _MM_HINT_T0);
            const auto at = [&](int output) {
                return weight + output / LANES * (STEP / 2) + (four * LANES + output % LANES * 4);
            };
            const typename V::Weights weights[] = {typename V::Weights(at(VECTOR * V::OUTPUTS))...};
            ((held[SUM] = V::added(held[SUM], weights[SUM % VECTORS], inputs(SUM / VECTORS))), ...);
        }
    }
    (V::store(&sums[SUM / VECTORS][first + SUM % VECTORS * V::OUTPUTS], held[SUM]), ...);
}

template <class V, int COUNT>
void hold_rows(const Pass& pass, Sums* sums) {
    constexpr int VECTORS = COUNT <= V::WHOLE ? COLUMNS / V::OUTPUTS : V::VECTORS;
    for (int first = 0; first < COLUMNS; first += VECTORS * V::OUTPUTS)
        hold<V>(pass, first, sums, std::make_integer_sequence<int, VECTORS>(),
                std::make_integer_sequence<int, COUNT * VECTORS>());
}

template <class V, int... ROW>
inline void hold_any(const Pass& pass, Sums* sums, std::integer_sequence<int, ROW...>) {
    static constexpr void (*BY_COUNT[])(const Pass&, Sums*) = {hold_rows<V, ROW + 1>...};
    BY_COUNT[pass.count - 1](pass, sums);
}

template <class V>
struct Registers {
    static constexpr int KIND = 1, HELD = V::HELD, TILE = 1;
    static int parts(int rows) { return rows <= V::WHOLE ? 1 : COLUMNS / (V::VECTORS * V::OUTPUTS); }
    static int steps_ahead(int rows) { return rows > 2 ? 4 : 2; }  // with few rows the processor reads ahead itself
    static void multiply(const Pass& pass, Sums* sums) {
        hold_any<V>(pass, sums, std::make_integer_sequence<int, HELD>());
    }
};
