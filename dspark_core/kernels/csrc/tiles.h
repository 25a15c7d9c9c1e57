// Tiles: up to 12 rows of activations times one panel of 32 columns.
//
// Every result is accumulated over the inputs in one order that does not depend on how many rows
// share the tile. A token's values are therefore the same bits in any batch, which is what makes
// speculative decoding exact beyond rounding.
#pragma once

#include "activations.h"

namespace dspark {

constexpr int kRows = 12;

// Activations [rows, stride].
template <class T>
struct Rows {
  const T* data;
  size_t stride;
  GroupValues by_group;
};

DSPARK_INLINE uint32_t pair_at(const uint16_t* p) {
  uint32_t pair;
  std::memcpy(&pair, p, 4);
  return pair;
}

template <int R>
static void tile_float32(const Rows<float>& x, const Matrix& m, const uint8_t* panel, float* out) {
  f32x16 acc[R][kVectors] = {};
  const auto* w = reinterpret_cast<const float*>(panel);
  for (int k = 0; k < m.k; ++k, w += kPanel) {
    const f32x16 w0 = load<f32x16>(w), w1 = load<f32x16>(w + kLanes);
    DSPARK_UNROLL for (int r = 0; r < R; ++r) {
      const f32x16 v = splat(x.data[r * x.stride + k]);
      acc[r][0] += w0 * v;
      acc[r][1] += w1 * v;
    }
  }
  DSPARK_UNROLL for (int r = 0; r < R; ++r) {
    store(out + r * kPanel, acc[r][0]);
    store(out + r * kPanel + kLanes, acc[r][1]);
  }
}

template <int R>
static void tile_bfloat16(const Rows<uint16_t>& x, const Matrix& m, const uint8_t* panel, float* out) {
  f32x16 acc[R][kVectors] = {};
  const int pairs = m.k / 2;
  for (int t = 0; t < pairs; ++t, panel += 128) {
    const u32x16 w0 = load<u32x16>(panel), w1 = load<u32x16>(panel + 64);
    __builtin_prefetch(panel + 2048);
    __builtin_prefetch(panel + 2048 + 64);
    DSPARK_UNROLL for (int r = 0; r < R; ++r) {
      const uint32_t v = pair_at(x.data + r * x.stride + 2 * t);
      acc[r][0] = dot_pair(acc[r][0], w0, v);
      acc[r][1] = dot_pair(acc[r][1], w1, v);
    }
  }
  DSPARK_UNROLL for (int r = 0; r < R; ++r) {
    store(out + r * kPanel, acc[r][0]);
    store(out + r * kPanel + kLanes, acc[r][1]);
  }
}

// Nibble `s` of each 16-bit word, as a bfloat16.
DSPARK_INLINE u32x16 nibbles(u32x16 words, int s) {
#ifdef DSPARK_AVX512_BF16
  const __m512i table = _mm512_broadcast_i64x4(_mm256_setr_epi16(
      0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130,
      0x4140, 0x4150, 0x4160, 0x4170));
  return (u32x16)_mm512_permutexvar_epi16(_mm512_srli_epi16((__m512i)words, 4 * s), table);
#else
  const u32x16 even = (words >> (4 * s)) & 15u, odd = (words >> (16 + 4 * s)) & 15u;
  const f32x16 e = __builtin_convertvector((i32x16)even, f32x16);
  const f32x16 o = __builtin_convertvector((i32x16)odd, f32x16);
  return (as_bits(e) >> 16) | as_bits(o);
#endif
}

// Sixteen pairs of int8 as bfloat16, exactly.
DSPARK_INLINE u32x16 bytes(const uint8_t* p) {
#ifdef DSPARK_AVX512_BF16
  const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
  const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(p + 16))));
  return (u32x16)_mm512_cvtne2ps_pbh(high, low);
#else
  uint32_t pairs[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    const float even = float(int8_t(p[2 * i])), odd = float(int8_t(p[2 * i + 1]));
    pairs[i] = uint32_t(float_to_bf16(even)) | uint32_t(float_to_bf16(odd)) << 16;
  }
  return load<u32x16>(pairs);
#endif
}

// Products of two rows and more keep a core too busy to run far ahead of itself, and asking for the next
// lines by hand keeps the memory busy. They are asked into the second cache: the first would lose what it
// holds before it is used. One row reads as fast as the processor's own prefetching follows.
template <int R>
DSPARK_INLINE void prefetch_group(const uint8_t* block, int bytes) {
  constexpr int kGroupsAhead = 12;
  if (R == 1) return;
  for (int line = 0; line < bytes; line += 64) __builtin_prefetch(block + kGroupsAhead * bytes + line, 0, 2);
}

template <int R>
DSPARK_INLINE void store_totals(const f32x16 (&totals)[R][kVectors], float* out) {
  DSPARK_UNROLL for (int r = 0; r < R; ++r)
    DSPARK_UNROLL for (int v = 0; v < kVectors; ++v) store(out + r * kPanel + v * kLanes, totals[r][v]);
}

