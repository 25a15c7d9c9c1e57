// Products on the matrix unit: up to 32 rows of activations times one panel of 32 columns.
//
// As in `tiles.h`, a row's results do not depend on how many rows share the product. But the unit sums in
// a different order than vector instructions, so it computes either all rows of a matrix or none.
#pragma once

#include "tile_unit.h"
#include "tiles.h"

namespace dspark {

#ifndef DSPARK_AMX

class MatrixUnit {
 public:
  static constexpr int kMostRows = kRows;
  static bool takes(const Matrix&) { return false; }
  template <class T>
  void multiply(const Rows<T>&, int, const Matrix&, const uint8_t*, float*) {}
};

#else

// How `MatrixUnit` handles formats with groups. `unpack` returns a group's weights as the unit reads them,
// [pairs or quads of inputs][32 columns]. `Scales` holds those of half a panel; its `add` adds the summed
// products of row r and group g to the row's total.
using GroupRows = Rows<uint16_t>;

// Scales of half a panel and, for four bits, minima.
struct ByteScales {
  f32x16 scale;

  DSPARK_MEMBER ByteScales(const uint8_t* block, int v)
      : scale(load_half(reinterpret_cast<const uint16_t*>(block + kQ8Scales + 32 * v))) {}
};

struct NibbleScales {
  f32x16 scale, minimum;

  DSPARK_MEMBER NibbleScales(const uint8_t* block, int v)
      : scale(load_half(reinterpret_cast<const uint16_t*>(block + kQ4Scales + 32 * v))),
        minimum(load_half(reinterpret_cast<const uint16_t*>(block + kQ4Scales + 64 + 32 * v))) {}
};

struct UnitQ4 {
  static constexpr bool kBytes = false;
  static constexpr int kBlock = kQ4Block;

  static const uint8_t* unpack(const uint8_t* block, uint8_t* to) {
    for (int j = 0; j < 4; ++j)
      for (int v = 0; v < kVectors; ++v) {
        const u32x16 words = load<u32x16>(block + 128 * j + 64 * v);
        DSPARK_UNROLL for (int s = 0; s < 4; ++s) store(to + 64 * (2 * (4 * j + s) + v), as_bf16(nibbles(words, s)));
      }
    return to;
  }

  struct Scales : NibbleScales {
    using NibbleScales::NibbleScales;

    DSPARK_MEMBER f32x16 add(f32x16 total, const float* sums, const GroupRows& x, int r, int g) const {
      const f32x16 scaled = total + scale * load<f32x16>(sums);
      return scaled + minimum * x.by_group.sums[r * x.by_group.groups + g];
    }
  };
};

struct UnitQ8 {
  static constexpr bool kBytes = false;
  static constexpr int kBlock = kQ8Block;

  static const uint8_t* unpack(const uint8_t* block, uint8_t* to) {
    for (int i = 0; i < kGroup / 2 * kVectors; ++i) store(to + 64 * i, as_bf16(bytes(block + 32 * i)));
    return to;
  }

  struct Scales : ByteScales {
    using ByteScales::ByteScales;

    DSPARK_MEMBER f32x16 add(f32x16 total, const float* sums, const GroupRows&, int, int) const {
      return total + scale * load<f32x16>(sums);
    }
  };
};

struct UnitI8 {
  static constexpr bool kBytes = true;
  static constexpr int kBlock = kQ8Block;

  static const uint8_t* unpack(const uint8_t* block, uint8_t*) { return block; }

  struct Scales : ByteScales {
    using ByteScales::ByteScales;

    DSPARK_MEMBER f32x16 add(f32x16 total, const float* sums, const GroupRows& x, int r, int g) const {
      const CodedGroup& coded = x.by_group.coded[r / kBlockRows * x.by_group.groups + g];
      const i32x16 products = load<i32x16>(sums) + splat_integer(coded.offsets[r % kBlockRows]);
      return total + to_float(products) * (scale * coded.steps[r % kBlockRows]);
    }
  };
};

struct UnitI4 {
  static constexpr bool kBytes = true;
  static constexpr int kBlock = kQ4Block;

  static const uint8_t* unpack(const uint8_t* block, uint8_t* to) {
    for (int t = 0; t < 4; ++t)
      for (int v = 0; v < kVectors; ++v) {
        const u32x16 words = load<u32x16>(block + 128 * t + 64 * v);
        for (int s = 0; s < 2; ++s) store(to + 64 * (2 * (2 * t + s) + v), (words >> (4 * s)) & 0x0f0f0f0fu);
      }
    return to;
  }

