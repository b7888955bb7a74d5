// Sixteen floats at a time in the compiler's vector extension: the order of operations is the same on every processor.
#pragma once
#include <cstdint>
#include <cstring>

constexpr int LANES = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

inline Floats load(const float* p) {
    Floats v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

inline Floats all(float x) { return x - Floats{}; }

inline float widened(uint16_t bfloat16) {
    const uint32_t bits = uint32_t(bfloat16) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline Ints rounded_bfloat16(Floats x) {  // to nearest, ties to even
    const Ints bits = (Ints)x;
    return ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) & 0xffff;
}

inline void store_bfloat16(uint16_t* p, Floats x) {
    const Halves halves = __builtin_convertvector(rounded_bfloat16(x), Halves);
    std::memcpy(p, &halves, sizeof halves);
}

template <class V>
inline V larger(V a, V b) {
    return a > b ? a : b;
}

inline bool any(Ints condition) {
    uint64_t words[8], found = 0;
    std::memcpy(words, &condition, sizeof words);
    for (uint64_t word : words) found |= word;
    return found != 0;
}

inline float sum(Floats v) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}

inline float largest(Floats v) {
    float top = v[0];
    for (int i = 1; i < LANES; i++) top = v[i] > top ? v[i] : top;
    return top;
}

// 2^x to a few units in the last place, for x up to 127; below -126 it stays at 2^-126.
template <class V>
inline V power_of_two(V x) {
    using Integers = decltype(x > x);
    const V magic = 12582912.0f - V{};  // 1.5 * 2^23: adding it rounds, and leaves the integer in the low bits
    x = larger(x, -126.0f - V{});
    const V shifted = x + magic;
    const V r = x - (shifted - magic);  // in [-0.5, 0.5]
    V p = 1.321867248e-03f - V{};
    p = p * r + 9.671697938e-03f;
    p = p * r + 5.550892952e-02f;
    p = p * r + 2.402223800e-01f;
    p = p * r + 6.931468559e-01f;
    p = p * r + 1.0f;
    return (V)((Integers)p + ((Integers)shifted << 23));
}

constexpr float LOG2_E = 1.44269504f;

inline Floats exponential(Floats x) {
    x = x * LOG2_E;
    return power_of_two(x < 127.0f ? x : all(127.0f));
}
