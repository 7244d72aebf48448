// The kernels as calls of XLA: shapes and indices are checked here, before the kernels run.
#include <algorithm>
#include <cstring>
#include <new>
#include <string>

#include "blocks.h"
#include "convolutions.h"
#include "depthwise.h"
#include "finish.h"
#include "products.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;
using Result = ffi::Result<Floats>;
using Numbers = ffi::Span<const int64_t>;
using namespace jaxprune;

// A kernel has as many dimensions as its layer says; packed values have one.
constexpr size_t kPacked = 1;

ffi::Error finished(const std::string& wrong) {
  return wrong.empty() ? ffi::Error::Success() : ffi::Error::InvalidArgument("jaxprune: " + wrong);
}

template <class Function>
ffi::Error guarded(const Function& function) {
  try {
    return finished(function());
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "jaxprune: no memory for a kernel");
  } catch (const std::exception& error) {
    return ffi::Error::Internal(std::string("jaxprune: ") + error.what());
  }
}

Workers workers_of(ffi::ThreadPool pool) {
  return {std::max<int64_t>(1, pool.num_threads()), [pool](std::function<void()> task) mutable {
            pool.Schedule(std::move(task));
          }};
}

template <class Buffer>
bool has_rank(const Buffer& buffer, size_t rank) {
  return buffer.dimensions().size() == rank;
}

Weights weights_of(Floats& weights, Ints& positions) {
  return {weights.typed_data(), has_rank(weights, kPacked) ? nullptr : positions.typed_data(),
          static_cast<int64_t>(weights.element_count())};
}

// Where a gradient goes: as packed values, or to its places in a dense kernel of zeros.
template <class Function>
std::string into(Floats& gradient, Ints& positions, int64_t count, const Function& function) {
  const int64_t size = gradient.element_count();
  const bool packed = has_rank(gradient, kPacked);
  const Weights places = {nullptr, packed ? nullptr : positions.typed_data(), size};
  if (auto wrong = check_weights(places, count); !wrong.empty()) return wrong;
  float* own = packed ? gradient.typed_data() : scratch<float>(kValues, count);
  if (auto wrong = function(own); !wrong.empty()) return wrong;
  if (packed) {
    std::memset(own + count, 0, sizeof(float) * (size - count));
    return "";
  }
  float* dense = gradient.typed_data();
  // Part by part, so that zeros are still in the cache when gradients follow. A position that is out
  // of order waits for its part, and positions behind it for their turn; all are below `size`.
  constexpr int64_t kPart = 4096;
  int64_t next = 0;
  for (int64_t start = 0; start < size; start += kPart) {
    const int64_t end = std::min(size, start + kPart);
    std::memset(dense + start, 0, sizeof(float) * (end - start));
    for (; next < count && places.positions[next] < end; next++) {
      dense[places.positions[next]] = own[next];
    }
  }
  return "";
}

// How results are stored, with arrays that are empty where there is nothing to do.
std::string finish_of(Floats& scale, Floats& shift, Floats& rest, float low, float high,
                      const Floats& results, Finish* finish) {
  if (results.element_count() == 0) return "an empty result has nothing to finish";
  auto some = [](Floats& own) { return own.element_count() ? own.typed_data() : nullptr; };
  const size_t count = scale.element_count();
  const int64_t channels = has_rank(results, 0) ? 1 : results.dimensions().back();
  if (shift.element_count() != count || (count && static_cast<int64_t>(count) != channels)) {
    return "the scale and the shift must have one number for each output channel";
  }
  if (rest.element_count() && rest.element_count() != results.element_count()) {
    return "what is added must have the shape of the result";
  }
  *finish = {some(scale), some(shift), some(rest), low, high, results.typed_data()};
  return "";
}

// Products.

// The list of a kernel, after its shapes and indices were checked.
std::string list_of(Ints& positions, Ints& starts, Ints& outputs, int64_t input_count,
                    int64_t output_count, List* list) {
  if (!has_rank(starts, 1) || !has_rank(outputs, 1) || !has_rank(positions, 1) ||
      static_cast<int64_t>(starts.element_count()) != input_count + 1 ||
      outputs.element_count() != positions.element_count()) {
    return "the indices are those of a kernel of another shape; make them of a mask of this kernel";
  }
  *list = {starts.typed_data(), outputs.typed_data(), input_count, output_count,
           static_cast<int64_t>(outputs.element_count())};
  return check_list(*list);
}