  struct Scales : NibbleScales {
    using NibbleScales::NibbleScales;

    DSPARK_MEMBER f32x16 add(f32x16 total, const float* sums, const GroupRows& x, int r, int g) const {
      const CodedGroup& coded = x.by_group.coded[r / kBlockRows * x.by_group.groups + g];
      const f32x16 products = scale * to_float(load<i32x16>(sums));
      return total + (products + minimum * coded.sums[r % kBlockRows]) * coded.steps[r % kBlockRows];
    }
  };
};

class MatrixUnit {
 public:
  static constexpr int kMostRows = 2 * kTileRows;

  static bool takes(const Matrix& m) { return m.format != kFloat32 && unit_at_hand(); }

  MatrixUnit() = default;
  MatrixUnit(const MatrixUnit&) = delete;

  ~MatrixUnit() {
    if (rows_) Tiles::release();  // context switches are cheaper for threads that hold no tiles
  }

  void multiply(const Rows<float>&, int, const Matrix&, const uint8_t*, float*) {}

  // out [rows, 32]. Not inlined, as one copy is enough. An object belongs to one thread, and nothing else on
  // that thread may use the unit meanwhile.
  __attribute__((noinline)) void multiply(const GroupRows& x, int rows, const Matrix& m, const uint8_t* panel,
                                          float* out) {
    configure(rows, m.rounds_activations());
    switch (m.format) {
      case kQ4: return by_groups<UnitQ4>(x, rows, m, panel, out);
      case kQ8: return by_groups<UnitQ8>(x, rows, m, panel, out);
      case kI8: return by_groups<UnitI8>(x, rows, m, panel, out);
      case kI4: return by_groups<UnitI4>(x, rows, m, panel, out);
      default: return bfloat16(x, rows, m, panel, out);
    }
  }

 private:
  static constexpr size_t kPanelRow = kPanel * 4;              // bytes: a pair or quad of all columns, or sums of a row
  static constexpr size_t kUnpacked = kGroup / 2 * kPanelRow;  // a group in bfloat16
  static constexpr int kAhead = 4;                             // groups of weights prefetched

  // Tiles 0 and 1 hold the sums of the first 16 rows, one per half of the panel, 2 and 3 those of the
  // others; 4 and 5 activations, 6 and 7 weights. Without other rows, 2, 3 and 5 serve a second group.
  void configure(int rows, bool bytes) {
    if (rows == rows_ && bytes == bytes_) return;
    rows_ = rows;
    bytes_ = bytes;
    const int first = std::min(rows, kTileRows), others = rows > kTileRows ? rows - kTileRows : first;
    const int inputs = bytes ? kGroup : 2 * kGroup;  // bytes of a group
    TileConfig config;
    for (int half = 0; half < kVectors; ++half) {
      config.set(half, first, kTileBytes);
      config.set(2 + half, others, kTileBytes);
      config.set(6 + half, inputs / 4, kTileBytes);
    }
    config.set(4, first, inputs);
    config.set(5, others, inputs);
    Tiles::configure(config);
  }

  static void zero_sums() {
    Tiles::zero<0>();
    Tiles::zero<1>();
    Tiles::zero<2>();
    Tiles::zero<3>();
  }

  static void load_weights(const uint8_t* group) {
    Tiles::load<6>(group, kPanelRow);
    Tiles::load<7>(group + kTileBytes, kPanelRow);
  }

  template <bool kBytes, int Sums, int Inputs>
  static void dot(const void* inputs, size_t stride) {
    Tiles::load<Inputs>(inputs, stride);
    if constexpr (kBytes) {
      Tiles::dot_bytes<Sums, Inputs, 6>();
      Tiles::dot_bytes<Sums + 1, Inputs, 7>();
    } else {
      Tiles::dot_bf16<Sums, Inputs, 6>();
      Tiles::dot_bf16<Sums + 1, Inputs, 7>();
    }
  }

  template <int Sums>
  static void store_sums(float* to) {
    Tiles::store<Sums>(to, kPanelRow);
    Tiles::store<Sums + 1>(to + kLanes, kPanelRow);
  }

  static void prefetch(const uint8_t* from, size_t bytes) {
    for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(from + line, 0, 2);
  }

