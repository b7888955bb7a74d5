// A pass over a panel of weights: what the products of every instruction set start from and what they leave.
#pragma once
#include <cstdint>

#include "../vector.h"

constexpr int BLOCK = 64;    // inputs of one step of a product, and of one Hadamard block
constexpr int COLUMNS = 32;  // outputs of a panel: two tiles of 16
constexpr int STEP = BLOCK * COLUMNS;

typedef int32_t Sums[COLUMNS];  // of one row

struct Pass {
    const int8_t* weight;   // [steps][2][16][16][4]: tile, four inputs, output, input
    const int8_t* rows;     // [count][steps][64]
    const int32_t* totals;  // [count], the sum of a row's numbers
    int count, steps;

    // What is read from memory into the cache meanwhile: `fetched` bytes for every four inputs, from `ahead` on, and
    // from `then` on after `turn` steps.
    const int8_t *ahead, *then;
    int fetched, turn;
};

// Every instruction set gives a type Products with
//     KIND                 2 for tiles, 1 for vectors, 0 for none
//     TILE, HELD           a pass starts at a multiple of TILE rows and has at most HELD
//     parts(rows)          how many times a pass with so many rows reads a part of the panel
//     steps_ahead(rows)    how far ahead a pass reads weights from memory if it reads the whole panel at once
//     multiply(pass, sums) sums of products, [count] for the rows of the pass
