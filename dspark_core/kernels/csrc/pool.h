// Threads that share the phases of one job.
//
// Work is claimed chunk by chunk, and a phase ends when all its chunks are done rather than when every thread
// has arrived: on a busy machine, a thread that is not scheduled holds up nobody. A chunk's result
// never depends on the thread that computes it, so overall results do not either.
//
// A thread claims its own part of a phase in order, and only then what is left of the others' parts:
// consecutive chunks are contiguous in memory, and hardware prefetching needs each thread to read
// sequentially. Two threads that took alternate chunks of small matrices were slower than one.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include <sched.h>

namespace dspark {

// Number of the calling thread within a job: 0 for the caller, helpers count from 1.
inline thread_local int thread_number = 0;

class Job {
 public:
  using Script = std::function<void(Job&)>;

  Job(int phases, Script script) : phases_(phases), script_(std::move(script)) {}

  // Sets how many threads may take part; must precede run().
  void share(int threads) {
    threads_ = std::max(threads, 1);
    stride_ = (size_t(threads_) + 1 + kLine - 1) / kLine * kLine;
    counters_ = std::vector<std::atomic<int>>(phases_ * stride_);
  }

  void run() { script_(*this); }

  // Returns when all chunks of phase `index` are done, by any thread.
  template <class F>
  void phase(int index, int chunks, F&& work) {
    std::atomic<int>& done = counters_[index * stride_];
    if (done.load(std::memory_order_acquire) >= chunks) return;
    for (int turn = 0; turn < threads_; ++turn) {
      const int part = (thread_number + turn) % threads_;
      const int first = first_of(part, chunks), end = first_of(part + 1, chunks);
      std::atomic<int>& claimed = counters_[index * stride_ + 1 + part];
      for (int c; (c = first + claimed.fetch_add(1, std::memory_order_relaxed)) < end;) {
        work(c);
        done.fetch_add(1, std::memory_order_acq_rel);
      }
    }
    for (int spins = 0; done.load(std::memory_order_acquire) < chunks; ++spins) {
      if (spins < 4096)
        pause();
      else
        sched_yield();
    }
  }

 private:
  static constexpr size_t kLine = 64 / sizeof(int);  // avoids false sharing between phases

  int first_of(int part, int chunks) const { return int(int64_t(chunks) * part / threads_); }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  const size_t phases_;
  const Script script_;
  int threads_ = 1;
  size_t stride_ = 0;
  std::vector<std::atomic<int>> counters_;  // per phase: chunks done, then chunks claimed of each part
};

class Pool {
 public:
  static Pool& instance() {
    static Pool* pool = new Pool;  // never destroyed: threads may outlive static destructors
    return *pool;
  }

  // Runs the job on this thread and up to threads - 1 others.
  void run(const std::shared_ptr<Job>& job, int threads) {
    job->share(threads);
    if (threads > 1) {
      std::lock_guard<std::mutex> guard(mutex_);
      while (started_ < threads - 1 && start()) {
      }
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

  // Returns when no helper is inside a job; call before freeing what jobs refer to.
  void quiesce() {
    while (inside_.load(std::memory_order_acquire) > 0) sched_yield();
  }

 private:
  // False if the system grants no more threads; the existing ones then do the work.
  bool start() {
    try {
      std::thread([this, index = started_] { work(index); }).detach();
    } catch (const std::system_error&) {
      return false;
    }
    ++started_;
    return true;
  }

  void work(int index) {
    thread_number = index + 1;
    uint64_t seen = 0;
    for (;;) {
      // Steps follow each other closely, so poll briefly for the next one before sleeping.
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
