// Which of a draft's tokens the target model keeps, and which token it chooses after them, decided on the device.
#pragma once

#include "edgellm/kernels/sampling.hpp"

namespace edgellm::kernels {

constexpr int kMaxAcceptanceNodes = 64;
constexpr int kMaxAcceptanceSequences = 1024;

// Node 0 is the token chosen last, which is kept in any case; the others are drafted and descend from it. The target's
// token at each node is drawn from its logits there, and the path goes on with the child that has that token: what is
// emitted follows the target's distribution, whatever the draft proposed. A node of depth d draws with index
// draw_index + d: the tokens are those that decoding one by one would draw, from the same logits. Greedy likewise.
//
// With draft_probs (chains only) a drafted token is kept with probability min(1, p / q), else replaced by a draw from
// max(0, p - q) (Leviathan et al. 2023, Chen et al. 2023): more is accepted, from other random numbers.
//
// Temperature, top-k, top-p and min-p count, as in sample_async; bias, penalties and masks do not: they depend on the
// path, and such a sequence should not be drafted for.
struct DraftAcceptanceArgs {
  const float* logits = nullptr;       // (num_sequences, max_nodes, vocab) after each node
  const float* draft_probs = nullptr;  // (num_sequences, max_nodes, vocab) that each node was drawn from; or null
  const int32_t* token_ids = nullptr;  // (num_sequences, max_nodes)
  const int32_t* parents = nullptr;    // (num_sequences, max_nodes) before their children; or null: chains
  const int32_t* num_nodes = nullptr;  // (num_sequences) node 0 included; 0 or less: a free place, left alone
  // As in DecodeState: then logits and draft_probs have a column for each row, and every token is a token's id. A
  // drafted token without a row is never kept.
  const int32_t* row_tokens = nullptr;  // (vocab), or null
  SamplingRow* rows = nullptr;          // (num_sequences); draw_index grows by path_lengths
  float* scores = nullptr;              // (num_sequences, max_nodes, vocab) workspace
  int32_t* paths = nullptr;             // (num_sequences, max_nodes): the nodes kept, 0 first, then -1
  int32_t* path_lengths = nullptr;      // (num_sequences) nodes kept: drafted tokens accepted + 1
  int32_t* next_tokens = nullptr;       // (num_sequences) the target's after the path; -1: its logits were not finite
  int num_sequences = 1;                // at most kMaxAcceptanceSequences
  int max_nodes = 0;                    // at most kMaxAcceptanceNodes
  int vocab = 0;
  void* workspace = nullptr;  // draft_acceptance_workspace_bytes, zeroed once at load
};
void accept_draft_async(const DraftAcceptanceArgs& args, cudaStream_t stream, bool pdl);

std::size_t draft_acceptance_workspace_bytes(int max_sequences, int max_nodes);

}  // namespace edgellm::kernels
