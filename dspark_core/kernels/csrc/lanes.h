// Sixteen 32-bit lanes, regardless of the processor's register width. All operations are lane-wise, in a
// fixed order.
//
// Compilers keep vectors in registers only if they fit one, and wider ones in memory: products of
// 16 lanes were ten times slower on a processor with 8-lane registers. Without 16-lane registers, a value
// is therefore an array of parts that fit.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)
#define DSPARK_AVX512_BF16 1
#if defined(__AVX512VNNI__)
#define DSPARK_AVX512_VNNI 1
#endif
#endif

#define DSPARK_INLINE static inline __attribute__((always_inline))
#define DSPARK_MEMBER inline __attribute__((always_inline))
#define DSPARK_UNROLL _Pragma("GCC unroll 16")

namespace dspark {

constexpr int kLanes = 16;

#if defined(__AVX512F__)

constexpr bool kWholeRegisters = true;

template <class V>
DSPARK_INLINE V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <class V>
DSPARK_INLINE void store(void* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

typedef float f32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int8_t i8x16 __attribute__((vector_size(16)));

DSPARK_INLINE f32x16 splat(float x) { return x - f32x16{}; }
DSPARK_INLINE u32x16 splat_bits(uint32_t x) { return u32x16{} + x; }
DSPARK_INLINE i32x16 splat_integer(int32_t x) { return i32x16{} + x; }

DSPARK_INLINE f32x16 as_float(u32x16 v) { return (f32x16)v; }
DSPARK_INLINE u32x16 as_bits(f32x16 v) { return (u32x16)v; }
DSPARK_INLINE i32x16 as_integers(u32x16 v) { return (i32x16)v; }

DSPARK_INLINE f32x16 to_float(i32x16 v) { return __builtin_convertvector(v, f32x16); }
DSPARK_INLINE u32x16 load_widened(const uint16_t* p) { return __builtin_convertvector(load<u16x16>(p), u32x16); }
DSPARK_INLINE void store_bytes(int8_t* p, f32x16 whole) {
  store(p, __builtin_convertvector(__builtin_convertvector(whole, i32x16), i8x16));
}

// Per lane: v if a >= b, else 0; and 0 if a < b, else v. They differ for NaN.
DSPARK_INLINE f32x16 where_reached(f32x16 a, f32x16 b, f32x16 v) { return a >= b ? v : f32x16{}; }
DSPARK_INLINE f32x16 zero_below(f32x16 a, f32x16 b, f32x16 v) { return a < b ? f32x16{} : v; }

// maximum and minimum return b if either is NaN.
DSPARK_INLINE f32x16 maximum(f32x16 a, f32x16 b) {
  return (f32x16)_mm512_max_ps((__m512)a, (__m512)b);  // compilers would compare and blend instead
}
DSPARK_INLINE f32x16 minimum(f32x16 a, f32x16 b) { return (f32x16)_mm512_min_ps((__m512)a, (__m512)b); }

#else

constexpr bool kWholeRegisters = false;

#if defined(__AVX2__)
constexpr int kPartLanes = 8;
#else
constexpr int kPartLanes = 4;
#endif
constexpr int kParts = kLanes / kPartLanes;

typedef float f32_part __attribute__((vector_size(4 * kPartLanes)));
typedef uint32_t u32_part __attribute__((vector_size(4 * kPartLanes)));
typedef int32_t i32_part __attribute__((vector_size(4 * kPartLanes)));
typedef uint16_t u16_part __attribute__((vector_size(2 * kPartLanes)));

template <class P, class T>
struct Lanes {
  P part[kParts];

  DSPARK_MEMBER T operator[](int lane) const { return part[lane / kPartLanes][lane % kPartLanes]; }
  DSPARK_MEMBER Lanes& operator+=(const Lanes& v) { return *this = *this + v; }

  template <class F>
  static DSPARK_MEMBER Lanes of(F part_of) {
    Lanes out;
    DSPARK_UNROLL for (int i = 0; i < kParts; ++i) out.part[i] = part_of(i);
    return out;
  }

#define DSPARK_LANES_OPERATOR(op)                                                 \
  friend DSPARK_MEMBER Lanes operator op(const Lanes& a, const Lanes& b) {        \
    return of([&](int i) { return a.part[i] op b.part[i]; });                     \
  }                                                                               \
  friend DSPARK_MEMBER Lanes operator op(const Lanes& a, T b) {                   \
    return of([&](int i) { return a.part[i] op b; });                             \
  }                                                                               \
  friend DSPARK_MEMBER Lanes operator op(T a, const Lanes& b) {                   \
    return of([&](int i) { return a op b.part[i]; });                             \
  }
  DSPARK_LANES_OPERATOR(+)
  DSPARK_LANES_OPERATOR(-)
  DSPARK_LANES_OPERATOR(*)
  DSPARK_LANES_OPERATOR(/)
  DSPARK_LANES_OPERATOR(&)
  DSPARK_LANES_OPERATOR(|)
#undef DSPARK_LANES_OPERATOR

  friend DSPARK_MEMBER Lanes operator-(const Lanes& a) {
    return of([&](int i) { return -a.part[i]; });
  }
  friend DSPARK_MEMBER Lanes operator<<(const Lanes& a, int by) {
    return of([&](int i) { return a.part[i] << by; });
  }
  friend DSPARK_MEMBER Lanes operator>>(const Lanes& a, int by) {
    return of([&](int i) { return a.part[i] >> by; });
  }
};

// Copies part by part: copying the whole struct would force it into memory.
template <class V>
struct Memory {
  static DSPARK_MEMBER V load(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof(V));
    return v;
  }
  static DSPARK_MEMBER void store(void* p, const V& v) { std::memcpy(p, &v, sizeof(V)); }
};

template <class P, class T>
struct Memory<Lanes<P, T>> {
  static DSPARK_MEMBER Lanes<P, T> load(const void* p) {
    return Lanes<P, T>::of([&](int i) { return Memory<P>::load(static_cast<const P*>(p) + i); });
  }
  static DSPARK_MEMBER void store(void* p, const Lanes<P, T>& v) {
    DSPARK_UNROLL for (int i = 0; i < kParts; ++i) Memory<P>::store(static_cast<P*>(p) + i, v.part[i]);
  }
};

template <class V>
DSPARK_INLINE V load(const void* p) {
  return Memory<V>::load(p);
}

template <class V>
DSPARK_INLINE void store(void* p, const V& v) {
  Memory<V>::store(p, v);
}

typedef Lanes<f32_part, float> f32x16;
typedef Lanes<u32_part, uint32_t> u32x16;
typedef Lanes<i32_part, int32_t> i32x16;

DSPARK_INLINE f32x16 splat(float x) {
  return f32x16::of([&](int) { return x - f32_part{}; });
}
DSPARK_INLINE u32x16 splat_bits(uint32_t x) {
  return u32x16::of([&](int) { return u32_part{} + x; });
}
DSPARK_INLINE i32x16 splat_integer(int32_t x) {
  return i32x16::of([&](int) { return i32_part{} + x; });
}

DSPARK_INLINE f32x16 as_float(const u32x16& v) {
  return f32x16::of([&](int i) { return (f32_part)v.part[i]; });
}
DSPARK_INLINE u32x16 as_bits(const f32x16& v) {
  return u32x16::of([&](int i) { return (u32_part)v.part[i]; });
}
DSPARK_INLINE i32x16 as_integers(const u32x16& v) {
  return i32x16::of([&](int i) { return (i32_part)v.part[i]; });
}

DSPARK_INLINE f32x16 to_float(const i32x16& v) {
  return f32x16::of([&](int i) { return __builtin_convertvector(v.part[i], f32_part); });
}
DSPARK_INLINE u32x16 load_widened(const uint16_t* p) {
  return u32x16::of([&](int i) { return __builtin_convertvector(load<u16_part>(p + i * kPartLanes), u32_part); });
}
DSPARK_INLINE void store_bytes(int8_t* p, const f32x16& whole) {
  for (int i = 0; i < kLanes; ++i) p[i] = int8_t(whole[i]);
}

DSPARK_INLINE f32x16 where_reached(const f32x16& a, const f32x16& b, const f32x16& v) {
  return f32x16::of([&](int i) { return a.part[i] >= b.part[i] ? v.part[i] : f32_part{}; });
}
DSPARK_INLINE f32x16 zero_below(const f32x16& a, const f32x16& b, const f32x16& v) {
  return f32x16::of([&](int i) { return a.part[i] < b.part[i] ? f32_part{} : v.part[i]; });
}

// maximum and minimum return b if either is NaN.
DSPARK_INLINE f32x16 maximum(const f32x16& a, const f32x16& b) {
  return f32x16::of([&](int i) { return a.part[i] > b.part[i] ? a.part[i] : b.part[i]; });
}
DSPARK_INLINE f32x16 minimum(const f32x16& a, const f32x16& b) {
  return f32x16::of([&](int i) { return a.part[i] < b.part[i] ? a.part[i] : b.part[i]; });
}

#endif

}  // namespace dspark
