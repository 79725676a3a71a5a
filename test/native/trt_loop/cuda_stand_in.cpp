// The CUDA runtime and the kernels that an engine's decode loop calls, on the CPU: device memory is host memory, and a
// capture keeps what would be launched. For running the loop's own code where there is no GPU; no result is the GPU's.
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "edgellm/kernels/embedding.hpp"
#include "edgellm/kernels/engine_inputs.hpp"
#include "edgellm/kernels/kv_compact.hpp"
#include "edgellm/kernels/sampling.hpp"
#include "stand_in.hpp"

namespace stand_in {
namespace {
std::vector<Launch>* captured = nullptr;
bool fails = false;
bool is_full = false;
thread_local int current_device = 0;
int device_of_streams = 0;  // where the last one was made
}  // namespace

void launch(Launch body) {
  require(current_device == device_of_streams, "a stream of another GPU than the thread's is launched into");
  if (captured != nullptr) {
    captured->push_back(std::move(body));
  } else {
    body();
  }
}

bool is_capturing() { return captured != nullptr; }

void fail_from_now_on() { fails = true; }

void fill_host_memory(bool full) { is_full = full; }

// After an error that ends the context every call fails with it, those that free something too.
cudaError_t state() { return fails ? cudaErrorLaunchFailure : cudaSuccess; }

void require(bool condition, const char* message) {
  if (condition) return;
  std::printf("wrong use: %s\n", message);
  std::exit(3);
}

}  // namespace stand_in

using stand_in::launch;

struct CUgraph_st {
  std::vector<stand_in::Launch> launches;
};
struct CUgraphExec_st {
  std::vector<stand_in::Launch> launches;
};

extern "C" {

cudaError_t cudaMalloc(void** data, std::size_t size) {
  *data = std::aligned_alloc(256, (size + 511) / 256 * 256);
  std::memset(*data, 0x5a, size);  // nothing may rely on zeros
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** data, std::size_t size, unsigned) {
  return stand_in::is_full ? cudaErrorMemoryAllocation : cudaMalloc(data, size);
}
cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  *device = host;
  return cudaSuccess;
}
cudaError_t cudaFree(void* data) {
  std::free(data);
  return stand_in::state();
}
cudaError_t cudaFreeHost(void* data) { return cudaFree(data); }
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t size, cudaMemcpyKind, cudaStream_t) {
  launch([=] { std::memcpy(to, from, size); });
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, std::size_t size, cudaStream_t) {
  launch([=] { std::memset(to, value, size); });
  return cudaSuccess;
}
cudaError_t cudaMemcpy3DAsync(const cudaMemcpy3DParms* given, cudaStream_t) {
  const cudaMemcpy3DParms p = *given;
  const auto row = [](const cudaPitchedPtr& of, std::size_t y, std::size_t z) {
    return static_cast<char*>(of.ptr) + (z * of.ysize + y) * of.pitch;
  };
  launch([=] {
    for (std::size_t z = 0; z < p.extent.depth; ++z) {
      for (std::size_t y = 0; y < p.extent.height; ++y) {
        std::memcpy(row(p.dstPtr, y, z), row(p.srcPtr, y, z), p.extent.width);
      }
    }
  });
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
  stand_in::require(!stand_in::is_capturing(), "the host waits for a stream that captures");
  return stand_in::state();
}
cudaError_t cudaGetDevice(int* device) {
  *device = stand_in::current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  stand_in::current_device = device;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 8;
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  *free = *total = std::size_t{1} << 30;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an error of the stand-in"; }
const char* cudaGetErrorName(cudaError_t) { return "stand-in"; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = static_cast<cudaEvent_t>(std::malloc(1));
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) { return cudaFree(event); }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) {
  *ms = 0.0F;
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = static_cast<cudaStream_t>(std::malloc(1));
  stand_in::device_of_streams = stand_in::current_device;
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return cudaFree(stream); }
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  stand_in::captured = new std::vector<stand_in::Launch>;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  *graph = new CUgraph_st{std::move(*stand_in::captured)};
  delete stand_in::captured;
  stand_in::captured = nullptr;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  *executable = new CUgraphExec_st{graph->launches};
  return cudaSuccess;
}
cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t) {
  for (const stand_in::Launch& body : executable->launches) body();
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return stand_in::state();
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete executable;
  return stand_in::state();
}

}  // extern "C"

