// Vectors of floats for one instruction set: GCC and Clang vector extensions, no intrinsics.
//
// The widest registers that the compiler may use decide the width, so one source serves AVX-512,
// AVX2, and the baseline of x86-64 (SSE2) and of aarch64 (NEON).
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

namespace xopd {
namespace {

#if defined(__AVX512F__)
constexpr int64_t WIDTH = 16;
#elif defined(__AVX2__)
constexpr int64_t WIDTH = 8;
#else
constexpr int64_t WIDTH = 4;
#endif

typedef float Floats __attribute__((vector_size(WIDTH * 4)));
typedef int32_t Ints __attribute__((vector_size(WIDTH * 4)));
typedef uint32_t Words __attribute__((vector_size(WIDTH * 4)));

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr int64_t UNROLL = 4;  // independent accumulators: more than one addition is under way

inline Floats splat(float value) { return value - Floats{}; }

inline Floats load(const float* from) {
  Floats value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// The first `count` < WIDTH lanes; 0 in the others.
inline Floats load_part(const float* from, int64_t count) {
  Floats value{};
  std::memcpy(&value, from, static_cast<size_t>(count) * sizeof(float));
  return value;
}

inline void store(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }

inline void store_part(float* to, Floats value, int64_t count) {
  std::memcpy(to, &value, static_cast<size_t>(count) * sizeof(float));
}

// A vector cast keeps the bits.
inline Words bits(Floats value) { return reinterpret_cast<Words>(value); }
inline Floats from_bits(Words value) { return reinterpret_cast<Floats>(value); }

inline Floats absolute(Floats value) { return from_bits(bits(value) & 0x7fffffffu); }

// The larger one, `b` where either is NaN: one instruction on x86-64.
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// `value`, but at least `low`. A NaN stays.
inline Floats at_least(Floats value, Floats low) { return larger(low, value); }

inline float largest(Floats value) {
  float result = value[0];
  for (int64_t i = 1; i < WIDTH; ++i) result = value[i] > result ? value[i] : result;
  return result;
}

inline double sum(Floats value) {
  double result = 0.0;
  for (int64_t i = 0; i < WIDTH; ++i) result += static_cast<double>(value[i]);
  return result;
}

// Accumulators of one sum over a piece.
struct Sum {
  Floats lanes[UNROLL] = {};
  double total() const { return sum((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])); }
};

}  // namespace
}  // namespace xopd
