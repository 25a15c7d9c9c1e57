// Paged attention over runs of queries, read in place through page tables.
//
// A page holds, per layer and key/value head, tiles of 16 tokens: keys with tokens in the lanes
// (one load serves 16 scores), values with head dimensions in the lanes. A query's result depends
// on its own context alone: contexts are cut at fixed multiples of kChunk, and what lies beyond a
// query's position adds exact zeros.
#pragma once

#include <cmath>

#include "tiles.h"

namespace dspark {

constexpr int kChunk = 256;  // tokens per softmax update

struct CacheShape {
  int32_t pages, page_tokens, kv_heads, head_dim;

  int tiles() const { return (page_tokens + kLanes - 1) / kLanes; }
  int padded_dim() const { return (head_dim + kLanes - 1) / kLanes * kLanes; }
  size_t tile_values() const { return size_t(padded_dim()) * kLanes; }
  size_t page_values() const { return size_t(kv_heads) * tiles() * tile_values(); }
  size_t layer_values() const { return page_values() * pages; }

  size_t tile(int64_t page, int head, int tile) const {
    return page * page_values() + (size_t(head) * tiles() + tile) * tile_values();
  }
};

// One cache row per (slot, head): keys [dim / 2][16 tokens][2] and values [8 pairs of tokens][dim][2]
// in bfloat16; keys [dim][16 tokens] and values [16 tokens][dim] in float32.
DSPARK_INLINE void put_key(uint16_t* tile, int lane, int dim, int, float x) {
  tile[(dim / 2 * kLanes + lane) * 2 + dim % 2] = float_to_bf16(x);
}
DSPARK_INLINE void put_key(float* tile, int lane, int dim, int, float x) { tile[dim * kLanes + lane] = x; }
DSPARK_INLINE void put_value(uint16_t* tile, int lane, int dim, int dims, float x) {
  tile[(lane / 2 * dims + dim) * 2 + lane % 2] = float_to_bf16(x);
}
DSPARK_INLINE void put_value(float* tile, int lane, int dim, int dims, float x) { tile[lane * dims + dim] = x; }

// Up to kRows (query, head) rows of one run that share a key/value head.
template <class T>
struct QueryRows {
  int count;
  const T* q[kRows];      // [head_dim]
  T* out[kRows];          // [head_dim]
  int position[kRows];    // sees positions up to and including its own
};

template <class T>
struct Context {
  const T* keys;    // of the layer
  const T* values;
  const int32_t* pages;
  CacheShape shape;
  int head;

