// The decoder: NumPy arrays in, NumPy arrays out, the GIL released while the device works.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.hpp"
#include "edgellm/decoder.hpp"
#include "host_array.hpp"

namespace py = pybind11;

namespace edgellm {
namespace {

void load_linear(Decoder& decoder, const std::string& stem, const py::array& weight, const py::object& scale) {
  const HostTensor host = host_tensor(stem + ".weight", weight);
  HostTensor host_scale;
  if (!scale.is_none()) host_scale = host_tensor(stem + ".scale", scale.cast<py::array>());
  const py::gil_scoped_release release;
  decoder.load_linear(stem, host, scale.is_none() ? nullptr : &host_scale);
}

// tensors: (layer, target, A (rank, in), B (out, rank), scale) a projection of one layer.
void load_adapter(Decoder& decoder, int index,
                  const std::vector<std::tuple<int, std::string, py::array, py::array, float>>& tensors) {
  std::vector<AdapterTensors> adapter;
  adapter.reserve(tensors.size());
  for (const auto& [layer, target, a, b, scale] : tensors) {
    const std::string name = "layers." + std::to_string(layer) + "." + target;
    adapter.push_back({layer, target, host_tensor(name + ".lora_A", a), host_tensor(name + ".lora_B", b), scale});
  }
  const py::gil_scoped_release release;
  decoder.load_adapter(index, adapter);
}

void bind_config(py::module_& module) {
  py::enum_<kernels::WeightFormat>(module, "WeightFormat")
      .value("bf16", kernels::WeightFormat::bf16)
      .value("fp16", kernels::WeightFormat::fp16)
      .value("fp8", kernels::WeightFormat::fp8)
      .value("int8", kernels::WeightFormat::int8)
      .value("int4", kernels::WeightFormat::int4)
      .value("int8_offset", kernels::WeightFormat::int8_offset)
      .value("fp8_blocks", kernels::WeightFormat::fp8_blocks);
  py::enum_<kernels::KvFormat>(module, "KvFormat")
      .value("bf16", kernels::KvFormat::bf16)
      .value("fp16", kernels::KvFormat::fp16)
      .value("fp8", kernels::KvFormat::fp8);
  py::enum_<kernels::Activation>(module, "Activation")
      .value("silu", kernels::Activation::silu)
      .value("gelu_tanh", kernels::Activation::gelu_tanh);
  py::class_<DecoderConfig>(module, "DecoderConfig", "What a decoder is and how much it may hold.")
      .def(py::init<>())
      .def_readwrite("num_layers", &DecoderConfig::num_layers)
      .def_readwrite("hidden_size", &DecoderConfig::hidden_size)
      .def_readwrite("intermediate_size", &DecoderConfig::intermediate_size)
      .def_readwrite("num_heads", &DecoderConfig::num_heads)
      .def_readwrite("num_kv_heads", &DecoderConfig::num_kv_heads)
      .def_readwrite("head_dim", &DecoderConfig::head_dim)
      .def_readwrite("vocab_size", &DecoderConfig::vocab_size)
      .def_readwrite("head_rows", &DecoderConfig::head_rows)
      .def_readwrite("num_positions", &DecoderConfig::num_positions)
      .def_readwrite("rms_norm_eps", &DecoderConfig::rms_norm_eps)
      .def_readwrite("embed_scale", &DecoderConfig::embed_scale)
      .def_readwrite("attention_scale", &DecoderConfig::attention_scale)
      .def_readwrite("activation", &DecoderConfig::activation)
      .def_readwrite("logit_softcap", &DecoderConfig::logit_softcap)
      .def_readwrite("qk_norm", &DecoderConfig::qk_norm)
      .def_readwrite("output_norms", &DecoderConfig::output_norms)
      .def_readwrite("tied_head", &DecoderConfig::tied_head)
      .def_readwrite("sliding_windows", &DecoderConfig::sliding_windows)
      .def_readwrite("layer_ropes", &DecoderConfig::layer_ropes)
      .def_readwrite("layer_format", &DecoderConfig::layer_format)
      .def_readwrite("head_format", &DecoderConfig::head_format)
      .def_readwrite("embedding_format", &DecoderConfig::embedding_format)
      .def_readwrite("kv_format", &DecoderConfig::kv_format)
      .def_readwrite("group_size", &DecoderConfig::group_size)
      .def_readwrite("formats", &DecoderConfig::formats)
      .def_readwrite("ordered", &DecoderConfig::ordered)
      .def_readwrite("factored", &DecoderConfig::factored)
      .def_readwrite("biases", &DecoderConfig::biases)
      .def_readwrite("num_slots", &DecoderConfig::num_slots)
      .def_readwrite("capacity", &DecoderConfig::capacity)
      .def_readwrite("max_tokens", &DecoderConfig::max_tokens)
      .def_readwrite("min_gemm_tokens", &DecoderConfig::min_gemm_tokens)
      .def_readwrite("max_verify_tokens", &DecoderConfig::max_verify_tokens)
      .def_readwrite("batch_invariant", &DecoderConfig::batch_invariant)
      .def_readwrite("wide_norm_inputs", &DecoderConfig::wide_norm_inputs)
      .def_readwrite("row_invariant", &DecoderConfig::row_invariant)
      .def_readwrite("max_packed_tokens", &DecoderConfig::max_packed_tokens)
      .def_readwrite("copied_bytes", &DecoderConfig::copied_bytes)
      .def_readonly("has_cublaslt", &DecoderConfig::has_cublaslt)
      .def_readwrite("fp8_prefill", &DecoderConfig::fp8_prefill)
      .def_readwrite("max_adapters", &DecoderConfig::max_adapters)
      .def_readwrite("max_lora_rank", &DecoderConfig::max_lora_rank)
      .def_readwrite("pdl", &DecoderConfig::pdl)
      .def_property_readonly("kv_bytes_per_token", &DecoderConfig::kv_bytes_per_token)
      .def_property_readonly("needs_cublaslt", &DecoderConfig::needs_cublaslt)
      .def("check", &DecoderConfig::check, "ValueError that names what the kernels cannot do.");
}

}  // namespace

void bind_decoder(py::module_& module) {
  bind_config(module);
  module.def(
      "plan_memory", [](const DecoderConfig& config) { return plan_to_dict(plan_memory(config)); }, py::arg("config"),
      "Bytes of device memory by purpose, and their total; takes none.");
  module.def(
      "decide",
      [](const DecoderConfig& config, int l2_bytes, int bus_bits, bool has_cublaslt) {
        return decide(config, {l2_bytes, bus_bits, has_cublaslt});
      },
      py::arg("config"), py::arg("l2_bytes"), py::arg("bus_bits"), py::arg("has_cublaslt") = true,
      "A copy of config with what it leaves to the GPU: max_packed_tokens, copied_bytes, has_cublaslt. Needs none.");
  module.def(
      "cut_prompt",
      [](int length, int num_logits, int max_tokens, bool products) {
        if (max_tokens < kernels::kMaxGemvTokens) {
          throw std::invalid_argument("max_tokens is " + std::to_string(max_tokens) + "; it must be at least " +
                                      std::to_string(kernels::kMaxGemvTokens));
        }
        py::list chunks;
        for (const PromptChunk& chunk : cut_prompt(length, num_logits, max_tokens, products)) {
          chunks.append(py::make_tuple(chunk.start, chunk.num_tokens, chunk.num_logits, chunk.num_last_rows));
        }
        return chunks;
      },
      py::arg("length"), py::arg("num_logits"), py::arg("max_tokens"), py::arg("products"),
      "How a long step is computed: (start, num_tokens, num_logits, num_last_rows) of each chunk; needs no GPU.");
  bind_token_loop(module);
  py::class_<Decoder, TokenLoop>(module, "Decoder", "A decoder on the current GPU; all its memory is taken here.")
      .def(py::init<DecoderConfig>(), py::arg("config"), py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("products_reason", &Decoder::products_reason)
      .def_property_readonly("has_fp8_products", &Decoder::has_fp8_products)
      .def_property_readonly("most_multiplied_nodes", &Decoder::most_multiplied_nodes)
      .def("multiplies_head", &Decoder::multiplies_head, py::arg("num_rows"))
      .def("load_linear", &load_linear, py::arg("stem"), py::arg("weight"), py::arg("scale") = py::none())
      .def(
          "load_vector",
          [](Decoder& decoder, const std::string& name, const py::array& values) {
            const HostTensor host = host_tensor(name, values);
            const py::gil_scoped_release release;
            decoder.load_vector(name, host);
          },
          py::arg("name"), py::arg("values"))
      .def(
          "load_order",
          [](Decoder& decoder, const std::string& stem, const py::array& order) {
            const HostTensor host = host_tensor(stem + ".input_order", order);
            const py::gil_scoped_release release;
            decoder.load_order(stem, host);
          },
          py::arg("stem"), py::arg("order"), "(cols) int32: which input feature each column of a layer takes.")
      .def(
          "load_vocab_map",
          [](Decoder& decoder, const py::array& token_ids) {
            const HostTensor host = host_tensor("vocab_map", token_ids);
            const py::gil_scoped_release release;
            decoder.load_vocab_map(host);
          },
          py::arg("token_ids"), "(head_rows) int32, ascending: the token that each row of a cut head stands for.")
      .def("finish_load", &Decoder::finish_load, py::call_guard<py::gil_scoped_release>())
      .def("load_adapter", &load_adapter, py::arg("index"), py::arg("tensors"))
      .def("unload_adapter", &Decoder::unload_adapter, py::arg("index"), py::call_guard<py::gil_scoped_release>())
      .def("time_verify", &Decoder::time_verify, py::arg("slot"), py::arg("position"), py::arg("num_tokens"),
           py::arg("num_steps"), "Milliseconds on the device of each verification of a chain, without copying logits.",
           py::call_guard<py::gil_scoped_release>())
      .def("num_tiles", &Decoder::num_tiles, py::arg("product"), py::arg("batch") = 1)
      .def("set_tile", &Decoder::set_tile, py::arg("product"), py::arg("batch"), py::arg("tile"));
}

}  // namespace edgellm