namespace edgellm::kernels {
namespace {

void embed(const WeightView& table, std::int32_t id, float scale, float* residual) {
  for (int i = 0; i < table.cols; ++i) {
    const auto at = static_cast<std::size_t>(id) * static_cast<std::size_t>(table.cols) + static_cast<std::size_t>(i);
    residual[i] = scale * __half2float(static_cast<const __half*>(table.data)[at]);
  }
}

void store(const EngineInputs& out, std::size_t at, float value) {
  static_cast<__half*>(out.embeds)[at] = __float2half(value);
}

}  // namespace

void embedding_async(const WeightView& table, const std::int32_t* token_ids, int num_tokens, float scale,
                     float* residual, __nv_bfloat16*, cudaStream_t, bool) {
  const WeightView view = table;
  launch([=] {
    for (int i = 0; i < num_tokens; ++i) embed(view, token_ids[i], scale, residual + i * view.cols);
  });
}

// As engine_inputs.cu has it, written again.
void engine_rows_async(const EngineRowsArgs& args, cudaStream_t) {
  launch([args] {
    for (int row = 0; row < args.num_rows; ++row) {
      args.out.positions[row] = 0;
      if (args.out.tree_masks != nullptr) args.out.tree_masks[row] = 1;
      args.out.write_indices[row] = args.idle_place;
      for (int i = 0; i < args.hidden; ++i) store(args.out, static_cast<std::size_t>(row * args.hidden + i), 0.0F);
    }
    int rank = 0;
    for (int i = 0; i < args.batch; ++i) {
      if ((args.members >> i & 1) == 0) continue;
      const int row = args.slots[i] - args.first_slot;
      args.out.positions[row] = args.out.write_indices[row] = args.positions[i];
      args.out.logit_indices[rank++] = row;
      for (int j = 0; j < args.hidden; ++j) {
        store(args.out, static_cast<std::size_t>(row * args.hidden + j), args.residual[i * args.hidden + j]);
      }
    }
  });
}

void engine_chunk_async(const EngineChunkArgs& args, cudaStream_t) {
  launch([args] {
    const int start = args.start != nullptr ? *args.start : args.position;
    args.out.write_indices[0] = start;
    for (int i = 0; i < args.num_logits; ++i) args.out.logit_indices[i] = args.num_tokens - args.num_logits + i;
    for (int token = 0; token < args.num_tokens; ++token) {
      args.out.positions[token] = start + (args.depths != nullptr ? args.depths[token] : token);
      if (args.out.tree_masks == nullptr) continue;
      std::uint64_t mask = args.masks != nullptr ? args.masks[token] : 0;
      for (int i = 0; args.masks == nullptr && i <= token && i < 64; ++i) mask |= std::uint64_t{1} << i;
      args.out.tree_masks[token] = static_cast<std::int64_t>(mask);
    }
    for (int i = 0; i < args.num_tokens * args.hidden; ++i) {
      store(args.out, static_cast<std::size_t>(i), args.residual[i]);
    }
  });
}

void engine_mask_async(const EngineMaskArgs& args, cudaStream_t) {
  launch([args] {
    auto* out = static_cast<__half*>(args.mask);
    for (int i = 0; i < args.num_tokens * args.capacity; ++i) out[i] = __float2half(-65504.0F);
    for (int token = 0; token < args.num_tokens; ++token) {
      const auto show = [&](std::int64_t place, std::int64_t position) {
        if (args.window > 0 && position <= args.positions[token] - args.window) return;
        out[token * args.capacity + place] = __float2half(0.0F);
      };
      const int prefix = args.start != nullptr ? *args.start : args.prefix;
      const std::int64_t before = args.tree != nullptr ? prefix : args.positions[token] + 1;
      for (std::int64_t place = 0; place < before; ++place) show(place, place);
      for (int node = 0; args.tree != nullptr && node < args.num_tokens; ++node) {
        if ((args.tree[token] >> node & 1) != 0) show(prefix + node, args.positions[node]);
      }
    }
  });
}

void kv_compact_async(const KvCompactArgs& args, cudaStream_t, bool) {
  launch([args] {
    const std::size_t row = static_cast<std::size_t>(args.head_dim) * kv_element_bytes(args.format);
    const auto capacity = static_cast<std::size_t>(args.capacity), heads = static_cast<std::size_t>(args.num_heads);
    for (int slice = 0; slice < args.num_slices; ++slice) {
      for (std::size_t head = 0; head < heads; ++head) {
        const std::size_t slot = static_cast<std::size_t>(slice * args.num_slots + args.slots[0]);
        char* first = static_cast<char*>(args.cache) + (slot * heads + head) * capacity * row;
        for (int i = 0; i < args.counts[0]; ++i) {
          std::memmove(first + static_cast<std::size_t>(args.positions[0] + i) * row,
                       first + static_cast<std::size_t>(args.positions[0] + args.paths[i]) * row, row);
        }
      }
    }
  });
}

void count_tokens_async(const std::int32_t*, int, int, std::uint32_t*, cudaStream_t, bool) {}

// Greedy, whatever the rows ask for.
void sample_async(const SamplingArgs& args, cudaStream_t, bool) {
  const WeightView table = *args.table;
  launch([args, table] {
    for (int b = 0; b < args.batch; ++b) {
      const float* logits = args.logits + b * args.vocab;
      int best = 0;
      for (int v = 1; v < args.vocab; ++v) best = logits[v] > logits[best] ? v : best;
      args.state.token_ids[b] = best;
      ++args.state.positions[b];
      const std::int32_t count = args.state.step_counts[b]++;
      args.state.history[b * args.state.history_length + count % args.state.history_length] = best;
      embed(table, best, args.embed_scale, args.residual + b * table.cols);
    }
  });
}

}  // namespace edgellm::kernels
