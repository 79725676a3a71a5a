// An engine whose logits anyone can compute: at position p the most likely token is `expected` of the tokens so far.
#pragma once

#include <vector>

#include "edgellm/trt_decoder.hpp"

namespace toy {

constexpr int kHidden = 8, kKvHeads = 2, kHeadDim = 16, kLayers = 2, kVocab = 64, kCapacity = 64, kMaxRank = 3;
constexpr int kWindow = 4;  // of the second layer

// Of the token's embedding, all columns alike.
int value(int token);
// adapter: what the bound adapter adds, the product of its A and B.
int expected(const std::vector<int>& tokens, int adapter);
// together: keys and values as one tensor. trees: masks as inputs, of scores or, where they are together, of bits.
std::vector<edgellm::TrtTensor> tensors(bool together, bool trees);

}  // namespace toy
