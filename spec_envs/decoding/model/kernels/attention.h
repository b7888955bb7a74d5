// Attention over the cache. A row's result is the same to the last bit alone, in a tree or in a batch, and on any
// number of threads.
//
// The keys that a row sees are counted in order, whatever lies between them: the first 128 (64 of float) are its chunk
// 0, and so on. Chunks are computed apart, so that threads can share a row, and merged one after another (Flash-Decoding;
// Dao et al., 2023). Within a chunk,
// - a score is a sum over the dimensions in order; sixteen keys are in the lanes of a vector,
// - weights are whole numbers, so that their sum is exact in any order,
// - weighted values are added one key after another; keys that a row does not see add an exact zero.
#pragma once
#include <algorithm>
#include <array>
#include <cfloat>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "matrix.h"

constexpr int CHUNK = 128;       // keys, at most
constexpr int QUERIES = 48;      // queries of a head of keys that are computed together; a multiple of 16
constexpr float UNIT = 1 << 23;  // weight of the key with a chunk's largest score; sums of CHUNK of them fit 31 bits

// Vectors of the processor's own size, and how many queries, tiles of 16 keys (in scores) and pairs of 16 dimensions
// (in sums of values) fit its registers.
#if defined(__AVX512F__)
constexpr int WIDTH = 16, DOT_QUERIES = 6, DOT_TILES = 4, SUM_QUERIES = 6, SUM_PAIRS = 2;
#elif defined(__AVX2__)
constexpr int WIDTH = 8, DOT_QUERIES = 4, DOT_TILES = 1, SUM_QUERIES = 2, SUM_PAIRS = 1;
#else
constexpr int WIDTH = 4, DOT_QUERIES = 2, DOT_TILES = 1, SUM_QUERIES = 2, SUM_PAIRS = 1;
#endif
constexpr int PARTS = LANES / WIDTH;
typedef float Native __attribute__((vector_size(4 * WIDTH)));
typedef int32_t NativeInts __attribute__((vector_size(4 * WIDTH)));

// Keys and values are bfloat16 (uint16_t) or float, and so are queries; without instructions for products of bfloat16
// these are rounded to it and computed as floats. What follows reads 32 bits at a time: two bfloat16, or one float.
template <class Key>
constexpr bool FLOATS = std::is_same_v<Key, float>;
template <class Key>
constexpr int PER_WORD = 4 / sizeof(Key);
#if defined(__AVX512BF16__) || defined(__AMX_BF16__)
template <class Key>
using Number = Key;
#else
template <class Key>
using Number = float;
#endif

// Calls f(0), …, f(COUNT - 1) with constants, so that arrays they index stay in registers.
template <class F, int... I>
__attribute__((always_inline)) inline void unrolled(std::integer_sequence<int, I...>, F f) {
    (f(std::integral_constant<int, I>()), ...);
}

template <int COUNT, class F>
__attribute__((always_inline)) inline void unrolled(F f) {
    unrolled(std::make_integer_sequence<int, COUNT>(), f);
}

#define UNROLLED(i) [&](auto i) __attribute__((always_inline))