// Whether weights are values, or a kernel [inputs, outputs].
bool is_kernel(const Floats& weights, int64_t inputs, int64_t outputs) {
  auto shape = weights.dimensions();
  return shape.size() == kPacked ||
         (shape.size() == 2 && shape[0] == inputs && shape[1] == outputs);
}

// Rows times the kernel, or times the transposed kernel if `back`.
std::string product(ffi::ThreadPool pool, Floats& from, Floats& weights, Ints& positions,
                    Ints& starts, Ints& outputs, Floats& to, bool back,
                    const Finish* finish = nullptr) {
  const Floats &x = back ? to : from, &y = back ? from : to;
  if (!has_rank(x, 2) || !has_rank(y, 2) || x.dimensions()[0] != y.dimensions()[0] ||
      !is_kernel(weights, x.dimensions()[1], y.dimensions()[1])) {
    return "rows and kernel do not fit together";
  }
  List list;
  std::string wrong =
      list_of(positions, starts, outputs, x.dimensions()[1], y.dimensions()[1], &list);
  const Weights own = weights_of(weights, positions);
  if (wrong.empty()) wrong = check_weights(own, list.size());
  if (!wrong.empty()) return wrong;
  const int64_t blocks = back ? -1 : count_blocks(list), rows = x.dimensions()[0];
  const Workers workers = workers_of(pool);
  const float* source = from.typed_data();
  float* target = to.typed_data();
  return blocks >= 0 ? multiply_blocks(workers, source, rows, list, blocks, own, target, finish)
                     : multiply(workers, source, rows, list, own, back, target, finish);
}

ffi::Error ProductForward(ffi::ThreadPool pool, Floats x, Floats weights, Ints positions,
                          Ints starts, Ints outputs, Result y) {
  return guarded([&] { return product(pool, x, weights, positions, starts, outputs, *y, false); });
}

ffi::Error ProductFinished(ffi::ThreadPool pool, Floats x, Floats weights, Ints positions,
                           Ints starts, Ints outputs, Floats scale, Floats shift, Floats rest,
                           Result y, float low, float high) {
  return guarded([&]() -> std::string {
    Finish finish;
    const std::string wrong = finish_of(scale, shift, rest, low, high, *y, &finish);
    if (!wrong.empty()) return wrong;
    return product(pool, x, weights, positions, starts, outputs, *y, false, &finish);
  });
}

ffi::Error ProductBackward(ffi::ThreadPool pool, Floats dy, Floats weights, Ints positions,
                           Ints starts, Ints outputs, Result dx) {
  return guarded([&] { return product(pool, dy, weights, positions, starts, outputs, *dx, true); });
}

ffi::Error ProductSample(ffi::ThreadPool pool, Floats x, Floats dy, Ints positions, Ints starts,
                         Ints outputs, Result gradient) {
  return guarded([&]() -> std::string {
    if (!has_rank(x, 2) || !has_rank(dy, 2) || x.dimensions()[0] != dy.dimensions()[0] ||
        !is_kernel(*gradient, x.dimensions()[1], dy.dimensions()[1])) {
      return "`x`, the cotangent and the kernel do not fit together";
    }
    List list;
    std::string wrong =
        list_of(positions, starts, outputs, x.dimensions()[1], dy.dimensions()[1], &list);
    if (!wrong.empty()) return wrong;
    const int64_t blocks = count_blocks(list), rows = x.dimensions()[0];
    return into(*gradient, positions, list.size(), [&](float* own) {
      if (blocks >= 0) {
        return sample_blocks(workers_of(pool), x.typed_data(), dy.typed_data(), rows, list, blocks,
                             own);
      }
      return sample(workers_of(pool), x.typed_data(), dy.typed_data(), rows, list, own);
    });
  });
}

// Convolutions.

