// Linear layers as phases of a job: which tiles there are, and what becomes of their results.
#pragma once

#include "pool.h"
#include "tiles.h"

namespace dspark {

// Results of one tile on their way out: rows [row, row + count), vectors 2p and 2p + 1.
struct TileResult {
  int row, count, panel;
  const float* values;  // [count, 32]
};

// What threads of one phase share.
template <class T>
struct Product {
  const Matrix& matrix;
  const T* x;
  size_t stride;
  int rows;
  int threads;

  int panels_per_chunk() const { return std::max(1, matrix.panels() / (threads * 8)); }
  int chunks() const {
    const int size = panels_per_chunk();
    return (matrix.panels() + size - 1) / size;
  }
};

DSPARK_INLINE float group_sum(const uint16_t* x) {
  const u32x16 pairs = load<u32x16>(x);
  return sum(dot_pair(f32x16{}, pairs, 0x3f803f80u));  // both of each pair times one
}

// One group to 8 bits: its step, its codes, and their sum.
static float group_codes(const uint16_t* x, int8_t* codes, int32_t* total) {
  const f32x16 low = load_floats(x), high = load_floats(x + kLanes);
  const float largest = maximum(maximum(maximum(low, -low), maximum(high, -high)));
  const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer
  const i32x16 first = __builtin_convertvector(low * inverse + kRound - kRound, i32x16);
  const i32x16 second = __builtin_convertvector(high * inverse + kRound - kRound, i32x16);
  store(codes, __builtin_convertvector(first, i8x16));
  store(codes + kLanes, __builtin_convertvector(second, i8x16));
  *total = int32_t(sum(__builtin_convertvector(first + second, f32x16)));  // small integers: exact
  return largest / 127.0f;
}

// Made by every thread for itself, when it first takes part in a product.
template <class T>
class ByGroup {
 public:
  const GroupValues& of(const Product<T>& p) {
    if (!values_.groups) {
      values_.groups = size_t(p.matrix.k / kGroup);
      prepare(p);
    }
    return values_;
  }

 private:
  void prepare(const Product<float>&) {}

  void prepare(const Product<uint16_t>& p) {
    if (p.matrix.format != kQ4 && !p.matrix.rounds_activations()) return;
    thread_local std::vector<float> factors;
    thread_local std::vector<int32_t> totals;
    thread_local std::vector<int8_t> codes;
    const size_t count = size_t(p.rows) * values_.groups;
    const bool coded = p.matrix.rounds_activations();
    factors.resize(std::max(factors.size(), count));
    if (coded) totals.resize(std::max(totals.size(), count));
    if (coded) codes.resize(std::max(codes.size(), count * kGroup));
    for (size_t i = 0; i < count; ++i) {
      const uint16_t* x = p.x + i / values_.groups * p.stride + i % values_.groups * kGroup;
      factors[i] = coded ? group_codes(x, &codes[i * kGroup], &totals[i]) : group_sum(x);
    }
    values_ = {factors.data(), totals.data(), codes.data(), values_.groups};
  }

  GroupValues values_{};
};

// Rows are spread evenly over as few tiles as hold them.
template <class T, class Sink>
static void multiply_panel(const Product<T>& p, const GroupValues& by_group, int panel, Sink&& sink) {
  const int tallest = tallest_tile(p.matrix), tiles = (p.rows + tallest - 1) / tallest;
  const uint8_t* data = p.matrix.data + size_t(panel) * p.matrix.panel_bytes();
  alignas(64) float values[kRows * kPanel];
  for (int t = 0; t < tiles; ++t) {
    const int row = int(int64_t(p.rows) * t / tiles), end = int(int64_t(p.rows) * (t + 1) / tiles);
    const Rows<T> rows{p.x + size_t(row) * p.stride, p.stride, by_group.from_row(row)};
    tile_for(p.matrix, p.x, end - row)(rows, p.matrix, data, values);
    sink(TileResult{row, end - row, panel, values});
  }
}

// One phase of `job`: every tile of the product goes to `sink`.
template <class T, class Sink>
static void multiply(Job& job, int phase, const Product<T>& p, Sink&& sink) {
  ByGroup<T> by_group;
  const int size = p.panels_per_chunk(), panels = p.matrix.panels();
  job.phase(phase, p.rows ? p.chunks() : 0, [&](int chunk) {
    const GroupValues& values = by_group.of(p);
    const int end = std::min(panels, (chunk + 1) * size);
    for (int panel = chunk * size; panel < end; ++panel) multiply_panel(p, values, panel, sink);
  });
}

// Sinks -------------------------------------------------------------------------------------

// out [rows, stride] = or += result (+ bias).
template <class O, bool kAdd>
struct StoreSink {
  const Matrix& matrix;
  O* out;
  size_t stride;

  void operator()(const TileResult& tile) const {
    for (int v = 0; v < kVectors; ++v) {
      const int vector = tile.panel * kVectors + v, width = matrix.width(vector);
      const int column = matrix.column(vector);
      for (int r = 0; r < tile.count; ++r) {
        O* to = out + size_t(tile.row + r) * stride + column;
        const float* from = tile.values + r * kPanel + v * kLanes;
        if (width == kLanes && !matrix.bias) {
          const f32x16 x = load<f32x16>(from);
          store_activation(to, kAdd ? load_floats(to) + x : x);
          continue;
        }
        for (int i = 0; i < width; ++i) {
          const float x = from[i] + (matrix.bias ? matrix.bias[column + i] : 0.0f);
          store_one(to + i, kAdd ? load_one(to + i) + x : x);
        }
      }
    }
  }
};

// out [rows, stride] = silu(gate) * up, for a paired matrix.
template <class T>
struct SiluSink {
  const Matrix& matrix;
  T* out;
  size_t stride;

  void operator()(const TileResult& tile) const {
    const int width = matrix.width(tile.panel * kVectors);
    for (int r = 0; r < tile.count; ++r) {
      const f32x16 gate = load<f32x16>(tile.values + r * kPanel);
      const f32x16 up = load<f32x16>(tile.values + r * kPanel + kLanes);
      const f32x16 result = gate / (1.0f + exp(-gate)) * up;
      T* to = out + size_t(tile.row + r) * stride + tile.panel * kLanes;
      if (width == kLanes) {
        store_activation(to, result);
      } else {
        for (int i = 0; i < width; ++i) store_one(to + i, result[i]);
      }
    }
  }
};

}  // namespace dspark
