// Attention over the cache. A row's result is the same to the last bit alone, in a tree or in a batch.
//
// Sixteen queries at a time are in the lanes of a vector. Every score is a separate dot product. Sums over the keys are
// made one key after another, so masked keys in between (which add an exact zero) change nothing.
#pragma once
#include <algorithm>
#include <vector>

#include "matrix.h"

constexpr int KEYS = 64;  // keys scored at a time; the capacity of a cache is a multiple

// The keys that new rows see: all earlier ones after the padding, and some of the last `last` columns.
struct Visibility {
    int64_t count, last;  // new rows of a sequence; columns that not all of them see
    int64_t heads_per_key;
    int blocks;                   // number of blocks of 16 queries
    std::vector<uint16_t> lanes;  // [blocks][last]: bits of the block's queries that see the key; empty if causal

    // `seen` [count][named], or null: every row sees the new rows up to itself.
    Visibility(const uint8_t* seen, int64_t count, int64_t named, int64_t heads_per_key)
        : count(count), last(seen ? named : count), heads_per_key(heads_per_key),
          blocks((count * heads_per_key + LANES - 1) / LANES) {
        if (!seen) return;
        lanes.assign(blocks * last, 0);
        for (int64_t query = 0; query < count * heads_per_key; query++) {
            const int64_t row = query / heads_per_key;
            uint16_t* out = lanes.data() + query / LANES * last;
            const uint16_t lane = 1 << query % LANES;
            for (int64_t j = 0; j < last; j++)
                if (seen[row * last + j]) out[j] |= lane;
        }
    }

    int queries(int block) const { return std::min<int64_t>(LANES, count * heads_per_key - int64_t(block) * LANES); }

    // Bits of the queries of a block that see column `j` of the last ones.
    int at(int block, int64_t j) const {
        if (!lanes.empty()) return lanes[block * last + j];
        const int64_t before = j * heads_per_key - int64_t(block) * LANES;  // queries of rows before the key's
        return before >= LANES ? 0 : ((1 << queries(block)) - 1) & ~((1 << std::max<int64_t>(before, 0)) - 1);
    }
};

struct Scratch {
    std::vector<float> scores;      // [keys][16 queries]
    std::vector<uint32_t> queries;  // [head_dim / 2][16 queries]: two bfloat16
};

inline Ints lane_bits() {
    Ints bits;
    for (int i = 0; i < LANES; i++) bits[i] = 1 << i;
    return bits;
}

// Query `lane` of a block, scaled, rounded to bfloat16 like the keys.
inline void pack(const float* query, float scale, int head_dim, int lane, uint32_t* out) {
    for (int d = 0; d < head_dim; d += LANES) {
        uint32_t pairs[LANES / 2];
        const Ints rounded = rounded_bfloat16(load(query + d) * scale);
        for (int i = 0; i < LANES / 2; i++) pairs[i] = uint32_t(rounded[2 * i]) | uint32_t(rounded[2 * i + 1]) << 16;
        for (int i = 0; i < LANES / 2; i++) out[(d / 2 + i) * LANES + lane] = pairs[i];
    }
}

// Dot products of the queries with keys [begin rounded down, end rounded up to KEYS).
inline void scores(const uint16_t* keys, int64_t begin, int64_t end, int head_dim, Scratch& s) {
#ifdef __AMX_BF16__
    const int64_t row = head_dim * 2, tile = 16 * head_dim;
    settle();
    for (int64_t j = begin / KEYS * KEYS; j < end; j += KEYS) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int d = 0; d < head_dim; d += 32) {
            const uint16_t* key = keys + j * head_dim + d;
            _tile_loadd(4, s.queries.data() + d * 8, 64);
            _tile_loadd(5, key, row);
            _tile_dpbf16ps(0, 5, 4);
            _tile_loadd(6, key + tile, row);
            _tile_dpbf16ps(1, 6, 4);
            _tile_loadd(5, key + 2 * tile, row);
            _tile_dpbf16ps(2, 5, 4);
            _tile_loadd(6, key + 3 * tile, row);
            _tile_dpbf16ps(3, 6, 4);
        }
        float* out = s.scores.data() + j * LANES;
        _tile_stored(0, out, 64);
        _tile_stored(1, out + 256, 64);
        _tile_stored(2, out + 512, 64);
        _tile_stored(3, out + 768, 64);
    }
    settle();
