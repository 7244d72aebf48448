// Products and convolutions whose weights are kept in blocks of 16 outputs for one input.
//
// Lanes are the outputs of a block. Images and rows are then read as they lie in memory, where the
// other kernels transpose them, and the values of a block are one load for several pixels.
#pragma once

#include <algorithm>
#include <cstring>
#include <string>
#include <type_traits>

#include "convolutions.h"
#include "finish.h"
#include "products.h"

namespace jaxprune {

constexpr int kWidth = 16;                // outputs of a block; the last one may have fewer
constexpr int kPieces = kWidth / kLanes;  // vectors of a block
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
// Pixels or rows whose sums are in registers at once.
constexpr int kMostPixels = std::min(16, (kRegisters - kPieces - 1) / kPieces);
constexpr int64_t kImageBytes = 256 << 10;  // of a strip of an image with its padding
// Numbers that lie a multiple of so many floats apart share a few sets of the first-level cache.
constexpr int64_t kCrowded = 512;
constexpr int64_t kLine = 16;  // floats in a line of the cache

// sums[p] += values of a block * source[offset + p * step] over blocks, for P pixels.
template <int P>
inline void accumulate_blocks(const float* base, int64_t step, const int32_t* offset,
                              const int32_t* end, const float* values, Vec (&sums)[P][kPieces]) {
  for (; offset < end; offset++, values += kWidth) {
    const float* source = base + *offset;
    Vec own[kPieces];
    JAXPRUNE_UNROLL for (int w = 0; w < kPieces; w++) own[w] = load(values + w * kLanes);
    JAXPRUNE_UNROLL for (int p = 0; p < P; p++) {
      const Vec value = broadcast(source[p * step]);
      JAXPRUNE_UNROLL for (int w = 0; w < kPieces; w++) sums[p][w] += own[w] * value;
    }
  }
}

// gradient of a block += sum of cotangents[p] * source[offset + p * step] over p.
template <int P>
inline void correlate_blocks(const float* base, int64_t step, const int32_t* offset,
                             const int32_t* end, const Vec (&cotangents)[P][kPieces],
                             float* gradient) {
  for (; offset < end; offset++, gradient += kWidth) {
    const float* source = base + *offset;
    Vec sums[2][kPieces] = {};  // two, because an addition waits for the one before
    JAXPRUNE_UNROLL for (int w = 0; w < kPieces; w++) sums[0][w] = load(gradient + w * kLanes);
    JAXPRUNE_UNROLL for (int p = 0; p < P; p++) {
      const Vec value = broadcast(source[p * step]);
      JAXPRUNE_UNROLL for (int w = 0; w < kPieces; w++) sums[p % 2][w] += cotangents[p][w] * value;
    }
    JAXPRUNE_UNROLL for (int w = 0; w < kPieces; w++) {
      store(gradient + w * kLanes, sums[0][w] + sums[1][w]);
    }
  }
}

inline void load_block(const float* from, int64_t width, Vec (&to)[kPieces]) {
  JAXPRUNE_UNROLL for (int w = 0; w < kPieces; w++) {
    const int64_t count = std::clamp<int64_t>(width - w * kLanes, 0, kLanes);
    to[w] = count == kLanes ? load(from + w * kLanes) : load_some(from + w * kLanes, count);
  }
}

inline void store_block(float* to, const Vec (&from)[kPieces], int64_t width, int64_t channel = 0,
                        const Finish* finish = nullptr) {
  JAXPRUNE_UNROLL for (int w = 0; w < kPieces; w++) {
    const int64_t count = std::clamp<int64_t>(width - w * kLanes, 0, kLanes);
    put(to + w * kLanes, from[w], channel + w * kLanes, count, finish);
  }
}

// Calls function(constant number of pixels) for a number at run time.
template <int P = kMostPixels, class Function>
void with_pixels(int64_t pixels, const Function& function) {
  if constexpr (P > 0) {
    pixels == P ? function(std::integral_constant<int, P>())
                : with_pixels<P - 1>(pixels, function);
  }
}

// Equal tiles, as large as registers allow.
inline int64_t pixels_of(int64_t count) {
  const int64_t tiles = (count + kMostPixels - 1) / kMostPixels;
  return tiles ? (count + tiles - 1) / tiles : 1;
}

// Floats from one pixel to the next, of those that lie `channels * step` apart.
inline int64_t distance_of(int64_t channels, int64_t step) {
  return channels * step % kCrowded ? channels : channels + kLine;
}

// Kept blocks by block of outputs; in memory of the calling thread.
struct Blocks {
  int64_t count, outputs;
  const int32_t* starts;   // [blocks of outputs + 1]
  const int32_t* offsets;  // [count]: where the source of a block lies
  const float* values;     // [count, kWidth], 0 beyond the outputs