// One direction of a convolution: images [batch, rows, columns, inputs], outputs likewise.
std::string convolution_of(const Floats& images, const Floats& results, Numbers window,
                           Numbers strides, Numbers padding, Convolution* c) {
  auto x = images.dimensions(), y = results.dimensions();
  if (x.size() != 4 || y.size() != 4 || window.size() != 2 || strides.size() != 2 ||
      padding.size() != 4 || x[0] != y[0]) {
    return "images, window, strides and padding do not fit together";
  }
  for (int i = 0; i < 2; i++) {
    if (strides[i] < 1 || strides[i] > 2) return "`strides` must be 1 or 2";
    if (window[i] < 1 || padding[2 * i] < 0 || padding[2 * i + 1] < 0) {
      return "the window must not be empty, and `padding` not negative";
    }
    const int64_t room = x[1 + i] + padding[2 * i] + padding[2 * i + 1] - window[i];
    if (room < 0 || y[1 + i] != room / strides[i] + 1) {
      return "the output does not have the shape that `strides` and `padding` give";
    }
  }
  *c = {x[0], {x[1], x[2]}, {y[1], y[2]}, {window[0], window[1]}, {strides[0], strides[1]},
        {padding[0], padding[2]}, x[3], y[3]};
  return "";
}

// Kept weights of a convolution, after everything about them was checked.
std::string taps_of(const Convolution& c, const Floats& weights, Ints& positions, Ints& taps,
                    Ints& inputs, Ints& outputs, Ints& count, Taps* kept) {
  auto shape = weights.dimensions();
  if (shape.size() != kPacked &&
      !(shape.size() == 4 && shape[0] == c.window.row && shape[1] == c.window.column &&
        shape[2] == c.inputs && shape[3] == c.outputs)) {
    return "the kernel does not fit the images";
  }
  const int64_t capacity = positions.element_count();
  for (Ints* own : {&positions, &taps, &inputs, &outputs}) {
    if (!has_rank(*own, 1) || static_cast<int64_t>(own->element_count()) != capacity) {
      return "the lists of indices differ in length; make them with convolution_indices";
    }
  }
  if (count.element_count() != 1) return "`count` must be one number";
  const int64_t size = count.typed_data()[0];
  if (size < 0 || size > capacity) {
    return "`count` must be in [0, " + std::to_string(capacity) + "], but is " +
           std::to_string(size) + "; make indices with convolution_indices";
  }
  *kept = {taps.typed_data(), inputs.typed_data(), outputs.typed_data(), size};
  std::string wrong = check_indices("taps", kept->taps, size, c.window.row * c.window.column);
  if (wrong.empty()) wrong = check_indices("inputs", kept->inputs, size, c.inputs);
  if (wrong.empty()) wrong = check_indices("outputs", kept->outputs, size, c.outputs);
  const Weights own = {nullptr, shape.size() == kPacked ? nullptr : positions.typed_data(),
                       static_cast<int64_t>(weights.element_count())};
  return wrong.empty() ? check_weights(own, size) : wrong;
}

// Nothing to compute: an output of no entries, or zeros where there are no inputs.
bool is_empty(const Convolution& c, Floats& result) {
  if (c.batch > 0 && c.inputs > 0 && c.outputs > 0 && c.image.row > 0 && c.image.column > 0) {
    return false;
  }
  std::memset(result.typed_data(), 0, result.size_bytes());
  return true;
}

std::string convolution(ffi::ThreadPool pool, Floats& x, Floats& weights, Ints& positions,
                        Ints& taps, Ints& inputs, Ints& outputs, Ints& count, Floats& y,
                        Numbers window, Numbers strides, Numbers padding, const Finish* finish) {
  Convolution c;
  Taps kept;
  std::string wrong = convolution_of(x, y, window, strides, padding, &c);
  if (wrong.empty()) wrong = taps_of(c, weights, positions, taps, inputs, outputs, count, &kept);
  if (!wrong.empty() || is_empty(c, y)) return wrong;
  const Weights own = weights_of(weights, positions);
  const Workers workers = workers_of(pool);
  const int64_t blocks = count_blocks(kept, c.outputs);
  const float* images = x.typed_data();
  float* results = y.typed_data();
  return blocks >= 0 ? convolve_blocks(workers, c, images, kept, blocks, own, results, finish)
                     : convolve(workers, c, images, kept, own, results, finish);
}

ffi::Error ConvolutionForward(ffi::ThreadPool pool, Floats x, Floats weights, Ints positions,
                              Ints taps, Ints inputs, Ints outputs, Ints count, Result y,
                              Numbers window, Numbers strides, Numbers padding) {
  return guarded([&] {
    return convolution(pool, x, weights, positions, taps, inputs, outputs, count, *y, window,
                       strides, padding, nullptr);
  });
}

