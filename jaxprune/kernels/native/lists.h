// Which weights are kept, as lists of indices. They come from the caller and are checked before any
// memory is touched through them.
#pragma once

#include <cstdint>
#include <string>

#include "cores.h"

namespace jaxprune {

// For each target, the sources it is summed from: entries starts[target] to starts[target + 1].
struct List {
  const int32_t* starts;
  int64_t targets;
  const int32_t* sources;
  int64_t source_count;  // each source is below this
  int64_t capacity;      // entries that memory holds

  int64_t size() const { return starts[targets]; }
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

inline std::string check_list(const char* starts_name, const char* sources_name,
                              const List& list) {
  bool rises = list.starts[0] == 0;
  for (int64_t i = 0; i < list.targets; i++) rises &= list.starts[i] <= list.starts[i + 1];
  if (!rises || list.size() > list.capacity) {
    return std::string("`") + starts_name + "` must rise from 0 to at most " +
           std::to_string(list.capacity) +
           ", but does not; make indices with product_indices";
  }
  return check_indices(sources_name, list.sources, list.size(), list.source_count);
}

inline std::string check_weights(const Weights& weights, int64_t count) {
  if (weights.positions == nullptr) {
    return count <= weights.size ? "" : "there are fewer `values` than kept weights";
  }
  return check_indices("positions", weights.positions, count, weights.size);
}

}  // namespace jaxprune
