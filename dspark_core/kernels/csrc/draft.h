// Everything after the layers of a draft pass: the head, then per position Markov bias, draw and confidence.
//
// Each position takes one product with W2, after which every row picks its token: the most likely one, or a
// draw from its top candidates under the request's sampling parameters. Proposals and draws follow the
// reference, `dspark_core.engine.draft_engines.draft_sampling`.
#pragma once

#include <functional>

#include "linear.h"
#include "splitmix.h"

namespace dspark {

enum DraftMode : int32_t { kGreedy = 0, kUniform = 1, kCoupled = 2 };

struct DraftRow {
  double top_p;      // 1: off
  int64_t seed;      // for coupled noise
  int64_t position;  // absolute position of the block's first token
  float temperature, min_p;
  int32_t top_k;  // 0: off
  int32_t mode;
};

struct DraftDraw {
  Matrix head;                // [draft vocab, hidden]; without data, `logits` are inputs
  Matrix w2;                  // [draft vocab, rank]
  const void* w1;             // [vocab, rank], bfloat16 or float32 according to the flag
  const void* hidden;         // [rows, block, hidden] of the same type; for the head and confidences
  float* logits;              // [rows, block, draft vocab]; the Markov biases are added in place
  const float* confidence;    // weights [hidden] or [hidden + rank], then a bias; null: no confidence head
  const int64_t* anchors;     // [rows]
  const int64_t* target_ids;  // [draft vocab] or null: identity
  const DraftRow* rows;
  const double* uniforms;  // [rows, block] for kUniform
  int64_t* tokens;         // out [rows, block] target ids
  int64_t* proposal_ids;   // out [rows, block, candidates], untouched for kGreedy
  float* proposal_probs;
  float* confidence_logits;  // out [rows, block]
  int32_t num_rows, block, candidates, hidden_size, confidence_with_markov, bfloat16, threads;
};

struct Candidate {
  float logit;
  int32_t index;
  bool operator<(const Candidate& other) const {  // more likely first, then lower index
    return logit != other.logit ? logit > other.logit : index < other.index;
  }
};

DSPARK_INLINE uint64_t noise_key(int64_t seed, int64_t position) {
  return splitmix(splitmix(uint64_t(seed) + kWeyl) + uint64_t(position + 1) * kWeyl);
}

DSPARK_INLINE double exponential_noise(uint64_t key, int64_t token) {
  const uint64_t bits = splitmix(key + uint64_t(token) * kWeyl);
  return -std::log((double(bits >> 12) + 0.5) * 0x1p-52);
}

// Calls `found(index)` for values above `least`, which the callback may raise.
template <class F>
DSPARK_INLINE void for_values_above(const float* x, int count, float& least, F&& found) {
  int i = 0;
#ifdef DSPARK_AVX512_BF16
  for (; i + kLanes <= count; i += kLanes) {
    unsigned hits = _mm512_cmp_ps_mask(_mm512_loadu_ps(x + i), _mm512_set1_ps(least), _CMP_GT_OQ);
    for (; hits; hits &= hits - 1) found(i + __builtin_ctz(hits));
  }
#endif
  for (; i < count; ++i)
    if (x[i] > least) found(i);
}

// The lowest index on ties; NaN is ignored.
static int most_likely(const float* logits, int count) {
  f32x16 best = splat(-INFINITY);
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) best = maximum(load<f32x16>(logits + i), best);
  float most = maximum(best);
  for (; i < count; ++i) most = std::max(most, logits[i]);
  for (i = 0; i < count; ++i)
    if (logits[i] == most) return i;
  return 0;
}

