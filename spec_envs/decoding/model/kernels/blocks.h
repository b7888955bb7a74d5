// Products with weights in the blocks of their GGUF file: 4 or 8 bits each, with a scale for 16 or 32 inputs.
//
// Rows are quantised to 16 bits with a scale for 32 inputs. The sums of a block are exact in int32, and the blocks are
// added in float32 in one order, so a row's result does not depend on the other rows. Two 16-bit numbers are multiplied
// per lane: as fast as two products of 8 bits, into which the rows could be split instead, and simpler.
#pragma once
#include <utility>

#include "matrix.h"

constexpr int SPAN = 32;  // inputs of a row that have one scale
constexpr int HALF = 16;  // outputs of one vector: half of the COLUMNS that are packed together

// Vectors of this processor: W lanes, which are W outputs. Words are 32 bits per lane, two inputs of 16 bits each.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
constexpr int W = 16, VECTORS = 2, MOST_ROWS = 6;  // vectors of outputs and rows whose sums fit the registers
typedef __m512i Words;
typedef __m512 Reals;
inline Words words(const void* p) { return _mm512_loadu_si512(p); }
inline Words nibbles(Words w, int place) {
    return place == 3 ? _mm512_srli_epi16(w, 12)
                      : _mm512_and_si512(_mm512_srli_epi16(w, 4 * place), _mm512_set1_epi16(15));
}
inline Words bytes(Words w, int place) { return _mm512_srai_epi16(place ? w : _mm512_slli_epi16(w, 8), 8); }
inline Words pair(const int16_t* two) {
    int32_t both;
    std::memcpy(&both, two, sizeof both);
    return _mm512_set1_epi32(both);
}
inline Words add_pairs(Words sum, Words a, Words b) { return _mm512_dpwssd_epi32(sum, a, b); }
inline Words plus(Words a, Words b) { return _mm512_add_epi32(a, b); }
inline Reals reals(Words w) { return _mm512_cvtepi32_ps(w); }
inline Reals every(float x) { return _mm512_set1_ps(x); }
inline Reals halves(const uint8_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline Reals small(const uint8_t* p) {  // signed bytes
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
inline Reals times(Reals a, Reals b) { return _mm512_mul_ps(a, b); }
inline Reals fused(Reals a, Reals b, Reals c) { return _mm512_fmadd_ps(a, b, c); }
inline void put(float* p, Reals x) { _mm512_storeu_ps(p, x); }
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
constexpr int W = 8, VECTORS = 1, MOST_ROWS = 4;
typedef __m256i Words;
typedef __m256 Reals;
inline Words words(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline Words nibbles(Words w, int place) {
    return place == 3 ? _mm256_srli_epi16(w, 12)
                      : _mm256_and_si256(_mm256_srli_epi16(w, 4 * place), _mm256_set1_epi16(15));
}
inline Words bytes(Words w, int place) { return _mm256_srai_epi16(place ? w : _mm256_slli_epi16(w, 8), 8); }
inline Words pair(const int16_t* two) {
    int32_t both;
    std::memcpy(&both, two, sizeof both);
    return _mm256_set1_epi32(both);
}
#ifdef __AVXVNNI__
inline Words add_pairs(Words sum, Words a, Words b) { return _mm256_dpwssd_avx_epi32(sum, a, b); }
#else
inline Words add_pairs(Words sum, Words a, Words b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
#endif
inline Words plus(Words a, Words b) { return _mm256_add_epi32(a, b); }
inline Reals reals(Words w) { return _mm256_cvtepi32_ps(w); }
inline Reals every(float x) { return _mm256_set1_ps(x); }
inline Reals halves(const uint8_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline Reals small(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
inline Reals times(Reals a, Reals b) { return _mm256_mul_ps(a, b); }
inline Reals fused(Reals a, Reals b, Reals c) { return _mm256_fmadd_ps(a, b, c); }
inline void put(float* p, Reals x) { _mm256_storeu_ps(p, x); }
#else
// One row, because compilers may fuse a * b + c in one copy of the code and not in another.
constexpr int W = 16, VECTORS = 1, MOST_ROWS = 1;
typedef Ints Words;
typedef Floats Reals;
typedef int16_t Shorts __attribute__((vector_size(64)));
typedef uint16_t UnsignedShorts __attribute__((vector_size(64)));
inline Words words(const void* p) {
    Words w;
    std::memcpy(&w, p, sizeof w);
    return w;
}
inline Words nibbles(Words w, int place) { return (Words)(((UnsignedShorts)w >> 4 * place) & 15); }
inline Words bytes(Words w, int place) { return (Words)((Shorts)(place ? w : (Words)((UnsignedShorts)w << 8)) >> 8); }
inline Words pair(const int16_t* two) {
    int32_t both;
    std::memcpy(&both, two, sizeof both);
    return both - Words{};
}
inline Words add_pairs(Words sum, Words a, Words b) {
    return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
}
inline Words plus(Words a, Words b) { return a + b; }
inline Reals reals(Words w) { return __builtin_convertvector(w, Reals); }
inline Reals every(float x) { return all(x); }
inline Reals halves(const uint8_t* p) {
    Reals v;
    for (int i = 0; i < W; i++) {
        uint16_t half;
        std::memcpy(&half, p + 2 * i, sizeof half);
        const int exponent = half >> 10 & 31, fraction = half & 1023;  // infinities and NaNs are refused when packed
        const float size = exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(float(fraction), -24);
        v[i] = half & 0x8000 ? -size : size;
    }
    return v;
}
inline Reals small(const uint8_t* p) {
    Reals v;
    for (int i = 0; i < W; i++) v[i] = int8_t(p[i]);
    return v;
}
inline Reals times(Reals a, Reals b) { return a * b; }
inline Reals fused(Reals a, Reals b, Reals c) { return a * b + c; }
inline void put(float* p, Reals x) { store(p, x); }
#endif

// What the blocks of COLUMNS outputs consist of: a head, then PER blocks of INPUTS inputs, again and again. A block is
// LEAD bytes of scales, then for each half of the outputs and each group of inputs 64 bytes of weights: four bytes of
// each output, in PLACES pairs of inputs. at() reads the scale and the minimum of some outputs.
template <int PLACES_, int INPUTS_, int PER_, int HEAD_, int LEAD_, bool MINIMUM_>
struct Format {
    static constexpr int PLACES = PLACES_, INPUTS = INPUTS_, PER = PER_, HEAD = HEAD_, LEAD = LEAD_;
    static constexpr bool MINIMUM = MINIMUM_;
    static constexpr int GROUPS = INPUTS / (2 * PLACES);     // loads of a block and half
    static constexpr int BYTES = LEAD + 2 * GROUPS * 64;     // of a block
    static constexpr int SUPER = HEAD + PER * BYTES;         // bytes of PER blocks with their head
    static Words part(Words w, int place) { return PLACES == 4 ? nibbles(w, place) : bytes(w, place); }
};
struct Q4 : Format<4, 32, 1, 128, 0, true> {  // Q4_0, Q4_1: weight = scale * nibble + minimum, in float16
    static void at(const uint8_t* head, const uint8_t*, int output, Reals& scale, Reals& minimum) {
        scale = halves(head + 2 * output), minimum = halves(head + 2 * COLUMNS + 2 * output);
    }
};
struct Q4K : Format<4, 32, 8, 128, 64, true> {  // Q4_K: the same, both in float16 times a small integer per block
    static void at(const uint8_t* head, const uint8_t* lead, int output, Reals& scale, Reals& minimum) {
        scale = times(halves(head + 2 * output), small(lead + output));
        minimum = times(halves(head + 2 * COLUMNS + 2 * output), small(lead + COLUMNS + output));
    }
};
struct Q8 : Format<2, 32, 1, 64, 0, false> {  // Q5_0, Q8_0: weight = scale * byte
    static void at(const uint8_t* head, const uint8_t*, int output, Reals& scale, Reals&) {
        scale = halves(head + 2 * output);
    }
};
struct Q6K : Format<2, 16, 16, 64, 32, false> {  // Q6_K: the same, with a scale for 16 inputs
    static void at(const uint8_t* head, const uint8_t* lead, int output, Reals& scale, Reals&) {
        scale = times(halves(head + 2 * output), small(lead + output));
    }
};

constexpr float TINY = 1e-30f;  // inputs below it count as zero: the inverse of their scale could overflow

// One row of `inputs` floats to 16 bits; per SPAN inputs a scale, and the sum of what the numbers stand for.
inline void quantise_blocks(const float* row, int64_t inputs, int16_t* out, float* scale, float* sum) {
    const Floats magic = all(12582912.0f);
    for (int64_t i = 0; i < inputs; i += SPAN) {
        const Floats v[2] = {load(row + i), load(row + i + LANES)};
        const float top = largest(larger(larger(v[0], -v[0]), larger(v[1], -v[1])));
        const float inverse = top > TINY ? 32767 / top : 0;
        Ints total = {};
        for (int j = 0; j < 2; j++) {
            const Ints rounded = __builtin_convertvector((v[j] * inverse + magic) - magic, Ints);
            total += rounded;
            typedef int16_t Narrow __attribute__((vector_size(32)));
            const Narrow narrow = __builtin_convertvector(rounded, Narrow);
            std::memcpy(out + i + j * LANES, &narrow, sizeof narrow);
        }
        int32_t whole = 0;
        for (int j = 0; j < LANES; j++) whole += total[j];
        scale[i / SPAN] = top / 32767;
        sum[i / SPAN] = float(whole) * (top / 32767);
    }
}

struct BlockRows {  // rows as quantise_blocks makes them, from the first one of a product on
    const int16_t* rows;
    const float *scale, *sum;
    int64_t stride;  // inputs of a row

    BlockRows from(int row) const {
        return {rows + row * stride, scale + row * stride / SPAN, sum + row * stride / SPAN, stride};
    }
    const int16_t* inputs(int row, int64_t at) const { return rows + row * stride + at; }
    float scaled(int row, int64_t at) const { return scale[(row * stride + at) / SPAN]; }
    float summed(int row, int64_t at) const { return sum[(row * stride + at) / SPAN]; }
};

// Sums [ROWS][VECTORS * W] of one to MOST_ROWS rows, for outputs from `first` on. I counts rows times vectors.
// `ahead` is what is read next from memory, as many bytes as the blocks have, if FETCH.
template <class F, bool FETCH, int... I>
__attribute__((always_inline)) inline void block_sums(const uint8_t* weight, const BlockRows& x, int first, float* out,
                                                      const uint8_t* ahead, std::integer_sequence<int, I...>) {
    constexpr int COUNT = sizeof...(I), CHAINS = COUNT <= 2 * VECTORS ? 2 : 1;  // few sums would wait for each other
    Reals total[COUNT] = {((void)I, every(0))...};
    for (int64_t at = 0; at < x.stride; weight += F::SUPER) {
        const uint8_t* block = weight + F::HEAD;
        for (int b = 0; b < F::PER; b++, block += F::BYTES, at += F::INPUTS) {
            if (FETCH)
                for (int i = 0; i < F::BYTES; i += 64, ahead += 64) __builtin_prefetch(ahead);
            Words sums[CHAINS][COUNT] = {};
#pragma GCC unroll 8
            for (int group = 0; group < F::GROUPS; group++) {
                Words packed[VECTORS];
                for (int v = 0; v < VECTORS; v++) {
                    const int output = first + v * W;
                    packed[v] = words(block + F::LEAD + (output / HALF * F::GROUPS + group) * 64 + output % HALF * 4);
                }
#pragma GCC unroll 4
                for (int place = 0; place < F::PLACES; place++) {
                    Words part[VECTORS];
                    for (int v = 0; v < VECTORS; v++) part[v] = F::part(packed[v], place);
                    ((sums[place % CHAINS][I] =
                          add_pairs(sums[place % CHAINS][I], part[I % VECTORS],
                                    pair(x.inputs(I / VECTORS, at + 2 * (group * F::PLACES + place))))),
                     ...);
                }
            }
            if constexpr (CHAINS == 2) ((sums[0][I] = plus(sums[0][I], sums[1][I])), ...);
            Reals scale[VECTORS], minimum[VECTORS];
            for (int v = 0; v < VECTORS; v++) F::at(weight, block, first + v * W, scale[v], minimum[v]);
            const auto scaled = [&](int i) { return times(scale[i % VECTORS], every(x.scaled(i / VECTORS, at))); };
            ((total[I] = fused(reals(sums[0][I]), scaled(I), total[I])), ...);
            if constexpr (F::MINIMUM)
                ((total[I] = fused(minimum[I % VECTORS], every(x.summed(I / VECTORS, at)), total[I])), ...);
        }
    }
    (put(out + I / VECTORS * COLUMNS + first + I % VECTORS * W, total[I]), ...);
}

using BlockSums = void (*)(const uint8_t* weight, const BlockRows& x, const uint8_t* ahead, float* out);

// Sums [ROWS][COLUMNS] of the outputs that are packed together. `ahead` is read from memory meanwhile, if not null.
template <class F, int ROWS>
void block_columns(const uint8_t* weight, const BlockRows& x, const uint8_t* ahead, float* out) {
    constexpr auto sums = std::make_integer_sequence<int, ROWS * VECTORS>();
    for (int first = 0; first < COLUMNS; first += VECTORS * W)
        if (ahead && !first)
            block_sums<F, true>(weight, x, first, out, ahead, sums);
        else
            block_sums<F, false>(weight, x, first, out, nullptr, sums);
}

template <class F, int... ROWS>
const BlockSums* block_table(std::integer_sequence<int, ROWS...>) {
    static constexpr BlockSums table[] = {nullptr, block_columns<F, ROWS + 1>...};
    return table;
}

struct BlockFormat {
    const BlockSums* sums;  // by the number of rows, 1 to MOST_ROWS
    int64_t super, inputs;  // bytes and inputs of blocks that have one head
    void (*row)(const Matrix&, int64_t, float*);

    // Bytes of the weights of COLUMNS outputs.
    int64_t panel(const Matrix& m) const { return m.inputs / inputs * super; }
};

// The weights of one output, which is a token's embedding.
template <class F>
void block_row(const Matrix& m, int64_t output, float* out) {
    const int lane = output % COLUMNS, first = lane / W * W;
    const uint8_t* weight = (const uint8_t*)m.weight + output / COLUMNS * (m.inputs / (F::PER * F::INPUTS)) * F::SUPER;
    for (int64_t at = 0; at < m.inputs; at += F::PER * F::INPUTS, weight += F::SUPER) {
        const uint8_t* block = weight + F::HEAD;
        for (int b = 0; b < F::PER; b++, block += F::BYTES) {
            Reals scales, minima = every(0);
            F::at(weight, block, first, scales, minima);
            const float scale = scales[lane - first], minimum = minima[lane - first];
            for (int group = 0; group < F::GROUPS; group++) {
                const uint8_t* four = block + F::LEAD + (lane / HALF * F::GROUPS + group) * 64 + lane % HALF * 4;
                for (int place = 0; place < F::PLACES; place++)
                    for (int side = 0; side < 4; side += 2) {
                        const uint8_t byte = four[side + place * 2 / F::PLACES];
                        const int number = F::PLACES == 4 ? byte >> place % 2 * 4 & 15 : int8_t(byte);
                        out[2 * place + side / 2] = scale * number + minimum;
                    }
                out += 2 * F::PLACES;
            }
        }
    }
}

inline const BlockFormat& block_format(int64_t kind) {
    constexpr auto rows = std::make_integer_sequence<int, MOST_ROWS>();
    const auto of = [&](auto format) {
        using F = decltype(format);
        return BlockFormat{block_table<F>(rows), F::SUPER, F::PER * F::INPUTS, block_row<F>};
    };
    static const BlockFormat formats[] = {of(Q4()), of(Q4K()), of(Q8()), of(Q6K())};
    return formats[kind - BLOCKS_Q4];
}

// The weights of one output of any matrix.
inline void weight_row(const Matrix& m, int64_t output, float* out) {
    if (output >= m.outputs) return weight_row(*m.next, output - m.outputs, out);
    if (m.kind == INT8) return int8_row(m, output, out);
    block_format(m.kind).row(m, output, out);
}

// The share of columns [begin, end) of a product, for all rows; its outputs are numbered from `offset` on. `following` is
// what this thread reads from memory next, or null.
template <class Sink>
void block_product(const Matrix& m, const BlockRows& x, int count, int begin, int end, int offset, Sink& sink,
                   const uint8_t* following) {
    alignas(64) float sums[MOST_ROWS * COLUMNS];
    const BlockFormat& format = block_format(m.kind);
    const int64_t panel = format.panel(m);
    const int passes = (count + MOST_ROWS - 1) / MOST_ROWS;
    for (int c = begin; c < end; c++) {
        const int column = c * COLUMNS;
        Floats bias[2] = {};
        if (m.bias) bias[0] = load(m.bias + column), bias[1] = load(m.bias + column + LANES);
        for (int pass = 0, row = 0; pass < passes; pass++) {
            const int here = (count - row + passes - pass - 1) / (passes - pass);
            const uint8_t *weight = (const uint8_t*)m.weight + c * panel, *later = c + 1 < end ? weight + panel : following;
            format.sums[here](weight, x.from(row), pass ? nullptr : later, sums);
            for (int i = 0; i < here; i++)
                finish(sink, row + i, offset + column, load(sums + i * COLUMNS) + bias[0],
                       load(sums + i * COLUMNS + LANES) + bias[1], offset + m.outputs);
            row += here;
        }
    }
}
