// The two inner loops: sums of values times sources, and sums of sources times cotangents.
//
// Both work on several vectors at a time. In a vector, neighbouring lanes are different rows of a
// product or different images of a convolution, so each load is a whole aligned line of memory.
#pragma once

#include "vectors.h"

namespace jaxprune {

// A kept weight: where its source lies, counted in floats from a base, and its value.
struct Entry {
  int32_t offset;
  float value;
};

// sums[v] += value * source[offset + v * Step] over entries, for V vectors.
template <int V, int Step>
inline void accumulate(const float* base, const Entry* entry, const Entry* end, Vec (&sums)[V]) {
  for (; entry < end; entry++) {
    const Vec value = broadcast(entry->value);
    const float* source = base + entry->offset;
    JAXPRUNE_UNROLL for (int v = 0; v < V; v++) sums[v] += value * load(source + v * Step);
  }
}

template <int V, int Step>
inline Vec products(const float* source, const Vec (&cotangents)[V]) {
  Vec sum = cotangents[0] * load(source);
  JAXPRUNE_UNROLL for (int v = 1; v < V; v++) sum += cotangents[v] * load(source + v * Step);
  return sum;
}

// gradient[i] += sum of cotangents[v] * source[offset of i + v * Step] over v and lanes.
template <int V, int Step>
inline void correlate(const float* base, const Entry* entry, const Entry* end,
                      const Vec (&cotangents)[V], float* gradient) {
  float found[4];
  for (; entry + 4 <= end; entry += 4, gradient += 4) {
    lane_sums(products<V, Step>(base + entry[0].offset, cotangents),
         products<V, Step>(base + entry[1].offset, cotangents),
         products<V, Step>(base + entry[2].offset, cotangents),
         products<V, Step>(base + entry[3].offset, cotangents), found);
    JAXPRUNE_UNROLL for (int i = 0; i < 4; i++) gradient[i] += found[i];
  }
  for (; entry < end; entry++, gradient++) {
    lane_sums(products<V, Step>(base + entry->offset, cotangents), Vec{}, Vec{}, Vec{}, found);
    gradient[0] += found[0];
  }
}

}  // namespace jaxprune