  // Sums in tiles over all inputs in order; the panel already holds weights as the unit reads them.
  static void bfloat16(const GroupRows& x, int rows, const Matrix& m, const uint8_t* panel, float* out) {
    const auto add = [rows](const uint16_t* inputs, size_t stride, const uint8_t* weights) {
      load_weights(weights);
      dot<false, 0, 4>(inputs, 2 * stride);
      if (rows > kTileRows) dot<false, 2, 5>(inputs + kTileRows * stride, 2 * stride);
    };
    zero_sums();
    const int whole = m.k / kGroup, rest = m.k % kGroup;
    for (int g = 0; g < whole; ++g, panel += kUnpacked) {
      prefetch(panel + kAhead * kUnpacked, kUnpacked);
      add(x.data + g * kGroup, x.stride, panel);
    }
    if (rest) {  // padded with zeros
      alignas(64) uint16_t inputs[kMostRows * kGroup] = {};
      alignas(64) uint8_t weights[kUnpacked] = {};
      for (int r = 0; r < rows; ++r) std::memcpy(inputs + r * kGroup, x.data + r * x.stride + whole * kGroup, 2 * rest);
      std::memcpy(weights, panel, rest / 2 * kPanelRow);
      add(inputs, kGroup, weights);
    }
    store_sums<0>(out);
    if (rows > kTileRows) store_sums<2>(out + kTileRows * kPanel);
  }

  // The activations of one group.
  template <class F>
  struct Inputs {
    alignas(64) int8_t codes[F::kBytes ? kMostRows * kGroup : 1];
    const void* first;
    size_t stride;

    Inputs(const GroupRows& x, int rows, int g) {
      if constexpr (F::kBytes) {  // groups of four rows are contiguous, but not adjacent to each other
        for (int r = 0; r < rows; r += kBlockRows)
          std::memcpy(codes + r * kGroup, x.by_group.coded[r / kBlockRows * x.by_group.groups + g].codes, kBlockRows * kGroup);
        first = codes;
        stride = kGroup;
      } else {
        first = x.data + g * kGroup;
        stride = 2 * x.stride;
      }
    }

    const void* from(int row) const { return static_cast<const uint8_t*>(first) + row * stride; }
  };

  // Adds the products of one group, or of two groups with 16 rows of sums each, to the totals.
  template <class F, int kCount>
  static void add_products(const GroupRows& x, int rows, const uint8_t* block, int g, const float* sums, float* out) {
    for (int v = 0; v < kVectors; ++v, sums += kLanes, out += kLanes) {
      const typename F::Scales scales(block, v), next(block + (kCount - 1) * F::kBlock, v);
      for (int r = 0; r < rows; ++r) {
        f32x16 total = load<f32x16>(out + r * kPanel);
        total = scales.add(total, sums + r * kPanel, x, r, g);
        if (kCount == 2) total = next.add(total, sums + (kTileRows + r) * kPanel, x, r, g + 1);
        store(out + r * kPanel, total);
      }
    }
  }

  template <class F>
  static void by_groups(const GroupRows& x, int rows, const Matrix& m, const uint8_t* panel, float* out) {
    alignas(64) uint8_t unpacked[2][kUnpacked];
    alignas(64) float sums[kMostRows * kPanel];  // of the first 16 rows, then of others or a second group
    float* const second_sums = sums + kTileRows * kPanel;
    const bool tall = rows > kTileRows;
    const int groups = m.k / kGroup;
    std::fill(out, out + rows * kPanel, 0.0f);
    for (int g = 0; g < groups; g += tall ? 1 : 2) {
      const uint8_t* block = panel + size_t(g) * F::kBlock;
      prefetch(block + kAhead * F::kBlock, (tall ? 1 : 2) * F::kBlock);
      zero_sums();
      const Inputs<F> inputs(x, rows, g);
      load_weights(F::unpack(block, unpacked[0]));
      dot<F::kBytes, 0, 4>(inputs.from(0), inputs.stride);
      if (tall) dot<F::kBytes, 2, 5>(inputs.from(kTileRows), inputs.stride);
      store_sums<0>(sums);
      if (tall || g + 1 == groups) {
        if (tall) store_sums<2>(second_sums);
        add_products<F, 1>(x, rows, block, g, sums, out);
        continue;
      }
      const Inputs<F> next(x, rows, g + 1);
      load_weights(F::unpack(block + F::kBlock, unpacked[1]));
      dot<F::kBytes, 2, 5>(next.from(0), next.stride);
      store_sums<2>(second_sums);
      add_products<F, 2>(x, rows, block, g, sums, out);
    }
  }

  int rows_ = 0;
  bool bytes_ = false;
};

#endif

}  // namespace dspark
