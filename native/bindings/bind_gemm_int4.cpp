// gemm_int4.
#include <string>

#include "bindings.hpp"
#include "edgellm/kernels/gemm_int4.hpp"
#include "kernel_views.hpp"

namespace py = pybind11;

namespace edgellm {

void bind_gemm_int4(py::module_& module) {
  py::list tiles;
  for (const kernels::GemmInt4Tile& tile : kernels::kGemmInt4Tiles) {
    tiles.append(py::make_tuple(tile.rows, tile.tokens, tile.split));
  }
  module.attr("GEMM_INT4_TILES") = py::tuple(tiles);
  module.def(
      "choose_gemm_int4_tile",
      [](int num_tokens, int rows, int num_sms, bool two_fit) {
        if (num_sms < 1) throw std::invalid_argument("num_sms " + std::to_string(num_sms) + " is not at least 1");
        return kernels::choose_gemm_int4_tile(num_tokens, rows, num_sms, two_fit);
      },
      py::arg("num_tokens"), py::arg("rows"), py::arg("num_sms"), py::arg("two_fit"));
  module.def("choose_gemm_int4_split", &kernels::choose_gemm_int4_split, py::arg("num_tokens"), py::arg("rows"),
             py::arg("group"), py::arg("num_sms"), py::arg("max_shared_bytes"));
  module.def("has_gemm_int4_split", &kernels::has_gemm_int4_split, py::arg("num_tokens"), py::arg("group"));
  module.def(
      "gemm_int4",
      [](const py::tuple& weight, bool gate_up, const py::object& x, const py::object& y, int tile,
         std::uintptr_t stream, bool pdl, bool row_invariant) {
        kernels::GemmInt4Args args;
        args.weight = WeightTuple(weight).view;
        if (args.weight.format != kernels::WeightFormat::int4) throw std::invalid_argument("the weight is not int4");
        if (gate_up && args.weight.rows % 2 != 0) throw std::invalid_argument("gate_up has an odd number of rows");
        if (tile < -1 || tile >= kernels::kNumGemmInt4Tiles) {
          throw std::invalid_argument("tile is " + std::to_string(tile) + "; there are " +
                                      std::to_string(kernels::kNumGemmInt4Tiles) + ", and -1");
        }
        const DeviceArray from(x, "x");
        const std::int64_t tokens = from.size(0);
        args.gate_up = gate_up;
        args.x = from.as<const __nv_bfloat16>({tokens, args.weight.cols});
        const DeviceArray to(y, "y");
        if (to.is_bfloat()) {
          args.y = to.as<__nv_bfloat16>({tokens, args.weight.rows});
        } else {
          if (gate_up || tile >= 0 || !kernels::has_gemm_int4_split(static_cast<int>(tokens), args.weight.group)) {
            to.fail("is not bf16, as this product's must be");
          }
          args.y_f32 = to.as<float>({tokens, args.weight.rows});
        }
        args.num_tokens = static_cast<int>(tokens);
        args.row_invariant = row_invariant;
        args.tile = tile;
        if (tile >= 0 && kernels::kGemmInt4Tiles[tile].split) {
          const int most = kernels::kGemmInt4Tiles[tile].tokens;
          if (tokens > most) from.fail("has more than the tile's " + std::to_string(most) + " tokens");
          if (!kernels::has_gemm_int4_split(most, args.weight.group)) {
            throw std::invalid_argument("tile " + std::to_string(tile) + " is not for groups of " +
                                        std::to_string(args.weight.group) + ", or needs another GPU's shared memory");
          }
        }
        kernels::gemm_int4_async(args, to_stream(stream), pdl);
      },
      py::arg("weight"), py::arg("gate_up"), py::arg("x"), py::arg("y"), py::arg("tile") = -1, py::arg("stream") = 0,
      py::arg("pdl") = false, py::arg("row_invariant") = true);
}

}  // namespace edgellm
