// Speculative rejection sampling of target rows; `dspark_core.algorithms.rejection` is the reference.
//
// A request's rows are processed in order; those after its first rejected token are not evaluated.
#pragma once

#include "law.h"

namespace dspark {

struct RejectionRows {
  const float* logits;             // [drafts + requests, vocab], laid out as in the reference
  const Law* laws;                 // [requests]
  const int64_t* lengths;          // [requests] draft tokens to verify
  const int64_t* draft_ids;        // [drafts]
  const int64_t* q_ids;            // [drafts, candidates] support of q
  const float* q_probs;            // [drafts, candidates]
  const double* draft_uniforms;    // [drafts]
  const double* request_uniforms;  // [requests]
  int64_t* accepted;               // out [requests]
  int64_t* next_tokens;            // out [requests]
  int32_t requests, candidates, vocab, threads;
};

static void decide(const RejectionRows& r, int request, int64_t draft) {
  RowWeights& weights = row_weights();
  const float* logits = r.logits + size_t(draft + request) * r.vocab;
  int64_t count = 0;
  for (; count < r.lengths[request]; ++count, ++draft, logits += r.vocab) {
    weights.shape(logits, r.vocab, r.laws[request]);
    const int64_t* ids = r.q_ids + draft * r.candidates;
    const float* probs = r.q_probs + draft * r.candidates;
    double q = 0.0;
    for (int i = 0; i < r.candidates; ++i) q += ids[i] == r.draft_ids[draft] ? probs[i] : 0.0f;
    // Strict, and as a product: p = 0 is never kept, and p >= q > 0 always is, since u < 1.
    if (q > 0.0 && r.draft_uniforms[draft] * q < weights.probability(r.draft_ids[draft])) continue;
    weights.subtract(ids, probs, r.candidates);
    break;
  }
  if (count == r.lengths[request]) weights.shape(logits, r.vocab, r.laws[request]);
  r.accepted[request] = count;
  r.next_tokens[request] = weights.draw(r.request_uniforms[request]);
}

}  // namespace dspark

extern "C" void dspark_accept_rejection(const dspark::RejectionRows* rows) {
  using namespace dspark;
  const RejectionRows r = *rows;
  std::vector<int64_t> first(r.requests);  // first draft of each request
  for (int i = 1; i < r.requests; ++i) first[i] = first[i - 1] + r.lengths[i - 1];
  auto job = std::make_shared<Job>(1, [r, first](Job& j) {
    j.phase(0, r.requests, [&](int request) { decide(r, request, first[request]); });
  });
  Pool::instance().run(job, std::min(r.threads, r.requests));
}
