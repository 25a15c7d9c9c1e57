// A whole stack of Llama or Qwen3 layers in one call, over a flattened ragged batch.
//
// A target's runs are causal. A drafter's runs are blocks: their tokens attend to the whole context
// held for their sequence and, bidirectionally, to each other. A block's keys and values are stored
// after that context, where the next ones overwrite them. `append` adds context, computed from features.
//
// Activations between matrices have type T (bfloat16 or float32); the residual stream, norms,
// rotations and softmax are float32.
#pragma once

#include <memory>

#include "attention_plan.h"
#include "linear.h"

namespace dspark {

struct DecoderShape {
  int32_t layers, hidden, inner, heads, kv_heads, head_dim, vocab, bfloat16;
  float eps;
  const float* cosines;  // [positions, head_dim]
  const float* sines;
  const void* embedding;     // [vocab, hidden] of type T
  const float* final_norm;   // [hidden]
  Matrix head;
};

struct Layer {
  const float* input_norm;      // [hidden]
  const float* attention_norm;  // norm after attention [hidden]
  const float* qk_norm;         // [heads + kv_heads, head_dim] or null
  Matrix qkv, output, gate_up, down;
};

struct Run {
  int32_t row, count, start, page_offset;  // first token row, tokens, first position, offset into `pages`
};

struct Batch {
  const int64_t* token_ids;
  const Run* runs;
  const int32_t* pages;
  const int64_t* logit_rows;
  const int32_t* taps;  // layers whose outputs to keep; -1: the embedding, `layers`: after the final norm
  void* keys;
  void* values;
  void* tapped;   // [tokens, num_taps * hidden] of type T
  float* logits;  // [num_logit_rows, vocab]
  int32_t tokens, num_runs, num_logit_rows, num_taps, num_pages, page_tokens, threads;
  int32_t two_way;       // runs are blocks
  const int32_t* slots;  // [num_runs] cache slot of a run's first token; null: its position
  const void* features;  // [tokens, hidden] of type T: only append their keys and values; null: a pass
};

constexpr int kRowsPerChunk = 8;

template <class T>
static void rms_norm(const float* x, const float* weight, float eps, int size, T* out) {
  f32x16 squares = {};
  int i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const f32x16 v = load<f32x16>(x + i);
    squares += v * v;
  }
  float total = sum(squares);
  for (; i < size; ++i) total += x[i] * x[i];
  const float factor = 1.0f / std::sqrt(total / float(size) + eps);
  for (i = 0; i + kLanes <= size; i += kLanes)
    store_activation(out + i, load<f32x16>(x + i) * factor * load<f32x16>(weight + i));
  for (; i < size; ++i) store_one(out + i, x[i] * factor * weight[i]);
}

struct Buffers {
  std::vector<float> residual, qkv;
  std::vector<uint8_t> normed, q, attended, inner;
  GroupBuffer normed_groups, attended_groups, inner_groups;
  std::vector<int32_t> run_of_row;
  AttentionBuffers attention;
};

template <class T>
class Pass {
 public:
  Pass(const DecoderShape& shape, const std::vector<Layer>& layers, const Batch& batch, Buffers& buffers)
      : s_(shape), layers_(layers), b_(batch), cache_{b_.num_pages, b_.page_tokens, s_.kv_heads, s_.head_dim},
        taps_(batch.taps, batch.taps + batch.num_taps),
        group_(s_.heads / s_.kv_heads),
        normed_groups_(buffers.normed_groups),
        attended_groups_(buffers.attended_groups),
        inner_groups_(buffers.inner_groups),
        attention_(tasks_of(buffers), s_.kv_heads, s_.layers, b_.threads) {
    q_size_ = s_.heads * s_.head_dim;
    qkv_size_ = (s_.heads + 2 * s_.kv_heads) * s_.head_dim;
    const size_t rows = std::max(b_.tokens, b_.num_logit_rows);
    residual_ = sized(buffers.residual, rows * s_.hidden);
    qkv_ = sized(buffers.qkv, rows * qkv_size_);
    normed_ = sized(buffers.normed, rows * s_.hidden);
    q_ = sized(buffers.q, rows * q_size_);
    attended_ = sized(buffers.attended, rows * q_size_);
    inner_ = sized(buffers.inner, rows * s_.inner);
    size_groups();
    buffers.run_of_row.clear();
    for (int run = 0; run < b_.num_runs; ++run)
      buffers.run_of_row.insert(buffers.run_of_row.end(), b_.runs[run].count, run);
    run_of_row_ = buffers.run_of_row.data();
  }

