// Products of rows with a sparse kernel, forward and backward.
//
// Blocks of rows are transposed, so that lanes are rows: then a kept weight is one number for all
// lanes, whatever the mask looks like.
#pragma once

#include <algorithm>
#include <cstring>
#include <string>

#include "cores.h"
#include "lists.h"
#include "parallel.h"
#include "scratch.h"

namespace jaxprune {

// [rows, columns] -> [columns, block], in units of a vector of rows. Rows that are missing are 0.
inline void read_rows(const float* from, int64_t rows, int64_t columns, int64_t block, float* to) {
  for (int64_t row = 0; row < block; row += kLanes) {
    const int64_t height = std::clamp<int64_t>(rows - row, 0, kLanes);
    for (int64_t column = 0; column < columns; column += kLanes) {
      const int64_t width = std::min<int64_t>(kLanes, columns - column);
      Vec square[kLanes];
      for (int i = 0; i < kLanes; i++) {
        const float* start = from + (row + i) * columns + column;
        square[i] = i >= height ? Vec{} : width == kLanes ? load(start) : load_some(start, width);
      }
      transpose(square);
      for (int64_t i = 0; i < width; i++) store(to + (column + i) * block + row, square[i]);
    }
  }
}

// [columns, block] -> [rows, columns].
inline void write_rows(const float* from, int64_t rows, int64_t columns, int64_t block, float* to) {
  for (int64_t row = 0; row < rows; row += kLanes) {
    const int64_t height = std::min<int64_t>(kLanes, rows - row);
    for (int64_t column = 0; column < columns; column += kLanes) {
      const int64_t width = std::min<int64_t>(kLanes, columns - column);
      Vec square[kLanes] = {};
      for (int64_t i = 0; i < width; i++) square[i] = load(from + (column + i) * block + row);
      transpose(square);
      for (int64_t i = 0; i < height; i++) {
        float* start = to + (row + i) * columns + column;
        width == kLanes ? store(start, square[i]) : store_some(start, square[i], width);
      }
    }
  }
}

// Entries of a list for blocks of rows. `order` says which weight an entry is; null: the same.
inline const Entry* product_entries(const List& list, const Weights& weights, const int32_t* order,
                                    int64_t block) {
  Entry* entries = scratch<Entry>(kEntries, list.size());
  for (int64_t i = 0; i < list.size(); i++) {
    entries[i] = {static_cast<int32_t>(list.sources[i] * block), weights.at(order ? order[i] : i)};
  }
  return entries;
}

// The vectors of a block: more of them share the loads of a weight, fewer suit few rows.
template <class Function>
void with_block(int64_t rows, const Function& function) {
  rows > 4 * kLanes ? function(std::integral_constant<int, 8>())
                    : function(std::integral_constant<int, 4>());
}

// target[rows, list.targets] = source[rows, list.source_count] times the kernel that a list holds.
inline std::string multiply(const Workers& workers, const float* source, int64_t rows,
                            const List& list, const Weights& weights, const int32_t* order,
                            float* target) {
  if (list.source_count * 8 * kLanes > INT32_MAX) return "the kernel has too many rows or columns";
  with_block(rows, [&](auto vectors) {
    constexpr int V = decltype(vectors)::value;
    constexpr int64_t block = V * kLanes;
    const Entry* entries = product_entries(list, weights, order, block);
    parallel(workers, (rows + block - 1) / block, [&](int64_t number) {
      const int64_t first = number * block, count = std::min(block, rows - first);
      float* from = scratch<float>(kSource, list.source_count * block);
      float* to = scratch<float>(kTarget, list.targets * block);
      read_rows(source + first * list.source_count, count, list.source_count, block, from);
      for (int64_t i = 0; i < list.targets; i++) {
        Vec sums[V] = {};
        accumulate<V, kLanes>(from, entries + list.starts[i], entries + list.starts[i + 1], sums);
        JAXPRUNE_UNROLL for (int v = 0; v < V; v++) store(to + i * block + v * kLanes, sums[v]);
      }
      write_rows(to, count, list.targets, block, target + first * list.targets);
    });
  });
  return "";
}

// gradient[i] = sum over rows of source[row, source of i] * cotangent[row, target of i].
// Blocks are divided into as many parts as there are threads, whose sums are added in order.
inline std::string sample(const Workers& workers, const float* source, const float* cotangent,
                          int64_t rows, const List& list, float* gradient) {
  if (list.source_count * 8 * kLanes > INT32_MAX) return "the kernel has too many rows or columns";
  with_block(rows, [&](auto vectors) {
    constexpr int V = decltype(vectors)::value;
    constexpr int64_t block = V * kLanes;
    const int64_t blocks = (rows + block - 1) / block, size = list.size();
    const int64_t parts = std::clamp<int64_t>(workers.threads, 1, std::max<int64_t>(blocks, 1));
    Entry* entries = scratch<Entry>(kEntries, size);
    for (int64_t i = 0; i < size; i++) {
      entries[i] = {static_cast<int32_t>(list.sources[i] * block), 0};
    }
    float* partial = scratch<float>(kPartial, parts * size);
    std::memset(partial, 0, sizeof(float) * parts * size);
    parallel(workers, parts, [&](int64_t part) {
      float* from = scratch<float>(kSource, list.source_count * block);
      float* by = scratch<float>(kCotangent, list.targets * block);
      for (int64_t number = blocks * part / parts; number < blocks * (part + 1) / parts; number++) {
        const int64_t first = number * block, count = std::min(block, rows - first);
        read_rows(source + first * list.source_count, count, list.source_count, block, from);
        read_rows(cotangent + first * list.targets, count, list.targets, block, by);
        for (int64_t i = 0; i < list.targets; i++) {
          Vec own[V];
          JAXPRUNE_UNROLL for (int v = 0; v < V; v++) own[v] = load(by + i * block + v * kLanes);
          const int64_t start = list.starts[i];
          correlate<V, kLanes>(from, entries + start, entries + list.starts[i + 1], own,
                               partial + part * size + start);
        }
      }
    });
    for (int64_t i = 0; i < size; i++) {
      float sum = partial[i];
      for (int64_t part = 1; part < parts; part++) sum += partial[part * size + i];
      gradient[i] = sum;
    }
  });
  return "";
}

}  // namespace jaxprune
