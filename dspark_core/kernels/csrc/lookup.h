// Draft blocks from matches in requests' own texts and an n-gram table, processed one after the other.
//
// `dspark_core.algorithms.suffix_match` and `lookup_chain` are the references. A block takes
// some tens of lookups of one cache line each, too little to wake other threads for.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <unordered_map>
#include <vector>

#include "splitmix.h"

namespace dspark {

constexpr int kLevelClasses = 16, kMatchClasses = 9, kLongestMatch = 16, kMaxOrder = 8;
constexpr int kMatch = 0, kTable = 1, kBoth = 2;
constexpr double kLeastSurvival = 0.04;
// By match length; 0 is no match.
constexpr uint8_t kMatchClass[kLongestMatch + 1] = {0, 1, 2, 3, 4, 5, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7, 8};

struct NgramTable {
  const uint16_t* checks;  // [slots], 0: empty
  const uint32_t* tokens;  // [slots]
  const uint8_t* levels;   // [slots]
  const float* rates;      // [3, kMatchClasses, kLevelClasses + 1]
  int64_t slots;
  int32_t order, padding;

  float rate(int support, int matched, int level) const {
    return rates[(support * kMatchClasses + matched) * (kLevelClasses + 1) + level];
  }

  // The slot of a context, or -1.
  int64_t slot_of(const int32_t* context, int length) const {
    uint64_t key = uint64_t(length);
    for (int i = 0; i < length; ++i) key = splitmix(key * kWeyl + uint64_t(context[i]) + 1);
    int64_t slot = int64_t((key >> 32) * uint64_t(slots) >> 32);
    const uint16_t check = (key & 0xFFFF) ? uint16_t(key) : uint16_t(1);
    while (checks[slot] != 0) {
      if (checks[slot] == check) return slot;
      if (++slot == slots) slot = 0;
    }
    return -1;
  }

  // The slot of the longest known context that ends at `end`, or -1.
  int64_t find(const int32_t* end, int available) const {
    for (int length = available < order ? available : order; length > 0; --length) {
      const int64_t slot = slot_of(end - length, length);
      if (slot >= 0) return slot;
    }
    return -1;
  }
};

struct Match {
  int agreed, count;  // tokens that match; tokens that follow
};

// One growing text, indexed by positions of its tokens and token pairs.
class Text {
 public:
  void extend(const int32_t* tokens, int count) { tokens_.insert(tokens_.end(), tokens, tokens + count); }

  // Copies the text's last tokens, at most `order`, to the end of `tail` -> their number.
  int tail(int order, int32_t* tail) const {
    const int known = std::min(order, int(tokens_.size()));
    std::copy(tokens_.end() - known, tokens_.end(), tail + order - known);
    return known;
  }

  // Up to `most` tokens that follow the longest match of the text's end.
  Match longest(int most, int32_t* followed) {
    index();
    const int size = int(tokens_.size());
    int agreed = 0, end = size ? best(&agreed) : -1;
    if (most < 1 || end < 0) return {0, 0};
    for (int i = 0; i < most; ++i) followed[i] = tokens_[end + i % (size - end)];
    return {agreed, most};
  }

 private:
  static constexpr int kRemembered = 8;
  struct Places {
    int32_t ends[kRemembered], count;
  };

  // Indexes all but the final token: the end of the text is not an earlier occurrence.
  void index() {
    for (const int size = int(tokens_.size()); indexed_ < size; ++indexed_) {
      singles_[tokens_[indexed_ - 1]] = indexed_;
      if (indexed_ < 2) continue;
      Places& places = pairs_[pair_before(indexed_)];
      if (places.count == kRemembered) {
        std::memmove(places.ends, places.ends + 1, sizeof(int32_t) * (kRemembered - 1));
        --places.count;
      }
      places.ends[places.count++] = indexed_;
    }
  }

  uint64_t pair_before(int end) const {
    return uint64_t(uint32_t(tokens_[end - 2])) << 32 | uint32_t(tokens_[end - 1]);
  }