template <class V>
inline V loaded(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

struct Sequence {     // one of a batch
    int64_t place;    // of its keys in the layer's, and of its values
    int64_t padding;  // first columns, which no row sees
    int64_t written;  // columns, the new ones last
};

// The columns that new rows see: all after the padding, but only some of the last ones.
struct Visibility {
    int64_t count = 0, last = 0;   // new rows of a sequence; columns that not all of them see
    int64_t most = 0;              // of the last columns that a row sees
    std::vector<int64_t> columns;  // [count][last], those of the last columns that a row sees, in order
    std::vector<int64_t> seen;     // [count], their number; empty if a row sees the new rows up to itself
    std::vector<uint64_t> bits;    // [count][words], 1 for each of the last columns that a row sees

    // `shown` [count][named], or null: every row sees the new rows up to itself.
    void set(const uint8_t* shown, int64_t rows, int64_t named) {
        count = rows, last = shown ? named : rows, most = shown ? 0 : rows;
        columns.assign(shown ? count * last : 0, 0);
        seen.assign(shown ? count : 0, 0);
        bits.assign(shown ? count * words() : 0, 0);
        for (int64_t i = 0; i < int64_t(columns.size()); i++) {
            if (!shown[i]) continue;
            const int64_t row = i / last, column = i % last;
            columns[row * last + seen[row]++] = column;
            bits[row * words() + column / 64] |= uint64_t(1) << column % 64;
            most = std::max(most, seen[row]);
        }
    }

    int64_t words() const { return last / 64 + 2; }

    // Number of keys before the last columns: all rows see them.
    int64_t shared(const Sequence& s) const { return std::max<int64_t>(0, s.written - last - s.padding); }

    int64_t keys(const Sequence& s) const { return shared(s) + most; }  // that a row sees, at most

    // The column of a row's key `number`, from 0, or the one after its last key if it sees fewer.
    int64_t column(const Sequence& s, int64_t row, int64_t number) const {
        const int64_t base = s.written - last;
        if (seen.empty()) return std::min(s.padding + number, base + row + 1);
        if (number < shared(s)) return s.padding + number;
        const int64_t *first = columns.data() + row * last, *end = first + seen[row];
        const int64_t left = end - std::lower_bound(first, end, s.padding - base), index = number - shared(s);
        if (index < left) return base + end[index - left];
        return seen[row] ? base + end[-1] + 1 : base;
    }

    // Bits of the 16 columns from `at` on that a row sees, of those in [begin, end).
    int lanes(const Sequence& s, int64_t row, int64_t at, int64_t begin, int64_t end) const {
        const auto below = [](int64_t n) { return (1 << std::min<int64_t>(std::max<int64_t>(n, 0), LANES)) - 1; };
        const int range = below(end - at) & ~below(begin - at);
        const int64_t before = s.written - last - at;  // columns that all rows see
        if (seen.empty() || before >= LANES || !range) return range;
        const uint64_t* word = bits.data() + row * words();
        if (before >= 0) return range & (int(word[0] << before) | below(before));
        const int64_t offset = -before % 64;
        word -= before / 64;
        return range & int(word[0] >> offset | word[1] << 1 << (63 - offset));
    }
};

// The outcome of a chunk, or of several that were merged, for up to QUERIES queries: their largest score, the sum of
// weights, and the sum of weighted values. Of 32 dimensions the even ones come first, as bfloat16s are unpacked.
struct Part {
    float *top, *total, *values;

    static int64_t size(int head_dim) { return int64_t(QUERIES + LANES) * 2 + int64_t(QUERIES) * head_dim; }

    explicit Part(float* memory) : top(memory), total(top + QUERIES + LANES), values(total + QUERIES + LANES) {}

    Part from(int query, int head_dim) const {
        Part part = *this;
        part.top += query, part.total += query, part.values += int64_t(query) * head_dim;
        return part;
    }
};

// Add the next chunk. A function of its own, so that all callers get the same instructions.
__attribute__((noinline)) inline void merge(const Part& into, const Part& next, int queries, int head_dim) {
    for (int q = 0; q < queries; q += LANES) {
        float kept[LANES], added[LANES];
        const Floats a = load(into.top + q), b = load(next.top + q), top = larger(a, b);
        store(kept, power_of_two(a - top)), store(added, power_of_two(b - top));
        const int here = std::min(LANES, queries - q);
        for (int i = 0; i < here; i++) {
            into.top[q + i] = top[i];
            into.total[q + i] = into.total[q + i] * kept[i] + next.total[q + i] * added[i];
            float* values = into.values + int64_t(q + i) * head_dim;
            const float* more = next.values + int64_t(q + i) * head_dim;
            for (int d = 0; d < head_dim; d += WIDTH) {
                const Native both = loaded<Native>(values + d) * kept[i] + loaded<Native>(more + d) * added[i];
                std::memcpy(values + d, &both, sizeof both);
            }
        }
    }
}

struct Scratch {  // of a thread
    std::vector<float> scores;     // [QUERIES][columns], then weights
    std::vector<uint32_t> turned;  // [DOT_TILES][words of a key][16]
    std::vector<float> queries;    // [QUERIES][head_dim], or bfloat16
    std::vector<float> parts;      // two
    std::vector<int> lanes;        // [columns / 16]: bits of those that a row sees

    // `spread`: columns between the first and the last of a chunk's keys that belong to other chunks or rows.
    void reserve(int64_t spread, int head_dim) {
        const size_t columns = (CHUNK + spread + 2 * LANES + 63) / 64 * 64;
        if (scores.size() < QUERIES * columns) scores.resize(QUERIES * columns);
        if (lanes.size() < columns / LANES) lanes.resize(columns / LANES);
        turned.resize(DOT_TILES * head_dim * LANES);
        queries.resize(QUERIES * head_dim);
        parts.resize(2 * Part::size(head_dim));
    }
};

// One query, scaled, and rounded like the keys.
template <class Key>
void pack(const float* query, float scale, int head_dim, Number<Key>* out) {
    for (int d = 0; d < head_dim; d += LANES) {
        const Floats v = load(query + d) * scale;
        if constexpr (FLOATS<Key>)
            store(out + d, v);
        else if constexpr (FLOATS<Number<Key>>)
            store(out + d, (Floats)(rounded_bfloat16(v) << 16));
        else
            store_bfloat16(out + d, v);
    }
}

// A tile of sixteen keys of `words` words, turned so that they are side by side: out [words][16].
inline void turn(const uint32_t* keys, int words, uint32_t* out) {
#if defined(__AVX512F__)
    for (int d = 0; d < words; d += 4, out += 4 * LANES) {
        __m512i four[4];
        for (int i = 0; i < 4; i++) {  // keys i, i + 4, i + 8 and i + 12
            const auto at = [&](int quarter) {
                return _mm_loadu_si128((const __m128i*)(keys + int64_t(4 * quarter + i) * words + d));
            };
            four[i] = _mm512_castsi128_si512(at(0));
            four[i] = _mm512_inserti32x4(four[i], at(1), 1);
            four[i] = _mm512_inserti32x4(four[i], at(2), 2);
            four[i] = _mm512_inserti32x4(four[i], at(3), 3);
        }
        const __m512i a = _mm512_unpacklo_epi32(four[0], four[1]), b = _mm512_unpackhi_epi32(four[0], four[1]);
        const __m512i c = _mm512_unpacklo_epi32(four[2], four[3]), e = _mm512_unpackhi_epi32(four[2], four[3]);
        _mm512_storeu_si512(out, _mm512_unpacklo_epi64(a, c));
        _mm512_storeu_si512(out + LANES, _mm512_unpackhi_epi64(a, c));
        _mm512_storeu_si512(out + 2 * LANES, _mm512_unpacklo_epi64(b, e));
        _mm512_storeu_si512(out + 3 * LANES, _mm512_unpackhi_epi64(b, e));
    }
#elif defined(__AVX2__)
    for (int half = 0; half < LANES; half += 8, keys += 8 * int64_t(words), out += 8)
        for (int d = 0; d < words; d += 4) {
            __m256i four[4];
            for (int i = 0; i < 4; i++)
                four[i] = _mm256_loadu2_m128i((const __m128i*)(keys + int64_t(4 + i) * words + d),
                                              (const __m128i*)(keys + int64_t(i) * words + d));
            const __m256i a = _mm256_unpacklo_epi32(four[0], four[1]), b = _mm256_unpackhi_epi32(four[0], four[1]);
            const __m256i c = _mm256_unpacklo_epi32(four[2], four[3]), e = _mm256_unpackhi_epi32(four[2], four[3]);
            __m256i* to = (__m256i*)(out + int64_t(d) * LANES);
            _mm256_storeu_si256(to, _mm256_unpacklo_epi64(a, c));
            _mm256_storeu_si256(to + 2, _mm256_unpackhi_epi64(a, c));
            _mm256_storeu_si256(to + 4, _mm256_unpacklo_epi64(b, e));
            _mm256_storeu_si256(to + 6, _mm256_unpackhi_epi64(b, e));
        }
#else
    for (int key = 0; key < LANES; key++)
        for (int d = 0; d < words; d++) out[d * LANES + key] = loaded<uint32_t>(keys + int64_t(key) * words + d);
#endif
}

// Scores of queries and up to DOT_TILES tiles of keys. Also fetches the values, which are needed soon.
template <class Key, int COUNT, int TILES>
void dots(const Number<Key>* queries, const uint32_t* turned, int head_dim, const Key* values, float* out,
          int64_t stride) {
    constexpr int VECTORS = TILES * PARTS;
    const int64_t tile = head_dim / PER_WORD<Key> * LANES;
    Native dot[COUNT * VECTORS] = {};
    for (int d = 0; d < head_dim; d += PER_WORD<Key>, turned += LANES) {
        for (int i = 0; i < TILES; i++, values += 64 / sizeof(Key)) __builtin_prefetch(values);
        NativeInts pair[VECTORS];
        unrolled<VECTORS>(UNROLLED(i) {
            pair[i] = loaded<NativeInts>(turned + i / PARTS * tile + i % PARTS * WIDTH);
        });
        if constexpr (FLOATS<Key>) {
            unrolled<COUNT>(UNROLLED(q) {
                const Native query = queries[q * head_dim + d] - Native{};
                unrolled<VECTORS>(UNROLLED(i) { dot[q * VECTORS + i] += query * (Native)pair[i]; });
            });
            continue;
        }
#ifdef __AVX512BF16__
        unrolled<COUNT>(UNROLLED(q) {
            const __m512i query = _mm512_set1_epi32(loaded<int32_t>(queries + q * head_dim + d));
            unrolled<VECTORS>(UNROLLED(i) {
                Native& sum = dot[q * VECTORS + i];
                sum = (Native)_mm512_dpbf16_ps((__m512)sum, (__m512bh)query, (__m512bh)pair[i]);
            });
        });
#else
        Native even[VECTORS], odd[VECTORS];
        unrolled<VECTORS>(UNROLLED(i) {
            even[i] = (Native)(pair[i] << 16), odd[i] = (Native)(pair[i] & int(0xffff0000));
        });
        unrolled<COUNT>(UNROLLED(q) {
            const float* query = queries + q * head_dim + d;
            const Native first = query[0] - Native{}, second = query[1] - Native{};
            unrolled<VECTORS>(UNROLLED(i) { dot[q * VECTORS + i] += first * even[i]; });
            unrolled<VECTORS>(UNROLLED(i) { dot[q * VECTORS + i] += second * odd[i]; });
        });
#endif
    }
    unrolled<COUNT * VECTORS>(UNROLLED(i) {
        std::memcpy(out + i / VECTORS * stride + i % VECTORS * WIDTH, &dot[i], sizeof(Native));
    });
}

template <class Key, int... I>
constexpr auto all_dots(std::integer_sequence<int, I...>) {
    return std::array{dots<Key, I / DOT_TILES + 1, I % DOT_TILES + 1>...};
}

template <class Key>
constexpr auto DOTS_OF = all_dots<Key>(std::make_integer_sequence<int, DOT_QUERIES * DOT_TILES>());

template <class Key>
void scores(const Number<Key>* queries, int count, const uint32_t* turned, int tiles, int head_dim, const Key* values,
            float* out, int64_t stride) {
    for (int q = 0; q < count; q += DOT_QUERIES)
        DOTS_OF<Key>[(std::min(DOT_QUERIES, count - q) - 1) * DOT_TILES + tiles - 1](
            queries + q * head_dim, turned, head_dim, values, out + q * stride, stride);
}

#ifdef __AMX_BF16__
inline void scores(const uint16_t* queries, int count, const uint32_t* turned, int tiles, int head_dim,
                   const uint16_t* values, float* out, int64_t stride) {
    const int64_t tile = head_dim / 2 * LANES;
    for (int line = 0; line < tiles * LANES * head_dim; line += 32) __builtin_prefetch(values + line);
    settle();
    for (int q = 0; q < count; q += 16, queries += 16 * head_dim, out += 16 * stride) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int d = 0; d < head_dim; d += 32) {
            const uint32_t* keys = turned + d / 2 * LANES;
            _tile_loadd(4, queries + d, head_dim * 2);
            _tile_loadd(5, keys, 64);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(6, keys + tile, 64);
            _tile_dpbf16ps(1, 4, 6);
            _tile_loadd(5, keys + 2 * tile, 64);
            _tile_dpbf16ps(2, 4, 5);
            _tile_loadd(6, keys + 3 * tile, 64);
            _tile_dpbf16ps(3, 4, 6);
        }
        _tile_stored(0, out, stride * 4);
        _tile_stored(1, out + LANES, stride * 4);
        _tile_stored(2, out + 2 * LANES, stride * 4);
        _tile_stored(3, out + 3 * LANES, stride * 4);
    }
    settle();
}
#endif

