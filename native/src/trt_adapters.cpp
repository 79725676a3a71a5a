// LoRA adapters of an engine: its inputs, in places of a pool, of rank 0 where there is none.
#include <algorithm>
#include <stdexcept>

#include "edgellm/cuda_try.hpp"
#include "edgellm/trt_decoder.hpp"

namespace edgellm {

void TrtDecoder::check_adapter(int adapter) const {
  if (adapter < 0 || adapter > config_.max_adapters || !loras_[static_cast<std::size_t>(adapter)].loaded) {
    throw std::invalid_argument("adapter " + std::to_string(adapter) + " is not loaded");
  }
}

void TrtDecoder::load_adapter(int index, std::span<const TrtLoraTensor> tensors) {
  if (index < 1 || index > config_.max_adapters) {
    throw std::invalid_argument("there is no place " + std::to_string(index) + " for an adapter; places are 1 to " +
                                std::to_string(config_.max_adapters));
  }
  Lora lora;
  lora.loaded = true;
  std::vector<std::size_t> places;
  for (const TrtLoraTensor& given : tensors) {
    const auto found = std::find_if(trt_.tensors.begin(), trt_.tensors.end(),
                                    [&](const TrtTensor& tensor) { return tensor.name == given.name; });
    const bool adapts =
        found != trt_.tensors.end() && (found->role == TrtRole::lora_a || found->role == TrtRole::lora_b);
    if (!adapts) throw std::invalid_argument("the engine has no adapter input " + given.name);
    if (given.rank < 1 || given.rank > found->max_rank) {
      throw std::invalid_argument(given.name + " has rank " + std::to_string(given.rank) + "; the engine takes 1 to " +
                                  std::to_string(found->max_rank));
    }
    std::size_t bytes = static_cast<std::size_t>(given.rank) * 2;
    for (const std::int64_t size : found->dims) bytes *= size < 0 ? 1 : static_cast<std::size_t>(size);
    if (bytes != given.data.size()) {
      throw std::invalid_argument(given.name + " has " + std::to_string(given.data.size()) + " bytes; rank " +
                                  std::to_string(given.rank) + " has " + std::to_string(bytes));
    }
    places.push_back(static_cast<std::size_t>(found - trt_.tensors.begin()));
    lora.ranks[given.name] = given.rank;
  }
  guarded([&] {
    forget(index);  // waits for a run under way, which reads the adapters
    loras_[static_cast<std::size_t>(index)] = std::move(lora);
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      EDGELLM_CUDA_TRY(cudaMemcpyAsync(lora_address(index, places[i]), tensors[i].data.data(), tensors[i].data.size(),
                                       cudaMemcpyHostToDevice, stream_.get()));
    }
    stream_.wait();
  });
}

void TrtDecoder::unload_adapter(int index) {
  check_adapter(index);
  if (index == 0) throw std::invalid_argument("place 0 is no adapter");
  guarded([&] {
    forget(index);
    loras_[static_cast<std::size_t>(index)] = {};
  });
}

int TrtDecoder::lora_rank(int adapter, const TrtTensor& tensor) const {
  const auto& ranks = loras_[static_cast<std::size_t>(adapter)].ranks;
  const auto found = ranks.find(tensor.name);
  return found == ranks.end() ? 0 : found->second;
}

std::byte* TrtDecoder::lora_address(int adapter, std::size_t tensor) const {
  auto* pool = arena_.get<std::byte>("trt.lora");
  const std::size_t each = trt_.adapter_bytes();
  if (lora_rank(adapter, trt_.tensors[tensor]) == 0)
    return pool + each * static_cast<std::size_t>(config_.max_adapters);
  return pool + each * static_cast<std::size_t>(adapter - 1) + lora_offsets_[tensor];
}

}  // namespace edgellm