ffi::Error ConvolutionFinished(ffi::ThreadPool pool, Floats x, Floats weights, Ints positions,
                               Ints taps, Ints inputs, Ints outputs, Ints count, Floats scale,
                               Floats shift, Floats rest, Result y, Numbers window,
                               Numbers strides, Numbers padding, float low, float high) {
  return guarded([&]() -> std::string {
    Finish finish;
    const std::string wrong = finish_of(scale, shift, rest, low, high, *y, &finish);
    if (!wrong.empty()) return wrong;
    return convolution(pool, x, weights, positions, taps, inputs, outputs, count, *y, window,
                       strides, padding, &finish);
  });
}

ffi::Error ConvolutionBackward(ffi::ThreadPool pool, Floats dy, Floats weights, Ints positions,
                               Ints taps, Ints inputs, Ints outputs, Ints count, Result dx,
                               Numbers window, Numbers strides, Numbers padding) {
  return guarded([&]() -> std::string {
    Convolution c;
    Taps kept;
    std::string wrong = convolution_of(*dx, dy, window, strides, padding, &c);
    if (wrong.empty()) wrong = taps_of(c, weights, positions, taps, inputs, outputs, count, &kept);
    if (!wrong.empty() || is_empty(c, *dx)) return wrong;
    return convolve_back(workers_of(pool), c, dy.typed_data(), kept, weights_of(weights, positions),
                         dx->typed_data());
  });
}

ffi::Error ConvolutionSample(ffi::ThreadPool pool, Floats x, Floats dy, Ints positions, Ints taps,
                             Ints inputs, Ints outputs, Ints count, Result gradient,
                             Numbers window, Numbers strides, Numbers padding) {
  return guarded([&]() -> std::string {
    Convolution c;
    Taps kept;
    std::string wrong = convolution_of(x, dy, window, strides, padding, &c);
    if (wrong.empty()) {
      wrong = taps_of(c, *gradient, positions, taps, inputs, outputs, count, &kept);
    }
    if (!wrong.empty() || is_empty(c, *gradient)) return wrong;
    const int64_t blocks = count_blocks(kept, c.outputs);
    return into(*gradient, positions, kept.size, [&](float* own) {
      if (blocks >= 0) {
        return convolve_sample_blocks(workers_of(pool), c, x.typed_data(), dy.typed_data(), kept,
                                      blocks, own);
      }
      return convolve_sample(workers_of(pool), c, x.typed_data(), dy.typed_data(), kept, own);
    });
  });
}

// Depthwise convolutions.

// Shapes of images, results and windows [rows, columns, 1, channels], after they were checked.
std::string depthwise_of(const Floats& images, const Floats& results, const Floats& weights,
                         Numbers window, Numbers strides, Numbers padding, Convolution* c) {
  auto shape = weights.dimensions();
  std::string wrong = convolution_of(images, results, window, strides, padding, c);
  if (!wrong.empty()) return wrong;
  if (c->inputs != c->outputs || shape.size() != 4 || shape[0] != c->window.row ||
      shape[1] != c->window.column || shape[2] != 1 || shape[3] != c->inputs) {
    return "the windows must be one for each channel: [rows, columns, 1, channels]";
  }
  return "";
}

std::string depthwise(ffi::ThreadPool pool, Floats& x, Floats& weights, Floats& y, Numbers window,
                      Numbers strides, Numbers padding, const Finish* finish) {
  Convolution c;
  std::string wrong = depthwise_of(x, y, weights, window, strides, padding, &c);
  if (!wrong.empty() || is_empty(c, y)) return wrong;
  return depthwise(workers_of(pool), c, x.typed_data(), weights.typed_data(), y.typed_data(),
                   finish);
}

ffi::Error DepthwiseForward(ffi::ThreadPool pool, Floats x, Floats weights, Result y,
                            Numbers window, Numbers strides, Numbers padding) {
  return guarded(
      [&] { return depthwise(pool, x, weights, *y, window, strides, padding, nullptr); });
}

ffi::Error DepthwiseFinished(ffi::ThreadPool pool, Floats x, Floats weights, Floats scale,
                             Floats shift, Floats rest, Result y, Numbers window, Numbers strides,
                             Numbers padding, float low, float high) {
  return guarded([&]() -> std::string {
    Finish finish;
    const std::string wrong = finish_of(scale, shift, rest, low, high, *y, &finish);
    if (!wrong.empty()) return wrong;
    return depthwise(pool, x, weights, *y, window, strides, padding, &finish);
  });
}