// Sums over the keys of weights[query][key] * values[key], for COUNT queries and PAIRS * 32 dimensions. Also fetches
// `ahead`, the keys of the next chunk.
template <class Key, int COUNT, int PAIRS>
void sums(const float* weights, int64_t stride, const Key* values, int64_t keys, int head_dim, const Key* ahead,
          float* out) {
    constexpr int LOADS = PAIRS * PARTS, VECTORS = 2 * LOADS;
    Native sum[COUNT * VECTORS] = {};
    for (int64_t j = 0; j < keys; j++, values += head_dim, ahead += head_dim) {
        for (int i = 0; i < PAIRS * 32; i += 64 / sizeof(Key)) __builtin_prefetch(ahead + i);
        unrolled<LOADS>(UNROLLED(i) {
            Native even, odd;
            if constexpr (FLOATS<Key>) {
                even = loaded<Native>(values + i * 2 * WIDTH), odd = loaded<Native>(values + i * 2 * WIDTH + WIDTH);
            } else {
                const NativeInts pair = loaded<NativeInts>(values + i * 2 * WIDTH);
                even = (Native)(pair << 16), odd = (Native)(pair & int(0xffff0000));
            }
            unrolled<COUNT>(UNROLLED(q) {
                const Native weight = weights[q * stride + j] - Native{};
                sum[q * VECTORS + 2 * i] += weight * even;
                sum[q * VECTORS + 2 * i + 1] += weight * odd;
            });
        });
    }
    unrolled<COUNT * LOADS>(UNROLLED(i) {
        constexpr int APART = FLOATS<Key> ? WIDTH : LANES, STEP_OUT = FLOATS<Key> ? 2 * WIDTH : WIDTH;
        float* to = out + i / LOADS * head_dim + i % LOADS / PARTS * 2 * LANES + i % PARTS * STEP_OUT;
        std::memcpy(to, &sum[2 * i], sizeof(Native));
        std::memcpy(to + APART, &sum[2 * i + 1], sizeof(Native));
    });
}

