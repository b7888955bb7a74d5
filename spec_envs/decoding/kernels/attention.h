// Attention over the cache, whose result for a row is the same bits alone, in a tree or in a batch.
//
// Sixteen queries at a time lie in the lanes. Scores are dot products of their own; everything that is summed over
// the keys is summed one key after another, so hidden keys in between (which add an exact zero) change nothing.
#pragma once
#include <algorithm>
#include <vector>

#include "matrix.h"

struct Keys {  // one layer of a cache, bfloat16 [batch][kv_heads][capacity][head_dim]; capacity a multiple of 16
    uint16_t *keys, *values;
    int64_t sequence, head;  // elements from one sequence, and from one head, to the next
};

// Which keys the new rows see: all earlier ones behind the padding, and of the last `last` columns those named.
struct Visibility {
    int64_t count, end, last;  // new rows of a sequence; keys; columns that `lanes` describes
    std::vector<uint16_t> lanes;  // [blocks of 16 queries][last]: which queries of the block see the key
    int blocks;

    // `seen` [count][last], or null: every row sees the new rows up to itself.
    Visibility(const uint8_t* seen, int64_t count, int64_t end, int64_t named, int heads_per_key)
        : count(count), end(end), last(seen ? named : count) {
        blocks = (count * heads_per_key + LANES - 1) / LANES;
        lanes.assign(blocks * last, 0);
        for (int64_t query = 0; query < count * heads_per_key; query++) {
            const int64_t row = query / heads_per_key;
            uint16_t* out = lanes.data() + query / LANES * last;
            const uint16_t lane = 1 << query % LANES;
            for (int64_t j = 0; j < last; j++)
                if (seen ? seen[row * last + j] : j <= row) out[j] |= lane;
        }
    }
};

struct Scratch {
    std::vector<float> scores;      // [keys][16 queries]
    std::vector<float> queries;     // [head_dim][16 queries]
    std::vector<uint16_t> packed;   // the same in pairs of bfloat16: [head_dim / 2][16][2]
};

inline Ints lane_bits() {
    Ints bits;
    for (int i = 0; i < LANES; i++) bits[i] = 1 << i;
    return bits;
}

// Dot products of the queries with keys [begin rounded down, end rounded up to 16).
inline void scores(const uint16_t* keys, int64_t begin, int64_t end, int head_dim, Scratch& s) {
#ifdef __AMX_BF16__
    for (int64_t block = begin / 16; block * 16 < end; block++) {
        _tile_zero(0);
        for (int d = 0; d < head_dim; d += 32) {
            _tile_loadd(1, keys + block * 16 * head_dim + d, head_dim * 2);
            _tile_loadd(2, s.packed.data() + d * 16, 64);
            _tile_dpbf16ps(0, 1, 2);
        }
        _tile_stored(0, s.scores.data() + block * 256, 64);
    }
#else
    for (int64_t j = begin; j < end; j++) {
        Floats dot = {};
        for (int d = 0; d < head_dim; d++) {
            const uint32_t bits = uint32_t(keys[j * head_dim + d]) << 16;
            float key;
            std::memcpy(&key, &bits, 4);
            dot += load(s.queries.data() + d * LANES) * key;
        }
        store(s.scores.data() + j * LANES, dot);
    }
#endif
}

// out[query][32 dimensions] for 8 of the queries.
inline void weigh(const float* weights, const uint16_t* values, int64_t begin, int64_t end, int head_dim,
                  Floats out[8][2]) {
    Floats sums[8][2] = {};
    for (int64_t j = begin; j < end; j++) {
        const Floats a = load_bfloat16(values + j * head_dim), b = load_bfloat16(values + j * head_dim + LANES);
        for (int q = 0; q < 8; q++) {
            const Floats w = all(weights[j * LANES + q]);
            sums[q][0] += w * a;
            sums[q][1] += w * b;
        }
    }
    std::memcpy(out, sums, sizeof sums);
}

// Attention of block `block` of the queries of one head of keys; call within the scope of a Tiles.
//
// queries and out: rows of `stride` and `out_stride` floats; query i belongs to row i / heads_per_key.
inline void attend(const float* queries, int64_t stride, const uint16_t* keys, const uint16_t* values,
                   int64_t padding, const Visibility& visible, int block, int heads_per_key, int head_dim, float* out,
                   int64_t out_stride, Scratch& s) {
    const int here = std::min<int64_t>(LANES, visible.count * heads_per_key - int64_t(block) * LANES);
    const uint16_t* lanes = visible.lanes.data() + block * visible.last;
    const int64_t base = visible.end - visible.last;
    int64_t end = visible.end;
    while (end > base && lanes[end - 1 - base] == 0) end--;
    const int64_t begin = std::min(padding, end);

    if (s.scores.size() < size_t(visible.end + 16) * LANES) s.scores.resize((visible.end + 16) * LANES);
    s.queries.assign(head_dim * LANES, 0);
    s.packed.assign(head_dim * LANES, 0);
    const auto at = [&](int query) {
        const int64_t i = int64_t(block) * LANES + query;
        return i / heads_per_key * stride + i % heads_per_key * head_dim;
    };
    for (int q = 0; q < here; q++)
        for (int d = 0; d < head_dim; d++) {
            const float x = queries[at(q) + d];
            s.queries[d * LANES + q] = x;
            s.packed[d / 2 * 2 * LANES + 2 * q + d % 2] = bfloat16(x);
        }
    scores(keys, begin, end, head_dim, s);

    const Ints bits = lane_bits();
    const Floats lowest = all(-INFINITY), scale = all(1 / std::sqrt(float(head_dim)));
    const auto masked = [&](int64_t j) {
        const Floats v = load(s.scores.data() + j * LANES);
        return j < base ? v : ((bits & int(lanes[j - base])) != 0 ? v : lowest);
    };
    Floats top = lowest;
    for (int64_t j = begin; j < end; j++) top = larger(masked(j), top);
    top = top == lowest ? Floats{} : top;  // a row that sees nothing
    Floats total = {};
    for (int64_t j = begin; j < end; j++) {
        const Floats weight = exponential((masked(j) - top) * scale);
        store(s.scores.data() + j * LANES, weight);
        total += weight;
    }
    for (int q = 0; q < here; q += 8)
        for (int d = 0; d < head_dim; d += 2 * LANES) {
            Floats sums[8][2];
            weigh(s.scores.data() + q, values + d, begin, end, head_dim, sums);
            for (int i = 0; i < 8 && q + i < here; i++) {
                const int64_t index = int64_t(block) * LANES + q + i;
                float* p = out + index / heads_per_key * out_stride + index % heads_per_key * head_dim + d;
                const float inverse = total[q + i] > 0 ? 1 / total[q + i] : 0;
                store(p, sums[i][0] * inverse);
                store(p + LANES, sums[i][1] * inverse);
            }
        }
}
