// Distributes the attention of a pass over threads.
//
// Work is split by rows of runs and by key/value heads and, if that yields too few tasks, as with one
// long context, also by chunks of the context. The thread that finishes a task's last part merges all
// parts, so no thread waits for another, and merges in context order, so results do not vary.
#pragma once

#include <atomic>
#include <vector>

#include "attention.h"

namespace dspark {

struct AttentionTask {
  int32_t run, first, rows;  // (query, head) rows [first, first + rows) of the run, for any key/value head
  int32_t chunks;            // of the context they attend to
};

struct AttentionItem {
  int32_t task, kv_head, first, end;  // chunks [first, end)
};

// Kept between passes to reuse memory.
struct AttentionBuffers {
  std::vector<AttentionTask> tasks;
  std::vector<AttentionItem> items;
  std::vector<int32_t> first_chunk;  // of each task, in `partials`
  std::vector<Partial> partials;
};

class AttentionPlan {
 public:
  // `buffers.tasks` must hold the tasks of the pass.
  AttentionPlan(AttentionBuffers& buffers, int kv_heads, int layers, int threads)
      : tasks_(buffers.tasks.data()), kv_heads_(kv_heads), num_tasks_(int(buffers.tasks.size())) {
    buffers.first_chunk.clear();
    int chunks = 0;
    for (const AttentionTask& task : buffers.tasks) {
      buffers.first_chunk.push_back(chunks);
      chunks += task.chunks;
    }
    const size_t count = size_t(chunks) * kv_heads * kRows;
    const bool few = threads > 1 && num_tasks_ * kv_heads < kFewPerThread * threads && chunks > num_tasks_;
    split_ = few && count * sizeof(Partial) <= kMostBytes;
    const int at_once = split_ ? std::max(1, chunks * kv_heads / (kItemsPerThread * threads)) : chunks;
    share_out(buffers.items, at_once);
    if (split_) {
      if (buffers.partials.size() < count) buffers.partials.resize(count);
      arrived_ = std::vector<std::atomic<int>>(size_t(layers) * num_tasks_ * kv_heads);
    }
    items_ = buffers.items.data();
    num_items_ = int(buffers.items.size());
    first_chunk_ = buffers.first_chunk.data();
    partials_ = buffers.partials.data();
  }

  int items() const { return num_items_; }
  const AttentionItem& item(int index) const { return items_[index]; }
  const AttentionTask& task(const AttentionItem& item) const { return tasks_[item.task]; }

  // Returns whether the rows' results were written, which the thread completing a task's last part does.
  template <class T>
  bool attend(const AttentionItem& item, int layer, const QueryRows<T>& rows, const Context<T>& context) const {
    if (!split_) {
      Partial parts[kRows];
      dspark::attend(rows, context, [&](int chunk) {
        attend_chunk(rows, context, chunk, parts);
        return parts;
      });
      return true;
    }
    for (int chunk = item.first; chunk < item.end; ++chunk)
      attend_chunk(rows, context, chunk, parts_of(item, chunk));
    const int all = task(item).chunks, mine = item.end - item.first;
    std::atomic<int>& arrived = arrived_[(size_t(layer) * num_tasks_ + item.task) * kv_heads_ + item.kv_head];
    if (arrived.fetch_add(mine, std::memory_order_acq_rel) + mine != all) return false;
    dspark::attend(rows, context, [&](int chunk) { return parts_of(item, chunk); });
    return true;
  }

 private:
  static constexpr int kFewPerThread = 4;    // tasks; with more, splitting contexts is not needed
  static constexpr int kItemsPerThread = 8;  // when split
  static constexpr size_t kMostBytes = 16 << 20;

  void share_out(std::vector<AttentionItem>& items, int at_once) const {
    items.clear();
    for (int task = 0; task < num_tasks_; ++task)
      for (int head = 0; head < kv_heads_; ++head)
        for (int first = 0; first < tasks_[task].chunks; first += at_once)
          items.push_back({task, head, first, std::min(first + at_once, tasks_[task].chunks)});
  }

  Partial* parts_of(const AttentionItem& item, int chunk) const {
    return partials_ + (size_t(first_chunk_[item.task] + chunk) * kv_heads_ + item.kv_head) * kRows;
  }

  const AttentionTask* tasks_;
  const int kv_heads_, num_tasks_;
  bool split_;
  mutable std::vector<std::atomic<int>> arrived_;  // chunks, by layer, task and head
  const AttentionItem* items_;
  int num_items_;
  const int32_t* first_chunk_;
  Partial* partials_;
};

}  // namespace dspark