template <class Key, int... I>
constexpr auto all_sums(std::integer_sequence<int, I...>) {
    return std::array{sums<Key, I / SUM_PAIRS + 1, I % SUM_PAIRS + 1>...};
}

template <class Key>
constexpr auto SUMS_OF = all_sums<Key>(std::make_integer_sequence<int, SUM_QUERIES * SUM_PAIRS>());

template <class Key>
void weigh(const float* weights, int count, int64_t stride, const Key* values, int64_t keys, int head_dim,
           const Key* ahead, float* out) {
    for (int q = 0; q < count; q += SUM_QUERIES)
        for (int d = 0, pairs; d < head_dim; d += pairs * 2 * LANES) {
            pairs = std::min(SUM_PAIRS, (head_dim - d) / (2 * LANES));
            SUMS_OF<Key>[(std::min(SUM_QUERIES, count - q) - 1) * SUM_PAIRS + pairs - 1](
                weights + q * stride, stride, values + d, keys, head_dim, ahead + d, out + q * head_dim + d);
        }
}

// Scores of one query to weights, where it sees the key; returns the largest score and the sum of the weights.
inline std::pair<float, float> softmax(float* scores, const int* lanes, int tiles) {
    NativeInts bits;
    for (int i = 0; i < WIDTH; i++) bits[i] = 1 << i;
    Native top = -FLT_MAX - Native{};
    for (int i = 0; i < tiles * PARTS; i++) {
        Native score = loaded<Native>(scores + i * WIDTH);
        if (const int here = lanes[i / PARTS]; here != (1 << LANES) - 1) {
            score = (bits & (here >> i % PARTS * WIDTH)) != 0 ? score : -INFINITY - Native{};
            std::memcpy(scores + i * WIDTH, &score, sizeof score);
        }
        top = larger(top, score);
    }
    float peak = top[0];
    for (int i = 1; i < WIDTH; i++) peak = std::max(peak, top[i]);
    NativeInts total = {};
    for (int i = 0; i < tiles * PARTS; i++) {
        const Native weight = power_of_two(loaded<Native>(scores + i * WIDTH) - peak) * UNIT;
        const NativeInts whole = __builtin_convertvector(weight, NativeInts);
        const Native rounded = __builtin_convertvector(whole, Native);
        std::memcpy(scores + i * WIDTH, &rounded, sizeof rounded);
        total += whole;
    }
    int sum = 0;
    for (int i = 0; i < WIDTH; i++) sum += total[i];
    return {peak, float(sum)};
}

