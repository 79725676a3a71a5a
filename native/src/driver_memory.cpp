// What CUDA's driver takes beside an arena: nothing that can be asked beforehand, so it is counted.
#include <algorithm>

#include "edgellm/adapters.hpp"
#include "edgellm/decoder_config.hpp"
#include "edgellm/kernels/attention_decode.hpp"
#include "edgellm/verify_inputs.hpp"

namespace edgellm {
namespace {

// An H200's driver took 36 MB (16 layers) and 45 to 48 (32) for what four slots of 4,096 tokens load and capture: about
// 25 MB of code, and 2.7 to 3.6 KB of a graph's kernel. A third more is planned. With an adapter it took 55 MB of 75 so
// planned (16 layers), and for eight slots of 16,384 tokens 185 of 260 (36). Other drivers were not asked.
constexpr std::size_t kCodeBytes = std::size_t{32} << 20;
constexpr std::size_t kGraphKernelBytes = 4096;
constexpr int kDecodeTails = 4;  // of StepTail, those of a decode step

}  // namespace

std::size_t driver_bytes(const DecoderConfig& config) {
  const int maps = config.ordered.empty() && config.factored.empty() ? 0 : kNumLinears;
  const int in_layer = 5 + maps + (config.output_norms ? 2 : 0), others = 8;
  int classes = 1;
  while (config.capacity > kernels::kContextClasses[classes - 1]) ++classes;
  const int decode_graphs = std::min(config.num_slots, kMaxBatch) * kDecodeTails * classes;
  int draft_graphs = 0;  // of chains and of trees
  const int most_nodes = config.max_verify_tokens > 0 ? verify_class(config.max_verify_tokens) : 0;
  for (int nodes = 2; nodes <= most_nodes; nodes *= 2) draft_graphs += 2;
  constexpr int kMore = 4;  // kernels in a layer, of long drafts' products and of adapters
  int kernels = decode_graphs * (in_layer * config.num_layers + others) +
                draft_graphs * ((in_layer + kMore) * config.num_layers + others);
  // Once an adapter is loaded, all again with its kernels.
  if (config.max_adapters > 0) {
    kernels += (decode_graphs + draft_graphs) * ((in_layer + kMore) * config.num_layers + others);
  }
  return kCodeBytes + static_cast<std::size_t>(kernels) * kGraphKernelBytes;
}

}  // namespace edgellm
