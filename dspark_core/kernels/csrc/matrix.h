// Weight matrices packed into panels of 32 output columns, in the order the tiles read them.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"

namespace dspark {

enum Format : int32_t { kFloat32 = 0, kBfloat16 = 1, kQ4 = 2, kQ8 = 3, kI8 = 4, kI4 = 5 };

constexpr int kVectors = 2;                     // per panel
constexpr int kPanel = kVectors * kLanes;       // columns
constexpr int kGroup = 32;                      // inputs that share a scale
// Bytes per group of a panel, in whole cache lines that the tiles read in sequence: with a separate block
// per vector, the hardware prefetcher did not recognise a stream.
constexpr int kQ4Scales = 4 * 128, kQ4Block = kQ4Scales + 2 * 64;  // nibbles, then scales and minima
constexpr int kQ8Scales = 16 * 64, kQ8Block = kQ8Scales + 64;      // int8 values, then scales

// Q4 and Q8 leave activations unrounded and so are exact in their weights. I4 and I8 hold the same weights
// but round activations to 8 bits, per row and group, and multiply integers. They are for drafters, whose
// errors only cost speed, and for targets if explicitly requested.
//
// `data` layouts, per panel (n padded with zeros):
//   float32   [k][32]
//   bfloat16  [k / 2][32][2]
//   Q4        [k / 32]{ 4 x [32 columns][2] words of 4 nibbles; scale[32]; minimum[32] }
//   Q8        [k / 32]{ 16 pairs x [32 columns][2] int8; scale[32] }
//   I8        [k / 32]{ 8 quads x [32 columns][4] int8 + 128; scale[32] }
//   I4        [k / 32]{ 4 x [32 columns][4] bytes: a quad in low nibbles, the next in high; scale[32]; minimum[32] }
struct Matrix {
  const uint8_t* data;
  const float* bias;  // [n] or null
  int32_t n, k;
  int32_t format;
  int32_t paired;  // the halves of the outputs (gate, up) alternate by vectors of 16

  int panels() const { return (padded() + kPanel - 1) / kPanel; }
  int padded() const { return paired ? 2 * kLanes * ((n / 2 + kLanes - 1) / kLanes) : n; }

  // First output column of vector `v`, and how many of its lanes are used.
  int column(int v) const { return paired ? (v % 2) * (n / 2) + kLanes * (v / 2) : kLanes * v; }
  int width(int v) const {
    const int end = paired ? (v % 2 ? n : n / 2) : n;
    return std::max(0, std::min(kLanes, end - column(v)));
  }

  // The outputs starting at a panel; not for paired matrices.
  Matrix from_panel(int first) const {
    const int columns = first * kPanel;
    return {data + first * panel_bytes(), bias ? bias + columns : nullptr, n - columns, k, format, 0};
  }

  bool four_bits() const { return format == kQ4 || format == kI4; }
  bool rounds_activations() const { return format == kI4 || format == kI8; }

  size_t group_bytes() const { return four_bits() ? kQ4Block : kQ8Block; }

