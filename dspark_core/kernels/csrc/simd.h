// Arithmetic on sixteen lanes: bfloat16, half precision, products of pairs and quads, exponentials.
#pragma once

#include "lanes.h"

namespace dspark {

DSPARK_INLINE float bf16_to_float(uint16_t h) {
  uint32_t bits = uint32_t(h) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

DSPARK_INLINE uint16_t float_to_bf16(float x) {  // rounds to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40u);
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// IEEE half without infinities, as block scales of quantised weights are finite.
DSPARK_INLINE f32x16 load_half(const uint16_t* p) {
#ifdef DSPARK_AVX512_BF16
  return (f32x16)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
  const u32x16 h = load_widened(p);
  f32x16 magnitude = as_float((h & 0x7fffu) << 13) * 0x1p112f;
  return as_float(as_bits(magnitude) | ((h & 0x8000u) << 16));
#endif
}

DSPARK_INLINE float half_to_float(uint16_t h) {
  uint32_t bits = uint32_t(h & 0x7fffu) << 13;
  float x;
  std::memcpy(&x, &bits, 4);
  x *= 0x1p112f;
  return h & 0x8000u ? -x : x;
}

// Sixteen pairs of weights as they are multiplied: in bfloat16 if the processor supports it, else as floats.
#ifdef DSPARK_AVX512_BF16
typedef u32x16 Pairs;
DSPARK_INLINE Pairs as_pairs(u32x16 bf16) { return bf16; }
DSPARK_INLINE u32x16 as_bf16(Pairs pairs) { return pairs; }
#else
struct Pairs {
  f32x16 first, second;
};
DSPARK_INLINE Pairs as_pairs(const u32x16& bf16) { return {as_float(bf16 << 16), as_float(bf16 & 0xffff0000u)}; }
#endif

DSPARK_INLINE Pairs load_pairs(const void* p) { return as_pairs(load<u32x16>(p)); }

// Per lane: acc + w0 * x0 + w1 * x1, where x holds a pair of bfloat16.
DSPARK_INLINE f32x16 dot_pair(f32x16 acc, Pairs w, uint32_t x) {
#if defined(DSPARK_AVX512_BF16)
  return (f32x16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)_mm512_set1_epi32(int(x)));
#elif defined(__AVX512F__)
  const u32x16 both = splat_bits(x);
  acc += w.second * as_float(both & 0xffff0000u);
  return acc + w.first * as_float(both << 16);
#else
  const u32_part both = u32_part{} + x;
  const f32_part first = (f32_part)(both << 16), second = (f32_part)(both & 0xffff0000u);
  DSPARK_UNROLL for (int i = 0; i < kParts; ++i) {
    acc.part[i] += w.second.part[i] * second;
    acc.part[i] += w.first.part[i] * first;
  }
  return acc;
#endif
}

// Per lane: acc + the sum of four products of unsigned bytes of w and signed bytes of x.
DSPARK_INLINE i32x16 dot_quad(i32x16 acc, u32x16 w, uint32_t x) {
#ifdef DSPARK_AVX512_VNNI
  return (i32x16)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(int(x)));
#else
  for (int shift = 0; shift < 32; shift += 8)
    acc += as_integers(w >> shift & 255u) * int32_t(int8_t(x >> shift));
  return acc;
#endif
}

DSPARK_INLINE u32x16 to_bf16_pairs(f32x16 even, f32x16 odd) {
  u32x16 e = as_bits(even), o = as_bits(odd);
  e = (e + 0x7fffu + ((e >> 16) & 1u)) >> 16;
  o = (o + 0x7fffu + ((o >> 16) & 1u)) & 0xffff0000u;
  return e | o;
}

#ifndef DSPARK_AVX512_BF16
DSPARK_INLINE u32x16 as_bf16(const Pairs& pairs) { return to_bf16_pairs(pairs.first, pairs.second); }
#endif

DSPARK_INLINE void store_activation(float* p, f32x16 v) { store(p, v); }

DSPARK_INLINE void store_activation(uint16_t* p, f32x16 v) {
#ifdef DSPARK_AVX512_BF16
  store(p, _mm512_cvtneps_pbh((__m512)v));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = float_to_bf16(v[i]);
#endif
}

DSPARK_INLINE void store_one(float* p, float x) { *p = x; }
DSPARK_INLINE void store_one(uint16_t* p, float x) { *p = float_to_bf16(x); }

template <class T>
DSPARK_INLINE void store_activations(T* to, const float* from, int count) {
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) store_activation(to + i, load<f32x16>(from + i));
  for (; i < count; ++i) store_one(to + i, from[i]);
}

DSPARK_INLINE f32x16 load_floats(const float* p) { return load<f32x16>(p); }
DSPARK_INLINE f32x16 load_floats(const uint16_t* p) {
  return as_float(load_widened(p) << 16);
}

DSPARK_INLINE float load_one(const float* p) { return *p; }
DSPARK_INLINE float load_one(const uint16_t* p) { return bf16_to_float(*p); }

DSPARK_INLINE float sum(f32x16 v) {
#ifdef DSPARK_AVX512_BF16
  return _mm512_reduce_add_ps((__m512)v);
#else
  float part[kLanes];
  store(part, v);
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) part[i] += part[i + width];
  return part[0];
#endif
}

DSPARK_INLINE float maximum(f32x16 v) {
#ifdef DSPARK_AVX512_BF16
  return _mm512_reduce_max_ps((__m512)v);
#else
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
#endif
}

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to an integer

// p * 2^n via the exponent bits, where `shifted` is n + kRound. Exactly 0 for x below -87.
DSPARK_INLINE f32x16 scaled_by_two_to(f32x16 p, f32x16 shifted, f32x16 x) {
  return zero_below(x, splat(-87.0f), as_float(as_bits(p) + (as_bits(shifted) << 23)));
}

// exp to about 2e-7 relative; exactly 1 at 0, exactly 0 below -87.
DSPARK_INLINE f32x16 exp(f32x16 x) {
  const f32x16 clamped = maximum(minimum(x, splat(88.0f)), splat(-87.0f));
  const f32x16 shifted = clamped * 1.44269504f + kRound;
  const f32x16 n = shifted - kRound;
  f32x16 r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  f32x16 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return scaled_by_two_to(p, shifted, x);
}

// exp to about 4e-5 relative, for x <= 0.
DSPARK_INLINE f32x16 rough_exp(f32x16 x) {
  const f32x16 clamped = maximum(x, splat(-87.0f));
  const f32x16 shifted = clamped * 1.44269504f + kRound;
  const f32x16 r = clamped - (shifted - kRound) * 0.69314718f;
  f32x16 p = splat(4.1666667e-2f);
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return scaled_by_two_to(p, shifted, x);
}

}  // namespace dspark
