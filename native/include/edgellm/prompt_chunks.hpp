// How a long step is cut, and of which tokens its last layer is computed as a whole. Needs no GPU.
#pragma once

#include <vector>

namespace edgellm {

struct PromptChunk {
  int start = 0;       // its first token in the step
  int num_tokens = 0;  // at most max_tokens
  int num_logits = 0;  // of its last tokens
  // So many of its last tokens go on after the last layer's keys and values, since only the head reads what comes then;
  // at least num_logits, and none where that is 0.
  int num_last_rows = 0;
};

// Of a step of `length` tokens, the last num_logits of which are asked for. products: through cuBLASLt, whose
// algorithms are chosen for two rows and more, so that no chunk of a longer step has one.
std::vector<PromptChunk> cut_prompt(int length, int num_logits, int max_tokens, bool products);

}  // namespace edgellm
