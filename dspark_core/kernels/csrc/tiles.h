// Tiles: up to 12 rows of activations times one panel of 32 columns.
//
// Every result is accumulated over the inputs in an order that does not depend on how many rows
// share the tile. A token's values are therefore bitwise identical in any batch, which makes
// speculative decoding exact to the last bit.
#pragma once

#include "activations.h"

namespace dspark {

// Maximum rows per tile, limited by the registers, and the instances by row count.
#if defined(__AVX512F__)
constexpr int kRows = 12;
#define DSPARK_BY_ROWS(name) \
  {name<1>, name<2>, name<3>, name<4>, name<5>, name<6>, name<7>, name<8>, name<9>, name<10>, name<11>, name<12>}
#else
constexpr int kRows = 4;
#define DSPARK_BY_ROWS(name) \
  { name<1>, name<2>, name<3>, name<4> }
#endif

// Activations [rows, stride].
template <class T>
struct Rows {
  const T* data;
  size_t stride;
  GroupValues by_group;
};

// Vectors of a panel computed in one pass over it; the panel stays in the cache for the next pass.
template <int R>
constexpr int at_once() {
  return kWholeRegisters || R == 1 ? kVectors : 1;
}

DSPARK_INLINE uint32_t pair_at(const uint16_t* p) {
  uint32_t pair;
  std::memcpy(&pair, p, 4);
  return pair;
}

template <int R, int V>
DSPARK_INLINE void store_vectors(const f32x16 (&values)[R][V], float* out) {
  DSPARK_UNROLL for (int r = 0; r < R; ++r)
    DSPARK_UNROLL for (int v = 0; v < V; ++v) store(out + r * kPanel + v * kLanes, values[r][v]);
}

template <int R>
static void tile_float32(const Rows<float>& x, const Matrix& m, const uint8_t* panel, float* out) {
  constexpr int V = at_once<R>();
  for (int first = 0; first < kVectors; first += V) {
    f32x16 acc[R][V] = {};
    const auto* w = reinterpret_cast<const float*>(panel) + first * kLanes;
    for (int k = 0; k < m.k; ++k, w += kPanel) {
      f32x16 weights[V];
      DSPARK_UNROLL for (int v = 0; v < V; ++v) weights[v] = load<f32x16>(w + v * kLanes);
      DSPARK_UNROLL for (int r = 0; r < R; ++r) {
        const f32x16 input = splat(x.data[r * x.stride + k]);
        DSPARK_UNROLL for (int v = 0; v < V; ++v) acc[r][v] += weights[v] * input;
      }
    }
    store_vectors<R, V>(acc, out + first * kLanes);
  }
}

template <int R>
static void tile_bfloat16(const Rows<uint16_t>& x, const Matrix& m, const uint8_t* panel, float* out) {
  constexpr int V = at_once<R>();
  for (int first = 0; first < kVectors; first += V) {
    f32x16 acc[R][V] = {};
    const uint8_t* w = panel + 64 * first;
    for (int t = 0; t < m.k / 2; ++t, w += 64 * kVectors) {
      Pairs weights[V];
      DSPARK_UNROLL for (int v = 0; v < V; ++v) weights[v] = load_pairs(w + 64 * v);
      DSPARK_UNROLL for (int v = 0; v < V; ++v) __builtin_prefetch(w + 2048 + 64 * v);
      DSPARK_UNROLL for (int r = 0; r < R; ++r) {
        const uint32_t input = pair_at(x.data + r * x.stride + 2 * t);
        DSPARK_UNROLL for (int v = 0; v < V; ++v) acc[r][v] = dot_pair(acc[r][v], weights[v], input);
      }
    }
    store_vectors<R, V>(acc, out + first * kLanes);
  }
}

// Nibble `s` of each 16-bit word, as pairs.
DSPARK_INLINE Pairs nibbles(u32x16 words, int s) {
#ifdef DSPARK_AVX512_BF16
  const __m512i table = _mm512_broadcast_i64x4(_mm256_setr_epi16(
      0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130,
      0x4140, 0x4150, 0x4160, 0x4170));
  return (u32x16)_mm512_permutexvar_epi16(_mm512_srli_epi16((__m512i)words, 4 * s), table);
#else
  return {to_float(as_integers(words >> (4 * s) & 15u)), to_float(as_integers(words >> (16 + 4 * s) & 15u))};
#endif
}

// Sixteen pairs from int8 values.
DSPARK_INLINE Pairs bytes(const uint8_t* p) {
#ifdef DSPARK_AVX512_BF16
  const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
  const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(p + 16))));
  return (u32x16)_mm512_cvtne2ps_pbh(high, low);
#else
  const u32x16 pairs = load_widened(reinterpret_cast<const uint16_t*>(p));
  return {to_float(as_integers(pairs << 24) >> 24), to_float(as_integers(pairs << 16) >> 24)};