  int phases() const { return 8 * s_.layers + 4; }

  void run(Job& job) const {
    if (b_.features)
      append(job);
    else
      forward(job);
  }

 private:
  void forward(Job& job) const {
    int phase = 0;
    by_rows(job, phase++, b_.tokens, [&](int row) { embed(row); });
    for (int layer = 0; layer < s_.layers; ++layer) run_layer(job, phase, layer);
    const bool tapped_at_end = tap_of(s_.layers - 1) >= 0 || tap_of(s_.layers) >= 0;
    by_rows(job, phase++, tapped_at_end ? b_.tokens : 0, [&](int row) {
      keep_tap(row, s_.layers - 1);
      keep_tap(row, s_.layers);
    });
    by_rows(job, phase++, b_.num_logit_rows, [&](int row) {
      normalize_for(s_.head, residual(b_.logit_rows[row]), s_.final_norm, row);
    });
    multiply(job, phase++, product(s_.head, normed_, b_.num_logit_rows, normed_groups_),
             StoreSink<float, false>{s_.head, b_.logits, size_t(s_.vocab)});
  }

  void size_groups() const {
    for (const Layer& layer : layers_) {
      normed_groups_.size_for(layer.qkv, b_.tokens);
      normed_groups_.size_for(layer.gate_up, b_.tokens);
      attended_groups_.size_for(layer.output, b_.tokens);
      inner_groups_.size_for(layer.down, b_.tokens);
    }
    normed_groups_.size_for(s_.head, b_.num_logit_rows);
  }

  // Every layer reads the same features; query columns are skipped as far as they fill whole panels.
  void append(Job& job) const {
    const int skipped = q_size_ / kPanel;
    for (int layer = 0; layer < s_.layers; ++layer) {
      const Matrix keys_values = layers_[layer].qkv.from_panel(skipped);
      const T* features = static_cast<const T*>(b_.features);
      multiply(job, 2 * layer, Product<T>{keys_values, features, size_t(s_.hidden), b_.tokens, b_.threads},
               StoreSink<float, false>{keys_values, qkv_ + skipped * kPanel, size_t(qkv_size_)});
      by_rows(job, 2 * layer + 1, b_.tokens, [&](int row) { rotate(row, layer, s_.heads); });
    }
  }

  template <class F>
  static void by_rows(Job& job, int phase, int rows, F&& work) {
    job.phase(phase, (rows + kRowsPerChunk - 1) / kRowsPerChunk, [&](int chunk) {
      const int end = std::min(rows, (chunk + 1) * kRowsPerChunk);
      for (int row = chunk * kRowsPerChunk; row < end; ++row) work(row);
    });
  }

  void run_layer(Job& job, int& phase, int index) const {
    const Layer& layer = layers_[index];
    by_rows(job, phase++, b_.tokens, [&](int row) {
      if (tap_of(index - 1) >= 0) keep_tap(row, index - 1);
      normalize_for(layer.qkv, residual(row), layer.input_norm, row);
    });
    multiply(job, phase++, product(layer.qkv, normed_, b_.tokens, normed_groups_),
             StoreSink<float, false>{layer.qkv, qkv_, size_t(qkv_size_)});
    by_rows(job, phase++, b_.tokens, [&](int row) { rotate(row, index); });
    job.phase(phase++, attention_.items(), [&](int item) { attend(attention_.item(item), index); });
    Product<T> output = product(layer.output, attended_, b_.tokens, attended_groups_);
    if (!groups_within_heads()) output.by_group = {};
    multiply(job, phase++, output, StoreSink<float, true>{layer.output, residual_, size_t(s_.hidden)});
    by_rows(job, phase++, b_.tokens, [&](int row) {
      normalize_for(layer.gate_up, residual(row), layer.attention_norm, row);
    });
    multiply(job, phase++, product(layer.gate_up, normed_, b_.tokens, normed_groups_),
             SiluSink<T>{layer.gate_up, layer.down, inner_, size_t(s_.inner), inner_groups_});
    multiply(job, phase++, product(layer.down, inner_, b_.tokens, inner_groups_),
             StoreSink<float, true>{layer.down, residual_, size_t(s_.hidden)});
  }

