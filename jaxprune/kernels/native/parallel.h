// Work that is divided among threads.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>

namespace jaxprune {

// Runs tasks elsewhere, at some time; XLA's thread pool, or nothing at all.
struct Workers {
  int64_t threads = 1;
  std::function<void(std::function<void()>)> schedule;
};

// Calls task(i) for all i below count. The caller works too, and waits only for tasks that a thread
// has begun: a pool whose threads all wait like this still finishes.
inline void parallel(const Workers& workers, int64_t count,
                     const std::function<void(int64_t)>& task) {
  const int64_t threads = workers.threads < count ? workers.threads : count;
  if (threads <= 1 || !workers.schedule) {
    for (int64_t i = 0; i < count; i++) task(i);
    return;
  }
  struct Shared {
    std::atomic<int64_t> next{0};
    int64_t done = 0;
    std::mutex mutex;
    std::condition_variable finished;
    std::exception_ptr error;
  };
  auto shared = std::make_shared<Shared>();  // outlives the call: a late helper still looks at it
  auto work = [shared, count, &task] {
    for (int64_t i; (i = shared->next.fetch_add(1)) < count;) {
      std::exception_ptr error;
      try {
        task(i);
      } catch (...) {
        error = std::current_exception();
      }
      std::lock_guard<std::mutex> lock(shared->mutex);
      if (error) shared->error = error;
      if (++shared->done == count) shared->finished.notify_all();
    }
  };
  for (int64_t i = 1; i < threads; i++) workers.schedule(work);
  work();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->finished.wait(lock, [&] { return shared->done == count; });
  if (shared->error) std::rethrow_exception(shared->error);
}

}  // namespace jaxprune