#endif
}

// With two or more rows, products keep a core too busy to run far ahead, so explicit prefetches of the next
// lines keep the memory busy. They target L2, because L1 would evict lines before they are
// used. With a single row, hardware prefetching keeps up.
template <int R>
DSPARK_INLINE void prefetch_group(const uint8_t* block, int bytes) {
  constexpr int kGroupsAhead = 12;
  if (R == 1) return;
  for (int line = 0; line < bytes; line += 64) __builtin_prefetch(block + kGroupsAhead * bytes + line, 0, 2);
}

template <int R>
static void tile_q4(const Rows<uint16_t>& x, const Matrix& m, const uint8_t* panel, float* out) {
  constexpr int V = at_once<R>();
  const size_t groups = x.by_group.groups;
  const float* sums = x.by_group.sums;
  for (int first = 0; first < kVectors; first += V) {
    f32x16 totals[R][V] = {};
    const uint8_t* block = panel;
    for (int g = 0; g < m.k / kGroup; ++g, block += kQ4Block) {
      f32x16 acc[R][V] = {};
      const uint16_t* inputs = x.data + g * kGroup;
      prefetch_group<R>(block, kQ4Block);
      _Pragma("GCC unroll 1") for (int j = 0; j < 4; ++j) {  // unrolling further would spill registers
        u32x16 words[V];
        DSPARK_UNROLL for (int v = 0; v < V; ++v) words[v] = load<u32x16>(block + 128 * j + 64 * (first + v));
        DSPARK_UNROLL for (int s = 0; s < 4; ++s) {
          Pairs weights[V];
          DSPARK_UNROLL for (int v = 0; v < V; ++v) weights[v] = nibbles(words[v], s);
          DSPARK_UNROLL for (int r = 0; r < R; ++r) {
            const uint32_t input = pair_at(inputs + r * x.stride + 2 * (4 * j + s));
            DSPARK_UNROLL for (int v = 0; v < V; ++v) acc[r][v] = dot_pair(acc[r][v], weights[v], input);
          }
        }
      }
      DSPARK_UNROLL for (int v = 0; v < V; ++v) {
        const uint8_t* scales = block + kQ4Scales + 32 * (first + v);
        const f32x16 scale = load_half(reinterpret_cast<const uint16_t*>(scales));
        const f32x16 minimum = load_half(reinterpret_cast<const uint16_t*>(scales + 64));
        DSPARK_UNROLL for (int r = 0; r < R; ++r) {
          const f32x16 scaled = totals[r][v] + scale * acc[r][v];
          totals[r][v] = scaled + minimum * sums[r * groups + g];
        }
      }
    }
    store_vectors<R, V>(totals, out + first * kLanes);
  }
}

template <int R>
static void tile_q8(const Rows<uint16_t>& x, const Matrix& m, const uint8_t* panel, float* out) {
  constexpr int V = at_once<R>();
  for (int first = 0; first < kVectors; first += V) {
    f32x16 totals[R][V] = {};
    const uint8_t* block = panel;
    for (int g = 0; g < m.k / kGroup; ++g, block += kQ8Block) {
      f32x16 acc[R][V] = {};
      const uint16_t* inputs = x.data + g * kGroup;
      prefetch_group<R>(block, kQ8Block);
      _Pragma("GCC unroll 2") for (int t = 0; t < 16; ++t) {
        Pairs weights[V];
        DSPARK_UNROLL for (int v = 0; v < V; ++v) weights[v] = bytes(block + 64 * t + 32 * (first + v));
        DSPARK_UNROLL for (int r = 0; r < R; ++r) {
          const uint32_t input = pair_at(inputs + r * x.stride + 2 * t);
          DSPARK_UNROLL for (int v = 0; v < V; ++v) acc[r][v] = dot_pair(acc[r][v], weights[v], input);
        }
      }
      DSPARK_UNROLL for (int v = 0; v < V; ++v) {
        const f32x16 scale = load_half(reinterpret_cast<const uint16_t*>(block + kQ8Scales + 32 * (first + v)));
        DSPARK_UNROLL for (int r = 0; r < R; ++r) totals[r][v] += scale * acc[r][v];
      }
    }
    store_vectors<R, V>(totals, out + first * kLanes);
  }
}

