// Convolutions [batch, rows, columns, channels] with a sparse kernel, forward and backward.
//
// Lanes are images, or strips of rows of them where there are few images. A tap of the window is
// then an offset that is the same in all lanes, for every stride and padding. Strips are read into
// memory that the second-level cache holds, with zeros around the image.
//
// The gradient by the images is the same loop. With a stride, neighbouring pixels of an image see
// different taps, so pixels fall into phases, and each phase has a list of its own.
#pragma once

#include <algorithm>
#include <cstring>
#include <string>

#include "cores.h"
#include "finish.h"
#include "lists.h"
#include "parallel.h"
#include "scratch.h"

namespace jaxprune {

constexpr int64_t kStripBytes = 512 << 10;
constexpr int kMaxTile = 8;  // pixels whose sums are in registers at once

struct Pair {
  int64_t row, column;
};

// One convolution as the user knows it.
struct Convolution {
  int64_t batch;
  Pair image, output, window, stride, padding;  // padding before the first row and column
  int64_t inputs, outputs;
};

// Kept weights, in any order: tap = row in window * columns of window + column.
struct Taps {
  const int32_t *taps, *inputs, *outputs;
  int64_t size;
};

// A walk over a grid of pixels. At each, sources lie in a window; results go to targets.
struct Walk {
  int64_t batch;
  Pair source, target, grid;
  Pair step, origin, reach;            // of the source: pixel = grid * step + origin + [0, reach)
  Pair target_step, target_origin;     // of the target, before phases are added
  int64_t source_channels, target_channels;
};

inline Walk forward_walk(const Convolution& c) {
  return {c.batch,  c.image,      c.output, c.output, c.stride, {-c.padding.row, -c.padding.column},
          c.window, {1, 1},       {0, 0},   c.inputs, c.outputs};
}

inline Walk backward_walk(const Convolution& c) {
  // In padded coordinates a pixel is stride * u + phase. Its window begins at output u - reach + 1.
  const Pair first = {c.padding.row / c.stride.row, c.padding.column / c.stride.column};
  const Pair last = {(c.image.row - 1 + c.padding.row) / c.stride.row,
                     (c.image.column - 1 + c.padding.column) / c.stride.column};
  const Pair reach = {(c.window.row - 1) / c.stride.row + 1,
                      (c.window.column - 1) / c.stride.column + 1};
  return {c.batch,
          c.output,
          c.image,
          {last.row - first.row + 1, last.column - first.column + 1},
          {1, 1},
          {first.row - reach.row + 1, first.column - reach.column + 1},
          reach,
          c.stride,
          {c.stride.row * first.row - c.padding.row,
           c.stride.column * first.column - c.padding.column},
          c.outputs,
          c.inputs};
}

// How lanes and strips divide a walk.
struct Strips {
  int64_t rows;      // of the grid, in one strip
  int64_t lanes;     // strips of all images
  Pair size;         // source pixels of a strip
  int64_t plane;     // floats from one channel to the next
  int64_t groups() const { return (lanes + kLanes - 1) / kLanes; }
};

inline Strips divide(const Walk& walk, int64_t threads) {
  const int64_t columns = (walk.grid.column - 1) * walk.step.column + walk.reach.column;
  const int64_t row_bytes = walk.source_channels * columns * kLanes * sizeof(float);
  int64_t rows = (kStripBytes / row_bytes - walk.reach.row) / walk.step.row + 1;
  // Few images are cut into more strips, so that all lanes and all threads have some.
  rows = std::min(rows, walk.grid.row * walk.batch / (kLanes * threads));
  rows = std::clamp<int64_t>(rows, 1, walk.grid.row);
  const int64_t strips = (walk.grid.row + rows - 1) / rows;
  rows = (walk.grid.row + strips - 1) / strips;
  const Pair size = {(rows - 1) * walk.step.row + walk.reach.row, columns};
  // An odd number of vectors: otherwise all channels would share a few sets of the cache.
  return {rows, strips * walk.batch, size, ((size.row * size.column) | 1) * kLanes};
}

// Where the lanes of a group begin.
struct Lanes {
  int count;
  int64_t image[kLanes], first[kLanes];  // image, and first row of the grid

