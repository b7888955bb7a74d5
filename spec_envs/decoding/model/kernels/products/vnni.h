// AVX-512 VNNI and AVX-VNNI. `vpdpbusd` multiplies unsigned numbers by signed ones: weights become unsigned when they
// are loaded, as flipping their highest bit adds 128, and the sums start from -128 times the sum of the row's numbers.
#pragma once
#include "registers.h"

inline int32_t less_128(int32_t total) { return int32_t(-128u * uint32_t(total)); }

#ifdef __AVX512VNNI__
struct Vectors {
    static constexpr int OUTPUTS = 16, WHOLE = 10, HELD = 10, VECTORS = 2;
    typedef __m512i Word;
    struct Weights {
        Word raised;
        explicit Weights(const int8_t* p)
            : raised(_mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(char(0x80)))) {}
    };
    static Word start(int32_t total) { return _mm512_set1_epi32(less_128(total)); }
    static Word added(Word sums, const Weights& w, int32_t inputs) {
        return _mm512_dpbusd_epi32(sums, w.raised, _mm512_set1_epi32(inputs));
    }
    static void store(int32_t* p, Word sums) { _mm512_storeu_si512(p, sums); }
};
#else
struct Vectors {
    static constexpr int OUTPUTS = 8, WHOLE = 2, HELD = 6, VECTORS = 2;
    typedef __m256i Word;
    struct Weights {
        Word raised;
        explicit Weights(const int8_t* p)
            : raised(_mm256_xor_si256(_mm256_loadu_si256((const Word*)p), _mm256_set1_epi8(char(0x80)))) {}
    };
    static Word start(int32_t total) { return _mm256_set1_epi32(less_128(total)); }
    static Word added(Word sums, const Weights& w, int32_t inputs) {
        return _mm256_dpbusd_avx_epi32(sums, w.raised, _mm256_set1_epi32(inputs));
    }
    static void store(int32_t* p, Word sums) { _mm256_storeu_si256((Word*)p, sums); }
};
#endif

using Products = Registers<Vectors>;