#elif defined(__AVX2__) && !defined(__AVX512F__)
    // Four keys at a time in vectors of this processor's size, each with separate sums.
    const __m256i high = _mm256_set1_epi32(int(0xffff0000));
    for (int64_t j = begin; j < end; j += 4) {
        const uint16_t* key[4];
        for (int i = 0; i < 4; i++) key[i] = keys + std::min(j + i, end - 1) * head_dim;
        __m256 dot[4][2] = {};
        for (int d = 0; d < head_dim; d += 2)
            for (int half = 0; half < 2; half++) {
                const __m256i pair = _mm256_loadu_si256((const __m256i*)(s.queries.data() + d * 8) + half);
                const __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16));
                const __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(pair, high));
                for (int i = 0; i < 4; i++) {
                    dot[i][half] = _mm256_fmadd_ps(even, _mm256_set1_ps(widened(key[i][d])), dot[i][half]);
                    dot[i][half] = _mm256_fmadd_ps(odd, _mm256_set1_ps(widened(key[i][d + 1])), dot[i][half]);
                }
            }
        for (int i = 0; i < 4 && j + i < end; i++)
            for (int half = 0; half < 2; half++)
                _mm256_storeu_ps(s.scores.data() + (j + i) * LANES + 8 * half, dot[i][half]);
    }
#else
    for (int64_t j = begin; j < end; j++) {
        Floats dot = {};
        for (int d = 0; d < head_dim; d += 2) {
            Ints pair;
            std::memcpy(&pair, s.queries.data() + d * 8, sizeof pair);
            dot += (Floats)(pair << 16) * widened(keys[j * head_dim + d]);
            dot += (Floats)(pair & int(0xffff0000)) * widened(keys[j * head_dim + d + 1]);
        }
        store(s.scores.data() + j * LANES, dot);
    }
#endif
}

// Sums over the keys of weights[key][query] * values[key] for some queries and PAIRS * 32 dimensions. The even ones of
// 32 are in one vector, the odd ones in the next, as they are in pairs of bfloat16.
template <int QUERIES, int PAIRS>
inline void weigh(const float* weights, const uint16_t* values, int64_t begin, int64_t end, int head_dim,
                  Floats* out) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i high = _mm256_set1_epi32(int(0xffff0000));
    for (int q = 0; q < QUERIES; q += 2)  // as many sums as registers have room for
        for (int pair = 0; pair < PAIRS; pair++) {
            __m256 sums[2][2][2] = {};  // query, even or odd, half
            for (int64_t j = begin; j < end; j++) {
                const __m256i* two = (const __m256i*)(values + j * head_dim + pair * 2 * LANES);
                const __m256 weight[2] = {_mm256_set1_ps(weights[j * LANES + q]),
                                          _mm256_set1_ps(weights[j * LANES + q + 1])};
                for (int half = 0; half < 2; half++) {
                    const __m256i both = _mm256_loadu_si256(two + half);
                    const __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
                    const __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(both, high));
                    for (int i = 0; i < 2; i++) {
                        sums[i][0][half] = _mm256_fmadd_ps(weight[i], even, sums[i][0][half]);
                        sums[i][1][half] = _mm256_fmadd_ps(weight[i], odd, sums[i][1][half]);
                    }
                }
            }
            for (int i = 0; i < 2; i++)
                for (int odd = 0; odd < 2; odd++)
                    for (int half = 0; half < 2; half++)
                        _mm256_storeu_ps((float*)(out + (q + i) * 2 * PAIRS + 2 * pair + odd) + 8 * half,
                                         sums[i][odd][half]);
        }
