// Sixteen floats at a time, in the compiler's own vector extension: any processor, the same order of operations.
#pragma once
#include <cstdint>
#include <cstring>

constexpr int LANES = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));

inline Floats load(const float* p) {
    Floats v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

inline Floats all(float x) { return x - Floats{}; }

inline Floats load_bfloat16(const uint16_t* p) {
    typedef uint16_t Halves __attribute__((vector_size(32)));
    Halves halves;
    std::memcpy(&halves, p, sizeof halves);
    return (Floats)(__builtin_convertvector(halves, Ints) << 16);
}

inline uint16_t bfloat16(float x) {  // round to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

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

// e^x to about one unit in the last place, 0 below -87.
inline Floats exponential(Floats x) {
    const Floats in_range = x > -87.0f ? x : all(-87.0f);
    const Floats magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Floats n = (in_range * 1.44269504f + magic) - magic;
    Floats r = in_range - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    Floats p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const Floats power = (Floats)((__builtin_convertvector(n, Ints) + 127) << 23);
    return x > -87.0f ? p * power : Floats{};
}