// A lower bound that at least `wanted` values exceed: maxima of disjoint parts are themselves values.
static float lower_bound_of_top(const float* x, int count, int wanted) {
  constexpr int kParts = 16;
  const int vectors = count / kLanes / kParts;
  if (vectors < 2 || wanted > kParts * kLanes / 2) return -INFINITY;
  float maxima[kParts * kLanes];
  for (int part = 0; part < kParts; ++part, x += vectors * kLanes) {
    f32x16 best = splat(-INFINITY);
    for (int i = 0; i < vectors; ++i) best = maximum(load<f32x16>(x + i * kLanes), best);
    store(maxima + part * kLanes, best);
  }
  std::nth_element(maxima, maxima + (wanted - 1), maxima + kParts * kLanes, std::greater<float>());
  return std::nextafter(maxima[wanted - 1], -INFINITY);
}

// The `wanted` most likely logits, best first; NaN counts as impossible.
static void top_candidates(const float* logits, int count, int wanted, std::vector<Candidate>& out) {
  const size_t limit = size_t(wanted) * 8;
  float least = lower_bound_of_top(logits, count, wanted);
  out.clear();
  for_values_above(logits, count, least, [&](int index) {
    if (logits[index] <= least) return;  // raised within this vector
    out.push_back({logits[index], index});
    if (out.size() < limit) return;
    std::nth_element(out.begin(), out.begin() + (wanted - 1), out.end());
    out.resize(wanted);
    least = out.back().logit;
  });
  std::sort(out.begin(), out.end());
  for (int index = 0; index < count && int(out.size()) < wanted; ++index)  // fill up with impossible ones
    if (!(logits[index] > -INFINITY)) out.push_back({-INFINITY, index});
  out.resize(wanted);
}

// Candidates, best first -> their probabilities under the row's parameters; ties are kept or cut together.
static void shape_candidates(const DraftRow& row, const std::vector<Candidate>& from, float* probs) {
  const int count = int(from.size());
  const float temperature = std::max(row.temperature, 1.17549435e-38f);
  probs[0] = 1.0f;  // even if its logit is infinite
  for (int i = 1; i < count; ++i) {
    const float scaled = (from[i].logit - from[0].logit) / temperature;
    probs[i] = scaled > -87.0f ? std::exp(scaled) : 0.0f;
  }
  const float top_k_least = row.top_k > 0 && row.top_k < count ? probs[row.top_k - 1] : 0.0f;
  float least = std::max(row.min_p, top_k_least);
  if (row.top_p < 1.0) {
    double mass = 0.0, held = 0.0;
    for (int i = 0; i < count; ++i) mass += probs[i] >= top_k_least ? probs[i] : 0.0;
    int last = 0;
    for (; last < count - 1; ++last)
      if ((held += probs[last]) >= row.top_p * mass) break;
    least = std::max(least, probs[last]);
  }
  double mass = 0.0;
  for (int i = 0; i < count; ++i) mass += probs[i] = probs[i] >= least ? probs[i] : 0.0f;
  for (int i = 0; i < count; ++i) probs[i] = float(probs[i] / mass);
}

DSPARK_INLINE int draw_uniform(const float* probs, int count, double uniform) {
  double total = 0.0, held = 0.0;
  for (int i = 0; i < count; ++i) total += probs[i];
  for (int i = 0; i < count; ++i)
    if ((held += probs[i]) > uniform * total && probs[i] > 0.0f) return i;
  return 0;
}

DSPARK_INLINE int draw_coupled(const float* probs, const int64_t* ids, int count, uint64_t key) {
  int winner = 0;
  double best = INFINITY;
  for (int i = 0; i < count; ++i) {
    if (!(probs[i] > 0.0f)) continue;
    const double race = exponential_noise(key, ids[i]) / double(probs[i]);
    if (race < best) best = race, winner = i;
  }
  return winner;
}

template <class T>
class DrawPass {
 public:
  explicit DrawPass(const DraftDraw& draw)
      : d_(draw), rank_(draw.w2.k), vocab_(draw.w2.n), embedded_(size_t(draw.num_rows) * rank_) {}

  int phases() const { return 2 * d_.block + 2; }

