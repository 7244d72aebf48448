// Products of rows with a sparse kernel, forward and backward.
//
// Blocks of rows are transposed, so that lanes are rows: then a kept weight is one number for all
// lanes, whatever the mask looks like.
#pragma once

#include <algorithm>
#include <cstring>
#include <string>
#include <type_traits>

#include "cores.h"
#include "finish.h"
#include "lists.h"
#include "parallel.h"
#include "scratch.h"

namespace jaxprune {

// Sources of a block of rows that are used together: so many bytes stay in the first-level cache.
constexpr int64_t kSourceBytes = 32 << 10;
// With fewer blocks of rows, sorting the transposed kernel by groups takes longer than it saves.
constexpr int64_t kFewBlocks = 4;
// Blocks up to this size are fetched while the one before is computed.
constexpr int64_t kAheadBytes = 128 << 10;

// Asks for memory line by line while something else is computed.
class Ahead {
 public:
  Ahead(const float* from, int64_t count, int64_t parts) {
    if (count <= 0 || count * static_cast<int64_t>(sizeof(float)) > kAheadBytes) return;
    next_ = reinterpret_cast<uintptr_t>(from);
    end_ = next_ + count * sizeof(float);
    lines_ = count * sizeof(float) / 64 / std::max<int64_t>(parts, 1) + 1;
  }

  void part() {
    for (int64_t i = 0; i < lines_ && next_ < end_; i++, next_ += 64) {
      __builtin_prefetch(reinterpret_cast<const void*>(next_));
    }
  }