ffi::Error DepthwiseBackward(ffi::ThreadPool pool, Floats dy, Floats weights, Result dx,
                             Numbers window, Numbers strides, Numbers padding) {
  return guarded([&]() -> std::string {
    Convolution c;
    std::string wrong = depthwise_of(*dx, dy, weights, window, strides, padding, &c);
    if (!wrong.empty() || is_empty(c, *dx)) return wrong;
    return depthwise_back(workers_of(pool), c, dy.typed_data(), weights.typed_data(),
                          dx->typed_data());
  });
}

ffi::Error DepthwiseSample(ffi::ThreadPool pool, Floats x, Floats dy, Result gradient,
                           Numbers window, Numbers strides, Numbers padding) {
  return guarded([&]() -> std::string {
    Convolution c;
    std::string wrong = depthwise_of(x, dy, *gradient, window, strides, padding, &c);
    if (!wrong.empty() || is_empty(c, *gradient)) return wrong;
    return depthwise_sample(workers_of(pool), c, x.typed_data(), dy.typed_data(),
                            gradient->typed_data());
  });
}

}  // namespace

#define JAXPRUNE_FINISH .Arg<Floats>().Arg<Floats>().Arg<Floats>().Ret<Floats>()
#define JAXPRUNE_CLAMP .Attr<float>("low").Attr<float>("high")
#define JAXPRUNE_WINDOW .Attr<Numbers>("window").Attr<Numbers>("strides").Attr<Numbers>("padding")

#define JAXPRUNE_PRODUCT      \
  ffi::Ffi::Bind()            \
      .Ctx<ffi::ThreadPool>() \
      .Arg<Floats>()          \
      .Arg<Floats>()          \
      .Arg<Ints>()            \
      .Arg<Ints>()            \
      .Arg<Ints>()            \
      .Ret<Floats>()
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxprune_product_forward, ProductForward, JAXPRUNE_PRODUCT);
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxprune_product_backward, ProductBackward, JAXPRUNE_PRODUCT);
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxprune_product_sample, ProductSample, JAXPRUNE_PRODUCT);
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxprune_product_finished, ProductFinished,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  JAXPRUNE_FINISH JAXPRUNE_CLAMP);

#define JAXPRUNE_CONVOLUTION   \
  ffi::Ffi::Bind()             \
      .Ctx<ffi::ThreadPool>()  \
      .Arg<Floats>()           \
      .Arg<Floats>()           \
      .Arg<Ints>()             \
      .Arg<Ints>()             \
      .Arg<Ints>()             \
      .Arg<Ints>()             \
      .Arg<Ints>()             \
      .Ret<Floats>()           \
      .Attr<Numbers>("window") \
      .Attr<Numbers>("strides") \
      .Attr<Numbers>("padding")
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxprune_convolution_forward, ConvolutionForward,
                              JAXPRUNE_CONVOLUTION);
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxprune_convolution_backward, ConvolutionBackward,
                              JAXPRUNE_CONVOLUTION);
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxprune_convolution_sample, ConvolutionSample,
                              JAXPRUNE_CONVOLUTION);

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxprune_convolution_finished, ConvolutionFinished,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  JAXPRUNE_FINISH JAXPRUNE_WINDOW JAXPRUNE_CLAMP);

#define JAXPRUNE_DEPTHWISE     \
  ffi::Ffi::Bind()             \
      .Ctx<ffi::ThreadPool>()  \
      .Arg<Floats>()           \
      .Arg<Floats>()           \
      .Ret<Floats>()           \
      .Attr<Numbers>("window") \
      .Attr<Numbers>("strides") \
      .Attr<Numbers>("padding")
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxprune_depthwise_forward, DepthwiseForward, JAXPRUNE_DEPTHWISE);
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxprune_depthwise_backward, DepthwiseBackward, JAXPRUNE_DEPTHWISE);
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxprune_depthwise_sample, DepthwiseSample, JAXPRUNE_DEPTHWISE);
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxprune_depthwise_finished, DepthwiseFinished,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  JAXPRUNE_FINISH JAXPRUNE_WINDOW JAXPRUNE_CLAMP);
