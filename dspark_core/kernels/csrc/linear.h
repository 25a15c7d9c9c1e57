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

// What threads of one phase share: sums of groups are per thread, computed when first needed.
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
  f32x16 total = {};
  const u32x16 pairs = load<u32x16>(x);
  total = dot_pair(total, pairs, 0x3f803f80u);  // both of each pair times one
  return sum(total);
}

DSPARK_INLINE float group_sum(const float*) { return 0.0f; }

template <class T>
class GroupSums {
 public:
  const float* of(const Product<T>& p) {
    if (p.matrix.format != kQ4) return nullptr;
    if (!ready_) {
      thread_local std::vector<float> kept;
      const int groups = p.matrix.k / kGroup;
      kept.resize(std::max(kept.size(), size_t(p.rows) * groups));
      for (int r = 0; r < p.rows; ++r)
        for (int g = 0; g < groups; ++g)
          kept[size_t(r) * groups + g] = group_sum(p.x + r * p.stride + g * kGroup);
      ready_ = kept.data();
    }
    return ready_;
  }

 private:
  const float* ready_ = nullptr;
};

// Rows are spread evenly over as few tiles as hold them.
template <class T, class Sink>
static void multiply_panel(const Product<T>& p, const float* sums, int panel, Sink&& sink) {
  const int tallest = tallest_tile(p.matrix), tiles = (p.rows + tallest - 1) / tallest;
  const int groups = p.matrix.k / kGroup;
  const uint8_t* data = p.matrix.data + size_t(panel) * p.matrix.panel_bytes();
  alignas(64) float values[kRows * kPanel];
  for (int t = 0; t < tiles; ++t) {
    const int row = int(int64_t(p.rows) * t / tiles), end = int(int64_t(p.rows) * (t + 1) / tiles);
    const float* row_sums = sums ? sums + size_t(row) * groups : nullptr;
    const Rows<T> rows{p.x + size_t(row) * p.stride, p.stride, row_sums, size_t(groups)};
    tile_for(p.matrix, p.x, end - row)(rows, p.matrix, data, values);
    sink(TileResult{row, end - row, panel, values});
  }
}

// One phase of `job`: every tile of the product goes to `sink`.
template <class T, class Sink>
static void multiply(Job& job, int phase, const Product<T>& p, Sink&& sink) {
  GroupSums<T> sums;
  const int size = p.panels_per_chunk(), panels = p.matrix.panels();
  job.phase(phase, p.rows ? p.chunks() : 0, [&](int chunk) {
    const float* group_sums = sums.of(p);
    const int end = std::min(panels, (chunk + 1) * size);
    for (int panel = chunk * size; panel < end; ++panel) multiply_panel(p, group_sums, panel, sink);
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
        if (width == kLanes && !kAdd && !matrix.bias) {
          store_activation(to, load<f32x16>(from));
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
