// Runs the kernels without JAX on random layers, right and wrong indices, one and more threads.
// test_native.py compiles it with sanitizers; it prints "ok" and the number of refused lists.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

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
    if (std::abs(own[i] - expected[i]) <= 1e-3 * (1 + std::abs(expected[i]))) continue;
    std::printf("%s differs at %zu: %g, not %g\n", what, i, own[i], expected[i]);
    std::exit(1);
  }
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
  const int64_t inputs = draw(1, 150), outputs = draw(1, 150);
  const double density = std::vector<double>{0, .1, .5, 1}[draw(0, 3)];
  std::vector<int32_t> starts{0}, kept, positions;
  for (int64_t k = 0; k < inputs; k++) {
    for (int64_t n = 0; n < outputs; n++) {
      if (std::uniform_real_distribution<>()(generator) >= density) continue;
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
}

static void convolution() {
  Convolution c;
  c.batch = draw(1, 20), c.inputs = draw(1, 20), c.outputs = draw(1, 20);
  c.image = {draw(1, 12), draw(1, 20)}, c.window = {draw(1, 7), draw(1, 7)};
  c.stride = {draw(1, 2), draw(1, 2)}, c.padding = {draw(0, 4), draw(0, 4)};
  const Pair room = {c.image.row + c.padding.row + draw(0, 4) - c.window.row,
                     c.image.column + c.padding.column + draw(0, 4) - c.window.column};
  if (room.row < 0 || room.column < 0) return;
  c.output = {room.row / c.stride.row + 1, room.column / c.stride.column + 1};
  const double density = std::vector<double>{0, .1, .5, 1}[draw(0, 3)];
  std::vector<int32_t> taps, inputs, outputs, positions;
  for (int32_t n = 0; n < c.outputs; n++)
    for (int32_t k = 0; k < c.inputs; k++)
      for (int32_t t = 0; t < c.window.row * c.window.column; t++) {
        if (std::uniform_real_distribution<>()(generator) >= density) continue;
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

int main(int count, char** arguments) {
  const int rounds = count > 1 ? std::atoi(arguments[1]) : 100;
  int refused = 0;
  for (int i = 0; i < rounds; i++) {
    generator.seed(i);
    product(), convolution(), depthwise_layer();
    for (int j = 0; j < 20; j++) refused += foreign();
  }
  std::printf("ok, %d of %d lists refused\n", refused, 20 * rounds);
}
