// Drafts: what a tree of them must be, its nodes' depths and masks, and the accepted path made linear.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "edgellm/cuda_try.hpp"
#include "edgellm/token_loop.hpp"
#include "edgellm/verify_inputs.hpp"

namespace edgellm {
namespace {

int parent_of(std::span<const std::int32_t> parents, int node) {
  return parents.empty() ? node - 1 : parents[static_cast<std::size_t>(node)];
}

}  // namespace

bool is_chain(std::span<const std::int32_t> parents) {
  for (std::size_t i = 0; i < parents.size(); ++i) {
    if (parents[i] != static_cast<std::int32_t>(i) - 1) return false;
  }
  return true;
}

VerifyInputs draft_inputs(int slot, int position, std::span<const std::int32_t> token_ids,
                          std::span<const std::int32_t> parents) {
  const auto count = static_cast<int>(token_ids.size());
  VerifyInputs inputs{};
  std::fill_n(inputs.positions, kMaxVerifyTokens, -1);
  for (int i = 0; i < count; ++i) {
    const int parent = parent_of(parents, i);
    inputs.token_ids[i] = token_ids[static_cast<std::size_t>(i)];
    inputs.positions[i] = position + i;
    inputs.slots[i] = slot;
    inputs.depths[i] = parent < 0 ? 0 : inputs.depths[parent] + 1;
    inputs.masks[i] = (parent < 0 ? 0 : inputs.masks[parent]) | std::uint64_t{1} << i;
  }
  inputs.starts[1] = count;
  inputs.slot = slot;
  inputs.position = position;
  return inputs;
}

void TokenLoop::upload_verify_inputs_async(const VerifyInputs& inputs) {
  std::int32_t* host = take_inputs(sizeof(VerifyInputs) / sizeof(std::int32_t));
  std::memcpy(host, &inputs, sizeof inputs);  // its place may not be aligned for the masks
  EDGELLM_CUDA_TRY(cudaMemcpyAsync(arena_.get<std::byte>("verify_inputs"), host, sizeof inputs, cudaMemcpyHostToDevice,
                                   stream_.get()));
}

int TokenLoop::verify_tree(int slot, int position, std::span<const std::int32_t> token_ids,
                           std::span<const std::int32_t> parents, int adapter) {
  const auto count = static_cast<int>(token_ids.size());
  if (count < 1 || count > config_.max_verify_tokens) {
    throw std::invalid_argument("a draft of " + std::to_string(count) + " nodes exceeds max_verify_tokens " +
                                std::to_string(config_.max_verify_tokens) + ", or is empty");
  }
  if (slot < 0 || slot >= config_.num_slots || position < 0 || position > config_.capacity - count) {
    throw std::invalid_argument("a draft does not fit its slot: every node needs a place behind the prefix");
  }
  if (!parents.empty() && parents.size() != token_ids.size()) {
    throw std::invalid_argument("a draft has one parent a node");
  }
  for (int i = 0; i < count; ++i) {
    const int parent = parent_of(parents, i);
    if (parent < -1 || parent >= i) {
      throw std::invalid_argument("node " + std::to_string(i) + " has parent " + std::to_string(parent) +
                                  "; parents come before their children, and a root has -1");
    }
  }
  check_adapter(adapter);
  return guarded([&] {
    reserve_logits_of_call(count);  // first: a call that is refused ends no run
    end_run();
    inputs_used_ = 0;
    verify_async(slot, position, token_ids, parents, 0, adapter);
    stream_.wait();
    return count;
  });
}

void TokenLoop::accept_path(int slot, int position, std::span<const std::int32_t> nodes) {
  const auto count = static_cast<int>(nodes.size());
  if (slot < 0 || slot >= config_.num_slots || position < 0 || position > config_.capacity ||
      count > config_.max_verify_tokens) {
    throw std::invalid_argument("a path does not fit its slot");
  }
  bool moves = false;
  for (int i = 0; i < count; ++i) {
    const int node = nodes[static_cast<std::size_t>(i)];
    if (node < 0 || node >= config_.capacity - position || (i > 0 && node <= nodes[static_cast<std::size_t>(i) - 1])) {
      throw std::invalid_argument("a path's nodes ascend and lie in the slot, but number " + std::to_string(i) +
                                  " is node " + std::to_string(node));
    }
    moves |= node != i;
  }
  guarded([&] {
    if (!moves) return;
    wait_for_run();
    inputs_used_ = 0;
    VerifyInputs path{};
    std::copy(nodes.begin(), nodes.end(), path.token_ids);
    path.starts[0] = count;
    path.slot = slot;
    path.position = position;
    upload_verify_inputs_async(path);
    cache().keep_path_async(*arena_.get<VerifyInputs>("verify_inputs"), stream_.get());
    stream_.wait();  // the pinned inputs are the next call's
  });
}

}  // namespace edgellm
