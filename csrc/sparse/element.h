// Vectors of fp32 from bf16, fp16 and fp32 memory, and bf16 of them.
#pragma once

#include "common/vector.h"

namespace xopd {
namespace {

typedef uint16_t Halves __attribute__((vector_size(WIDTH * 2)));

struct Float32 {
  typedef float Word;
  static Floats load(const float* from) { return xopd::load(from); }
};

struct BFloat16 {
  typedef uint16_t Word;
  static Floats load(const uint16_t* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return from_bits(__builtin_convertvector(halves, Words) << 16);
  }

  // Rounded to the nearest, ties to even; a NaN stays one.
  static Halves round(Floats value) {
    const Words word = bits(value);
    const Words rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
    const Words nan = (word >> 16) | 0x40u;
    return __builtin_convertvector(value == value ? rounded : nan, Halves);
  }
};

struct Float16 {
  typedef uint16_t Word;
  static Floats load(const uint16_t* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    const Words word = __builtin_convertvector(halves, Words);
    // Exponent and fraction in their places, the exponent 112 too small: a product mends it, of
    // subnormal numbers too.
    const Words magnitude = (word & 0x7fffu) << 13;
    const Words finite = bits(from_bits(magnitude) * from_bits(Words{} + 0x77800000u));
    const Words special = magnitude | 0x7f800000u;
    const Words value = magnitude >= 0x0f800000u ? special : finite;
    return from_bits(value | (word & 0x8000u) << 16);
  }
};

// The first `count` < WIDTH elements; 0 in the other lanes.
template <class Element>
Floats load_part_of(const typename Element::Word* from, int64_t count) {
  typename Element::Word words[WIDTH] = {};
  std::memcpy(words, from, static_cast<size_t>(count) * sizeof words[0]);
  return Element::load(words);
}

}  // namespace
}  // namespace xopd
