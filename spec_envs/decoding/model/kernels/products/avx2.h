// AVX2. `vpmaddubsw` multiplies unsigned numbers by signed ones, so the signs of the weights are moved to the rows. No
// number is below -127, so the sum of two products fits 16 bits.
#pragma once
#include "registers.h"

struct Vectors {
    static constexpr int OUTPUTS = 8, WHOLE = 2, HELD = 4, VECTORS = 2;
    typedef __m256i Word;
    struct Weights {
        Word own, size;
        explicit Weights(const int8_t* p) : own(_mm256_loadu_si256((const Word*)p)), size(_mm256_abs_epi8(own)) {}
    };
    static Word start(int32_t) { return _mm256_setzero_si256(); }
    static Word added(Word sums, const Weights& w, int32_t inputs) {
        const Word pairs = _mm256_maddubs_epi16(w.size, _mm256_sign_epi8(_mm256_set1_epi32(inputs), w.own));
        return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    static void store(int32_t* p, Word sums) { _mm256_storeu_si256((Word*)p, sums); }
};

using Products = Registers<Vectors>;
