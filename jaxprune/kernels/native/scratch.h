// Memory that a thread keeps from one call to the next.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace jaxprune {

// Each use has a buffer of its own in each thread, so calls at the same time share nothing. Fresh
// memory for each call would cost a page fault for every 4 KiB.
enum Use {
  kValues,
  kSource,
  kTarget,
  kCotangent,
  kPartial,
  kEntries,
  kPlaces,
  kStarts,
  kBlocks,
  kUses
};

class Buffer {
 public:
  ~Buffer() { std::free(memory_); }

  void* at_least(size_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      size_ = (bytes + bytes / 4 + 4095) / 4096 * 4096;
      memory_ = std::aligned_alloc(4096, size_);
      if (memory_ == nullptr) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return memory_;
  }

 private:
  void* memory_ = nullptr;
  size_t size_ = 0;
};

template <class T>
T* scratch(Use use, int64_t count) {
  static thread_local Buffer buffers[kUses];
  // One vector more, so that a buffer of no entries is a buffer as well.
  return static_cast<T*>(buffers[use].at_least(sizeof(T) * static_cast<size_t>(count) + 64));
}

}  // namespace jaxprune