template <int R>
static void tile_q4(const Rows<uint16_t>& x, const Matrix& m, const uint8_t* block, float* out) {
  const size_t groups = x.by_group.groups;
  const float* sums = x.by_group.sums;
  f32x16 totals[R][kVectors] = {};
  for (int g = 0; g < m.k / kGroup; ++g, block += kQ4Block) {
    f32x16 acc[R][kVectors] = {};
    const uint16_t* inputs = x.data + g * kGroup;
    prefetch_group<R>(block, kQ4Block);
    _Pragma("GCC unroll 1") for (int j = 0; j < 4; ++j) {  // unrolled further, registers would not do
      const u32x16 words0 = load<u32x16>(block + 128 * j), words1 = load<u32x16>(block + 128 * j + 64);
      DSPARK_UNROLL for (int s = 0; s < 4; ++s) {
        const u32x16 w0 = nibbles(words0, s), w1 = nibbles(words1, s);
        DSPARK_UNROLL for (int r = 0; r < R; ++r) {
          const uint32_t v = pair_at(inputs + r * x.stride + 2 * (4 * j + s));
          acc[r][0] = dot_pair(acc[r][0], w0, v);
          acc[r][1] = dot_pair(acc[r][1], w1, v);
        }
      }
    }
    DSPARK_UNROLL for (int v = 0; v < kVectors; ++v) {
      const f32x16 scale = load_half(reinterpret_cast<const uint16_t*>(block + kQ4Scales + 32 * v));
      const f32x16 minimum = load_half(reinterpret_cast<const uint16_t*>(block + kQ4Scales + 64 + 32 * v));
      DSPARK_UNROLL for (int r = 0; r < R; ++r) {
        const f32x16 scaled = totals[r][v] + scale * acc[r][v];
        totals[r][v] = scaled + minimum * sums[r * groups + g];
      }
    }
  }
  store_totals<R>(totals, out);
}

template <int R>
static void tile_q8(const Rows<uint16_t>& x, const Matrix& m, const uint8_t* block, float* out) {
  f32x16 totals[R][kVectors] = {};
  for (int g = 0; g < m.k / kGroup; ++g, block += kQ8Block) {
    f32x16 acc[R][kVectors] = {};
    const uint16_t* inputs = x.data + g * kGroup;
    prefetch_group<R>(block, kQ8Block);
    _Pragma("GCC unroll 2") for (int t = 0; t < 16; ++t) {
      const u32x16 w0 = bytes(block + 64 * t), w1 = bytes(block + 64 * t + 32);
      DSPARK_UNROLL for (int r = 0; r < R; ++r) {
        const uint32_t v = pair_at(inputs + r * x.stride + 2 * t);
        acc[r][0] = dot_pair(acc[r][0], w0, v);
        acc[r][1] = dot_pair(acc[r][1], w1, v);
      }
    }
    DSPARK_UNROLL for (int v = 0; v < kVectors; ++v) {
      const f32x16 scale = load_half(reinterpret_cast<const uint16_t*>(block + kQ8Scales + 32 * v));
      DSPARK_UNROLL for (int r = 0; r < R; ++r) totals[r][v] += scale * acc[r][v];
    }
  }
  store_totals<R>(totals, out);
}

// Products of bytes, by groups: integers, exactly, before anything is scaled.
template <int R>
static void tile_i8(const Rows<uint16_t>& x, const Matrix& m, const uint8_t* block, float* out) {
  const size_t groups = x.by_group.groups;
  const CodedGroup* coded = x.by_group.coded;
  f32x16 totals[R][kVectors] = {};
  for (int g = 0; g < m.k / kGroup; ++g, block += kQ8Block, ++coded) {
    const auto of = [&](int r) -> const CodedGroup& { return coded[r / kBlockRows * groups]; };
    i32x16 acc[R][kVectors];
    DSPARK_UNROLL for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = i32x16{} + of(r).offsets[r % kBlockRows];
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
        totals[r][v] += __builtin_convertvector(acc[r][v], f32x16) * (scale * of(r).steps[r % kBlockRows]);
    }
  }
  store_totals<R>(totals, out);
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
        const f32x16 products = scale * __builtin_convertvector(acc[r][v], f32x16);
        totals[r][v] += (products + minimum * of(r).sums[r % kBlockRows]) * of(r).steps[r % kBlockRows];
      }
    }
  }
  store_totals<R>(totals, out);
}

template <class T>
using Tile = void (*)(const Rows<T>&, const Matrix&, const uint8_t*, float*);

#define DSPARK_TILES(name) \
  {name<1>, name<2>, name<3>, name<4>, name<5>, name<6>, name<7>, name<8>, name<9>, name<10>, name<11>, name<12>}

// Unpacking needs registers too: taller tiles of quantised weights would spill.
DSPARK_INLINE int tallest_tile(const Matrix& m) { return m.format == kQ4 || m.format == kQ8 ? 8 : kRows; }

// The format must suit the activations: float32 with float32, the others with bfloat16.
static Tile<float> tile_for(const Matrix&, const float*, int rows) {
  static const Tile<float> tiles[kRows] = DSPARK_TILES(tile_float32);
  return tiles[rows - 1];
}

static Tile<uint16_t> tile_for(const Matrix& m, const uint16_t*, int rows) {
  static const Tile<uint16_t> bfloat16[kRows] = DSPARK_TILES(tile_bfloat16);
  static const Tile<uint16_t> q4[kRows] = DSPARK_TILES(tile_q4);
  static const Tile<uint16_t> q8[kRows] = DSPARK_TILES(tile_q8);
  static const Tile<uint16_t> i8[kRows] = DSPARK_TILES(tile_i8);
  static const Tile<uint16_t> i4[kRows] = DSPARK_TILES(tile_i4);
  switch (m.format) {
    case kQ4: return q4[rows - 1];
    case kQ8: return q8[rows - 1];
    case kI8: return i8[rows - 1];
    case kI4: return i4[rows - 1];
    default: return bfloat16[rows - 1];
  }
}

}  // namespace dspark