  Lanes(const Walk& walk, const Strips& strips, int64_t group) {
    count = static_cast<int>(std::min<int64_t>(kLanes, strips.lanes - group * kLanes));
    for (int i = 0; i < count; i++) {
      const int64_t number = group * kLanes + i;  // neighbours are the same strip of more images
      image[i] = number % walk.batch;
      first[i] = number / walk.batch * strips.rows;
    }
  }
};

// Reads pixels of the strips of a group: [channels, size.row, size.column, kLanes], 0 outside.
inline void read_strips(const float* images, Pair shape, int64_t channels, const Lanes& lanes,
                        int64_t step, Pair origin, Pair size, int64_t plane, float* to) {
  for (int64_t row = 0; row < size.row; row++) {
    const float* lines[kLanes] = {};
    for (int i = 0; i < lanes.count; i++) {
      const int64_t own = lanes.first[i] * step + origin.row + row;
      if (own < 0 || own >= shape.row) continue;
      lines[i] = images + (lanes.image[i] * shape.row + own) * shape.column * channels;
    }
    for (int64_t column = 0; column < size.column; column++) {
      const int64_t pixel = origin.column + column;
      float* start = to + (row * size.column + column) * kLanes;
      if (pixel < 0 || pixel >= shape.column) {
        for (int64_t i = 0; i < channels; i++) store(start + i * plane, Vec{});
        continue;
      }
      for (int64_t channel = 0; channel < channels; channel += kLanes) {
        const int64_t width = std::min<int64_t>(kLanes, channels - channel);
        read_square(lines, pixel * channels + channel, width, start + channel * plane, plane);
      }
    }
  }
}

// Entries by phase and target channel, with offsets in a strip. `places` says which weight each is.
struct Table {
  const int32_t* starts;  // [phases * targets + 1]
  const Entry* entries;
  const int32_t* places;
};

inline Table forward_table(const Convolution& c, const Strips& strips, const Taps& kept,
                           const Weights* weights) {
  int32_t* starts = scratch<int32_t>(kStarts, c.outputs + 2);
  Entry* entries = scratch<Entry>(kEntries, kept.size);
  int32_t* places = scratch<int32_t>(kPlaces, kept.size);
  std::memset(starts, 0, sizeof(int32_t) * (c.outputs + 2));
  int32_t* next = starts + 1;  // next[i + 1] counts, then next[i] is where the next entry goes
  for (int64_t i = 0; i < kept.size; i++) next[kept.outputs[i] + 1]++;
  for (int64_t i = 0; i < c.outputs; i++) next[i + 1] += next[i];
  for (int64_t i = 0; i < kept.size; i++) {
    const int64_t row = kept.taps[i] / c.window.column, column = kept.taps[i] % c.window.column;
    const int64_t pixel = row * strips.size.column + column;
    const int32_t place = next[kept.outputs[i]]++;
    entries[place] = {static_cast<int32_t>(kept.inputs[i] * strips.plane + pixel * kLanes),
                      weights ? weights->at(i) : 0};
    places[place] = static_cast<int32_t>(i);
  }
  return {starts, entries, places};
}

inline Table backward_table(const Convolution& c, const Walk& walk, const Strips& strips,
                            const Taps& kept, const Weights& weights) {
  const int64_t lists = c.stride.row * c.stride.column * c.inputs;
  int32_t* starts = scratch<int32_t>(kStarts, lists + 2);
  Entry* entries = scratch<Entry>(kEntries, kept.size);
  std::memset(starts, 0, sizeof(int32_t) * (lists + 2));
  int32_t* next = starts + 1;
  auto list_of = [&](int64_t i) {
    const int64_t row = kept.taps[i] / c.window.column, column = kept.taps[i] % c.window.column;
    const int64_t phase = row % c.stride.row * c.stride.column + column % c.stride.column;
    return phase * c.inputs + kept.inputs[i];
  };
  for (int64_t i = 0; i < kept.size; i++) next[list_of(i) + 1]++;
  for (int64_t i = 0; i < lists; i++) next[i + 1] += next[i];
  for (int64_t i = 0; i < kept.size; i++) {
    const int64_t row = kept.taps[i] / c.window.column, column = kept.taps[i] % c.window.column;
    const int64_t pixel = (walk.reach.row - 1 - row / c.stride.row) * strips.size.column +
                          walk.reach.column - 1 - column / c.stride.column;
    entries[next[list_of(i)]++] = {
        static_cast<int32_t>(kept.outputs[i] * strips.plane + pixel * kLanes), weights.at(i)};
  }
  return {starts, entries, nullptr};
}

// Writes the results [channels, tile, kLanes] of one row of a tile into the images of a group.
inline void write_tile(const float* from, const Walk& walk, const Lanes& lanes, int64_t grid_row,
                       int64_t grid_column, Pair phase, int tile, float* images,
                       const Finish* finish) {
  const int64_t channels = walk.target_channels;
  float* lines[kLanes] = {};
  for (int i = 0; i < lanes.count; i++) {
    const int64_t own = lanes.first[i] + grid_row;
    const int64_t row = own * walk.target_step.row + walk.target_origin.row + phase.row;
    if (own >= walk.grid.row || row < 0 || row >= walk.target.row) continue;
    lines[i] = images + (lanes.image[i] * walk.target.row + row) * walk.target.column * channels;
  }
  for (int pixel = 0; pixel < tile; pixel++) {
    const int64_t column =
        (grid_column + pixel) * walk.target_step.column + walk.target_origin.column + phase.column;
    if (column < 0 || column >= walk.target.column) continue;
    for (int64_t channel = 0; channel < channels; channel += kLanes) {
      const int64_t width = std::min<int64_t>(kLanes, channels - channel);
      write_square(from + (channel * tile + pixel) * kLanes, tile * kLanes, width, lines,
                   column * channels + channel, channel, finish);
    }
  }
}

// Calls function(constant tile, constant step in floats) for run-time numbers.
template <int V = kMaxTile, class Function>
void with_tile(int tile, int64_t step, const Function& function) {
  if constexpr (V > 0) {
    if (tile != V) return with_tile<V - 1>(tile, step, function);
    step == 1 ? function(std::integral_constant<int, V>(), std::integral_constant<int, kLanes>())
              : function(std::integral_constant<int, V>(), std::integral_constant<int, 2 * kLanes>());
  }
}

// Equal tiles of a row, as large as registers allow: 14 pixels are 7 and 7.
inline int tile_of(int64_t columns) {
  const int64_t tiles = (columns + kMaxTile - 1) / kMaxTile;
  return static_cast<int>((columns + tiles - 1) / tiles);
}

inline void run(const Workers& workers, const Walk& walk, const Strips& strips, const Table& table,
                Pair phases, const float* images, float* results, const Finish* finish) {
  const int64_t channels = walk.target_channels;
  const int full = tile_of(walk.grid.column);
  parallel(workers, strips.groups(), [&](int64_t group) {
    const Lanes lanes(walk, strips, group);
    float* source = scratch<float>(kSource, walk.source_channels * strips.plane);
    float* target = scratch<float>(kTarget, channels * kMaxTile * kLanes);
    read_strips(images, walk.source, walk.source_channels, lanes, walk.step.row, walk.origin,
                strips.size, strips.plane, source);
    for (int64_t row = 0; row < strips.rows; row++) {
      for (int64_t column = 0; column < walk.grid.column; column += full) {
        const int tile = static_cast<int>(std::min<int64_t>(full, walk.grid.column - column));
        const float* base = source + (row * walk.step.row * strips.size.column +
                                      column * walk.step.column) * kLanes;
        for (int64_t phase = 0; phase < phases.row * phases.column; phase++) {
          const int32_t* starts = table.starts + phase * channels;
          with_tile(tile, walk.step.column, [&](auto vectors, auto step) {
            constexpr int V = decltype(vectors)::value;
            for (int64_t i = 0; i < channels; i++) {
              Vec sums[V] = {};
              accumulate<V, decltype(step)::value>(base, table.entries + starts[i],
                                                   table.entries + starts[i + 1], sums);
              JAXPRUNE_UNROLL for (int v = 0; v < V; v++) store(target + (i * V + v) * kLanes, sums[v]);
            }
          });
          write_tile(target, walk, lanes, row, column,
                     {phase / phases.column, phase % phases.column}, tile, results, finish);
        }
      }
    }
  });
}

inline std::string check_strips(const Walk& walk, const Strips& strips) {
  if (walk.source_channels * strips.plane <= INT32_MAX) return "";
  return "one row of the images has more than 2^31 entries in all lanes; use smaller images";
}

// y = convolution of x with the kept weights.
inline std::string convolve(const Workers& workers, const Convolution& c, const float* x,
                            const Taps& kept, const Weights& weights, float* y,
                            const Finish* finish = nullptr) {
  const Walk walk = forward_walk(c);
  const Strips strips = divide(walk, workers.threads);
  if (auto wrong = check_strips(walk, strips); !wrong.empty()) return wrong;
  run(workers, walk, strips, forward_table(c, strips, kept, &weights), {1, 1}, x, y, finish);
  return "";
}

// The gradient of convolve by x, for a cotangent dy of y.
inline std::string convolve_back(const Workers& workers, const Convolution& c, const float* dy,
                                 const Taps& kept, const Weights& weights, float* dx) {
  const Walk walk = backward_walk(c);
  const Strips strips = divide(walk, workers.threads);
  if (auto wrong = check_strips(walk, strips); !wrong.empty()) return wrong;
  run(workers, walk, strips, backward_table(c, walk, strips, kept, weights), c.stride, dy, dx, nullptr);
  return "";
}

// The gradient of convolve by the kept weights. As in `sample`, the sums of parts are added in order.
inline std::string convolve_sample(const Workers& workers, const Convolution& c, const float* x,
                                   const float* dy, const Taps& kept, float* gradient) {
  const Walk walk = forward_walk(c);
  const Strips strips = divide(walk, workers.threads);
  if (auto wrong = check_strips(walk, strips); !wrong.empty()) return wrong;
  const Table table = forward_table(c, strips, kept, nullptr);
  const int full = tile_of(c.output.column);
  const int64_t groups = strips.groups(), plane = ((strips.rows * c.output.column) | 1) * kLanes;
  const int64_t parts = std::clamp<int64_t>(workers.threads, 1, groups);
  float* partial = scratch<float>(kPartial, parts * kept.size);
  std::memset(partial, 0, sizeof(float) * parts * kept.size);
  parallel(workers, parts, [&](int64_t part) {
    float* source = scratch<float>(kSource, c.inputs * strips.plane);
    float* cotangent = scratch<float>(kCotangent, c.outputs * plane);
    float* sums = partial + part * kept.size;
    for (int64_t group = groups * part / parts; group < groups * (part + 1) / parts; group++) {
      const Lanes lanes(walk, strips, group);
      read_strips(x, c.image, c.inputs, lanes, c.stride.row, walk.origin, strips.size, strips.plane,
                  source);
      read_strips(dy, c.output, c.outputs, lanes, 1, {0, 0}, {strips.rows, c.output.column}, plane,
                  cotangent);
      for (int64_t row = 0; row < strips.rows; row++) {
        for (int64_t column = 0; column < c.output.column; column += full) {
          const int tile = static_cast<int>(std::min<int64_t>(full, c.output.column - column));
          const float* base = source + (row * c.stride.row * strips.size.column +
                                        column * c.stride.column) * kLanes;
          const float* by = cotangent + (row * c.output.column + column) * kLanes;
          with_tile(tile, c.stride.column, [&](auto vectors, auto step) {
            constexpr int V = decltype(vectors)::value;
            for (int64_t i = 0; i < c.outputs; i++) {
              Vec own[V];
              JAXPRUNE_UNROLL for (int v = 0; v < V; v++) own[v] = load(by + i * plane + v * kLanes);
              const int32_t start = table.starts[i], end = table.starts[i + 1];
              correlate<V, decltype(step)::value>(base, table.entries + start, table.entries + end,
                                                  own, sums + start);
            }
          });
        }
      }
    }
  });
  for (int64_t i = 0; i < kept.size; i++) {
    float sum = partial[i];
    for (int64_t part = 1; part < parts; part++) sum += partial[part * kept.size + i];
    gradient[table.places[i]] = sum;
  }
  return "";
}

}  // namespace jaxprune
