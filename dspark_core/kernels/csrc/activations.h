// Values derived from activations that products in some formats need, per row and group of 32 inputs.
//
// They are computed once, when the activations are produced, rather than by every thread of every product.
#pragma once

#include "matrix.h"

namespace dspark {

constexpr int kBlockRows = 4;

// One group of four rows, rounded to 8 bits. The rows are adjacent so that a tile addresses all of them from
// one pointer, with each row's values at a fixed offset.
struct CodedGroup {
  int8_t codes[kBlockRows][kGroup];
  float steps[kBlockRows];
  float sums[kBlockRows];       // of the codes; multiplied by the weights' minimum
  int32_t offsets[kBlockRows];  // -128 times the sums, because I8 weights are stored plus 128

  uint32_t quad(int row, int input) const {
    uint32_t four;
    std::memcpy(&four, codes[row] + input, 4);
    return four;
  }
};

struct GroupValues {
  const float* sums;        // [rows, groups] Q4
  const CodedGroup* coded;  // [rows / 4, groups] I4, I8
  size_t groups;

  GroupValues from_row(int row) const {  // row must be a multiple of four
    return {sums ? sums + row * groups : nullptr, coded ? coded + row / kBlockRows * groups : nullptr, groups};
  }
};

DSPARK_INLINE float group_sum(const uint16_t* x) {
  return sum(dot_pair(f32x16{}, load_pairs(x), 0x3f803f80u));  // multiplies both elements of each pair by one
}

static void code_group(const uint16_t* x, CodedGroup& out, int row) {
  const f32x16 low = load_floats(x), high = load_floats(x + kLanes);
  const float largest = maximum(maximum(maximum(low, -low), maximum(high, -high)));
  const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
  const f32x16 first = low * inverse + kRound - kRound, second = high * inverse + kRound - kRound;
  store_bytes(out.codes[row], first);
  store_bytes(out.codes[row] + kLanes, second);
  out.steps[row] = largest / 127.0f;
  out.sums[row] = sum(first + second);  // small integers: exact
  out.offsets[row] = -128 * int32_t(out.sums[row]);
}

// Group values of some rows; the memory is reused between passes.
class GroupBuffer {
 public:
  // Makes room for `rows` rows as inputs of `matrix`; nothing for formats that need no group values.
  void size_for(const Matrix& matrix, int rows) {
    const size_t groups = matrix.k / kGroup;
    if (matrix.format == kQ4) grow(sums_, rows * groups);
    if (matrix.rounds_activations()) grow(coded_, (rows + kBlockRows - 1) / kBlockRows * groups);
  }

  GroupValues values(const Matrix& matrix) {
    return {matrix.format == kQ4 ? sums_.data() : nullptr,
            matrix.rounds_activations() ? coded_.data() : nullptr, size_t(matrix.k / kGroup)};
  }

  // Groups [first, end) of one row [k].
  void prepare(const Matrix& matrix, const uint16_t* x, int row, int first, int end) {
    const size_t groups = matrix.k / kGroup;
    if (matrix.format == kQ4)
      for (int g = first; g < end; ++g) sums_[row * groups + g] = group_sum(x + g * kGroup);
    else if (matrix.rounds_activations())
      for (int g = first; g < end; ++g)
        code_group(x + g * kGroup, coded_[row / kBlockRows * groups + g], row % kBlockRows);
  }

  void prepare(const Matrix& matrix, const uint16_t* x, int row) { prepare(matrix, x, row, 0, matrix.k / kGroup); }

  // float32 products need no group values.
  void prepare(const Matrix&, const float*, int, int, int) {}
  void prepare(const Matrix&, const float*, int) {}

 private:
  template <class V>
  static void grow(std::vector<V>& buffer, size_t count) {
    if (buffer.size() < count) buffer.resize(count);
  }

  std::vector<float> sums_;
  std::vector<CodedGroup> coded_;
};

}  // namespace dspark
