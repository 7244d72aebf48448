// Runs the kernels without JAX on random layers, right and wrong indices, one and more threads.
// test_native.py compiles it with sanitizers; it prints "ok" and the numbers of lists.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "blocks.h"
#include "convolutions.h"
#include "depthwise.h"
#include "products.h"

using namespace jaxprune;

static std::mt19937 generator;
static int64_t draw(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}
static std::vector<float> floats(int64_t count) {
  std::vector<float> own(count);
  for (float& value : own) value = std::normal_distribution<float>()(generator);
  return own;
}
static void compare(const char* what, const std::vector<float>& own,
                    const std::vector<double>& expected) {
  for (size_t i = 0; i < own.size(); i++) {
    if (std::abs(own[i] - expected[i]) <= 1e-3 * (1 + std::abs(expected[i]))) continue;  // not NaN
    std::printf("%s differs at %zu: %g, not %g\n", what, i, own[i], expected[i]);
    std::exit(1);
  }
}
static void expect(const char* what, bool right) {
  if (right) return;
  std::printf("%s: not as expected\n", what);
  std::exit(1);
}
// Whether each of `count` blocks of outputs is kept, with some densities.
static std::vector<char> drawn(int64_t count) {
  const double density = std::vector<double>{0, .1, .5, 1}[draw(0, 3)];
  std::vector<char> own(count);
  for (char& kept : own) kept = std::uniform_real_distribution<>()(generator) < density;
  return own;
}
// A pool that starts a thread for each task, and joins them all when the call is over.
struct Pool {
  std::vector<std::thread> threads;
  Workers workers(int64_t count) {
    return {count, [this](std::function<void()> task) { threads.emplace_back(std::move(task)); }};
  }
  ~Pool() {
    for (auto& own : threads) own.join();
  }
};

// Arrays of a finish, and what it makes of expected sums.
struct Drawn {
  std::vector<float> scale, shift, rest;
  Finish finish;

  Drawn(int64_t channels, std::vector<float>& results)
      : scale(floats(channels)), shift(floats(channels)), rest(floats(results.size())) {
    const bool scaled = draw(0, 1), summed = draw(0, 1);
    finish = {scaled ? scale.data() : nullptr, scaled ? shift.data() : nullptr,
              summed ? rest.data() : nullptr, draw(0, 1) ? 0.f : -INFINITY,
              draw(0, 1) ? 1.f : INFINITY, results.data()};
  }

  std::vector<double> of(const std::vector<double>& sums) const {
    std::vector<double> found(sums);
    for (size_t i = 0; i < found.size(); i++) {
      const size_t channel = i % scale.size();
      if (finish.scale) found[i] = found[i] * scale[channel] + shift[channel];
      if (finish.rest) found[i] += rest[i];
      found[i] = std::min<double>(std::max<double>(found[i], finish.low), finish.high);
    }
    return found;
  }
};

