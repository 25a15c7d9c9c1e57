// Intel's matrix unit (AMX): eight tile registers of up to 16 rows of 64 bytes, and products of two of them.
//
// The instructions are written in assembly, because the compilers' intrinsics do not declare their memory
// accesses: GCC 12 drops stores that a later tile or configuration load depends on.
// With DSPARK_AMX_EMULATED, the same programs run on any processor, through loops that follow Intel's manual.
// These serve for tests, and as the reference that a processor with AMX is checked against.
#pragma once

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <csignal>
#include <cstdlib>

#include "lanes.h"

#if defined(DSPARK_AMX_EMULATED) || \
    (defined(__linux__) && defined(DSPARK_AVX512_VNNI) && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__))
#define DSPARK_AMX 1
#endif

#ifdef DSPARK_AMX

#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

namespace dspark {

constexpr int kTileRows = 16, kTileBytes = 64;

// Operand of `ldtilecfg`.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};  // bytes per row of each tile
  uint8_t rows[16] = {};

  void set(int tile, int tile_rows, int row_bytes) {
    rows[tile] = uint8_t(tile_rows);
    bytes[tile] = uint16_t(row_bytes);
  }
};

// Instructions as functions of tile numbers. `Emulated` defines their meaning.
struct Emulated {
  struct State {
    TileConfig config;
    alignas(64) uint8_t tile[8][kTileRows][kTileBytes];
  };

  static State& state() {
    static thread_local State one;
    return one;
  }

  static void configure(const TileConfig& config) {
    state().config = config;
    std::memset(state().tile, 0, sizeof(State::tile));
  }

  static void release() { state().config = {}; }

  template <int T>
  static void load(const void* from, size_t stride) {
    zero<T>();
    for (int r = 0; r < state().config.rows[T]; ++r)
      std::memcpy(state().tile[T][r], static_cast<const uint8_t*>(from) + r * stride, state().config.bytes[T]);
  }

  template <int T>
  static void store(void* to, size_t stride) {
    for (int r = 0; r < state().config.rows[T]; ++r)
      std::memcpy(static_cast<uint8_t*>(to) + r * stride, state().tile[T][r], state().config.bytes[T]);
  }

  template <int T>
  static void zero() {
    std::memset(state().tile[T], 0, sizeof(state().tile[T]));
  }

  template <int T, class V>
  static V at(int row, int index) {
    V value;
    std::memcpy(&value, state().tile[T][row] + index * sizeof(V), sizeof(V));
    return value;
  }

  template <int T, class V>
  static void put(int row, int index, V value) {
    std::memcpy(state().tile[T][row] + index * sizeof(V), &value, sizeof(V));
  }

  template <int T>
  static float bf16_at(int row, int index) {
    const uint32_t bits = uint32_t(at<T, uint16_t>(row, index)) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }

  // Constraints on the three tiles; a processor raises a fault if they are violated.
  template <int C, int A, int B>
  static void check() {
    const TileConfig& c = state().config;
    const bool fit = c.rows[C] && c.rows[C] == c.rows[A] && c.bytes[C] && c.bytes[C] == c.bytes[B] && c.bytes[A] % 4 == 0 &&
                     c.bytes[A] / 4 == c.rows[B];
    if (!fit) std::abort();
  }

  // C += A B in bfloat16: products of even and odd inputs are summed separately, then both sums are added.
  template <int C, int A, int B>
  static void dot_bf16() {
    check<C, A, B>();
    const TileConfig& config = state().config;
    for (int r = 0; r < config.rows[C]; ++r) {
      for (int n = 0; n < config.bytes[C] / 4; ++n) {
        float even = 0.0f, odd = 0.0f;
        for (int k = 0; k < config.bytes[A] / 4; ++k) {
          even = std::fma(bf16_at<A>(r, 2 * k), bf16_at<B>(k, 2 * n), even);
          odd = std::fma(bf16_at<A>(r, 2 * k + 1), bf16_at<B>(k, 2 * n + 1), odd);
        }
        put<C>(r, n, at<C, float>(r, n) + (even + odd));
      }
    }
  }