  void run(Job& job) {
    job.phase(0, 1, [&](int) {
      for (int row = 0; row < d_.num_rows; ++row) embed(row, d_.anchors[row]);
    });
    if (d_.head.data) {
      const Product<T> product{d_.head, static_cast<const T*>(d_.hidden), size_t(d_.hidden_size),
                               d_.num_rows * d_.block, d_.threads};
      multiply(job, 1, product, StoreSink<float, false>{d_.head, d_.logits, size_t(vocab_)});
    }
    const size_t stride = size_t(d_.block) * vocab_;
    for (int position = 0; position < d_.block; ++position) {
      const Product<T> product{d_.w2, embedded_.data(), size_t(rank_), d_.num_rows, d_.threads};
      const StoreSink<float, true> sink{d_.w2, d_.logits + size_t(position) * vocab_, stride};
      multiply(job, 2 * position + 2, product, sink);
      job.phase(2 * position + 3, d_.num_rows, [&](int row) { choose(row, position); });
    }
  }

 private:
  void embed(int row, int64_t token) {
    std::memcpy(&embedded_[size_t(row) * rank_], static_cast<const T*>(d_.w1) + token * rank_, sizeof(T) * rank_);
  }

  void choose(int row, int position) {
    const size_t at = size_t(row) * d_.block + position;
    const float* logits = d_.logits + at * vocab_;
    if (d_.confidence) d_.confidence_logits[at] = confidence(row, at);
    const int index = d_.rows[row].mode == kGreedy ? most_likely(logits, vocab_) : sample(row, position, logits);
    const int64_t token = d_.target_ids ? d_.target_ids[index] : index;
    d_.tokens[at] = token;
    embed(row, token);
  }

  // Must run while the row's embedding is that of the previous token.
  float confidence(int row, size_t at) const {
    const float* weights = d_.confidence;
    float result = dot(static_cast<const T*>(d_.hidden) + at * d_.hidden_size, weights, d_.hidden_size);
    weights += d_.hidden_size;
    if (d_.confidence_with_markov) {
      result += dot(&embedded_[size_t(row) * rank_], weights, rank_);
      weights += rank_;
    }
    return result + *weights;
  }

  static float dot(const T* x, const float* weights, int count) {
    f32x16 total{};
    int i = 0;
    for (; i + kLanes <= count; i += kLanes) total += load_floats(x + i) * load<f32x16>(weights + i);
    float result = sum(total);
    for (; i < count; ++i) result += load_one(x + i) * weights[i];
    return result;
  }

  int sample(int row, int position, const float* logits) const {
    thread_local std::vector<Candidate> candidates;
    const size_t at = size_t(row) * d_.block + position;
    const DraftRow& wish = d_.rows[row];
    top_candidates(logits, vocab_, d_.candidates, candidates);
    int64_t* ids = d_.proposal_ids + at * d_.candidates;
    float* probs = d_.proposal_probs + at * d_.candidates;
    for (int i = 0; i < d_.candidates; ++i)
      ids[i] = d_.target_ids ? d_.target_ids[candidates[i].index] : candidates[i].index;
    shape_candidates(wish, candidates, probs);
    const int drawn = wish.mode == kUniform
                          ? draw_uniform(probs, d_.candidates, d_.uniforms[at])
                          : draw_coupled(probs, ids, d_.candidates, noise_key(wish.seed, wish.position + position));
    return candidates[drawn].index;
  }

  const DraftDraw d_;
  const int rank_, vocab_;
  std::vector<T> embedded_;
};

template <class T>
static void draw_block(const DraftDraw& draw) {
  auto pass = std::make_shared<DrawPass<T>>(draw);
  auto job = std::make_shared<Job>(pass->phases(), [pass](Job& j) { pass->run(j); });
  Pool::instance().run(job, draw.threads);
}

}  // namespace dspark

extern "C" void dspark_draft_draw(const dspark::DraftDraw* draw) {
  if (draw->bfloat16)
    dspark::draw_block<uint16_t>(*draw);
  else
    dspark::draw_block<float>(*draw);
}