// Attention of new rows to the keys and values of their sequences, for one layer after another.
class Attention {
    struct Block {  // up to QUERIES queries of one head of keys; query i belongs to row i / group
        const Sequence& sequence;
        int64_t entry, head, first;  // of the batch; of keys; query
        int count;
        int64_t place;  // of the head's keys in the layer's
    };

    std::vector<Sequence> sequences;
    Visibility visible;
    int64_t group, kv_heads, head_stride;  // heads of queries per head of keys; from one head of keys to the next
    int head_dim;
    int64_t chunk_keys;             // so many that the keys of a chunk and its values are near
    int64_t blocks, chunks, tasks;  // of a head of keys; of a block, at most; of a layer
    std::vector<float> parts;       // of every task if it is a chunk
    std::vector<Scratch> scratch;   // of every thread

    Part part(int64_t task) { return Part(parts.data() + task * Part::size(head_dim)); }

    Block block_of(int64_t task) const {
        const int64_t i = whole ? task : task / chunks, head = i / blocks % kv_heads, entry = i / blocks / kv_heads;
        const int64_t first = i % blocks * QUERIES, left = visible.count * group - first;
        const Sequence& sequence = sequences[entry];
        const int64_t place = sequence.place + head * head_stride;
        return {sequence, entry, head, first, int(std::min<int64_t>(QUERIES, left)), place};
    }