  // C += A B of signed (A) and unsigned (B) bytes.
  template <int C, int A, int B>
  static void dot_bytes() {
    check<C, A, B>();
    const TileConfig& config = state().config;
    for (int r = 0; r < config.rows[C]; ++r) {
      for (int n = 0; n < config.bytes[C] / 4; ++n) {
        int32_t total = at<C, int32_t>(r, n);
        for (int k = 0; k < config.bytes[A] / 4; ++k)
          for (int i = 0; i < 4; ++i)
            total += int32_t(at<A, int8_t>(r, 4 * k + i)) * int32_t(at<B, uint8_t>(k, 4 * n + i));
        put<C>(r, n, total);
      }
    }
  }
};

#ifdef DSPARK_AMX_EMULATED

using Tiles = Emulated;
inline bool unit_permitted() { return true; }

#else

struct Tiles {
  static DSPARK_MEMBER void configure(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config) : "memory"); }
  static DSPARK_MEMBER void release() { asm volatile("tilerelease" ::: "memory"); }

  template <int T>
  static DSPARK_MEMBER void load(const void* from, size_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
  }
  template <int T>
  static DSPARK_MEMBER void store(void* to, size_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
  }
  template <int T>
  static DSPARK_MEMBER void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
  }
  template <int C, int A, int B>
  static DSPARK_MEMBER void dot_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
  template <int C, int A, int B>
  static DSPARK_MEMBER void dot_bytes() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
};

// Linux grants the tile registers on request, and refuses if signal stacks are too small.
inline bool unit_permitted() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

#endif

// One product of each kind, on pseudo-random numbers.
struct UnitSample {
  static constexpr int kRows = 7;
  float halves[kRows][kTileRows];
  int32_t bytes[kRows][kTileRows];

  template <class Unit>
  void compute() {
    alignas(64) uint8_t a[kRows][kTileBytes], b[kTileRows][kTileBytes];
    uint32_t bits = 12345;
    const auto next = [&](int i) {  // every pair is a bfloat16 of magnitude 0.1 to 0.5
      bits = bits * 1664525u + 1013904223u;
      return uint8_t(i % 2 ? 0x3e | bits >> 31 << 7 : bits >> 16);
    };
    for (auto& row : a)
      for (int i = 0; i < kTileBytes; ++i) row[i] = next(i);
    for (auto& row : b)
      for (int i = 0; i < kTileBytes; ++i) row[i] = next(i);
    TileConfig config;
    config.set(0, kRows, kTileBytes);
    config.set(1, kRows, kTileBytes);
    config.set(2, kTileRows, kTileBytes);
    Unit::configure(config);
    Unit::template load<1>(a, kTileBytes);
    Unit::template load<2>(b, kTileBytes);
    Unit::template zero<0>();
    Unit::template dot_bf16<0, 1, 2>();
    Unit::template dot_bf16<0, 1, 2>();
    Unit::template store<0>(halves, kTileBytes);
    Unit::template zero<0>();
    Unit::template dot_bytes<0, 1, 2>();
    Unit::template store<0>(bytes, kTileBytes);
    Unit::release();
  }

  bool close_to(const UnitSample& other) const {
    for (int r = 0; r < kRows; ++r)
      for (int n = 0; n < kTileRows; ++n)
        if (!(std::fabs(halves[r][n] - other.halves[r][n]) < 1e-4f) || bytes[r][n] != other.bytes[r][n]) return false;
    return true;
  }
};

// Whether the unit works as expected. Tested in a child process, which an unsupported instruction would kill.
inline bool unit_computes() {
  UnitSample expected;
  expected.compute<Emulated>();
  const long child = syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);  // not `fork`, which would run atfork handlers
  if (child == 0) {
    alarm(10);
    UnitSample found;
    found.compute<Tiles>();
    _exit(found.close_to(expected) ? 0 : 1);
  }
  int status = 1;
  pid_t ended = -1;
  while (child > 0 && (ended = waitpid(pid_t(child), &status, 0)) < 0 && errno == EINTR) {
  }
  return child > 0 && ended == child && status == 0;
}

// Decided once, so that results do not depend on when they are computed within a process.
inline bool unit_at_hand() {
  static const bool at_hand = [] {
    const char* wish = std::getenv("DSPARK_AMX");
    return !(wish && std::strcmp(wish, "off") == 0) && unit_permitted() && unit_computes();
  }();
  return at_hand;
}

}  // namespace dspark

#endif