static void product() {
  const int64_t rows = draw(0, 2) ? draw(0, 150) : draw(400, 700);
  const int64_t inputs = draw(0, 9) ? draw(1, 150) : 512, outputs = draw(1, 150);
  const int64_t width = draw(0, 1) ? kWidth : 1, wide = (outputs + width - 1) / width;
  const std::vector<char> mask = drawn(inputs * wide);
  std::vector<int32_t> starts{0}, kept, positions;
  for (int64_t k = 0; k < inputs; k++) {
    for (int64_t n = 0; n < outputs; n++) {
      if (!mask[k * wide + n / width]) continue;
      kept.push_back(n), positions.push_back(k * outputs + n);
    }
    starts.push_back(kept.size());
  }
  const auto x = floats(rows * inputs), dy = floats(rows * outputs), kernel = floats(inputs * outputs);
  const List list{starts.data(), kept.data(), inputs, outputs, (int64_t)kept.size()};
  const Weights weights{kernel.data(), positions.data(), (int64_t)kernel.size()};
  std::vector<double> y(rows * outputs), dx(rows * inputs), dw(kept.size());
  for (int64_t k = 0; k < inputs; k++)
    for (int64_t i = starts[k]; i < starts[k + 1]; i++)
      for (int64_t m = 0; m < rows; m++) {
        const double w = kernel[positions[i]];
        y[m * outputs + kept[i]] += w * x[m * inputs + k];
        dx[m * inputs + k] += w * dy[m * outputs + kept[i]];
        dw[i] += (double)x[m * inputs + k] * dy[m * outputs + kept[i]];
      }
  std::vector<float> own_y(y.size()), own_dx(dx.size()), own_dw(dw.size());
  Pool pool;
  const Workers workers = pool.workers(draw(1, 3));
  multiply(workers, x.data(), rows, list, weights, false, own_y.data());
  multiply(workers, dy.data(), rows, list, weights, true, own_dx.data());
  sample(workers, x.data(), dy.data(), rows, list, own_dw.data());
  const Drawn drawn(outputs, own_y);
  compare("product", own_y, y);
  multiply(workers, x.data(), rows, list, weights, false, own_y.data(), &drawn.finish);
  compare("finished product", own_y, drawn.of(y)), compare("input gradient", own_dx, dx);
  compare("kernel gradient", own_dw, dw);
  const int64_t blocks = count_blocks(list);
  if (width == kWidth) expect("blocks of a product", (blocks >= 0) == (outputs >= kWidth));
  if (blocks < 0) return;
  own_y.assign(y.size(), NAN), own_dw.assign(dw.size(), NAN);
  multiply_blocks(workers, x.data(), rows, list, blocks, weights, own_y.data());
  sample_blocks(workers, x.data(), dy.data(), rows, list, blocks, own_dw.data());
  compare("product of blocks", own_y, y), compare("gradient of blocks", own_dw, dw);
  multiply_blocks(workers, x.data(), rows, list, blocks, weights, own_y.data(), &drawn.finish);
  compare("finished product of blocks", own_y, drawn.of(y));
}

