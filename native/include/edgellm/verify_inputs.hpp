// What a verification reads from device memory, so that one graph serves every step of its class.
#pragma once

#include <cstdint>
#include <span>

#include "edgellm/kernels/attention_tree.hpp"

namespace edgellm {

constexpr int kMaxVerifyTokens = kernels::kMaxTreeTokens;

// Nodes that a verification of `count` is computed with: a power of two, the rest being free places.
constexpr int verify_class(int count) {
  int size = 2;
  while (size < count) size *= 2;
  return size;
}

// One upload; see TreeAttentionArgs. For moving an accepted path, token_ids hold its nodes and starts[0] their number.
struct VerifyInputs {
  std::int32_t token_ids[kMaxVerifyTokens];
  std::int32_t positions[kMaxVerifyTokens];  // in the cache; -1: a free place
  std::int32_t slots[kMaxVerifyTokens];
  std::int32_t depths[kMaxVerifyTokens];
  std::int32_t starts[2];
  std::int32_t slot;
  std::int32_t position;  // of node 0
  std::uint64_t masks[kMaxVerifyTokens];
};
static_assert(sizeof(VerifyInputs) % sizeof(std::int32_t) == 0);

// Node i of a draft follows the node before it, unless `parents` says which one.
bool is_chain(std::span<const std::int32_t> parents);
VerifyInputs draft_inputs(int slot, int position, std::span<const std::int32_t> token_ids,
                          std::span<const std::int32_t> parents);

}  // namespace edgellm
