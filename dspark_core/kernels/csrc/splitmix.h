// SplitMix64, the hash of n-gram contexts and of coupled noise. The constants are those of
// `dspark_core.algorithms.splitmix`.
#pragma once

#include "lanes.h"

namespace dspark {

constexpr uint64_t kWeyl = 0x9E3779B97F4A7C15ull;
constexpr uint64_t kMix1 = 0xBF58476D1CE4E5B9ull;
constexpr uint64_t kMix2 = 0x94D049BB133111EBull;

// The finalizer, of one word or of a vector of them.
template <class Words>
DSPARK_INLINE Words splitmix(Words x) {
  x = (x ^ (x >> 30)) * kMix1;
  x = (x ^ (x >> 27)) * kMix2;
  return x ^ (x >> 31);
}

}  // namespace dspark
