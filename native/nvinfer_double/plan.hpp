// The plan of a double: what stands where TensorRT's serialised engine would, and can be nothing else.
//
//   "edgellm_ros double of nvinfer 1\n"   32 bytes
//   length of the JSON                    8 bytes, little endian
//   JSON                                  bindings, profiles, the decoder, where its weights are, faults to show
//   weights                               at the next multiple of 256, each at its own offset from there
//
// test/native/double_plan.py writes it.
#pragma once

#include <NvInferRuntime.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "edgellm/decoder_config.hpp"
#include "edgellm/tensor.hpp"

namespace edgellm::nvinfer_double {

constexpr std::string_view kMagic = "edgellm_ros double of nvinfer 1\n";
constexpr std::size_t kWeightAlignment = 256;

using Sizes = std::vector<std::int64_t>;

// An input or output; its role says what the decoder does with it (edgellm_ros/executors/contract.py).
struct Binding {
  std::string name;
  bool is_input = false;
  nvinfer1::DataType dtype = nvinfer1::DataType::kFLOAT;
  Sizes shape;  // -1 where it varies
  std::string role;
  int layer = -1;
  std::string stem;  // of adapters: attn.qkv, …
  int window = 0;    // of a mask
};

struct ShapeRange {
  Sizes smallest, best, largest;
};
using Profile = std::map<std::string, ShapeRange, std::less<>>;  // by the name of the input

struct StoredWeight {
  std::string name;  // as in weights.safetensors
  DType dtype = DType::kFloat32;
  Shape shape;
  std::span<const std::byte> bytes;  // of the plan
};

// What the double shall fail at; numbers count from 1, 0 is never.
struct Faults {
  std::string deserialize;          // the message, or empty
  std::string create_context;       // the same
  std::int64_t enqueue = 0;         // the enqueueV3 that returns false and launches nothing
  std::int64_t execution_trap = 0;  // the execution, replays of a graph included, that ends in a device error
  std::int64_t execution_nan = 0;   // the execution from which on logits are NaN
};

struct Plan {
  Sizes tensorrt;  // major, minor, patch of the TensorRT that it pretends to be built with
  std::vector<Binding> bindings;
  std::vector<Profile> profiles;
  DecoderConfig decoder;
  bool is_bf16 = false;  // embeddings, masks and adapters; else fp16
  std::vector<StoredWeight> weights;
  Faults faults;

  const Binding* find(std::string_view name) const;
};

// The weights' bytes stay in `blob`. Throws std::invalid_argument that says what of it is no plan of a double.
Plan parse_plan(std::span<const std::byte> blob);

std::size_t size_of(nvinfer1::DataType dtype);
std::string to_string(const Sizes& sizes);

}  // namespace edgellm::nvinfer_double
