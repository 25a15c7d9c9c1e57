// Paged attention over runs of queries, read in place through page tables.
//
// A page holds, per layer and key/value head, tiles of 16 tokens: keys with tokens in the lanes
// (one load serves 16 scores), values with head dimensions in the lanes. The pages of one head are
// contiguous, so that a context on consecutive pages is read as one stream. A query's result depends
// only on its own context: contexts are cut into chunks at fixed positions, chunks are merged in order
// no matter which thread computed them, and anything beyond a query's position adds exact zeros.
#pragma once

#include <array>
#include <cmath>
#include <utility>

#include "tiles.h"

namespace dspark {

constexpr int kChunkTiles = 8;
constexpr int kChunk = kChunkTiles * kLanes;  // tokens that share one softmax
constexpr int kMaxHeadDim = 256;

struct CacheShape {
  int32_t pages, page_tokens, kv_heads, head_dim;

  int tiles() const { return (page_tokens + kLanes - 1) / kLanes; }
  int padded_dim() const { return (head_dim + kLanes - 1) / kLanes * kLanes; }
  size_t tile_values() const { return size_t(padded_dim()) * kLanes; }
  size_t layer_values() const { return size_t(kv_heads) * pages * tiles() * tile_values(); }

  size_t tile(int64_t page, int head, int tile) const {
    return ((size_t(head) * pages + page) * tiles() + tile) * tile_values();
  }
};

// One cache row per (slot, head): keys [dim / 2][16 tokens][2] and values [8 pairs of tokens][dim][2]
// in bfloat16; keys [dim][16 tokens] and values [16 tokens][dim] in float32.
DSPARK_INLINE void put_key(uint16_t* tile, int lane, int dim, const uint16_t* key) {
  for (int d = 0; d + 2 <= dim; d += 2) std::memcpy(tile + (d / 2 * kLanes + lane) * 2, key + d, 4);
}
DSPARK_INLINE void put_key(float* tile, int lane, int dim, const float* key) {
  for (int d = 0; d < dim; ++d) tile[d * kLanes + lane] = key[d];
}
DSPARK_INLINE void put_value(uint16_t* tile, int lane, int dim, int padded, const uint16_t* value) {
  uint16_t* to = tile + lane / 2 * padded * 2 + lane % 2;
  for (int d = 0; d < dim; ++d) to[2 * d] = value[d];
}
DSPARK_INLINE void put_value(float* tile, int lane, int dim, int padded, const float* value) {
  std::memcpy(tile + lane * padded, value, sizeof(float) * dim);
}

// Up to kRows (query, head) rows of one run that share a key/value head.
template <class T>
struct QueryRows {
  int count;
  const T* q[kRows];      // [head_dim]
  T* out[kRows];          // [head_dim]
  int position[kRows];    // last position attended to, inclusive

  int last() const { return *std::max_element(position, position + count); }
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
  int width(int index) const {  // tokens in a tile; page sizes may not be multiples of 16
    return std::min(kLanes, shape.page_tokens - index % shape.tiles() * kLanes);
  }
  int tiles_for(int positions) const {
    const int whole = positions / shape.page_tokens, rest = positions % shape.page_tokens;
    return whole * shape.tiles() + (rest + kLanes - 1) / kLanes;
  }
  int chunks_for(int positions) const { return (tiles_for(positions) + kChunkTiles - 1) / kChunkTiles; }
};

// A row's result over part of its context: the weighted sum of values, weights relative to the largest score.
struct Partial {
  float largest, total;
  alignas(64) float values[kMaxHeadDim];

  void clear(int dims) {
    largest = -INFINITY;
    total = 0.0f;
    std::memset(values, 0, sizeof(float) * dims);
  }

  // Equivalent to computing over both parts. Not inlined, so that all callers round alike.
  __attribute__((noinline)) void merge(const Partial& part, int dims) {
    const float peak = std::max(largest, part.largest);
    if (peak == -INFINITY) return;  // nothing visible in either part
    const float lesser = exp(splat(std::min(largest, part.largest) - peak))[0];
    const float kept = largest == peak ? 1.0f : lesser, added = largest == peak ? lesser : 1.0f;
    for (int d = 0; d < dims; d += kLanes)
      store(values + d, load<f32x16>(values + d) * kept + load<f32x16>(part.values + d) * added);
    total = total * kept + part.total * added;
    largest = peak;
  }