#else
    Floats sums[QUERIES][2 * PAIRS] = {};
    for (int64_t j = begin; j < end; j++) {
        Floats value[2 * PAIRS];
        for (int d = 0; d < PAIRS; d++) {
            Ints two;
            std::memcpy(&two, values + j * head_dim + d * 2 * LANES, sizeof two);
            value[2 * d] = (Floats)(two << 16);
            value[2 * d + 1] = (Floats)(two & int(0xffff0000));
        }
        for (int q = 0; q < QUERIES; q++) {
            const Floats w = all(weights[j * LANES + q]);
            for (int d = 0; d < 2 * PAIRS; d++) sums[q][d] += w * value[d];
        }
    }
    std::memcpy(out, sums, sizeof sums);
#endif
}

// Attention of block `block` of the queries of one head of keys; call within the scope of a Tiles.
//
// queries and out: rows of `stride` and `out_stride` floats; query i belongs to row i / heads_per_key.
// keys and values: `written` rows, the new ones last; no query sees the first `padding`.
inline void attend(const float* queries, int64_t stride, const uint16_t* keys, const uint16_t* values,
                   int64_t padding, int64_t written, const Visibility& visible, int block, int heads_per_key,
                   int head_dim, float* out, int64_t out_stride, Scratch& s) {
    const int here = visible.queries(block);
    const int64_t base = written - visible.last;
    int64_t end = written;
    while (end > base && visible.at(block, end - 1 - base) == 0) end--;
    const int64_t begin = std::min(padding, end);

    if (s.scores.size() < size_t(written + KEYS) * LANES) s.scores.resize((written + KEYS) * LANES);
    s.queries.assign(head_dim / 2 * LANES, 0);
    const auto at = [&](int query, int64_t stride) {
        const int64_t i = int64_t(block) * LANES + query;
        return i / heads_per_key * stride + i % heads_per_key * head_dim;
    };
    const float scale = LOG2_E / std::sqrt(float(head_dim));
    for (int q = 0; q < here; q++) pack(queries + at(q, stride), scale, head_dim, q, s.queries.data());
    scores(keys, begin, end, head_dim, s);

    // Softmax over the keys: all queries see those before `base`, some see the later ones.
    const Ints bits = lane_bits();
    const auto sees = [&](int64_t j) { return (bits & visible.at(block, j - base)) != 0; };
    float* row = s.scores.data();
    Floats top = all(-INFINITY), total = {};
    int64_t j = begin;
    for (; j < std::min(base, end); j++) top = larger(top, load(row + j * LANES));
    for (; j < end; j++) top = sees(j) ? larger(top, load(row + j * LANES)) : top;
    for (j = begin; j < std::min(base, end); j++) {
        const Floats weight = power_of_two(load(row + j * LANES) - top);
        store(row + j * LANES, weight);
        total += weight;
    }
    for (; j < end; j++) {
        const Floats weight = sees(j) ? power_of_two(load(row + j * LANES) - top) : Floats{};
        store(row + j * LANES, weight);
        total += weight;
    }
    const float* weights = s.scores.data();
    const auto write = [&](int q, int count, int d, int pairs, const Floats* sums) {
        for (int i = 0; i < count && q + i < here; i++) {
            const float inverse = total[q + i] > 0 ? 1 / total[q + i] : 0;
            for (int pair = 0; pair < pairs; pair++, sums += 2) {
                float* p = out + at(q + i, out_stride) + d + pair * 2 * LANES;
                for (int lane = 0; lane < LANES; lane++)
                    p[2 * lane] = sums[0][lane] * inverse, p[2 * lane + 1] = sums[1][lane] * inverse;
            }
        }
    };
    Floats sums[16];
    if (here <= 4 && head_dim % 64 == 0)
        for (int d = 0; d < head_dim; d += 64) {
            weigh<4, 2>(weights, values + d, begin, end, head_dim, sums);
            write(0, 4, d, 2, sums);
        }
    else
        for (int q = 0; q < here; q += 8)
            for (int d = 0; d < head_dim; d += 32) {
                weigh<8, 1>(weights + q, values + d, begin, end, head_dim, sums);
                write(q, 8, d, 1, sums);
            }
}