  size_t panel_bytes() const {
    switch (format) {
      case kFloat32: return size_t(k) * kPanel * 4;
      case kBfloat16: return size_t((k + 1) / 2) * kPanel * 4;
      default: return size_t(k / kGroup) * group_bytes();
    }
  }
};

DSPARK_INLINE uint16_t float_to_half(float x) {  // rounds to nearest even; for finite values in range
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  float magnitude = std::fabs(x);
  if (magnitude >= 65504.0f) return uint16_t(sign | 0x7bffu);
  if (magnitude < 0x1p-14f) return uint16_t(sign | uint32_t(std::nearbyint(magnitude * 0x1p24f)));
  std::memcpy(&bits, &magnitude, 4);
  bits += 0xfffu + ((bits >> 13) & 1u);
  return uint16_t(sign | ((bits - (112u << 23)) >> 13));
}

// Where the values of one source row go: a column of a panel.
struct Lane {
  uint8_t* panel;
  int column;
};

static Lane lane_of(const Matrix& m, uint8_t* data, int row) {
  int vector = row / kLanes, lane = row % kLanes;
  if (m.paired) {
    const int half = m.n / 2, inner = row % half;
    vector = 2 * (inner / kLanes) + row / half;
    lane = inner % kLanes;
  }
  return {data + size_t(vector / kVectors) * m.panel_bytes(), vector % kVectors * kLanes + lane};
}

static void pack_float_row(const Matrix& m, Lane at, const float* row) {
  for (int k = 0; k < m.k; ++k) {
    if (m.format == kFloat32)
      reinterpret_cast<float*>(at.panel)[size_t(k) * kPanel + at.column] = row[k];
    else
      reinterpret_cast<uint16_t*>(at.panel)[(size_t(k / 2) * kPanel + at.column) * 2 + k % 2] =
          float_to_bf16(row[k]);
  }
}

// Position of input k of a column's group within a panel's block: the byte, and the shift of its nibble.
struct NibblePlace {
  int byte, shift;
};

static NibblePlace nibble_place(const Matrix& m, int column, int k) {
  if (m.format == kI4) return {k / 8 * 128 + 4 * column + k % 4, k % 8 / 4 * 4};
  const int pair = k / 2, word = pair / 4 * 64 + 2 * column + k % 2;  // 16-bit words of four nibbles
  return {2 * word + pair % 4 / 2, pair % 2 * 4};
}

static void pack_nibbles(const Matrix& m, uint8_t* block, int column, const uint8_t* source) {
  // GGUF Q4_1: scale, minimum, then 16 bytes; low nibbles are inputs 0..15, high nibbles 16..31.
  std::memcpy(block + kQ4Scales + 2 * column, source, 2);
  std::memcpy(block + kQ4Scales + 64 + 2 * column, source + 2, 2);
  for (int k = 0; k < kGroup; ++k) {
    const uint8_t byte = source[4 + k % 16];
    const NibblePlace at = nibble_place(m, column, k);
    block[at.byte] |= uint8_t((k < 16 ? byte & 15 : byte >> 4) << at.shift);
  }
}

static void pack_q8_group(uint8_t* block, int column, uint16_t scale, const int8_t* values) {
  std::memcpy(block + kQ8Scales + 2 * column, &scale, 2);
  for (int k = 0; k < kGroup; ++k) block[(k / 2) * 64 + 2 * column + k % 2] = uint8_t(values[k]);
}

static void pack_i8_group(uint8_t* block, int column, uint16_t scale, const int8_t* values) {
  std::memcpy(block + kQ8Scales + 2 * column, &scale, 2);
  for (int k = 0; k < kGroup; ++k) block[(k / 4) * 128 + 4 * column + k % 4] = uint8_t(values[k] + 128);
}

static void pack_byte_group(const Matrix& m, uint8_t* block, int column, uint16_t scale, const int8_t* codes) {
  (m.format == kI8 ? pack_i8_group : pack_q8_group)(block, column, scale, codes);
}

static void quantize_group(const Matrix& m, uint8_t* block, int column, const float* values) {
  float largest = 0.0f;
  for (int k = 0; k < kGroup; ++k) largest = std::max(largest, std::fabs(values[k]));
  const uint16_t scale = float_to_half(largest / 127.0f);
  const float step = half_to_float(scale);
  int8_t codes[kGroup];
  for (int k = 0; k < kGroup; ++k) {
    const float code = step > 0.0f ? std::nearbyint(values[k] / step) : 0.0f;
    codes[k] = int8_t(std::max(-127.0f, std::min(127.0f, code)));
  }
  pack_byte_group(m, block, column, scale, codes);
}

// `raw`: source rows are GGUF blocks (Q4_1, Q8_0); otherwise floats. `data` must be zeroed.
static void pack(const Matrix& m, const void* source, bool raw, uint8_t* data) {
  const int groups = m.k / kGroup;
  for (int row = 0; row < m.n; ++row) {
    const Lane at = lane_of(m, data, row);
    if (!raw && m.format != kQ8 && m.format != kI8) {
      pack_float_row(m, at, static_cast<const float*>(source) + size_t(row) * m.k);
      continue;
    }
    for (int g = 0; g < groups; ++g) {
      uint8_t* block = at.panel + g * m.group_bytes();
      const size_t index = size_t(row) * groups + g;
      if (!raw) {
        quantize_group(m, block, at.column, static_cast<const float*>(source) + index * kGroup);
      } else if (m.four_bits()) {
        pack_nibbles(m, block, at.column, static_cast<const uint8_t*>(source) + index * 20);
      } else {
        const uint8_t* from = static_cast<const uint8_t*>(source) + index * 34;
        uint16_t scale;
        std::memcpy(&scale, from, 2);
        pack_byte_group(m, block, at.column, scale, reinterpret_cast<const int8_t*>(from + 2));
      }
    }
  }
}

// One row as float32: the exact values that the tiles use.
static void unpack_row(const Matrix& m, int row, float* out) {
  const Lane at = lane_of(m, const_cast<uint8_t*>(m.data), row);
  for (int k = 0; k < m.k; ++k) {
    if (m.format == kFloat32) {
      out[k] = reinterpret_cast<const float*>(at.panel)[size_t(k) * kPanel + at.column];
    } else if (m.format == kBfloat16) {
      const auto* values = reinterpret_cast<const uint16_t*>(at.panel);
      out[k] = bf16_to_float(values[(size_t(k / 2) * kPanel + at.column) * 2 + k % 2]);
    } else {
      const uint8_t* block = at.panel + k / kGroup * m.group_bytes();
      uint16_t scale, minimum;
      if (m.four_bits()) {
        std::memcpy(&scale, block + kQ4Scales + 2 * at.column, 2);
        std::memcpy(&minimum, block + kQ4Scales + 64 + 2 * at.column, 2);
        const NibblePlace place = nibble_place(m, at.column, k % kGroup);
        const int code = (block[place.byte] >> place.shift) & 15;
        out[k] = half_to_float(scale) * float(code) + half_to_float(minimum);
      } else {
        std::memcpy(&scale, block + kQ8Scales + 2 * at.column, 2);
        const int code = m.format == kI8 ? block[(k % kGroup / 4) * 128 + 4 * at.column + k % 4] - 128
                                         : int8_t(block[k % kGroup / 2 * 64 + 2 * at.column + k % 2]);
        out[k] = half_to_float(scale) * float(code);
      }
    }
  }
}

}  // namespace dspark
