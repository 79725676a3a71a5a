#include "edgellm/prompt_chunks.hpp"

#include <algorithm>

namespace edgellm {
namespace {

// Products of fewer rows take as long: their time is that of reading the weight.
constexpr int kFewestProductRows = 16;

}  // namespace

std::vector<PromptChunk> cut_prompt(int length, int num_logits, int max_tokens, bool products) {
  std::vector<PromptChunk> chunks;
  for (int start = 0; start < length; start += chunks.back().num_tokens) {
    PromptChunk chunk;
    chunk.start = start;
    chunk.num_tokens = std::min(length - start, max_tokens);
    if (products && chunk.num_tokens > 2 && length - start - chunk.num_tokens == 1) --chunk.num_tokens;
    // The last num_logits tokens of the step may lie in more than one chunk.
    const int behind = start + chunk.num_tokens - (length - num_logits);
    chunk.num_logits = std::clamp(behind, 0, chunk.num_tokens);
    chunk.num_last_rows = chunk.num_logits;
    if (products && chunk.num_logits > 0) {
      chunk.num_last_rows = std::min(chunk.num_tokens, std::max(chunk.num_logits, kFewestProductRows));
    }
    chunks.push_back(chunk);
  }
  return chunks;
}

}  // namespace edgellm
