// Linear layers as phases of a job: how a product is split into tiles, and sinks for the results.
#pragma once

#include "pool.h"
#include "unit_products.h"

namespace dspark {

// Results of one tile, passed to a sink: rows [row, row + count), vectors 2p and 2p + 1.
struct TileResult {
  int row, count, panel;
  const float* values;  // [count, 32]
};

// State shared by the threads of one phase.
template <class T>
struct Product {
  const Matrix& matrix;
  const T* x;
  size_t stride;
  int rows;
  int threads;
  GroupValues by_group{};  // of x; empty: not prepared yet

  // Even for a paired matrix, where two panels produce one group of outputs.
  int panels_per_chunk() const {
    const int panels = std::max(1, matrix.panels() / (threads * 8));
    return matrix.paired ? panels + panels % 2 : panels;
  }
  int chunks() const {
    const int size = panels_per_chunk();
    return (matrix.panels() + size - 1) / size;
  }
};

// For rows without prepared values: each thread prepares its own when it first takes part in a product.
template <class T>
static GroupValues prepared_here(const Product<T>& p) {
  thread_local GroupBuffer buffer;
  buffer.size_for(p.matrix, p.rows);
  for (int row = 0; row < p.rows; ++row) buffer.prepare(p.matrix, p.x + row * p.stride, row);
  return buffer.values(p.matrix);
}

// Distributes rows evenly, in fours, over as few tiles as possible.
template <class T, class Sink>
static void multiply_panel(const Product<T>& p, const GroupValues& by_group, int panel, MatrixUnit& unit, Sink&& sink) {
  const bool by_unit = MatrixUnit::takes(p.matrix);
  const int tallest = (by_unit ? MatrixUnit::kMostRows : tallest_tile(p.matrix)) / kBlockRows;
  const int blocks = (p.rows + kBlockRows - 1) / kBlockRows, tiles = (blocks + tallest - 1) / tallest;
  const uint8_t* data = p.matrix.data + size_t(panel) * p.matrix.panel_bytes();
  alignas(64) float values[std::max(kRows, MatrixUnit::kMostRows) * kPanel];
  for (int t = 0; t < tiles; ++t) {
    const int row = kBlockRows * (blocks * t / tiles);
    const int end = std::min(p.rows, kBlockRows * (blocks * (t + 1) / tiles));
    const Rows<T> rows{p.x + size_t(row) * p.stride, p.stride, by_group.from_row(row)};
    if (by_unit)
      unit.multiply(rows, end - row, p.matrix, data, values);
    else
      tile_for(p.matrix, p.x, end - row)(rows, p.matrix, data, values);
    sink(TileResult{row, end - row, panel, values});
  }
}

// One phase of `job`: passes every tile of the product to `sink`.
template <class T, class Sink>
static void multiply(Job& job, int phase, const Product<T>& p, Sink&& sink) {
  GroupValues values = p.by_group;
  MatrixUnit unit;
  const int size = p.panels_per_chunk(), panels = p.matrix.panels();
  job.phase(phase, p.rows ? p.chunks() : 0, [&](int chunk) {
    if (!values.groups) values = prepared_here(p);
    const int end = std::min(panels, (chunk + 1) * size);
    for (int panel = chunk * size; panel < end; ++panel) multiply_panel(p, values, panel, unit, sink);
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

// out [rows, stride] = silu(gate) * up, for a paired matrix. Also prepares the group values that `next`
// needs, once the second of two panels completes a group.
template <class T>
struct SiluSink {
  const Matrix& matrix;
  const Matrix& next;
  T* out;
  size_t stride;
  GroupBuffer& prepared;

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
      const int group = tile.panel / 2;
      if (tile.panel % 2) prepared.prepare(next, out + size_t(tile.row + r) * stride, tile.row + r, group, group + 1);
    }
  }
};

}  // namespace dspark
