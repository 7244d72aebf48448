// Depthwise convolutions [batch, rows, columns, channels]: each channel has a window of its own.
//
// Lanes are channels. A few vectors of channels of one image are copied into memory that the
// second-level cache holds, with zeros around the image, so that no tap needs a check. Windows
// [rows, columns, 1, channels] are dense: there are few weights, and each is used at every pixel.
#pragma once

#include <algorithm>
#include <cstring>
#include <string>

#include "convolutions.h"
#include "finish.h"
#include "parallel.h"
#include "scratch.h"
#include "vectors.h"

namespace jaxprune {

constexpr int64_t kPlaneBytes = 256 << 10;
constexpr int64_t kMostVectors = 4;

// Some channels of an image, with a frame of zeros: vectors [rows, columns, vectors].
struct Plane {
  float* data;
  Pair size;
  int64_t vectors;

  const float* at(int64_t row, int64_t column) const {
    return data + (row * size.column + column) * vectors * kLanes;
  }
};

// Channels that are handled together.
struct Chunk {
  int64_t first, count, vectors;

  int64_t width(int64_t vector) const { return std::min<int64_t>(kLanes, count - vector * kLanes); }
};

// How channels are divided: vectors of a chunk, and chunks.
struct Division {
  int64_t vectors, chunks;
};

// Divides channels so that a plane of each chunk fits into the cache.
inline Division division_of(int64_t channels, int64_t pixels) {
  const int64_t room = kPlaneBytes / (pixels * kLanes * static_cast<int64_t>(sizeof(float)));
  const int64_t needed = (channels + kLanes - 1) / kLanes;
  const int64_t vectors = std::clamp<int64_t>(std::min(room, needed), 1, kMostVectors);
  return {vectors, (needed + vectors - 1) / vectors};
}

inline Chunk chunk_at(int64_t number, int64_t vectors, int64_t channels) {
  const int64_t first = number * vectors * kLanes;
  const int64_t count = std::min(vectors * kLanes, channels - first);
  return {first, count, (count + kLanes - 1) / kLanes};
}

// Copies channels of pixels that lie `channels` floats apart.
inline void read_pixels(const float* from, int64_t pixels, int64_t channels, const Chunk& chunk,
                        float* to) {
  for (int64_t pixel = 0; pixel < pixels; pixel++, from += channels) {
    for (int64_t v = 0; v < chunk.vectors; v++, to += kLanes) {
      const int64_t width = chunk.width(v);
      const float* own = from + v * kLanes;
      store(to, width == kLanes ? load(own) : load_some(own, width));
    }
  }
}

// Fills a plane whose first pixel is at `origin` of the image.
inline void read_plane(const float* image, const Pair& size, const Pair& origin, int64_t channels,
                       const Chunk& chunk, const Plane& plane) {
  const int64_t pixel = chunk.vectors * kLanes;
  std::memset(plane.data, 0, sizeof(float) * plane.size.row * plane.size.column * pixel);
  const int64_t left = std::max<int64_t>(0, origin.column);
  const int64_t right = std::min(size.column, origin.column + plane.size.column);
  for (int64_t row = 0; row < plane.size.row; row++) {
    const int64_t own = origin.row + row;
    if (own < 0 || own >= size.row || left >= right) continue;
    read_pixels(image + (own * size.column + left) * channels + chunk.first, right - left, channels,
                chunk, plane.data + (row * plane.size.column + left - origin.column) * pixel);
  }
}

// Taps of a window that meet one class of pixels: row `i` of `rows` is `row_step` rows further in the
// plane, and row_first + i * row_stride in the window; columns likewise.
struct PhaseTaps {
  Pair count, first, stride, step;
};

// Sums of U neighbouring pixels, `apart` floats apart in the plane.
template <int U>
inline void sum_taps(const float* from, int64_t row, int64_t pixel, int64_t apart,
                     const float* weights, int64_t window_columns, const PhaseTaps& taps,
                     Vec (&sums)[U]) {
  for (int64_t i = 0; i < taps.count.row; i++) {
    const float* own = from + i * taps.step.row * row;
    const float* w =
        weights + ((taps.first.row + i * taps.stride.row) * window_columns + taps.first.column) * pixel;
    for (int64_t j = 0; j < taps.count.column; j++) {
      const Vec by = load(w);
      JAXPRUNE_UNROLL for (int u = 0; u < U; u++) sums[u] += load(own + u * apart) * by;
      own += taps.step.column * pixel;
      w += taps.stride.column * pixel;
    }
  }
}

// A row of targets `target_apart` floats apart from sources `apart` floats apart.
template <int U>
inline int64_t sum_pixels(int64_t from_column, int64_t columns, const float* source, int64_t row,
                          int64_t pixel, int64_t apart, const float* weights, int64_t window_columns,
                          const PhaseTaps& taps, float* target, int64_t target_apart, int64_t width,
                          int64_t channel, const Finish* finish) {
  int64_t column = from_column;
  for (; column + U <= columns; column += U) {
    Vec sums[U] = {};
    sum_taps<U>(source + column * apart, row, pixel, apart, weights, window_columns, taps, sums);
    JAXPRUNE_UNROLL for (int u = 0; u < U; u++) {
      float* to = target + (column + u) * target_apart;
      put(to, sums[u], channel, width, finish);
    }
  }
  return column;
}

inline void sum_row(int64_t columns, const float* source, int64_t row, int64_t pixel, int64_t apart,
                    const float* weights, int64_t window_columns, const PhaseTaps& taps, float* target,
                    int64_t target_apart, int64_t width, int64_t channel, const Finish* finish) {
  int64_t at = 0;
  at = sum_pixels<7>(at, columns, source, row, pixel, apart, weights, window_columns, taps, target,
                     target_apart, width, channel, finish);
  at = sum_pixels<3>(at, columns, source, row, pixel, apart, weights, window_columns, taps, target,
                     target_apart, width, channel, finish);
  sum_pixels<1>(at, columns, source, row, pixel, apart, weights, window_columns, taps, target,
                target_apart, width, channel, finish);
}

// Weights of the channels of a chunk: vectors [taps, vectors].
inline float* weights_of_chunk(const Convolution& c, const float* weights, const Chunk& chunk) {
  const int64_t taps = c.window.row * c.window.column;
  float* own = scratch<float>(kValues, taps * chunk.vectors * kLanes);
  read_pixels(weights + chunk.first, taps, c.inputs, chunk, own);
  return own;
}

// The pixels of a padded image that the windows of all outputs cover.
inline Pair reach_of(const Convolution& c) {
  return {(c.output.row - 1) * c.stride.row + c.window.row,
          (c.output.column - 1) * c.stride.column + c.window.column};
}

inline std::string depthwise(const Workers& workers, const Convolution& c, const float* x,
                             const float* weights, float* y, const Finish* finish = nullptr) {
  const Pair size = reach_of(c);
  const Division division = division_of(c.inputs, size.row * size.column);
  const int64_t vectors = division.vectors, chunks = division.chunks;
  const PhaseTaps taps = {c.window, {0, 0}, {1, 1}, {1, 1}};
  parallel(workers, c.batch * chunks, [&](int64_t task) {
    const Chunk chunk = chunk_at(task % chunks, vectors, c.inputs);
    const int64_t image = task / chunks, pixel = chunk.vectors * kLanes;
    const float* own = weights_of_chunk(c, weights, chunk);
    const Plane plane = {scratch<float>(kSource, size.row * size.column * pixel), size,
                         chunk.vectors};
    read_plane(x + image * c.image.row * c.image.column * c.inputs, c.image,
               {-c.padding.row, -c.padding.column}, c.inputs, chunk, plane);
    for (int64_t row = 0; row < c.output.row; row++) {
      float* to = y + ((image * c.output.row + row) * c.output.column) * c.inputs + chunk.first;
      for (int64_t v = 0; v < chunk.vectors; v++) {
        sum_row(c.output.column, plane.at(row * c.stride.row, 0) + v * kLanes,
                size.column * pixel, pixel, c.stride.column * pixel, own + v * kLanes,
                c.window.column, taps, to + v * kLanes, c.inputs, chunk.width(v),
                chunk.first + v * kLanes, finish);
      }
    }
  });
  return "";
}

// Divides towards minus infinity.
inline int64_t floor_of(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

// The gradient by the images. Pixel i of a padded image meets the taps p with p = i modulo the
// stride, and with these the outputs (i - p) / stride: one step back for each further tap.
inline std::string depthwise_back(const Workers& workers, const Convolution& c, const float* dy,
                                  const float* weights, float* dx) {
  const Pair most = {(c.window.row - 1) / c.stride.row, (c.window.column - 1) / c.stride.column};
  const Pair origin = {c.padding.row / c.stride.row - most.row,
                       c.padding.column / c.stride.column - most.column};
  const Pair last = {(c.image.row - 1 + c.padding.row) / c.stride.row,
                     (c.image.column - 1 + c.padding.column) / c.stride.column};
  const Pair size = {last.row - origin.row + 1, last.column - origin.column + 1};
  const Division division = division_of(c.inputs, size.row * size.column);
  const int64_t vectors = division.vectors, chunks = division.chunks;
  parallel(workers, c.batch * chunks, [&](int64_t task) {
    const Chunk chunk = chunk_at(task % chunks, vectors, c.inputs);
    const int64_t image = task / chunks, pixel = chunk.vectors * kLanes;
    const float* own = weights_of_chunk(c, weights, chunk);
    const Plane plane = {scratch<float>(kSource, size.row * size.column * pixel), size,
                         chunk.vectors};
    read_plane(dy + image * c.output.row * c.output.column * c.inputs, c.output, origin, c.inputs,
               chunk, plane);
    for (int64_t row = 0; row < c.image.row; row++) {
      const int64_t padded = row + c.padding.row, top = padded / c.stride.row - origin.row;
      for (int64_t phase = 0; phase < std::min(c.stride.column, c.image.column); phase++) {
        const int64_t column = phase + c.padding.column, left = column / c.stride.column;
        const Pair first = {padded % c.stride.row, column % c.stride.column};
        const Pair count = {std::max<int64_t>(0, floor_of(c.window.row - 1 - first.row, c.stride.row) + 1),
                            std::max<int64_t>(0, floor_of(c.window.column - 1 - first.column, c.stride.column) + 1)};
        const PhaseTaps taps = {count, first, c.stride, {-1, -1}};
        const int64_t columns = (c.image.column - phase + c.stride.column - 1) / c.stride.column;
        float* to = dx + ((image * c.image.row + row) * c.image.column + phase) * c.inputs + chunk.first;
        for (int64_t v = 0; v < chunk.vectors; v++) {
          sum_row(columns, plane.at(top, left - origin.column) + v * kLanes, size.column * pixel,
                  pixel, pixel, own + v * kLanes, c.window.column, taps, to + v * kLanes,
                  c.stride.column * c.inputs, chunk.width(v), 0, nullptr);
        }
      }
    }
  });
  return "";
}

// Adds to `sums` [rows, columns of the window] what R x K taps gain at one row of outputs.
template <int R, int K>
inline void correlate_row(const float* x, int64_t row, int64_t pixel, int64_t apart, const float* dy,
                          int64_t columns, float* sums, int64_t window_columns) {
  Vec own[R][K];
  for (int i = 0; i < R; i++)
    for (int k = 0; k < K; k++) own[i][k] = load(sums + (i * window_columns + k) * pixel);
  for (int64_t column = 0; column < columns; column++, x += apart, dy += pixel) {
    const Vec by = load(dy);
    JAXPRUNE_UNROLL for (int i = 0; i < R; i++)
      JAXPRUNE_UNROLL for (int k = 0; k < K; k++) own[i][k] += load(x + i * row + k * pixel) * by;
  }
  for (int i = 0; i < R; i++)
    for (int k = 0; k < K; k++) store(sums + (i * window_columns + k) * pixel, own[i][k]);
}

// The same for a whole window, whose sums do not all fit into registers.
inline void correlate_window(const Pair& window, const float* x, int64_t row, int64_t pixel,
                             int64_t apart, const float* dy, int64_t columns, float* sums) {
  int64_t i = 0;
  if (window.column == 3) {
    for (; i + 3 <= window.row; i += 3) {
      correlate_row<3, 3>(x + i * row, row, pixel, apart, dy, columns, sums + i * 3 * pixel, 3);
    }
  }
  for (; i < window.row; i++) {
    int64_t k = 0;
    const float* from = x + i * row;
    float* to = sums + i * window.column * pixel;
    for (; k + 7 <= window.column; k += 7) {
      correlate_row<1, 7>(from + k * pixel, row, pixel, apart, dy, columns, to + k * pixel, 7);
    }
    for (; k + 5 <= window.column; k += 5) {
      correlate_row<1, 5>(from + k * pixel, row, pixel, apart, dy, columns, to + k * pixel, 5);
    }
    for (; k < window.column; k++) {
      correlate_row<1, 1>(from + k * pixel, row, pixel, apart, dy, columns, to + k * pixel, 1);
    }
  }
}

// The gradient by the windows. Images are divided into as many parts as there are threads, whose
// sums are added in order.
inline std::string depthwise_sample(const Workers& workers, const Convolution& c, const float* x,
                                    const float* dy, float* gradient) {
  const Pair size = reach_of(c);
  const Division division = division_of(c.inputs, size.row * size.column);
  const int64_t vectors = division.vectors, chunks = division.chunks;
  const int64_t taps = c.window.row * c.window.column, stride = vectors * kLanes * chunks;
  const int64_t parts = std::clamp<int64_t>(workers.threads, 1, c.batch);
  float* partial = scratch<float>(kPartial, parts * taps * stride);
  std::memset(partial, 0, sizeof(float) * parts * taps * stride);
  parallel(workers, parts * chunks, [&](int64_t task) {
    const int64_t part = task / chunks, number = task % chunks;
    const Chunk chunk = chunk_at(number, vectors, c.inputs);
    const int64_t pixel = chunk.vectors * kLanes, outputs = c.output.row * c.output.column;
    const Plane plane = {scratch<float>(kSource, size.row * size.column * pixel), size,
                         chunk.vectors};
    float* by = scratch<float>(kCotangent, outputs * pixel);
    float* sums = partial + part * taps * stride + number * taps * vectors * kLanes;
    for (int64_t image = c.batch * part / parts; image < c.batch * (part + 1) / parts; image++) {
      read_plane(x + image * c.image.row * c.image.column * c.inputs, c.image,
                 {-c.padding.row, -c.padding.column}, c.inputs, chunk, plane);
      read_pixels(dy + image * outputs * c.inputs + chunk.first, outputs, c.inputs, chunk, by);
      for (int64_t row = 0; row < c.output.row; row++) {
        for (int64_t v = 0; v < chunk.vectors; v++) {
          correlate_window(c.window, plane.at(row * c.stride.row, 0) + v * kLanes,
                           size.column * pixel, pixel, c.stride.column * pixel,
                           by + row * c.output.column * pixel + v * kLanes, c.output.column,
                           sums + v * kLanes);
        }
      }
    }
  });
  for (int64_t number = 0; number < chunks; number++) {
    const Chunk chunk = chunk_at(number, vectors, c.inputs);
    for (int64_t tap = 0; tap < taps; tap++) {
      for (int64_t i = 0; i < chunk.count; i++) {
        float sum = 0;
        for (int64_t part = 0; part < parts; part++) {
          sum += partial[part * taps * stride + number * taps * vectors * kLanes +
                         tap * chunk.vectors * kLanes + i];
        }
        gradient[tap * c.inputs + chunk.first + i] = sum;
      }
    }
  }
  return "";
}

}  // namespace jaxprune