  // `groups` must have been prepared when `x` was produced.
  Product<T> product(const Matrix& matrix, const T* x, int rows, GroupBuffer& groups) const {
    return {matrix, x, size_t(matrix.k), rows, b_.threads, groups.values(matrix)};
  }

  bool groups_within_heads() const { return s_.head_dim % kGroup == 0; }

  float* residual(int row) const { return residual_ + size_t(row) * s_.hidden; }

  void embed(int row) const {
    const T* from = static_cast<const T*>(s_.embedding) + b_.token_ids[row] * s_.hidden;
    float* to = residual(row);
    for (int i = 0; i < s_.hidden; ++i) to[i] = load_one(from + i);
  }

  int tap_of(int layer) const {
    for (int i = 0; i < b_.num_taps; ++i)
      if (taps_[i] == layer) return i;
    return -1;
  }

  void keep_tap(int row, int layer) const {
    for (int i = 0; i < b_.num_taps; ++i) {
      if (taps_[i] != layer) continue;
      T* to = static_cast<T*>(b_.tapped) + (size_t(row) * b_.num_taps + i) * s_.hidden;
      if (layer == s_.layers)
        normalize(residual(row), s_.final_norm, to);
      else
        store_activations(to, residual(row), s_.hidden);
    }
  }

  void normalize(const float* x, const float* weight, T* out) const {
    rms_norm(x, weight, s_.eps, s_.hidden, out);
  }

  // Writes one row of `normed_`, with the group values that `matrix` needs.
  void normalize_for(const Matrix& matrix, const float* x, const float* weight, int row) const {
    T* out = normed_ + size_t(row) * s_.hidden;
    normalize(x, weight, out);
    normed_groups_.prepare(matrix, out, row);
  }

  int slot(int run) const { return b_.slots ? b_.slots[run] : b_.runs[run].start; }

  // q and k of one row: optional norms, rotation. Writes q to its buffer, k and v to the cache.
  void rotate(int row, int index, int first_head = 0) const {
    const Run& run = b_.runs[run_of_row_[row]];
    const int position = run.start + row - run.row, dim = s_.head_dim;
    const int held = slot(run_of_row_[row]) + row - run.row;
    const int64_t page = b_.pages[run.page_offset + held / b_.page_tokens];
    const int offset = held % b_.page_tokens, lane = offset % kLanes;
    T* keys = static_cast<T*>(b_.keys) + index * cache_.layer_values();
    T* values = static_cast<T*>(b_.values) + index * cache_.layer_values();
    alignas(64) float normed[kMaxHeadDim];
    alignas(64) T rotated[kMaxHeadDim];
    for (int head = first_head; head < s_.heads + s_.kv_heads; ++head) {
      const float* x = normed_head(row, head, layers_[index].qk_norm, normed);
      if (head < s_.heads) {
        rotate_head(x, position, q_ + size_t(row) * q_size_ + head * dim);
      } else {
        rotate_head(x, position, rotated);
        put_key(keys + cache_.tile(page, head - s_.heads, offset / kLanes), lane, dim, rotated);
      }
    }
    const float* v = qkv_ + size_t(row) * qkv_size_ + (s_.heads + s_.kv_heads) * dim;
    for (int head = 0; head < s_.kv_heads; ++head) {
      store_activations(rotated, v + head * dim, dim);
      put_value(values + cache_.tile(page, head, offset / kLanes), lane, dim, cache_.padded_dim(), rotated);
    }
  }

  void rotate_head(const float* x, int position, T* out) const {
    const int dim = s_.head_dim, half = dim / 2;
    const float *cosine = s_.cosines + size_t(position) * dim, *sine = s_.sines + size_t(position) * dim;
    int d = 0;
    for (; d + kLanes <= half; d += kLanes) {
      const f32x16 low = load<f32x16>(x + d), high = load<f32x16>(x + half + d);
      store_activation(out + d, low * load<f32x16>(cosine + d) - high * load<f32x16>(sine + d));
      store_activation(out + half + d, high * load<f32x16>(cosine + half + d) + low * load<f32x16>(sine + half + d));
    }
    for (; d < half; ++d) {
      store_one(out + d, x[d] * cosine[d] - x[d + half] * sine[d]);
      store_one(out + half + d, x[d + half] * cosine[d + half] + x[d] * sine[d + half]);
    }
  }