 private:
  uintptr_t next_ = 0, end_ = 0;
  int64_t lines_ = 0;
};

// [rows, columns] -> [columns, block]. Rows that are missing are 0.
inline void read_rows(const float* from, int64_t rows, int64_t columns, int64_t block, float* to) {
  for (int64_t row = 0; row < block; row += kLanes) {
    const float* lines[kLanes] = {};
    for (int i = 0; i < kLanes && row + i < rows; i++) lines[i] = from + (row + i) * columns;
    for (int64_t column = 0; column < columns; column += kLanes) {
      const int64_t width = std::min<int64_t>(kLanes, columns - column);
      // Rows are short runs of memory, which the hardware does not foresee.
      prefetch(lines, kLanes * columns + column);
      read_square(lines, column, width, to + column * block + row, block);
    }
  }
}

// [columns, block] -> [rows, columns].
inline void write_rows(const float* from, int64_t rows, int64_t columns, int64_t block, float* to,
                       const Finish* finish) {
  for (int64_t row = 0; row < rows; row += kLanes) {
    float* lines[kLanes] = {};
    for (int i = 0; i < kLanes && row + i < rows; i++) lines[i] = to + (row + i) * columns;
    for (int64_t column = 0; column < columns; column += kLanes) {
      const int64_t width = std::min<int64_t>(kLanes, columns - column);
      write_square(from + column * block + row, block, width, lines, column, column, finish);
    }
  }
}

// Calls a function with a constant number of vectors in a block: more of them share the loads of a
// weight, fewer suit few rows.
template <class Function>
void with_block(int64_t rows, const Function& function) {
  rows > 4 * kLanes ? function(std::integral_constant<int, 8>())
                    : function(std::integral_constant<int, 4>());
}

// Entries by group of sources, then by target.
struct Sorted {
  const int32_t* starts;  // [groups * targets + 1]
  const Entry* entries;
  int64_t groups;
};

// Sorts the weights of a kernel by what they are summed into: outputs, or inputs if `back`. The
// kernel is read in its own order; reading it by columns would miss the cache at each weight.
inline Sorted sorted(const List& list, const Weights& weights, bool back, int64_t block,
                     int64_t blocks) {
  if (back && blocks < kFewBlocks) {  // the order that the list has
    Entry* entries = scratch<Entry>(kEntries, list.size());
    for (int64_t i = 0; i < list.size(); i++) {
      entries[i] = {static_cast<int32_t>(list.kept[i] * block), weights.at(i)};
    }
    return {list.starts, entries, 1};
  }
  const int64_t targets = back ? list.inputs : list.outputs;
  const int64_t sources = back ? list.outputs : list.inputs;
  int shift = 0;  // a power of two of sources in a group: divisions would take as long as the rest
  while (block * static_cast<int64_t>(sizeof(float)) << (shift + 1) <= kSourceBytes) shift++;
  const int64_t groups = std::max<int64_t>(1, ((sources - 1) >> shift) + 1);
  int32_t* starts = scratch<int32_t>(kStarts, groups * targets + 2);
  Entry* entries = scratch<Entry>(kEntries, list.size());
  std::memset(starts, 0, sizeof(int32_t) * (groups * targets + 2));
  int32_t* next = starts + 1;  // next[i + 1] counts; then next[i] is where the next entry goes
  for (int64_t input = 0; input < list.inputs; input++) {
    const int64_t first = list.starts[input], last = list.starts[input + 1];
    if (back) {
      for (int64_t i = first; i < last; i++) next[(list.kept[i] >> shift) * targets + input + 1]++;
    } else {
      int32_t* own = next + (input >> shift) * targets + 1;
      for (int64_t i = first; i < last; i++) own[list.kept[i]]++;
    }
  }
  for (int64_t i = 0; i < groups * targets; i++) next[i + 1] += next[i];
  for (int64_t input = 0; input < list.inputs; input++) {
    const int64_t first = list.starts[input], last = list.starts[input + 1];
    if (back) {
      for (int64_t i = first; i < last; i++) {
        const int64_t output = list.kept[i];
        entries[next[(output >> shift) * targets + input]++] = {
            static_cast<int32_t>(output * block), weights.at(i)};
      }
    } else {
      int32_t* own = next + (input >> shift) * targets;
      const int32_t offset = static_cast<int32_t>(input * block);
      for (int64_t i = first; i < last; i++) entries[own[list.kept[i]]++] = {offset, weights.at(i)};
    }
  }
  return {starts, entries, groups};
}

// target[rows, outputs] = source[rows, inputs] times the kernel; or, if `back`, target[rows, inputs]
// = source[rows, outputs] times the transposed kernel.
inline std::string multiply(const Workers& workers, const float* source, int64_t rows,
                            const List& list, const Weights& weights, bool back, float* target,
                            const Finish* finish = nullptr) {
  const int64_t targets = back ? list.inputs : list.outputs;
  const int64_t sources = back ? list.outputs : list.inputs;
  if (auto wrong = check_size(list); !wrong.empty()) return wrong;
  with_block(rows, [&](auto vectors) {
    constexpr int V = decltype(vectors)::value;
    constexpr int64_t block = V * kLanes;
    const int64_t blocks = (rows + block - 1) / block;
    const Sorted own = sorted(list, weights, back, block, blocks);
    parallel(workers, blocks, [&](int64_t number) {
      const int64_t first = number * block, count = std::min(block, rows - first);
      float* from = scratch<float>(kSource, sources * block);
      float* to = scratch<float>(kTarget, targets * block);
      read_rows(source + first * sources, count, sources, block, from);
      const int64_t after = first + block * std::max<int64_t>(1, workers.threads);
      Ahead source_ahead(source + after * sources, std::min(block, rows - after) * sources,
                         targets * own.groups);
      Ahead target_ahead(target + first * targets, count * targets, targets * own.groups);
      for (int64_t group = 0; group < own.groups; group++) {
        const int32_t* starts = own.starts + group * targets;
        for (int64_t i = 0; i < targets; i++) {
          source_ahead.part();
          target_ahead.part();
          Vec sums[V] = {};
          if (group) JAXPRUNE_UNROLL for (int v = 0; v < V; v++) sums[v] = load(to + i * block + v * kLanes);
          accumulate<V, kLanes>(from, own.entries + starts[i], own.entries + starts[i + 1], sums);
          JAXPRUNE_UNROLL for (int v = 0; v < V; v++) store(to + i * block + v * kLanes, sums[v]);
        }
      }
      write_rows(to, count, targets, block, target + first * targets, finish);
    });
  });
  return "";
}

// gradient[i] = sum over rows of source[row, input of i] * cotangent[row, output of i].
// Blocks are divided into as many parts as there are threads, whose sums are added in order.
inline std::string sample(const Workers& workers, const float* source, const float* cotangent,
                          int64_t rows, const List& list, float* gradient) {
  if (auto wrong = check_size(list); !wrong.empty()) return wrong;
  with_block(rows, [&](auto vectors) {
    constexpr int V = decltype(vectors)::value;
    constexpr int64_t block = V * kLanes;
    const int64_t blocks = (rows + block - 1) / block, size = list.size();
    const int64_t parts = std::clamp<int64_t>(workers.threads, 1, std::max<int64_t>(blocks, 1));
    Entry* entries = scratch<Entry>(kEntries, size);
    for (int64_t i = 0; i < size; i++) {
      entries[i] = {static_cast<int32_t>(list.kept[i] * block), 0};
    }
    float* partial = scratch<float>(kPartial, parts * size);
    std::memset(partial, 0, sizeof(float) * parts * size);
    parallel(workers, parts, [&](int64_t part) {
      float* from = scratch<float>(kSource, list.inputs * block);
      float* by = scratch<float>(kCotangent, list.outputs * block);
      for (int64_t number = blocks * part / parts; number < blocks * (part + 1) / parts; number++) {
        const int64_t first = number * block, count = std::min(block, rows - first);
        read_rows(source + first * list.inputs, count, list.inputs, block, from);
        read_rows(cotangent + first * list.outputs, count, list.outputs, block, by);
        for (int64_t i = 0; i < list.inputs; i++) {
          Vec own[V];
          JAXPRUNE_UNROLL for (int v = 0; v < V; v++) own[v] = load(from + i * block + v * kLanes);
          const int64_t start = list.starts[i];
          correlate<V, kLanes>(by, entries + start, entries + list.starts[i + 1], own,
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
