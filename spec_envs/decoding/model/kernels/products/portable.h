// Products in plain C++.
#pragma once
#include <cstring>

#include "panel.h"

struct Products {
    static constexpr int KIND = 0, HELD = 32, TILE = 1;
    static int parts(int) { return 1; }
    static int steps_ahead(int) { return 4; }

    static void multiply(const Pass& pass, Sums* sums) {
        std::memset(sums, 0, pass.count * sizeof *sums);
        for (int step = 0; step < pass.steps; step++)
            for (int row = 0; row < pass.count; row++) {
                const int8_t* x = pass.rows + (int64_t(row) * pass.steps + step) * BLOCK;
                for (int tile = 0; tile < 2; tile++) {
                    const int8_t* w = pass.weight + step * STEP + tile * STEP / 2;
                    int32_t* out = sums[row] + tile * LANES;
                    for (int four = 0; four < BLOCK; four += 4, w += 4 * LANES)
                        for (int i = 0; i < LANES; i++)
                            out[i] += x[four] * w[4 * i] + x[four + 1] * w[4 * i + 1] + x[four + 2] * w[4 * i + 2] +
                                      x[four + 3] * w[4 * i + 3];
                }
            }
    }
};