  // Where the longest match ends, the latest on ties; -1 if there is none.
  int best(int* agreed) const {
    const int size = int(tokens_.size());
    const auto pair = size > 1 ? pairs_.find(pair_before(size)) : pairs_.end();
    if (pair == pairs_.end()) {
      const auto single = singles_.find(tokens_.back());
      *agreed = 1;
      return single == singles_.end() ? -1 : single->second;
    }
    int found = -1;
    for (int place = pair->second.count; place-- > 0;) {
      const int end = pair->second.ends[place], common = common_suffix(end);
      if (common > *agreed) *agreed = common, found = end;
    }
    return found;
  }

  int common_suffix(int end) const {
    const int size = int(tokens_.size()), most = std::min(kLongestMatch, end);
    int common = 0;
    while (common < most && tokens_[end - 1 - common] == tokens_[size - 1 - common]) ++common;
    return common;
  }

  std::vector<int32_t> tokens_;
  std::unordered_map<int32_t, int32_t> singles_;
  std::unordered_map<uint64_t, Places> pairs_;
  int indexed_ = 1;  // ends below it are indexed; an end is the position of the token that follows
};

struct LookupBlocks {
  const NgramTable* table;
  Text* const* texts;     // [blocks]
  const int32_t* added;   // [blocks] new tokens of each text
  const int32_t* tokens;  // [sum of `added`], concatenated by text
  const int32_t* wanted;  // [blocks] maximum number of tokens
  int32_t* drafted;       // out [blocks, most]
  float* confidences;     // out [blocks, most]
  int32_t* counts;        // out [blocks]
  int32_t blocks, most;
};

// Drafts the block of `text` -> its number of tokens. `followed` [wanted] is scratch.
static int lookup_chain(const NgramTable& table, Text& text, int wanted, int32_t* followed, int32_t* out,
                        float* confidences) {
  const Match match = text.longest(wanted, followed);
  int agreed = match.agreed, following = match.count;
  int32_t tail[kMaxOrder];
  int known = text.tail(table.order, tail);
  double survival = 1.0;
  int count = 0;
  for (; count < wanted; ++count) {
    const bool own = count < following;
    const int64_t slot = table.find(tail + table.order, known);
    if (!own && slot < 0) break;
    const int matched = own ? kMatchClass[std::min(agreed, kLongestMatch)] : 0;
    const int level = slot < 0 ? kLevelClasses : table.levels[slot] * kLevelClasses >> 8;
    const int32_t said = slot < 0 ? -1 : int32_t(table.tokens[slot]);
    int32_t token = -1;
    float confidence = 0.0f;
    if (own && slot >= 0 && followed[count] == said) {
      token = said, confidence = table.rate(kBoth, matched, level);
    } else {
      if (own) token = followed[count], confidence = table.rate(kMatch, matched, level);
      if (slot >= 0 && table.rate(kTable, matched, level) > confidence)
        token = said, confidence = table.rate(kTable, matched, level), following = 0;
    }
    survival *= double(confidence);
    if (survival < kLeastSurvival) break;
    ++agreed;
    out[count] = token, confidences[count] = confidence;
    std::memmove(tail, tail + 1, sizeof(int32_t) * size_t(table.order - 1));
    tail[table.order - 1] = token;
    if (known < table.order) ++known;
  }
  return count;
}

}  // namespace dspark

extern "C" void* dspark_text_create() { return new dspark::Text; }

extern "C" void dspark_text_destroy(void* text) { delete static_cast<dspark::Text*>(text); }

extern "C" void dspark_lookup_blocks(const dspark::LookupBlocks* blocks) {
  const dspark::LookupBlocks b = *blocks;
  std::vector<int32_t> followed(b.most);
  const int32_t* tokens = b.tokens;
  for (int i = 0; i < b.blocks; ++i) {
    b.texts[i]->extend(tokens, b.added[i]);
    tokens += b.added[i];
    const size_t at = size_t(i) * b.most;
    b.counts[i] = dspark::lookup_chain(*b.table, *b.texts[i], b.wanted[i], followed.data(), b.drafted + at,
                                       b.confidences + at);
  }
}
