// Vectors of floats as wide as this machine has them, in the vector extensions of GCC and Clang.
#pragma once

#include <cstdint>
#include <cstring>

namespace jaxprune {

#if defined(__AVX512F__)
#define JAXPRUNE_LANES 16
#elif defined(__AVX__)
#define JAXPRUNE_LANES 8
#else  // SSE, NEON and everything else that the compiler can map four floats to
#define JAXPRUNE_LANES 4
#endif

constexpr int kLanes = JAXPRUNE_LANES;
typedef float Vec __attribute__((vector_size(4 * JAXPRUNE_LANES)));
typedef float UnalignedVec __attribute__((vector_size(4 * JAXPRUNE_LANES), aligned(4), may_alias));

#define JAXPRUNE_UNROLL _Pragma("GCC unroll 32")

inline Vec load(const float* from) { return *reinterpret_cast<const UnalignedVec*>(from); }
inline void store(float* to, Vec v) { *reinterpret_cast<UnalignedVec*>(to) = v; }
// A loop of inserts here made kernels ten times slower; this compiles to one broadcast.
inline Vec broadcast(float x) { return x - Vec{}; }

// Loads fewer floats than a vector has; the other lanes are 0.
inline Vec load_some(const float* from, int64_t count) {
  Vec v = {};
  std::memcpy(&v, from, sizeof(float) * count);
  return v;
}
inline void store_some(float* to, Vec v, int64_t count) {
  std::memcpy(to, &v, sizeof(float) * count);
}

// The lower and the upper half of a0 b0 a1 b1 a2 b2 ...
#if JAXPRUNE_LANES == 16
#define JAXPRUNE_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define JAXPRUNE_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif JAXPRUNE_LANES == 8
#define JAXPRUNE_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define JAXPRUNE_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define JAXPRUNE_LOW 0, 4, 1, 5
#define JAXPRUNE_HIGH 2, 6, 3, 7
#endif

#if defined(__clang__) || __GNUC__ >= 12
inline Vec low(Vec a, Vec b) { return __builtin_shufflevector(a, b, JAXPRUNE_LOW); }
inline Vec high(Vec a, Vec b) { return __builtin_shufflevector(a, b, JAXPRUNE_HIGH); }
#else
typedef int32_t VecIndex __attribute__((vector_size(4 * JAXPRUNE_LANES)));
inline Vec low(Vec a, Vec b) { return __builtin_shuffle(a, b, VecIndex{JAXPRUNE_LOW}); }
inline Vec high(Vec a, Vec b) { return __builtin_shuffle(a, b, VecIndex{JAXPRUNE_HIGH}); }
#endif

// Transposes a square of vectors. One round moves the top bit of the row number to the lowest bit
// of the lane number; after log2(kLanes) rounds rows and lanes have changed places.
inline void transpose(Vec (&rows)[kLanes]) {
  Vec other[kLanes];
  JAXPRUNE_UNROLL for (int round = 1; round < kLanes; round *= 2) {
    JAXPRUNE_UNROLL for (int i = 0; i < kLanes / 2; i++) {
      other[2 * i] = low(rows[i], rows[i + kLanes / 2]);
      other[2 * i + 1] = high(rows[i], rows[i + kLanes / 2]);
    }
    JAXPRUNE_UNROLL for (int i = 0; i < kLanes; i++) rows[i] = other[i];
  }
}

// Asks for memory that will be read soon. It may lie behind the array: nothing is accessed.
inline void prefetch(const float* const (&lines)[kLanes], int64_t offset) {
  JAXPRUNE_UNROLL for (int i = 0; i < kLanes; i++) {
    const uintptr_t place = reinterpret_cast<uintptr_t>(lines[i]) + offset * sizeof(float);
    __builtin_prefetch(reinterpret_cast<const void*>(place));
  }
}

// Reads `width` floats at an offset from each line, transposes them, and stores vector i of the
// result at to + i * stride. A line that is null counts as zeros. Full squares stay in registers.
inline void read_square(const float* const (&lines)[kLanes], int64_t offset, int64_t width,
                        float* to, int64_t stride) {
  Vec square[kLanes];
  if (width == kLanes) {
    JAXPRUNE_UNROLL for (int i = 0; i < kLanes; i++) {
      square[i] = lines[i] ? load(lines[i] + offset) : Vec{};
    }
    transpose(square);
    JAXPRUNE_UNROLL for (int i = 0; i < kLanes; i++) store(to + i * stride, square[i]);
    return;
  }
  for (int i = 0; i < kLanes; i++) {
    square[i] = lines[i] ? load_some(lines[i] + offset, width) : Vec{};
  }
  transpose(square);
  for (int64_t i = 0; i < width; i++) store(to + i * stride, square[i]);
}

// The sums over the lanes of four vectors.
inline void lane_sums(Vec a, Vec b, Vec c, Vec d, float (&result)[4]) {
  Vec ac_of_a = low(a, b) + high(a, b), ac_of_c = low(c, d) + high(c, d);  // a b a b, c d c d
  Vec all = low(ac_of_a, ac_of_c) + high(ac_of_a, ac_of_c);                // a c b d a c b d
  float lanes[kLanes];
  store(lanes, all);
  float folded[4] = {lanes[0], lanes[1], lanes[2], lanes[3]};
  JAXPRUNE_UNROLL for (int i = 4; i < kLanes; i += 4)
    JAXPRUNE_UNROLL for (int j = 0; j < 4; j++) folded[j] += lanes[i + j];
  result[0] = folded[0], result[1] = folded[2], result[2] = folded[1], result[3] = folded[3];
}

}  // namespace jaxprune