  const float* normed_head(int row, int head, const float* weight, float* scratch) const {
    const int dim = s_.head_dim;
    const float* x = qkv_ + size_t(row) * qkv_size_ + head * dim;
    if (!weight) return x;
    float total = 0.0f;
    for (int d = 0; d < dim; ++d) total += x[d] * x[d];
    const float factor = 1.0f / std::sqrt(total / float(dim) + s_.eps);
    for (int d = 0; d < dim; ++d) scratch[d] = x[d] * factor * weight[head * dim + d];
    return scratch;
  }

  void attend(const AttentionItem& item, int index) const {
    const AttentionTask& task = attention_.task(item);
    const Run& run = b_.runs[task.run];
    QueryRows<T> rows;
    rows.count = task.rows;
    for (int i = 0; i < rows.count; ++i) {
      const int query = (task.first + i) / group_, head = item.kv_head * group_ + (task.first + i) % group_;
      const size_t at = size_t(run.row + query) * q_size_ + head * s_.head_dim;
      rows.q[i] = q_ + at;
      rows.out[i] = attended_ + at;
      rows.position[i] = last_seen(task.run, query);
    }
    if (!attention_.attend(item, index, rows, context_of(task.run, item.kv_head, index))) return;
    if (!groups_within_heads()) return;
    const int groups = s_.head_dim / kGroup;
    for (int i = 0; i < rows.count; ++i) {
      const int row = run.row + (task.first + i) / group_, head = item.kv_head * group_ + (task.first + i) % group_;
      const T* x = attended_ + size_t(row) * q_size_;
      attended_groups_.prepare(layers_[index].output, x, row, head * groups, (head + 1) * groups);
    }
  }

  // The last position that a query of a run attends to.
  int last_seen(int run, int query) const { return slot(run) + (b_.two_way ? b_.runs[run].count - 1 : query); }

  Context<T> context_of(int run, int kv_head, int layer) const {
    const size_t at = layer * cache_.layer_values();
    return {static_cast<const T*>(b_.keys) + at, static_cast<const T*>(b_.values) + at,
            b_.pages + b_.runs[run].page_offset, cache_, kv_head};
  }

  AttentionBuffers& tasks_of(Buffers& buffers) const {
    buffers.attention.tasks.clear();
    for (int run = 0; run < b_.num_runs && !b_.features; ++run) {
      const int all = b_.runs[run].count * group_;
      for (int first = 0; first < all; first += kRows) {
        const int rows = std::min(kRows, all - first), last = last_seen(run, (first + rows - 1) / group_);
        buffers.attention.tasks.push_back({run, first, rows, context_of(run, 0, 0).chunks_for(last + 1)});
      }
    }
    return buffers.attention;
  }

  static float* sized(std::vector<float>& buffer, size_t values) {
    if (buffer.size() < values) buffer.resize(values);
    return buffer.data();
  }

  static T* sized(std::vector<uint8_t>& buffer, size_t values) {
    if (buffer.size() < values * sizeof(T)) buffer.resize(values * sizeof(T));
    return reinterpret_cast<T*>(buffer.data());
  }

  const DecoderShape s_;
  const std::vector<Layer>& layers_;
  const Batch b_;
  const CacheShape cache_;
  const std::vector<int32_t> taps_;  // a copy: a late helper may read it after the caller's array is gone
  const int group_;
  GroupBuffer &normed_groups_, &attended_groups_, &inner_groups_;
  const AttentionPlan attention_;
  int q_size_, qkv_size_;
  float *residual_, *qkv_;
  T *normed_, *q_, *attended_, *inner_;
  const int32_t* run_of_row_;
};

class Decoder {
 public:
  Decoder(const DecoderShape& shape, const Layer* layers)
      : shape_(shape), layers_(layers, layers + shape.layers) {}

  ~Decoder() { Pool::instance().quiesce(); }

  void forward(const Batch& batch) {
    std::lock_guard<std::mutex> guard(mutex_);
    if (shape_.bfloat16)
      forward_as<uint16_t>(batch);
    else
      forward_as<float>(batch);
  }

 private:
  template <class T>
  void forward_as(const Batch& batch) {
    auto pass = std::make_shared<Pass<T>>(shape_, layers_, batch, buffers_);
    auto job = std::make_shared<Job>(pass->phases(), [pass](Job& j) { pass->run(j); });
    Pool::instance().run(job, batch.threads);
  }

  std::mutex mutex_;
  DecoderShape shape_;
  std::vector<Layer> layers_;
  Buffers buffers_;
};

}  // namespace dspark