static void convolution() {
  Convolution c;
  c.batch = draw(1, 20), c.inputs = draw(1, 20), c.outputs = draw(1, 40);
  if (draw(0, 9) == 0) c.batch = draw(1, 2), c.inputs = 512;
  c.image = {draw(1, 12), draw(1, 20)}, c.window = {draw(1, 7), draw(1, 7)};
  c.stride = {draw(1, 2), draw(1, 2)}, c.padding = {draw(0, 4), draw(0, 4)};
  const Pair room = {c.image.row + c.padding.row + draw(0, 4) - c.window.row,
                     c.image.column + c.padding.column + draw(0, 4) - c.window.column};
  if (room.row < 0 || room.column < 0) return;
  c.output = {room.row / c.stride.row + 1, room.column / c.stride.column + 1};
  const int64_t width = draw(0, 1) ? kWidth : 1, each = c.window.row * c.window.column * c.inputs;
  const std::vector<char> mask = drawn((c.outputs + width - 1) / width * each);
  std::vector<int32_t> taps, inputs, outputs, positions;
  for (int32_t n = 0; n < c.outputs; n++)
    for (int32_t k = 0; k < c.inputs; k++)
      for (int32_t t = 0; t < c.window.row * c.window.column; t++) {
        if (!mask[n / width * each + k * c.window.row * c.window.column + t]) continue;
        taps.push_back(t), inputs.push_back(k), outputs.push_back(n);
        positions.push_back((t * c.inputs + k) * c.outputs + n);
      }
  const int64_t size = taps.size();
  const auto x = floats(c.batch * c.image.row * c.image.column * c.inputs);
  const auto dy = floats(c.batch * c.output.row * c.output.column * c.outputs);
  const auto kernel = floats(c.window.row * c.window.column * c.inputs * c.outputs);
  std::vector<double> y(dy.size()), dx(x.size()), dw(size);
  for (int64_t i = 0; i < size; i++)
    for (int64_t b = 0; b < c.batch; b++)
      for (int64_t r = 0; r < c.output.row; r++)
        for (int64_t s = 0; s < c.output.column; s++) {
          const int64_t row = r * c.stride.row + taps[i] / c.window.column - c.padding.row;
          const int64_t column = s * c.stride.column + taps[i] % c.window.column - c.padding.column;
          if (row < 0 || row >= c.image.row || column < 0 || column >= c.image.column) continue;
          const int64_t from =
              ((b * c.image.row + row) * c.image.column + column) * c.inputs + inputs[i];
          const int64_t to = ((b * c.output.row + r) * c.output.column + s) * c.outputs + outputs[i];
          const double w = kernel[positions[i]];
          y[to] += w * x[from], dx[from] += w * dy[to], dw[i] += (double)x[from] * dy[to];
        }
  const Taps kept{taps.data(), inputs.data(), outputs.data(), size};
  const Weights weights{kernel.data(), positions.data(), (int64_t)kernel.size()};
  std::vector<float> own_y(y.size()), own_dx(dx.size()), own_dw(size);
  Pool pool;
  const Workers workers = pool.workers(draw(1, 3));
  convolve(workers, c, x.data(), kept, weights, own_y.data());
  convolve_back(workers, c, dy.data(), kept, weights, own_dx.data());
  convolve_sample(workers, c, x.data(), dy.data(), kept, own_dw.data());
  const Drawn drawn(c.outputs, own_y);
  compare("convolution", own_y, y);
  convolve(workers, c, x.data(), kept, weights, own_y.data(), &drawn.finish);
  compare("finished convolution", own_y, drawn.of(y)), compare("image gradient", own_dx, dx);
  compare("kernel gradient", own_dw, dw);
  const int64_t blocks = count_blocks(kept, c.outputs);
  if (width == kWidth) expect("blocks of a convolution", (blocks >= 0) == (c.outputs >= kWidth));
  if (blocks < 0) return;
  own_y.assign(y.size(), NAN), own_dw.assign(size, NAN);
  convolve_blocks(workers, c, x.data(), kept, blocks, weights, own_y.data());
  convolve_sample_blocks(workers, c, x.data(), dy.data(), kept, blocks, own_dw.data());
  compare("convolution of blocks", own_y, y), compare("gradient of blocks", own_dw, dw);
  convolve_blocks(workers, c, x.data(), kept, blocks, weights, own_y.data(), &drawn.finish);
  compare("finished convolution of blocks", own_y, drawn.of(y));
}

static void depthwise_layer() {
  Convolution c;
  c.batch = draw(1, 5), c.inputs = c.outputs = draw(0, 3) ? draw(1, 40) : draw(100, 150);
  c.image = {draw(1, 12), draw(1, 20)}, c.window = {draw(1, 9), draw(1, 9)};
  c.stride = {draw(1, 2), draw(1, 2)}, c.padding = {draw(0, 9), draw(0, 9)};
  const Pair room = {c.image.row + c.padding.row + draw(0, 9) - c.window.row,
                     c.image.column + c.padding.column + draw(0, 9) - c.window.column};
  if (room.row < 0 || room.column < 0) return;
  c.output = {room.row / c.stride.row + 1, room.column / c.stride.column + 1};
  const int64_t size = c.window.row * c.window.column * c.inputs;
  const auto x = floats(c.batch * c.image.row * c.image.column * c.inputs);
  const auto dy = floats(c.batch * c.output.row * c.output.column * c.inputs);
  const auto kernel = floats(size);
  std::vector<double> y(dy.size()), dx(x.size()), dw(size);
  for (int64_t i = 0; i < size; i++)
    for (int64_t b = 0; b < c.batch; b++)
      for (int64_t r = 0; r < c.output.row; r++)
        for (int64_t s = 0; s < c.output.column; s++) {
          const int64_t tap = i / c.inputs, channel = i % c.inputs;
          const int64_t row = r * c.stride.row + tap / c.window.column - c.padding.row;
          const int64_t column = s * c.stride.column + tap % c.window.column - c.padding.column;
          if (row < 0 || row >= c.image.row || column < 0 || column >= c.image.column) continue;
          const int64_t from =
              ((b * c.image.row + row) * c.image.column + column) * c.inputs + channel;
          const int64_t to = ((b * c.output.row + r) * c.output.column + s) * c.inputs + channel;
          const double w = kernel[i];
          y[to] += w * x[from], dx[from] += w * dy[to], dw[i] += (double)x[from] * dy[to];
        }
  std::vector<float> own_y(y.size()), own_dx(dx.size()), own_dw(size);
  Pool pool;
  const Workers workers = pool.workers(draw(1, 3));
  depthwise(workers, c, x.data(), kernel.data(), own_y.data());
  depthwise_back(workers, c, dy.data(), kernel.data(), own_dx.data());
  depthwise_sample(workers, c, x.data(), dy.data(), own_dw.data());
  const Drawn drawn(c.outputs, own_y);
  compare("depthwise convolution", own_y, y);
  depthwise(workers, c, x.data(), kernel.data(), own_y.data(), &drawn.finish);
  compare("finished windows", own_y, drawn.of(y)), compare("depthwise image gradient", own_dx, dx);
  compare("window gradient", own_dw, dw);
}