// Products of bytes, exact integers within a group, before scaling.
template <int R>
static void tile_i8(const Rows<uint16_t>& x, const Matrix& m, const uint8_t* block, float* out) {
  const size_t groups = x.by_group.groups;
  const CodedGroup* coded = x.by_group.coded;
  f32x16 totals[R][kVectors] = {};
  for (int g = 0; g < m.k / kGroup; ++g, block += kQ8Block, ++coded) {
    const auto of = [&](int r) -> const CodedGroup& { return coded[r / kBlockRows * groups]; };
    i32x16 acc[R][kVectors];
    DSPARK_UNROLL for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = splat_integer(of(r).offsets[r % kBlockRows]);
    prefetch_group<R>(block, kQ8Block);
    _Pragma("GCC unroll 2") for (int t = 0; t < kGroup / 4; ++t) {
      const u32x16 w0 = load<u32x16>(block + 128 * t), w1 = load<u32x16>(block + 128 * t + 64);
      DSPARK_UNROLL for (int r = 0; r < R; ++r) {
        const uint32_t v = of(r).quad(r % kBlockRows, 4 * t);
        acc[r][0] = dot_quad(acc[r][0], w0, v);
        acc[r][1] = dot_quad(acc[r][1], w1, v);
      }
    }
    DSPARK_UNROLL for (int v = 0; v < kVectors; ++v) {
      const f32x16 scale = load_half(reinterpret_cast<const uint16_t*>(block + kQ8Scales + 32 * v));
      DSPARK_UNROLL for (int r = 0; r < R; ++r)
        totals[r][v] += to_float(acc[r][v]) * (scale * of(r).steps[r % kBlockRows]);
    }
  }
  store_vectors<R, kVectors>(totals, out);
}

template <int R>
static void tile_i4(const Rows<uint16_t>& x, const Matrix& m, const uint8_t* block, float* out) {
  const size_t groups = x.by_group.groups;
  const CodedGroup* coded = x.by_group.coded;
  f32x16 totals[R][kVectors] = {};
  for (int g = 0; g < m.k / kGroup; ++g, block += kQ4Block, ++coded) {
    const auto of = [&](int r) -> const CodedGroup& { return coded[r / kBlockRows * groups]; };
    i32x16 acc[R][kVectors] = {};
    prefetch_group<R>(block, kQ4Block);
    _Pragma("GCC unroll 1") for (int t = 0; t < 4; ++t) {
      const u32x16 words0 = load<u32x16>(block + 128 * t), words1 = load<u32x16>(block + 128 * t + 64);
      DSPARK_UNROLL for (int s = 0; s < 2; ++s) {
        const u32x16 w0 = (words0 >> (4 * s)) & 0x0f0f0f0fu, w1 = (words1 >> (4 * s)) & 0x0f0f0f0fu;
        DSPARK_UNROLL for (int r = 0; r < R; ++r) {
          const uint32_t v = of(r).quad(r % kBlockRows, 4 * (2 * t + s));
          acc[r][0] = dot_quad(acc[r][0], w0, v);
          acc[r][1] = dot_quad(acc[r][1], w1, v);
        }
      }
    }
    DSPARK_UNROLL for (int v = 0; v < kVectors; ++v) {
      const f32x16 scale = load_half(reinterpret_cast<const uint16_t*>(block + kQ4Scales + 32 * v));
      const f32x16 minimum = load_half(reinterpret_cast<const uint16_t*>(block + kQ4Scales + 64 + 32 * v));
      DSPARK_UNROLL for (int r = 0; r < R; ++r) {
        const f32x16 products = scale * to_float(acc[r][v]);
        totals[r][v] += (products + minimum * of(r).sums[r % kBlockRows]) * of(r).steps[r % kBlockRows];
      }
    }
  }
  store_vectors<R, kVectors>(totals, out);
}

template <class T>
using Tile = void (*)(const Rows<T>&, const Matrix&, const uint8_t*, float*);

// Unpacking needs registers too, so taller tiles of quantised weights would spill.
DSPARK_INLINE int tallest_tile(const Matrix& m) { return m.format == kQ4 || m.format == kQ8 ? std::min(8, kRows) : kRows; }

// The format must match the activations: float32 with float32, all others with bfloat16.
static Tile<float> tile_for(const Matrix&, const float*, int rows) {
  static const Tile<float> tiles[kRows] = DSPARK_BY_ROWS(tile_float32);
  return tiles[rows - 1];
}

static Tile<uint16_t> tile_for(const Matrix& m, const uint16_t*, int rows) {
  static const Tile<uint16_t> bfloat16[kRows] = DSPARK_BY_ROWS(tile_bfloat16);
  static const Tile<uint16_t> q4[kRows] = DSPARK_BY_ROWS(tile_q4);
  static const Tile<uint16_t> q8[kRows] = DSPARK_BY_ROWS(tile_q8);
  static const Tile<uint16_t> i8[kRows] = DSPARK_BY_ROWS(tile_i8);
  static const Tile<uint16_t> i4[kRows] = DSPARK_BY_ROWS(tile_i4);
  switch (m.format) {
    case kQ4: return q4[rows - 1];
    case kQ8: return q8[rows - 1];
    case kI8: return i8[rows - 1];
    case kI4: return i4[rows - 1];
    default: return bfloat16[rows - 1];
  }
}

}  // namespace dspark
