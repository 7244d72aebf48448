// What becomes of sums when they are stored: y = clamp(sum * scale + shift + rest, low, high).
//
// Lanes are channels here. A norm in evaluation mode is a scale and a shift for each channel, a
// residual branch is the rest, and an activation is a clamp.
#pragma once

#include <string>

#include "vectors.h"

namespace jaxprune {

struct Finish {
  const float *scale, *shift;  // [channels]; null: 1 and 0
  const float* rest;           // like the results; null: 0
  float low, high;
  const float* results;  // where the results begin

  // The vector that is stored at `place`, of which `width` lanes exist.
  Vec operator()(Vec sum, int64_t channel, const float* place, int64_t width) const {
    auto read = [width](const float* from) {
      return width == kLanes ? load(from) : load_some(from, width);
    };
    if (scale) sum = sum * read(scale + channel) + read(shift + channel);
    if (rest) sum += read(rest + (place - results));
    const Vec least = broadcast(low), most = broadcast(high);
    sum = sum < least ? least : sum;  // NaN stays
    return sum > most ? most : sum;
  }
};

// Null where there is nothing to do, so that plain sums are stored as they are.
inline void put(float* to, Vec sum, int64_t channel, int64_t width, const Finish* finish) {
  if (finish) sum = (*finish)(sum, channel, to, width);
  width == kLanes ? store(to, sum) : store_some(to, sum, width);
}

// Transposes vectors at from + i * stride, the way back from `read_square`, and stores `width`
// floats at an offset from each line. Lines that are null are left out. The first float of a line
// belongs to `channel`.
inline void write_square(const float* from, int64_t stride, int64_t width,
                         float* const (&lines)[kLanes], int64_t offset, int64_t channel,
                         const Finish* finish) {
  Vec square[kLanes] = {};
  if (width == kLanes) {
    JAXPRUNE_UNROLL for (int i = 0; i < kLanes; i++) square[i] = load(from + i * stride);
    transpose(square);
    JAXPRUNE_UNROLL for (int i = 0; i < kLanes; i++) {
      if (lines[i]) put(lines[i] + offset, square[i], channel, kLanes, finish);
    }
    return;
  }
  for (int64_t i = 0; i < width; i++) square[i] = load(from + i * stride);
  transpose(square);
  for (int i = 0; i < kLanes; i++) {
    if (lines[i]) put(lines[i] + offset, square[i], channel, width, finish);
  }
}

}  // namespace jaxprune