    int64_t first_key(const Block& block, int64_t chunk) const {
        const Sequence& s = block.sequence;
        return block.place + std::min(s.padding + chunk * chunk_keys, s.written) * head_dim;
    }

    // Where query `i` of a head of keys is in rows of `stride` numbers.
    int64_t query(const Block& block, int64_t i, int64_t stride) const {
        return (block.entry * visible.count + i / group) * stride + (block.head * group + i % group) * head_dim;
    }

    template <class Key>
    void write(const Part& part, float* out) const {
        const float inverse = *part.total > 0 ? 1 / *part.total : 0;
        for (int d = 0; d < head_dim && FLOATS<Key>; d += LANES) store(out + d, load(part.values + d) * inverse);
        for (int d = 0; d < head_dim && !FLOATS<Key>; d += 2 * LANES)
            for (int i = 0; i < LANES; i++) {
                out[d + 2 * i] = part.values[d + i] * inverse;
                out[d + 2 * i + 1] = part.values[d + LANES + i] * inverse;
            }
    }

    // Compute a chunk of a block. `ahead` are the keys that are needed next.
    template <class Key>
    void compute(const Block& block, int64_t chunk, const Key* keys, const Key* values, const Key* ahead, Scratch& s,
                 const Part& out) const {
        int64_t begin = block.sequence.written, end = 0, from = 0, to = 0;
        const auto find = [&](int64_t row) {
            from = visible.column(block.sequence, row, chunk * chunk_keys);
            to = visible.column(block.sequence, row, (chunk + 1) * chunk_keys);
        };
        for (int64_t row = block.first / group; row <= (block.first + block.count - 1) / group; row++) {
            find(row);
            if (from < to) begin = std::min(begin, from), end = std::max(end, to);
        }
        if (begin >= end) {
            std::fill_n(out.top, block.count, -FLT_MAX);
            std::fill_n(out.total, block.count, 0.0f);
            std::fill_n(out.values, block.count * head_dim, 0.0f);
            return;
        }
        const int64_t first = begin / LANES * LANES;
        const int words = head_dim / PER_WORD<Key>;
        const int tiles = (end - first + LANES - 1) / LANES, stride = (tiles * LANES + 63) / 64 * 64;
        for (int t = 0; t < tiles; t += DOT_TILES) {
            const int held = std::min(DOT_TILES, tiles - t);
            const int64_t offset = (first + t * LANES) * head_dim;
            const auto* tiled = (const uint32_t*)(keys + offset);
            for (int i = 0; i < held * words * LANES; i += words * LANES) turn(tiled + i, words, s.turned.data() + i);
            scores((const Number<Key>*)s.queries.data(), block.count, s.turned.data(), held, head_dim, values + offset,
                   s.scores.data() + t * LANES, stride);
        }
        int64_t row = -1;
        for (int q = 0; q < block.count; q++) {
            if ((block.first + q) / group != row) {
                row = (block.first + q) / group;
                find(row);
                for (int t = 0; t < tiles; t++)
                    s.lanes[t] = visible.lanes(block.sequence, row, first + t * LANES, from, to);
            }
            std::tie(out.top[q], out.total[q]) = softmax(s.scores.data() + q * stride, s.lanes.data(), tiles);
        }
        weigh(s.scores.data() + begin - first, block.count, stride, values + begin * head_dim, end - begin, head_dim,
              ahead, out.values);
    }

