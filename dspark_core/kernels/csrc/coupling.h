// Draws by the exponential race with coupled noise: argmin of E / p over a row's tokens.
//
// E of a token is -log u, where u is a hash of (seed, position, token); see the reference,
// `dspark_core.algorithms.coupling`. Every token that could win is evaluated exactly. Others are excluded
// by their hash alone, since E >= 1 - u, or even before hashing, since E is never less than 2^-53.
#pragma once

#include "law.h"

namespace dspark {

constexpr int kWords = 8;
typedef uint64_t u64x8 __attribute__((vector_size(64)));

constexpr double kLeastNoise = 1e-16;  // below 2^-53

// Hash words -> u, too small by 2^-53.
DSPARK_INLINE f64x8 uniform_of(u64x8 words) {
  return (f64x8)((words >> 12) | 0x3FF0000000000000ull) - 1.0;
}

// Mask of lanes in which a >= b.
DSPARK_INLINE unsigned lanes_at_least(f64x8 a, f64x8 b) {
#ifdef DSPARK_AVX512_BF16
  return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GE_OQ);
#else
  unsigned lanes = 0;
  for (int i = 0; i < kWords; ++i) lanes |= unsigned(a[i] >= b[i]) << i;
  return lanes;
#endif
}

struct Race {
  double least;
  int64_t winner;

  void enter(uint64_t key, int64_t token, float weight) {
    if (!(weight > 0.0f)) return;
    const double race = exponential_noise(key, token) / double(weight);
    if (race < least || (race == least && token < winner)) least = race, winner = token;
  }
};

static int64_t race_winner(const float* weights, int vocab, uint64_t key) {
  Race race{INFINITY, vocab - 1};
  const int likeliest = most_likely(weights, vocab);
  race.enter(key, likeliest, weights[likeliest]);  // bounds what can still win
  u64x8 words;
  for (int i = 0; i < kWords; ++i) words[i] = key + uint64_t(i) * kWeyl;
  int first = 0;
  for (; first + kWords <= vocab; first += kWords, words += kWords * kWeyl) {
    const f64x8 weight = __builtin_convertvector(load<f32x8>(weights + first), f64x8);
    const f64x8 limit = weight * race.least;  // noise below it could win
    if (!lanes_at_least(limit, f64x8{} + kLeastNoise)) continue;
    // Allows for rounding: an extra candidate costs one logarithm, a missing one would be an error.
    unsigned lanes = lanes_at_least(limit * (1.0 + 1e-9) + 1e-15, 1.0 - uniform_of(splitmix(words)));
    for (; lanes; lanes &= lanes - 1) {
      const int token = first + __builtin_ctz(lanes);
      race.enter(key, token, weights[token]);
    }
  }
  for (; first < vocab; ++first) race.enter(key, first, weights[first]);
  return race.winner;
}

struct CoupledRows {
  const float* logits;       // [rows, vocab]
  const Law* laws;           // [rows]
  const int64_t* seeds;      // [rows]
  const int64_t* positions;  // [rows] absolute positions of the tokens drawn
  int64_t* tokens;           // out [rows]
  int32_t rows, vocab, threads;
};

}  // namespace dspark

extern "C" void dspark_sample_coupled(const dspark::CoupledRows* rows) {
  using namespace dspark;
  const CoupledRows r = *rows;
  auto job = std::make_shared<Job>(1, [r](Job& j) {
    j.phase(0, r.rows, [&](int row) {
      const uint64_t key = noise_key(r.seeds[row], r.positions[row]);
      RowWeights& weights = row_weights();
      weights.shape(r.logits + size_t(row) * r.vocab, r.vocab, r.laws[row]);
      r.tokens[row] = race_winner(weights.data(), r.vocab, key);
    });
  });
  Pool::instance().run(job, std::min(r.threads, r.rows));
}