  template <class T>
  void write(T* out, int dim) const {
    int d = 0;
    for (; d + kLanes <= dim; d += kLanes) store_activation(out + d, load<f32x16>(values + d) / splat(total));
    for (; d < dim; ++d) store_one(out + d, values[d] / total);
  }
};

template <int R>
static void scores(const QueryRows<uint16_t>& rows, const uint16_t* keys, int dim, float* out) {
  f32x16 acc[R] = {};
  for (int t = 0; t < dim / 2; ++t) {
    const Pairs k = load_pairs(keys + t * 2 * kLanes);
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

// parts [R] = weights x values, for dimensions [first, first + 16 D).
template <int R, int D>
static void mix(const uint16_t* const* tiles, int count, const uint16_t* weights, int first, int dims,
                Partial* parts) {
  f32x16 acc[R][D] = {};
  for (int i = 0; i < count; ++i)
    for (int t = 0; t < kLanes / 2; ++t) {
      const uint16_t* values = tiles[i] + (t * dims + first) * 2;
      Pairs v[D];
      DSPARK_UNROLL for (int d = 0; d < D; ++d) v[d] = load_pairs(values + d * 2 * kLanes);
      DSPARK_UNROLL for (int r = 0; r < R; ++r) {
        const uint32_t w = pair_at(weights + r * kChunk + i * kLanes + 2 * t);
        DSPARK_UNROLL for (int d = 0; d < D; ++d) acc[r][d] = dot_pair(acc[r][d], v[d], w);
      }
    }
  DSPARK_UNROLL for (int r = 0; r < R; ++r)
    DSPARK_UNROLL for (int d = 0; d < D; ++d) store(parts[r].values + first + d * kLanes, acc[r][d]);
}

template <int R, int D>
static void mix(const float* const* tiles, int count, const float* weights, int first, int dims,
                Partial* parts) {
  f32x16 acc[R][D] = {};
  for (int i = 0; i < count; ++i)
    for (int t = 0; t < kLanes; ++t) {
      const float* values = tiles[i] + t * dims + first;
      DSPARK_UNROLL for (int r = 0; r < R; ++r)
        DSPARK_UNROLL for (int d = 0; d < D; ++d)
          acc[r][d] += load<f32x16>(values + d * kLanes) * weights[r * kChunk + i * kLanes + t];
    }
  DSPARK_UNROLL for (int r = 0; r < R; ++r)
    DSPARK_UNROLL for (int d = 0; d < D; ++d) store(parts[r].values + first + d * kLanes, acc[r][d]);
}

template <int R, class T>
static void mix_all(const T* const* tiles, int count, const T* weights, int dims, Partial* parts) {
  constexpr int kWide = kWholeRegisters ? (R <= 6 ? 4 : 2) : R == 1 ? 2 : 1;
  int first = 0;
  for (; first + kWide * kLanes <= dims; first += kWide * kLanes)
    mix<R, kWide>(tiles, count, weights, first, dims, parts);
  for (; first < dims; first += kLanes) mix<R, 1>(tiles, count, weights, first, dims, parts);
}

static float largest_score(const float* s, int count) {
  f32x16 top = splat(-INFINITY);
  for (int i = 0; i < count; ++i) top = maximum(load<f32x16>(s + i * kLanes), top);
  return maximum(top);
}

DSPARK_INLINE f32x16 weight_of(const float*, f32x16 x) { return exp(x); }
DSPARK_INLINE f32x16 weight_of(const uint16_t*, f32x16 x) { return rough_exp(x); }  // bfloat16 is coarser

// Turns one row's scores into weights relative to `largest`, the largest scaled score. Returns their sum.
template <class T>
static float soften(const float* s, T* weights, int count, float scale, float largest) {
  if (largest == -INFINITY) {  // nothing visible in this chunk
    for (int i = 0; i < count * kLanes; ++i) weights[i] = T(0);
    return 0.0f;
  }
  f32x16 added = {};
  for (int i = 0; i < count; ++i) {
    const f32x16 w = weight_of(weights, load<f32x16>(s + i * kLanes) * scale - largest);
    store_activation(weights + i * kLanes, w);
    added += w;
  }
  return sum(added);
}

template <int kCache, class T>
DSPARK_INLINE void prefetch_tile(const T* tile, size_t values) {
  for (size_t i = 0; i < values; i += 64 / sizeof(T)) __builtin_prefetch(tile + i, 0, kCache);
}

constexpr int kKeysAhead = 2;       // tiles, into the L1 cache
constexpr int kElsewhereAhead = 4;  // tiles that are not contiguous, into the L2 cache

// For tile `i` of a chunk. Rows that share a context compute for so long that hardware prefetching falls
// short: they waited longer for keys and values than they computed. Values are used after the softmax.
template <class T>
DSPARK_INLINE void prefetch_ahead(const Context<T>& context, int begin, int i, int count, int tiles) {
  const size_t values = context.shape.tile_values(), at = context.tile(begin + i);
  if (i + kKeysAhead < count) prefetch_tile<3>(context.keys + context.tile(begin + i + kKeysAhead), values);
  prefetch_tile<2>(context.values + at, values);
  if (begin + i + kElsewhereAhead >= tiles) return;
  const size_t later = context.tile(begin + i + kElsewhereAhead);
  if (later == at + kElsewhereAhead * values) return;
  prefetch_tile<2>(context.keys + later, values);
  prefetch_tile<2>(context.values + later, values);
}

// parts [R]: the rows' results over one chunk of their context.
template <int R, class T>
static void attend_rows(const QueryRows<T>& rows, const Context<T>& context, int chunk, Partial* parts) {
  alignas(64) float s[R * kChunk];
  alignas(64) T weights[R * kChunk];
  const T* values[kChunkTiles];
  const float scale = 1.0f / std::sqrt(float(context.shape.head_dim));
  const int tiles = context.tiles_for(rows.last() + 1), begin = chunk * kChunkTiles;
  const int count = std::min(kChunkTiles, tiles - begin);
  for (int i = 0; i < std::min(kKeysAhead, count); ++i)
    prefetch_tile<3>(context.keys + context.tile(begin + i), context.shape.tile_values());
  for (int i = 0; i < count; ++i) {
    const size_t at = context.tile(begin + i);
    values[i] = context.values + at;
    prefetch_ahead(context, begin, i, count, tiles);
    scores<R>(rows, context.keys + at, context.shape.head_dim, s + i * kLanes);
    const int first = context.first_position(begin + i), width = context.width(begin + i);
    for (int r = 0; r < R; ++r)
      for (int lane = std::max(0, std::min(width, rows.position[r] + 1 - first)); lane < kLanes; ++lane)
        s[r * kChunk + i * kLanes + lane] = -INFINITY;
  }
  for (int r = 0; r < R; ++r) parts[r].largest = scale * largest_score(s + r * kChunk, count);
  for (int r = 0; r < R; ++r)
    parts[r].total = soften(s + r * kChunk, weights + r * kChunk, count, scale, parts[r].largest);
  mix_all<R>(values, count, weights, context.shape.padded_dim(), parts);
}

template <class T>
using Attend = void (*)(const QueryRows<T>&, const Context<T>&, int, Partial*);

template <class T, size_t... I>
static constexpr std::array<Attend<T>, kRows> attend_by_count(std::index_sequence<I...>) {
  return {attend_rows<int(I) + 1, T>...};
}

template <class T>
static void attend_chunk(const QueryRows<T>& rows, const Context<T>& context, int chunk, Partial* parts) {
  static constexpr auto by_count = attend_by_count<T>(std::make_index_sequence<kRows>());
  by_count[rows.count - 1](rows, context, chunk, parts);
}

// The whole context, chunk by chunk; `chunk_of(index)` returns the parts [count] of a chunk.
template <class T, class F>
static void attend(const QueryRows<T>& rows, const Context<T>& context, F&& chunk_of) {
  const int dims = context.shape.padded_dim(), chunks = context.chunks_for(rows.last() + 1);
  Partial whole[kRows];
  for (int r = 0; r < rows.count; ++r) whole[r].clear(dims);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const Partial* parts = chunk_of(chunk);
    for (int r = 0; r < rows.count; ++r) whole[r].merge(parts[r], dims);
  }
  for (int r = 0; r < rows.count; ++r) whole[r].write(rows.out[r], context.shape.head_dim);
}

}  // namespace dspark
