// A target row's distribution: its weights under a request's sampling parameters, and draws from them.
//
// `dspark_core.algorithms.sampling` is the reference and defines what each parameter keeps. Logits are read
// once; everything else stays in the cache of the thread that processes the row.
#pragma once

#include <algorithm>

#include "draft.h"

namespace dspark {

struct Law {
  double top_p;       // 1: off
  float temperature;  // above 0
  float min_p;        // 0: off
  int32_t top_k;      // 0: off
};

typedef double f64x8 __attribute__((vector_size(64)));
typedef float f32x8 __attribute__((vector_size(32)));

constexpr float kLeastNormal = 1.17549435e-38f;

class RowWeights {
 public:
  // The most likely token of logits [vocab] gets weight 1; tokens that the parameters exclude get 0.
  void shape(const float* logits, int vocab, const Law& law) {
    weights_.resize((vocab + kLanes - 1) / kLanes * kLanes);
    vocab_ = vocab;
    exponentials(logits, std::max(law.temperature, kLeastNormal));
    float least = 0.0f;
    if (law.top_k > 0 && law.top_k < vocab) least = kth_largest(law.top_k);
    if (law.top_p < 1.0) least = std::max(least, nucleus_least(law.top_p, least));
    least = std::max(least, law.min_p);
    if (least > 0.0f) cut(least);
    add_up();
  }

  const float* data() const { return weights_.data(); }

  double probability(int64_t token) const { return double(weights_[token]) / total_; }

  // max(p - q, 0), for q over `count` distinct tokens; false, leaving p unchanged, if the result is empty.
  bool subtract(const int64_t* tokens, const float* probabilities, int count) {
    kept_.resize(count);
    for (int i = 0; i < count; ++i) {
      float& weight = weights_[tokens[i]];
      kept_[i] = weight;
      if (probabilities[i] > 0.0f) weight = std::max(0.0f, float(weight - double(probabilities[i]) * total_));
    }
    add_up();
    if (total_ > 0.0) return true;
    for (int i = count; i-- > 0;) weights_[tokens[i]] = kept_[i];
    add_up();
    return false;
  }

  // Inverts the cumulative sum; uniform in [0, 1). Tokens of weight 0 are never drawn.
  int64_t draw(double uniform) const {
    const double wanted = uniform * total_;
    double held = 0.0;
    size_t block = 0;
    while (block + 1 < sums_.size() && held + sums_[block] <= wanted) held += sums_[block++];
    for (int i = int(block) * kBlock; i < vocab_; ++i)
      if (weights_[i] > 0.0f && (held += weights_[i]) > wanted) return i;
    int last = vocab_ - 1;  // rounding left a sliver beyond the last weight
    while (last > 0 && !(weights_[last] > 0.0f)) --last;
    return last;
  }

 private:
  static constexpr int kBlock = 1024;
  static constexpr int kBins = (127 << 3) + 1;  // eight per octave of (0, 1], by a float's leading bits

  void exponentials(const float* logits, float temperature) {
    const int likeliest = most_likely(logits, vocab_);
    const f32x16 most = splat(logits[likeliest]), scale = splat(temperature);
    int i = 0;
    for (; i + kLanes <= vocab_; i += kLanes) store(&weights_[i], weight_of(load<f32x16>(logits + i), most, scale));
    if (i < vocab_) {
      f32x16 rest = splat(-INFINITY);
      std::memcpy(&rest, logits + i, sizeof(float) * (vocab_ - i));
      store(&weights_[i], weight_of(rest, most, scale));
    }
    weights_[likeliest] = 1.0f;  // already so, unless the largest logit is infinite or all are NaN
  }

  // In [0, 1]; 0 for NaN.
  static DSPARK_MEMBER f32x16 weight_of(const f32x16& logit, const f32x16& most, const f32x16& scale) {
    return exp(maximum((logit - most) / scale, splat(-88.0f)));
  }

  void cut(float least) {
    for (size_t i = 0; i < weights_.size(); i += kLanes) {
      const f32x16 weight = load<f32x16>(&weights_[i]);
      store(&weights_[i], where_reached(weight, splat(least), weight));
    }
  }

  void add_up() {
    sums_.clear();
    total_ = 0.0;
    for (size_t first = 0; first < weights_.size(); first += kBlock)
      total_ += sums_.emplace_back(sum_from(first, std::min(first + kBlock, weights_.size()), 0.0f));
  }

  // Sum of the weights in [first, end) that are at least `least`.
  double sum_from(size_t first, size_t end, float least) const {
    f64x8 low{}, high{};
    for (size_t i = first; i < end; i += kLanes) {
      const f32x16 weight = load<f32x16>(&weights_[i]);
      const f32x16 kept = where_reached(weight, splat(least), weight);
      low += __builtin_convertvector(load<f32x8>(&kept), f64x8);
      high += __builtin_convertvector(load<f32x8>(reinterpret_cast<const float*>(&kept) + 8), f64x8);
    }
    low += high;
    return ((low[0] + low[4]) + (low[1] + low[5])) + ((low[2] + low[6]) + (low[3] + low[7]));
  }

  void collect(float least) {
    heavy_.clear();
    float below = std::nextafter(least, -INFINITY);
    for_values_above(weights_.data(), vocab_, below, [&](int i) { heavy_.push_back(weights_[i]); });
  }

  float kth_largest(int k) {
    collect(std::max(0.0f, lower_bound_of_top(weights_.data(), vocab_, k)));
    if (int(heavy_.size()) < k) return 0.0f;
    std::nth_element(heavy_.begin(), heavy_.begin() + (k - 1), heavy_.end(), std::greater<float>());
    return heavy_[k - 1];
  }

  // Smallest weight of the nucleus: the smallest set of most likely tokens that holds top_p of the mass at
  // or above `least`. Tokens below the floor weigh less than 1 - top_p together, so the nucleus does without
  // them; of the others, only the bin in which it ends is sorted.
  float nucleus_least(double top_p, float least) {
    const double mass = sum_from(0, weights_.size(), least);
    const float floor = float(0.5 * (1.0 - top_p) * mass / vocab_);  // half, to allow for rounded sums
    collect(std::max({floor, least, kLeastNormal}));
    bins_.assign(kBins, 0.0);
    for (float weight : heavy_) bins_[bin_of(weight)] += weight;
    double total = 0.0;
    for (double bin : bins_) total += bin;
    const double wanted = std::min(top_p * mass, total);
    double held = 0.0;
    int last = 0;
    while (last + 1 < kBins && held + bins_[last] < wanted) held += bins_[last++];
    const auto end = std::partition(heavy_.begin(), heavy_.end(), [&](float w) { return bin_of(w) == last; });
    std::sort(heavy_.begin(), end, std::greater<float>());
    float found = 1.0f;
    for (auto member = heavy_.begin(); member != end; ++member) {
      found = *member;
      if ((held += found) >= wanted) break;
    }
    return found;
  }

  static int bin_of(float weight) {  // 0: the heaviest
    uint32_t bits;
    std::memcpy(&bits, &weight, sizeof(bits));
    return std::max(kBins - 1 - int(bits >> 20), 0);  // clamped, so that no weight writes outside the bins
  }

  std::vector<float> weights_, heavy_, kept_;
  std::vector<double> sums_, bins_;
  double total_ = 0.0;
  int vocab_ = 0;
};

// Reused, as a row's weights take about 200 KB.
static RowWeights& row_weights() {
  thread_local RowWeights weights;
  return weights;
}

}  // namespace dspark