  int64_t wide() const { return (outputs + kWidth - 1) / kWidth; }
  int64_t width(int64_t block) const {
    return std::min<int64_t>(kWidth, outputs - block * kWidth);
  }

  // The results of a tile of pixels, for all outputs; `ahead` asks for what comes next.
  template <class Function>
  void accumulate(const float* base, int64_t step, int64_t pixels, float* results,
                  const Finish* finish, const Function& ahead) const {
    with_pixels(pixels, [&](auto constant) {
      constexpr int P = decltype(constant)::value;
      for (int64_t block = 0; block < wide(); block++) {
        ahead();
        const int32_t first = starts[block];
        Vec sums[P][kPieces] = {};
        accumulate_blocks<P>(base, step, offsets + first, offsets + starts[block + 1],
                             values + static_cast<int64_t>(first) * kWidth, sums);
        float* to = results + block * kWidth;
        JAXPRUNE_UNROLL for (int p = 0; p < P; p++) {
          store_block(to + p * outputs, sums[p], width(block), block * kWidth, finish);
        }
      }
    });
  }

  // Adds to the gradients [count, kWidth] of all blocks what a tile of pixels contributes.
  template <class Function>
  void correlate(const float* base, int64_t step, int64_t pixels, const float* cotangents,
                 float* gradients, const Function& ahead) const {
    with_pixels(pixels, [&](auto constant) {
      constexpr int P = decltype(constant)::value;
      for (int64_t block = 0; block < wide(); block++) {
        ahead();
        const int32_t first = starts[block];
        const float* from = cotangents + block * kWidth;
        Vec own[P][kPieces];
        JAXPRUNE_UNROLL for (int p = 0; p < P; p++) {
          load_block(from + p * outputs, width(block), own[p]);
        }
        correlate_blocks<P>(base, step, offsets + first, offsets + starts[block + 1], own,
                            gradients + static_cast<int64_t>(first) * kWidth);
      }
    });
  }
};

// Asks for rows first to first + count of an array of `rows`, while blocks of outputs are computed.
inline Ahead ahead_of(const float* array, int64_t first, int64_t rows, int64_t count,
                      int64_t columns, const Blocks& blocks) {
  const int64_t some = std::clamp<int64_t>(rows - first, 0, count);
  return Ahead(array + first * columns, some * columns, blocks.wide());
}

// Calls function(part, its gradients [count, kWidth]) for parts of the work; returns the sum of the
// gradients over parts, added in order.
template <class Function>
const float* summed_parts(const Workers& workers, int64_t parts, int64_t count,
                          const Function& function) {
  const int64_t size = count * kWidth;
  float* partial = scratch<float>(kPartial, parts * size);
  std::memset(partial, 0, sizeof(float) * parts * size);
  parallel(workers, parts, [&](int64_t part) { function(part, partial + part * size); });
  for (int64_t part = 1; part < parts; part++) {
    for (int64_t i = 0; i < size; i++) partial[i] += partial[part * size + i];
  }
  return partial;
}

// Products.

// Whether numbers count up from the first one.
inline bool count_up(const int32_t* numbers, int64_t count) {
  const uint32_t first = static_cast<uint32_t>(numbers[0]);
  uint32_t wrong = 0;
  auto compare = [&](auto size) {
    for (uint32_t i = 0; i < size; i++) wrong |= static_cast<uint32_t>(numbers[i]) ^ (first + i);
  };
  if (count == kWidth) {
    compare(std::integral_constant<uint32_t, kWidth>());  // a few vectors
  } else {
    compare(static_cast<uint32_t>(count));
  }
  return wrong == 0;
}

// The number of kept blocks, or -1 if weights are not kept in whole blocks, as a list in the order
// of the kernel shows.
inline int64_t count_blocks(const List& list) {
  if (list.outputs < kWidth) return -1;
  int64_t count = 0;
  for (int64_t input = 0; input < list.inputs; input++) {
    for (int64_t i = list.starts[input], end = list.starts[input + 1]; i < end; count++) {
      const int64_t first = list.kept[i], width = std::min<int64_t>(kWidth, list.outputs - first);
      if (first % kWidth || i + width > end || !count_up(list.kept + i, width)) return -1;
      i += width;
    }
  }
  return count;
}

// Writes the values of weights i to i + width, and zeros up to the width of a block.
inline void copy_values(const Weights& weights, int64_t i, int64_t width, float* to) {
  const int32_t* positions = weights.positions;
  if (positions == nullptr || count_up(positions + i, width)) {  // they lie side by side
    const float* from = weights.data + (positions ? positions[i] : i);
    Vec own[kPieces];
    load_block(from, width, own);
    return store_block(to, own, kWidth);
  }
  for (int64_t j = 0; j < width; j++) to[j] = weights.at(i + j);
  std::memset(to + width, 0, sizeof(float) * (kWidth - width));
}

// The blocks of a list; `places` says which weight is the first of a block. Without weights, the
// values are not there.
inline Blocks blocks_of(const List& list, int64_t count, const Weights* weights,
                        const int32_t** places) {
  const int64_t wide = (list.outputs + kWidth - 1) / kWidth;
  int32_t* starts = scratch<int32_t>(kStarts, wide + 2);
  int32_t* offsets = scratch<int32_t>(kEntries, count);
  int32_t* firsts = scratch<int32_t>(kPlaces, count);
  float* values = weights ? scratch<float>(kBlocks, count * kWidth) : nullptr;
  std::memset(starts, 0, sizeof(int32_t) * (wide + 2));
  int32_t* next = starts + 1;  // next[i + 1] counts; then next[i] is where the next block goes
  const int64_t size = list.size();
  auto width_of = [&](int64_t i) { return std::min<int64_t>(kWidth, list.outputs - list.kept[i]); };
  for (int64_t i = 0; i < size; i += width_of(i)) next[list.kept[i] / kWidth + 1]++;
  for (int64_t i = 0; i < wide; i++) next[i + 1] += next[i];
  for (int64_t input = 0; input < list.inputs; input++) {
    for (int64_t i = list.starts[input]; i < list.starts[input + 1];) {
      const int64_t place = next[list.kept[i] / kWidth]++, width = width_of(i);
      offsets[place] = static_cast<int32_t>(input);
      firsts[place] = static_cast<int32_t>(i);
      if (weights) copy_values(*weights, i, width, values + place * kWidth);
      i += width;
    }
  }
  *places = firsts;
  return {count, list.outputs, starts, offsets, values};
}

// Calls function(first row, number of rows, sources, floats from one row to the next) for tiles of
// the rows [first, last).
template <class Function>
void for_tiles(const float* source, int64_t inputs, int64_t first, int64_t last, int64_t tile,
               const Function& function) {
  const int64_t distance = distance_of(inputs, 1);
  for (int64_t row = first; row < last; row += tile) {
    const int64_t count = std::min(tile, last - row);
    const float* from = source + row * inputs;
    if (distance != inputs) {
      float* copy = scratch<float>(kSource, tile * distance);
      for (int64_t i = 0; i < count; i++) {
        std::memcpy(copy + i * distance, from + i * inputs, sizeof(float) * inputs);
      }
      from = copy;
    }
    function(row, count, from, distance);
  }
}

// The same as `multiply` forward, for a list of `count` blocks.
inline std::string multiply_blocks(const Workers& workers, const float* source, int64_t rows,
                                   const List& list, int64_t count, const Weights& weights,
                                   float* target, const Finish* finish = nullptr) {
  const int32_t* places;
  const Blocks blocks = blocks_of(list, count, &weights, &places);
  const int64_t tile = pixels_of(rows), tiles = (rows + tile - 1) / tile;
  const int64_t each = std::clamp<int64_t>(tiles / (4 * workers.threads), 1, 8) * tile;
  parallel(workers, (rows + each - 1) / each, [&](int64_t part) {
    for_tiles(source, list.inputs, part * each, std::min(rows, (part + 1) * each), tile,
              [&](int64_t row, int64_t pixels, const float* from, int64_t distance) {
                Ahead next = ahead_of(source, row + pixels, rows, tile, list.inputs, blocks);
                Ahead after = ahead_of(target, row + pixels, rows, tile, list.outputs, blocks);
                blocks.accumulate(from, distance, pixels, target + row * list.outputs, finish,
                                  [&] { next.part(), after.part(); });
              });
  });
  return "";
}

// The same as `sample`, for a list of `count` blocks.
inline std::string sample_blocks(const Workers& workers, const float* source,
                                 const float* cotangent, int64_t rows, const List& list,
                                 int64_t count, float* gradient) {
  const int32_t* places;
  const Blocks blocks = blocks_of(list, count, nullptr, &places);
  const int64_t tile = pixels_of(rows), tiles = (rows + tile - 1) / tile;
  const int64_t parts = std::clamp<int64_t>(workers.threads, 1, std::max<int64_t>(tiles, 1));
  const float* sums = summed_parts(workers, parts, count, [&](int64_t part, float* own) {
    for_tiles(source, list.inputs, tiles * part / parts * tile,
              std::min(rows, tiles * (part + 1) / parts * tile), tile,
              [&](int64_t row, int64_t pixels, const float* from, int64_t distance) {
                Ahead next = ahead_of(source, row + pixels, rows, tile, list.inputs, blocks);
                Ahead after = ahead_of(cotangent, row + pixels, rows, tile, list.outputs, blocks);
                blocks.correlate(from, distance, pixels, cotangent + row * list.outputs, own,
                                 [&] { next.part(), after.part(); });
              });
  });
  for (int64_t block = 0; block < blocks.wide(); block++) {
    for (int64_t i = blocks.starts[block]; i < blocks.starts[block + 1]; i++) {
      std::memcpy(gradient + places[i], sums + i * kWidth, sizeof(float) * blocks.width(block));
    }
  }
  return "";
}

// Convolutions.

// The number of kept blocks, or -1 if weights are not kept in whole blocks: then the weights of an
// output are not those of its neighbours in a block.
inline int64_t count_blocks(const Taps& kept, int64_t outputs) {
  if (outputs < kWidth) return -1;
  int64_t count = 0, i = 0;
  for (int64_t first = 0; first < outputs; first += kWidth) {
    const int64_t width = std::min<int64_t>(kWidth, outputs - first);
    int64_t length = 0;
    while (i + length < kept.size && kept.outputs[i + length] == first) length++;
    if (i + width * length > kept.size) return -1;
    for (int64_t other = 1; other < width; other++) {
      const int64_t own = i + other * length;
      bool same = true;
      for (int64_t j = 0; j < length; j++) {
        same &= kept.outputs[own + j] == first + other && kept.taps[own + j] == kept.taps[i + j] &&
                kept.inputs[own + j] == kept.inputs[i + j];
      }
      if (!same) return -1;
    }
    i += width * length, count += length;
  }
  return i == kept.size ? count : -1;
}

// How images are divided into strips of rows of the output, and how a strip lies in memory.
struct Images {
  int64_t rows, strips;  // rows of the output in a strip, and strips of an image
  Pair size;             // pixels of the source of a strip
  int64_t distance;      // floats from one pixel to the next
};

inline Images divide_images(const Convolution& c, int64_t threads) {
  const int64_t distance = distance_of(c.inputs, c.stride.column);
  const int64_t columns = (c.output.column - 1) * c.stride.column + c.window.column;
  const int64_t row_bytes = columns * distance * sizeof(float);
  int64_t rows = (kImageBytes / row_bytes - c.window.row) / c.stride.row + 1;
  rows = std::min(rows, c.output.row * c.batch / threads);  // all threads have some
  rows = std::clamp<int64_t>(rows, 1, c.output.row);
  const int64_t strips = (c.output.row + rows - 1) / rows;
  rows = (c.output.row + strips - 1) / strips;
  return {rows, strips, {(rows - 1) * c.stride.row + c.window.row, columns}, distance};
}

inline std::string check_images(const Images& images) {
  if (images.size.row * images.size.column * images.distance <= INT32_MAX) return "";
  return "a window of rows of an image has more than 2^31 entries; use smaller images";
}

// Copies the source of a strip, with zeros around the image.
inline void read_image(const float* image, const Convolution& c, const Images& images,
                       int64_t strip, float* to) {
  const int64_t before = std::min(c.padding.column, images.size.column);
  const int64_t inside = std::min(c.image.column, images.size.column - before);
  const int64_t line = images.size.column * images.distance;
  for (int64_t row = 0; row < images.size.row; row++, to += line) {
    const int64_t own = strip * images.rows * c.stride.row - c.padding.row + row;
    if (own < 0 || own >= c.image.row) {
      std::memset(to, 0, sizeof(float) * line);
      continue;
    }
    const float* from = image + own * c.image.column * c.inputs;
    const int64_t after = (before + inside) * images.distance;
    std::memset(to, 0, sizeof(float) * before * images.distance);
    if (images.distance == c.inputs) {
      std::memcpy(to + before * images.distance, from, sizeof(float) * inside * c.inputs);
    } else {
      for (int64_t i = 0; i < inside; i++) {
        std::memcpy(to + (before + i) * images.distance, from + i * c.inputs,
                    sizeof(float) * c.inputs);
      }
    }
    std::memset(to + after, 0, sizeof(float) * (line - after));
  }
}

// The first row of all images that a strip reads, if it is inside of its image.
inline int64_t row_of(const Convolution& c, const Images& images, int64_t task) {
  const int64_t row = task % images.strips * images.rows * c.stride.row - c.padding.row;
  return task / images.strips * c.image.row + std::clamp<int64_t>(row, 0, c.image.row);
}

// Calls function(first pixel of the output, number of pixels, their sources, floats from one to the
// next) for the tiles of a strip; `task` counts strips of all images, and `next` is the task after.
template <class Function>
void for_tiles(const float* x, const Convolution& c, const Images& images, int64_t task,
               int64_t next, const Function& function) {
  const int64_t image = task / images.strips, strip = task % images.strips;
  const int64_t tile = pixels_of(c.output.column), tiles = (c.output.column + tile - 1) / tile;
  const int64_t line = c.image.column * c.inputs;
  const int64_t begin = std::min(row_of(c, images, next), c.batch * c.image.row);
  const int64_t end = std::min(begin + images.size.row, c.batch * c.image.row);
  Ahead ahead(x + begin * line, (end - begin) * line, images.rows * tiles);
  float* source = scratch<float>(kSource, images.size.row * images.size.column * images.distance);
  read_image(x + image * c.image.row * c.image.column * c.inputs, c, images, strip, source);
  const int64_t first = strip * images.rows;
  for (int64_t row = 0; row < std::min(images.rows, c.output.row - first); row++) {
    for (int64_t column = 0; column < c.output.column; column += tile) {
      ahead.part();
      const int64_t pixel = row * c.stride.row * images.size.column + column * c.stride.column;
      function((image * c.output.row + first + row) * c.output.column + column,
               std::min(tile, c.output.column - column), source + pixel * images.distance,
               c.stride.column * images.distance);
    }
  }
}

inline Blocks blocks_of(const Convolution& c, const Images& images, const Taps& kept,
                        int64_t count, const Weights* weights) {
  const int64_t wide = (c.outputs + kWidth - 1) / kWidth;
  int32_t* starts = scratch<int32_t>(kStarts, wide + 1);
  int32_t* offsets = scratch<int32_t>(kEntries, count);
  float* values = weights ? scratch<float>(kBlocks, count * kWidth) : nullptr;
  const Blocks blocks = {count, c.outputs, starts, offsets, values};
  int64_t i = 0, place = 0;
  for (int64_t block = 0; block < wide; block++) {
    starts[block] = static_cast<int32_t>(place);
    int64_t length = 0;
    while (i + length < kept.size && kept.outputs[i + length] == block * kWidth) length++;
    for (int64_t j = 0; j < length; j++, place++) {
      const int64_t row = kept.taps[i + j] / c.window.column;
      const int64_t pixel = row * images.size.column + kept.taps[i + j] % c.window.column;
      offsets[place] = static_cast<int32_t>(pixel * images.distance + kept.inputs[i + j]);
      if (!weights) continue;
      float* own = values + place * kWidth;
      for (int64_t k = 0; k < kWidth; k++) {
        own[k] = k < blocks.width(block) ? weights->at(i + k * length + j) : 0;
      }
    }
    i += length * blocks.width(block);
  }
  starts[wide] = static_cast<int32_t>(place);
  return blocks;
}

// The same as `convolve`, for `count` blocks.
inline std::string convolve_blocks(const Workers& workers, const Convolution& c, const float* x,
                                   const Taps& kept, int64_t count, const Weights& weights,
                                   float* y, const Finish* finish = nullptr) {
  const Images images = divide_images(c, workers.threads);
  if (auto wrong = check_images(images); !wrong.empty()) return wrong;
  const Blocks blocks = blocks_of(c, images, kept, count, &weights);
  const int64_t total = c.batch * c.output.row * c.output.column;
  parallel(workers, c.batch * images.strips, [&](int64_t task) {
    for_tiles(x, c, images, task, task + workers.threads,
              [&](int64_t first, int64_t pixels, const float* from, int64_t step) {
                Ahead after = ahead_of(y, first + pixels, total, pixels, c.outputs, blocks);
                blocks.accumulate(from, step, pixels, y + first * c.outputs, finish,
                                  [&] { after.part(); });
              });
  });
  return "";
}

// The same as `convolve_sample`, for `count` blocks.
inline std::string convolve_sample_blocks(const Workers& workers, const Convolution& c,
                                          const float* x, const float* dy, const Taps& kept,
                                          int64_t count, float* gradient) {
  const Images images = divide_images(c, workers.threads);
  if (auto wrong = check_images(images); !wrong.empty()) return wrong;
  const Blocks blocks = blocks_of(c, images, kept, count, nullptr);
  const int64_t total = c.batch * c.output.row * c.output.column;
  const int64_t tasks = c.batch * images.strips;
  const int64_t parts = std::clamp<int64_t>(workers.threads, 1, tasks);
  const float* sums = summed_parts(workers, parts, count, [&](int64_t part, float* own) {
    for (int64_t task = tasks * part / parts; task < tasks * (part + 1) / parts; task++) {
      for_tiles(x, c, images, task, task + 1,
                [&](int64_t first, int64_t pixels, const float* from, int64_t step) {
                  Ahead after = ahead_of(dy, first + pixels, total, pixels, c.outputs, blocks);
                  blocks.correlate(from, step, pixels, dy + first * c.outputs, own,
                                   [&] { after.part(); });
                });
    }
  });
  for (int64_t block = 0; block < blocks.wide(); block++) {
    const int64_t first = blocks.starts[block], length = blocks.starts[block + 1] - first;
    for (int64_t k = 0; k < blocks.width(block); k++) {
      for (int64_t j = 0; j < length; j++) *gradient++ = sums[(first + j) * kWidth + k];
    }
  }
  return "";
}

}  // namespace jaxprune
