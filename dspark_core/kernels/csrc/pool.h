// Threads that share the phases of one job.
//
// Work is claimed chunk by chunk, and a phase ends when its chunks are done, not when every thread
// has arrived: on a busy machine a thread that is not running holds nobody up. What a chunk
// computes never depends on who computes it, so neither do results.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include <sched.h>

namespace dspark {

class Job {
 public:
  using Script = std::function<void(Job&)>;

  Job(int phases, Script script) : phases_(phases), script_(std::move(script)) {}

  void run() { script_(*this); }

  // Returns when all chunks of phase `index` are done, by whomever.
  template <class F>
  void phase(int index, int chunks, F&& work) {
    Phase& p = phases_[index];
    if (p.done.load(std::memory_order_acquire) >= chunks) return;
    for (int c; (c = p.next.fetch_add(1, std::memory_order_relaxed)) < chunks;) {
      work(c);
      p.done.fetch_add(1, std::memory_order_acq_rel);
    }
    for (int spins = 0; p.done.load(std::memory_order_acquire) < chunks; ++spins) {
      if (spins < 4096)
        pause();
      else
        sched_yield();
    }
  }

 private:
  struct alignas(64) Phase {
    std::atomic<int> next{0};
    std::atomic<int> done{0};
  };

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  std::vector<Phase> phases_;
  Script script_;
};

class Pool {
 public:
  static Pool& instance() {
    static Pool* pool = new Pool;  // never destroyed: threads may outlive static destructors
    return *pool;
  }

  // Runs the job on this thread and up to threads - 1 others.
  void run(const std::shared_ptr<Job>& job, int threads) {
    if (threads > 1) {
      std::lock_guard<std::mutex> guard(mutex_);
      while (int(started_) < threads - 1) start();
      job_ = job;
      helpers_ = threads - 1;
      generation_.fetch_add(1, std::memory_order_release);
      wake_.notify_all();
    }
    job->run();
    if (threads > 1) {
      std::lock_guard<std::mutex> guard(mutex_);
      if (job_ == job) job_.reset();
    }
  }

  // Returns when no helper is inside a job any more; for freeing what jobs refer to.
  void quiesce() {
    while (inside_.load(std::memory_order_acquire) > 0) sched_yield();
  }

 private:
  void start() {
    const int index = started_++;
    std::thread([this, index] { work(index); }).detach();
  }

  void work(int index) {
    uint64_t seen = 0;
    for (;;) {
      // Steps follow each other closely: look for the next one briefly before going to sleep.
      for (int spins = 0; spins < 64 && generation_.load(std::memory_order_acquire) == seen; ++spins)
        sched_yield();
      std::shared_ptr<Job> job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
        seen = generation_.load(std::memory_order_relaxed);
        if (index < helpers_) job = job_;
        if (job) inside_.fetch_add(1, std::memory_order_acq_rel);
      }
      if (job) {
        job->run();
        inside_.fetch_sub(1, std::memory_order_acq_rel);
      }
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::shared_ptr<Job> job_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> inside_{0};
  int helpers_ = 0;
  int started_ = 0;
};

}  // namespace dspark