  size_t tile(int index) const {
    const int per_page = shape.tiles();
    return shape.tile(pages[index / per_page], head, index % per_page);
  }
  int first_position(int index) const {
    const int per_page = shape.tiles();
    return index / per_page * shape.page_tokens + index % per_page * kLanes;
  }
  int width(int index) const {  // tokens in a tile: pages may not be multiples of 16
    return std::min(kLanes, shape.page_tokens - index % shape.tiles() * kLanes);
  }
  int tiles_for(int positions) const {
    const int whole = positions / shape.page_tokens, rest = positions % shape.page_tokens;
    return whole * shape.tiles() + (rest + kLanes - 1) / kLanes;
  }
};

template <int R>
static void scores(const QueryRows<uint16_t>& rows, const uint16_t* keys, int dim, float* out) {
  f32x16 acc[R] = {};
  for (int t = 0; t < dim / 2; ++t) {
    const u32x16 k = load<u32x16>(keys + t * 2 * kLanes);
    DSPARK_UNROLL for (int r = 0; r < R; ++r) acc[r] = dot_pair(acc[r], k, pair_at(rows.q[r] + 2 * t));
  }
  DSPARK_UNROLL for (int r = 0; r < R; ++r) store(out + r * kChunk, acc[r]);
}

template <int R>
static void scores(const QueryRows<float>& rows, const float* keys, int dim, float* out) {
  f32x16 acc[R] = {};
  for (int d = 0; d < dim; ++d) {
    const f32x16 k = load<f32x16>(keys + d * kLanes);
    DSPARK_UNROLL for (int r = 0; r < R; ++r) acc[r] += k * rows.q[r][d];
  }
  DSPARK_UNROLL for (int r = 0; r < R; ++r) store(out + r * kChunk, acc[r]);
}

// out [R, dims] = out * scale + weights x values, for dimensions [first, first + 16 D).
template <int R, int D>
static void mix(const uint16_t* const* tiles, int count, const uint16_t* weights, const float* scale,
                int first, int dims, float* out) {
  f32x16 acc[R][D];
  DSPARK_UNROLL for (int r = 0; r < R; ++r)
    DSPARK_UNROLL for (int d = 0; d < D; ++d)
      acc[r][d] = load<f32x16>(out + r * dims + first + d * kLanes) * scale[r];
  for (int i = 0; i < count; ++i)
    for (int t = 0; t < kLanes / 2; ++t) {
      const uint16_t* values = tiles[i] + (t * dims + first) * 2;
      u32x16 v[D];
      DSPARK_UNROLL for (int d = 0; d < D; ++d) v[d] = load<u32x16>(values + d * 2 * kLanes);
      DSPARK_UNROLL for (int r = 0; r < R; ++r) {
        const uint32_t w = pair_at(weights + r * kChunk + i * kLanes + 2 * t);
        DSPARK_UNROLL for (int d = 0; d < D; ++d) acc[r][d] = dot_pair(acc[r][d], v[d], w);
      }
    }
  DSPARK_UNROLL for (int r = 0; r < R; ++r)
    DSPARK_UNROLL for (int d = 0; d < D; ++d) store(out + r * dims + first + d * kLanes, acc[r][d]);
}

template <int R, int D>
static void mix(const float* const* tiles, int count, const float* weights, const float* scale, int first,
                int dims, float* out) {
  f32x16 acc[R][D];
  DSPARK_UNROLL for (int r = 0; r < R; ++r)
    DSPARK_UNROLL for (int d = 0; d < D; ++d)
      acc[r][d] = load<f32x16>(out + r * dims + first + d * kLanes) * scale[r];
  for (int i = 0; i < count; ++i)
    for (int t = 0; t < kLanes; ++t) {
      const float* values = tiles[i] + t * dims + first;
      DSPARK_UNROLL for (int r = 0; r < R; ++r)
        DSPARK_UNROLL for (int d = 0; d < D; ++d)
          acc[r][d] += load<f32x16>(values + d * kLanes) * weights[r * kChunk + i * kLanes + t];
    }
  DSPARK_UNROLL for (int r = 0; r < R; ++r)
    DSPARK_UNROLL for (int d = 0; d < D; ++d) store(out + r * dims + first + d * kLanes, acc[r][d]);
}

template <int R, class T>
static void mix_all(const T* const* tiles, int count, const T* weights, const float* scale, int dims,
                    float* out) {
  constexpr int kWide = R <= 6 ? 4 : 2;
  int first = 0;
  for (; first + kWide * kLanes <= dims; first += kWide * kLanes)
    mix<R, kWide>(tiles, count, weights, scale, first, dims, out);
  for (; first < dims; first += kLanes) mix<R, 1>(tiles, count, weights, scale, first, dims, out);
}

constexpr int kMaxHeadDim = 256;

// Scores of one row become weights; returns by how much to scale what was summed before.
template <class T>
static float soften(float* s, T* weights, int count, float scale, float& largest, float& total) {
  f32x16 top = splat(-INFINITY);
  for (int i = 0; i < count; ++i) {
    const f32x16 scaled = load<f32x16>(s + i * kLanes) * scale;
    store(s + i * kLanes, scaled);
    top = maximum(top, scaled);
  }
  const float peak = std::max(largest, maximum(top));
  if (peak == -INFINITY) {  // nothing visible in this chunk, nor before: zero weights
    for (int i = 0; i < count * kLanes; ++i) weights[i] = T(0);
    return 1.0f;
  }
  f32x16 added = {};
  for (int i = 0; i < count; ++i) {
    const f32x16 w = exp(load<f32x16>(s + i * kLanes) - peak);
    store_activation(weights + i * kLanes, w);
    added += w;
  }
  const float kept = exp(splat(largest - peak))[0];
  total = total * kept + sum(added);
  largest = peak;
  return kept;
}

template <class T>
DSPARK_INLINE void prefetch_tile(const T* tile, size_t values) {
  const char* bytes = reinterpret_cast<const char*>(tile);
  for (size_t at = 0; at < values * sizeof(T); at += 64) __builtin_prefetch(bytes + at);
}

template <int R, class T>
static void attend_rows(const QueryRows<T>& rows, const Context<T>& context) {
  alignas(64) float s[R * kChunk];
  alignas(64) T weights[R * kChunk];
  alignas(64) float out[R * kMaxHeadDim];
  float largest[R], total[R] = {}, kept[R];
  const int dims = context.shape.padded_dim();
  const float scale = 1.0f / std::sqrt(float(context.shape.head_dim));
  int last = 0;
  for (int r = 0; r < R; ++r) {
    largest[r] = -INFINITY;
    last = std::max(last, rows.position[r]);
  }
  std::memset(out, 0, sizeof(float) * R * dims);
  const int tiles = context.tiles_for(last + 1);
  const T* values[kChunk / kLanes];
  for (int begin = 0; begin < tiles; begin += kChunk / kLanes) {
    const int count = std::min(kChunk / kLanes, tiles - begin);
    for (int i = 0; i < count; ++i) {
      const size_t at = context.tile(begin + i);
      values[i] = context.values + at;
      // Pages lie anywhere: ask for this tile's values and the next one's keys while computing.
      prefetch_tile(values[i], context.shape.tile_values());
      if (begin + i + 1 < tiles)
        prefetch_tile(context.keys + context.tile(begin + i + 1), context.shape.tile_values());
      scores<R>(rows, context.keys + at, context.shape.head_dim, s + i * kLanes);
      const int first = context.first_position(begin + i), width = context.width(begin + i);
      for (int r = 0; r < R; ++r)
        for (int lane = std::max(0, std::min(width, rows.position[r] + 1 - first)); lane < kLanes; ++lane)
          s[r * kChunk + i * kLanes + lane] = -INFINITY;
    }
    for (int r = 0; r < R; ++r)
      kept[r] = soften(s + r * kChunk, weights + r * kChunk, count, scale, largest[r], total[r]);
    mix_all<R>(values, count, weights, kept, dims, out);
  }
  for (int r = 0; r < R; ++r)
    for (int d = 0; d < context.shape.head_dim; ++d) store_one(rows.out[r] + d, out[r * dims + d] / total[r]);
}

template <class T>
static void attend(const QueryRows<T>& rows, const Context<T>& context) {
  using Attend = void (*)(const QueryRows<T>&, const Context<T>&);
  static const Attend by_count[kRows] = {
      attend_rows<1, T>, attend_rows<2, T>, attend_rows<3, T>,  attend_rows<4, T>,
      attend_rows<5, T>, attend_rows<6, T>, attend_rows<7, T>,  attend_rows<8, T>,
      attend_rows<9, T>, attend_rows<10, T>, attend_rows<11, T>, attend_rows<12, T>};
  by_count[rows.count - 1](rows, context);
}

}  // namespace dspark