  public:
    bool whole;  // a task is a block with all its chunks; otherwise one chunk of a block, and `merge_chunks` is needed

    // `shown` [count][named], or null: every row sees the new rows up to itself. `bytes` of a number of a key.
    void plan(std::vector<Sequence> batch, const uint8_t* shown, int64_t count, int64_t named, int64_t heads,
              int64_t heads_of_keys, int64_t dimensions, int64_t bytes, int64_t stride_of_heads, int64_t threads) {
        sequences = std::move(batch), visible.set(shown, count, named);
        group = heads / heads_of_keys, kv_heads = heads_of_keys, head_dim = dimensions, head_stride = stride_of_heads;
        blocks = (count * group + QUERIES - 1) / QUERIES, chunks = 1, chunk_keys = 2 * CHUNK / bytes;
        for (const Sequence& s : sequences) chunks = std::max(chunks, (visible.keys(s) + chunk_keys - 1) / chunk_keys);
        const int64_t all_blocks = int64_t(sequences.size()) * kv_heads * blocks;
        whole = threads == 1 || chunks == 1 || all_blocks >= 4 * threads;
        tasks = whole ? all_blocks : all_blocks * chunks;
        const size_t floats = whole ? 0 : tasks * Part::size(head_dim);
        if (parts.size() < floats) parts.resize(floats);
        if (scratch.size() < size_t(threads)) scratch.resize(threads);
        for (Scratch& s : scratch) s.reserve(shown ? named : 0, head_dim);
    }

    // This thread's tasks of a layer; call within the scope of a Tiles. queries: rows of `stride` floats; out: rows of
    // all heads.
    template <class Key>
    void attend(int64_t thread, int64_t threads, const float* queries, int64_t stride, const Key* keys,
                const Key* values, float* out) {
        Scratch& s = scratch[thread];
        const float scale = LOG2_E / std::sqrt(float(head_dim));
        for (int64_t task = thread; task < tasks; task += threads) {
            const Block block = block_of(task);
            const int64_t after = std::min(task + threads, tasks - 1);
            const Key* next = keys + first_key(block_of(after), whole ? 0 : after % chunks);
            auto* packed = (Number<Key>*)s.queries.data();
            for (int q = 0; q < block.count; q++, packed += head_dim)
                pack<Key>(queries + query(block, block.first + q, stride), scale, head_dim, packed);
            const Key *own = keys + block.place, *weighed = values + block.place;
            if (!whole) {
                compute(block, task % chunks, own, weighed, next, s, part(task));
                continue;
            }
            const Part sums(s.parts.data()), more(s.parts.data() + Part::size(head_dim));
            for (int64_t c = 0; c < chunks; c++) {
                const Key* ahead = c + 1 < chunks ? keys + first_key(block, c + 1) : next;
                compute(block, c, own, weighed, ahead, s, c ? more : sums);
                if (c) merge(sums, more, block.count, head_dim);
            }
            for (int q = 0; q < block.count; q++)
                write<Key>(sums.from(q, head_dim), out + query(block, block.first + q, kv_heads * group * head_dim));
        }
    }

    // This thread's share of what is left to do when all threads are done with their tasks.
    template <class Key>
    void merge_chunks(int64_t thread, int64_t threads, float* out) {
        const Part sums(scratch[thread].parts.data());
        const int64_t rows = int64_t(sequences.size()) * visible.count;
        for (int64_t item = thread; item < rows * kv_heads; item += threads) {
            const int64_t row = item / kv_heads, head = item % kv_heads, end = (row % visible.count + 1) * group;
            for (int64_t i = end - group, here; i < end; i += here) {  // queries of one row in one block
                const int64_t task = ((row / visible.count * kv_heads + head) * blocks + i / QUERIES) * chunks;
                here = std::min(end - i, QUERIES - i % QUERIES);
                const auto computed = [&](int64_t c) { return part(task + c).from(i % QUERIES, head_dim); };
                std::copy_n(computed(0).top, here, sums.top);
                std::copy_n(computed(0).total, here, sums.total);
                std::copy_n(computed(0).values, here * head_dim, sums.values);
                for (int64_t c = 1; c < chunks; c++) merge(sums, computed(c), here, head_dim);
                for (int64_t q = 0; q < here; q++)
                    write<Key>(sums.from(q, head_dim), out + query(block_of(task), i + q, kv_heads * group * head_dim));
            }
        }
    }
};
