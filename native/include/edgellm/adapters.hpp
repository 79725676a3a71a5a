// LoRA adapters in device memory: a pool of equal places, filled at run time, and the table that tells the kernels
// where each layer's matrices are. Switching adapters between steps changes an index in device memory and nothing else.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "edgellm/arena.hpp"
#include "edgellm/decoder_config.hpp"
#include "edgellm/kernels/lora.hpp"
#include "edgellm/weights.hpp"

namespace edgellm {

// The linear layers of a decoder layer, in the order of layer_linears.
enum class Linear : std::uint8_t { kQkv, kO, kGateUp, kDown };
constexpr int kNumLinears = 4;
constexpr const char* kLinearStems[kNumLinears] = {"attn.qkv", "attn.o", "mlp.gate_up", "mlp.down"};
constexpr unsigned linear_bit(Linear linear) { return 1U << static_cast<unsigned>(linear); }

// What an adapter has for one projection of one layer: y += scale * B (A x).
struct AdapterTensors {
  int layer = 0;
  std::string target;  // q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj or down_proj
  HostTensor a;        // (rank, in) float32, float16 or bfloat16
  HostTensor b;        // (out, rank) float32, float16 or bfloat16
  float scale = 1.0F;
};

// Device memory of max_adapters adapters of up to max_lora_rank, and of the steps that use them. Nothing for 0
// adapters.
void plan_adapters(MemoryPlan& plan, const DecoderConfig& config);

// Views into an arena that must outlive this. Adapters are numbered from 1; 0 stands for none.
class Adapters {
 public:
  Adapters(const Arena& arena, const DecoderConfig& config);

  // Copies an adapter into place `index`, over what was there, and waits for the stream; no kernel that uses adapters
  // may run meanwhile.
  // Throws std::invalid_argument, and changes nothing, for an index, target, layer, rank or shape that does not fit.
  void load(int index, std::span<const AdapterTensors> tensors, cudaStream_t stream);
  void unload(int index, cudaStream_t stream);
  // Throws std::invalid_argument unless `index` is 0 or a loaded adapter.
  void check(int index) const;

  // linear_bit of every linear layer that some loaded adapter adapts.
  unsigned linears() const noexcept { return linears_; }
  // A layer of all adapters, for num_tokens tokens whose adapters are at `adapters` in device memory.
  kernels::LoraView view(int layer, Linear linear, const std::int32_t* adapters) const;
  // One adapter's part of a linear layer, whose pointers are to device memory.
  const kernels::LoraLinear& part(int index, int layer, Linear linear) const;
  // First row of each target of a linear layer, and after the last one the number of rows.
  std::vector<int> target_rows(Linear linear) const;

 private:
  std::size_t slot_of(int index, int layer, Linear linear) const;
  std::byte* place(int index, int layer, Linear linear) const;
  void upload_table(cudaStream_t stream);

  const Arena& arena_;
  const DecoderConfig& config_;
  std::vector<kernels::LoraLinear> table_;  // (num_layers, kNumLinears, max_adapters), as it is on the device
  std::vector<unsigned> loaded_;            // (max_adapters) linear bits and kLoaded, or 0
  unsigned linears_ = 0;
};

}  // namespace edgellm
