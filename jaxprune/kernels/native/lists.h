// Which weights are kept, as lists of indices. They come from the caller and are checked before any
// memory is touched through them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "cores.h"

namespace jaxprune {

// The kept weights of a kernel [inputs, outputs] in its own order: those of an input are entries
// starts[input] to starts[input + 1], and kept[i] is the output of an entry.
struct List {
  const int32_t* starts;
  const int32_t* kept;
  int64_t inputs, outputs;
  int64_t capacity;  // entries that memory holds

  int64_t size() const { return starts[inputs]; }
};

// Values of kept weights: packed, or in their places in a dense kernel.
struct Weights {
  const float* data;
  const int32_t* positions;  // null where values are packed
  int64_t size;              // of the data

  float at(int64_t i) const { return positions ? data[positions[i]] : data[i]; }
};

// Whether the first `count` entries lie in [0, below). Without branches, so that it vectorises.
inline bool all_below(const int32_t* values, int64_t count, int64_t below) {
  uint32_t largest = 0;  // a negative number is a large one here
  for (int64_t i = 0; i < count; i++) {
    const uint32_t own = static_cast<uint32_t>(values[i]);
    largest = own > largest ? own : largest;
  }
  return count == 0 || static_cast<int64_t>(largest) < below;
}

// Each check returns what is wrong, or an empty text.
inline std::string check_indices(const char* name, const int32_t* values, int64_t count,
                                 int64_t below) {
  if (all_below(values, count, below)) return "";
  return std::string("`") + name + "` must be in [0, " + std::to_string(below) +
         "), but some entries are not; make indices with product_indices or convolution_indices";
}

inline std::string check_list(const List& list) {
  bool rises = list.starts[0] == 0;
  for (int64_t i = 0; i < list.inputs; i++) rises &= list.starts[i] <= list.starts[i + 1];
  if (!rises || list.size() > list.capacity) {
    return "`starts` must rise from 0 to at most " + std::to_string(list.capacity) +
           ", but does not; make indices with product_indices";
  }
  return check_indices("outputs", list.kept, list.size(), list.outputs);
}

// Offsets in a block of rows are 32-bit numbers.
inline std::string check_size(const List& list) {
  if (std::max(list.inputs, list.outputs) * 8 * kLanes <= INT32_MAX) return "";
  return "the kernel has too many inputs or outputs for 32-bit offsets; split it";
}

inline std::string check_weights(const Weights& weights, int64_t count) {
  if (weights.positions == nullptr) {
    return count <= weights.size ? "" : "there are fewer `values` than kept weights";
  }
  return check_indices("positions", weights.positions, count, weights.size);
}

}  // namespace jaxprune