// Random lists; those that pass the checks are run, so a hole in the checks is a fault of memory.
static bool foreign() {
  const int64_t inputs = draw(1, 6), outputs = draw(1, 6), capacity = draw(0, 8);
  const int64_t spread = draw(0, 2);  // how wild numbers are
  auto wild = [&](int64_t high) {
    return (int32_t)(spread == 2 && draw(0, 9) == 0 ? draw(INT32_MIN, INT32_MAX)
                                                    : draw(-(spread > 0), high));
  };
  std::vector<int32_t> starts(inputs + 1), kept(capacity), positions(capacity);
  int64_t last = 0;
  for (size_t i = 1; i < starts.size(); i++) {
    starts[i] = spread ? wild(capacity + 1) : last = draw(last, capacity);
  }
  for (auto& own : kept) own = wild(outputs - !spread);
  for (auto& own : positions) own = wild(inputs * outputs - !spread);
  const auto kernel = floats(inputs * outputs), x = floats(3 * inputs), dy = floats(3 * outputs);
  const List list{starts.data(), kept.data(), inputs, outputs, capacity};
  const Weights weights{kernel.data(), positions.data(), (int64_t)kernel.size()};
  if (!check_list(list).empty() || !check_weights(weights, list.size()).empty()) return true;
  std::vector<float> y(3 * outputs), dx(3 * inputs), dw(list.size());
  const Workers one;
  multiply(one, x.data(), 3, list, weights, false, y.data());
  multiply(one, dy.data(), 3, list, weights, true, dx.data());
  sample(one, x.data(), dy.data(), 3, list, dw.data());
  return false;
}

static int32_t altered(int32_t value, int64_t below) {
  const int64_t kind = draw(0, 3);
  if (kind == 0) return draw(INT32_MIN, INT32_MAX);
  return kind == 1 ? draw(0, below - 1) : value + draw(-1, 1);
}

// Lists of blocks in which one number, or a tail, is altered. Those that pass the checks and are still blocks
// give what the kernels of single weights give.
static void altered_blocks(int* refused, int* single, int* whole) {
  const int64_t inputs = draw(1, 4), outputs = draw(16, 40), rows = draw(1, 40);
  const int64_t wide = (outputs + kWidth - 1) / kWidth;
  std::vector<int32_t> starts{0}, kept, positions, taps, sources, targets, places;
  std::vector<char> mask(inputs * wide);
  for (char& own : mask) own = draw(0, 1);
  for (int32_t k = 0; k < inputs; k++) {
    for (int32_t n = 0; n < outputs; n++) {
      if (!mask[k * wide + n / kWidth]) continue;
      kept.push_back(n), positions.push_back(k * outputs + n);
    }
    starts.push_back(kept.size());
  }
  for (int32_t n = 0; n < outputs; n++) {
    for (int32_t k = 0; k < inputs; k++) {
      if (!mask[k * wide + n / kWidth]) continue;
      taps.push_back(0), sources.push_back(k), targets.push_back(n);
      places.push_back(k * outputs + n);
    }
  }
  const int64_t size = kept.size();
  if (size == 0) return;
  const int64_t at = draw(0, size - 1), one = draw(0, inputs);
  switch (draw(0, 9)) {
    case 0: starts[one] = altered(starts[one], size); break;
    case 1: kept[at] = altered(kept[at], outputs); break;
    case 2: positions[at] = altered(positions[at], inputs * outputs); break;
    case 3: taps[at] = altered(taps[at], 2); break;
    case 4: sources[at] = altered(sources[at], inputs); break;
    case 5: targets[at] = altered(targets[at], outputs); break;
    case 6: places[at] = altered(places[at], inputs * outputs); break;
    case 7: std::swap(kept[at], kept[draw(0, size - 1)]); break;
    case 8: std::fill(targets.begin() + at, targets.end(), targets[at] / kWidth * kWidth); break;
    default: break;
  }
  for (auto* own : {&starts, &kept, &positions, &taps, &sources, &targets, &places}) {
    own->shrink_to_fit();  // so that the sanitizer sees what is read behind the end
  }
  const auto x = floats((rows + 1) * inputs), dy = floats(rows * outputs);
  const auto w = floats(2 * inputs * outputs);
  const Workers workers;
  std::vector<float> y(dy.size()), own_y(dy.size()), dw(size), own_dw(size);
  auto same = [&](const char* what) {
    compare(what, own_y, {y.begin(), y.end()}), compare(what, own_dw, {dw.begin(), dw.end()});
  };
  const List list{starts.data(), kept.data(), inputs, outputs, size};
  const Weights weights{w.data(), positions.data(), (int64_t)w.size()};
  if (!check_list(list).empty() || !check_weights(weights, list.size()).empty()) {
    ++*refused;
  } else if (const int64_t blocks = count_blocks(list); blocks < 0) {
    ++*single;
  } else {
    ++*whole;
    multiply(workers, x.data(), rows, list, weights, false, y.data());
    multiply_blocks(workers, x.data(), rows, list, blocks, weights, own_y.data());
    sample(workers, x.data(), dy.data(), rows, list, dw.data());
    sample_blocks(workers, x.data(), dy.data(), rows, list, blocks, own_dw.data());
    same("altered product");
  }
  const Convolution c = {1, {1, rows + 1}, {1, rows}, {1, 2}, {1, 1}, {0, 0}, inputs, outputs};
  const Taps tapped{taps.data(), sources.data(), targets.data(), size};
  const Weights placed{w.data(), places.data(), (int64_t)w.size()};
  if (!all_below(taps.data(), size, 2) || !all_below(sources.data(), size, inputs) ||
      !all_below(targets.data(), size, outputs) || !check_weights(placed, size).empty()) {
    ++*refused;
  } else if (const int64_t blocks = count_blocks(tapped, outputs); blocks < 0) {
    ++*single;
  } else {
    ++*whole;
    convolve(workers, c, x.data(), tapped, placed, y.data());
    convolve_blocks(workers, c, x.data(), tapped, blocks, placed, own_y.data());
    convolve_sample(workers, c, x.data(), dy.data(), tapped, dw.data());
    convolve_sample_blocks(workers, c, x.data(), dy.data(), tapped, blocks, own_dw.data());
    same("altered convolution");
  }
}

int main(int count, char** arguments) {
  const int rounds = count > 1 ? std::atoi(arguments[1]) : 100;
  int refused = 0, refused_blocks = 0, single = 0, whole = 0;
  for (int i = 0; i < rounds; i++) {
    generator.seed(i);
    product(), convolution(), depthwise_layer();
    for (int j = 0; j < 20; j++) refused += foreign();
    for (int j = 0; j < 20; j++) altered_blocks(&refused_blocks, &single, &whole);
  }
  std::printf("ok, %d of %d lists refused\n", refused, 20 * rounds);
  std::printf("of blocks, %d refused, %d single, %d whole\n", refused_blocks, single, whole);
}
