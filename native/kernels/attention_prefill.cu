// Prefill attention: FlashAttention-2 (Dao 2023) over a slot of the cache, on mma.m16n8k16.
//
// A block has one KV head and 64 or 128 rows; a row is a (token, query head of the group) pair, so that grouped queries
// share the keys and values they read, and a few tokens of a large group fill the tensor cores too. Four warps have 16
// or 32 rows each and run over tiles of 64 positions. A warp reads the whole tile from shared memory: with 32 rows,
// half as often for each product, which is what bounds it. Values are fetched while scores are computed, the next keys
// while values are multiplied. A row's result does not depend on which rows are beside it. Heads wider than 128 have 16
// rows a warp only: the sums of their outputs fill half of the registers.
#include <cassert>
#include <cmath>
#include <stdexcept>
#include <string>

#include "copy_async.cuh"
#include "edgellm/kernels/attention_prefill.hpp"
#include "kv_format.cuh"
#include "launch.hpp"

namespace edgellm::kernels {

namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
template <int HD>
constexpr int kMostRowTiles = HD > 128 ? 1 : 2;  // of 16 rows a warp
constexpr int kTile = 64;                        // positions

struct Params {
  const bf16* q;
  const void* cache;
  const int32_t* starts;
  const int32_t* slots;
  const int32_t* positions;
  bf16* out;
  int num_heads;
  int num_kv_heads;
  int capacity;
  std::size_t values_offset;  // elements from a head's keys to its values
  int window;
  float scale;  // positive, times log2(e)
};

__device__ __forceinline__ void load_matrices(uint32_t* r, const bf16* p) {
  const uint32_t from = shared_address(p);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t* r, const bf16* p) {
  const uint32_t from = shared_address(p);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}

template <int HD>
constexpr int kStride = HD + 8;  // elements a row in shared memory: ldmatrix without bank conflicts
// Queries, keys, values. At most 99 KiB, which is all that a block may have on compute capability 8.6, 8.9 and 12.0.
template <int HD, int kRowTiles>
constexpr std::size_t kSharedBytes = (kWarps * kRowTiles * 16 + 2 * kTile) * kStride<HD> * sizeof(bf16);

__device__ __forceinline__ float exp2_fast(float v) {
  float result;
  asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(result) : "f"(v));
  return result;
}

// Threads that copy one row, eight elements each; those past the row's end do nothing.
template <int HD>
constexpr int kRowThreads = HD > 128  ? 32
                            : HD > 64 ? 16
                                      : 8;

// A tile of one head's keys or values to shared memory. `from` and `to` are what this thread copies of the first row
// that it copies of, and num_rows is counted from there; rows after them are zeros. `readable` is any address.
template <int HD, KvFormat F>
__device__ __forceinline__ void fetch_tile(bf16* to, const typename Kv<F>::Element* from, int num_rows,
                                           const void* readable) {
  constexpr int kStep = kThreads / kRowThreads<HD>;
  if (HD % (8 * kRowThreads<HD>) != 0 && threadIdx.x % kRowThreads<HD> * 8 >= HD) return;
#pragma unroll
  for (int row = 0; row < kTile; row += kStep) {
    const bool inside = row < num_rows;
    bf16* place = to + row * kStride<HD>;
    if constexpr (F != KvFormat::fp8) {
      copy_async16(place, inside ? static_cast<const void*>(from + row * HD) : readable, inside);
    } else {
      float v[8];
      Kv<F>::unpack(inside ? Kv<F>::load(from + row * HD) : Kv<F>::zeros(), v);
      *reinterpret_cast<uint4*>(place) =
          make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
    }
  }
}

// The products' operands: as the cache has them, and bf16 for FP8.
template <KvFormat F>
__device__ __forceinline__ void operand_mma(float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
  if constexpr (F == KvFormat::fp16) {
    mma_fp16(d, a, b0, b1);
  } else {
    mma_bf16(d, a, b0, b1);
  }
}
template <KvFormat F>
__device__ __forceinline__ uint32_t operand_pack(float low, float high) {
  return F == KvFormat::fp16 ? pack_fp16(low, high) : pack_bf16(low, high);
}
template <KvFormat F>
__device__ __forceinline__ uint32_t operand_from_bf16(uint32_t two) {
  if constexpr (F != KvFormat::fp16) return two;
  using Half = Kv<KvFormat::fp16>;
  return bits_as<uint32_t>(__halves2half2(Half::from_float(low_float(two)), Half::from_float(high_float(two))));
}

// One block's sequence and rows.
struct Rows {
  int first;        // row of the sequence
  int count;        // rows of the whole sequence
  int group;        // query heads a KV head
  int first_token;  // of the sequence, in q and out
  int base;         // position of that token
  int num_heads;
  int first_head;

  // Volatile: what is needed again after the loop is read again, so that it holds no registers meanwhile.
  __device__ __forceinline__ Rows(const Params& p, int rows_per_block)
      : first(static_cast<int>(gridDim.y - 1 - blockIdx.y) * rows_per_block),  // see launch_rows
        group(p.num_heads / p.num_kv_heads),
        first_token(*static_cast<const volatile int32_t*>(p.starts + blockIdx.z)),
        base(*static_cast<const volatile int32_t*>(p.positions + blockIdx.z)),
        num_heads(p.num_heads),
        first_head(static_cast<int>(blockIdx.x) * group) {
    count = (*static_cast<const volatile int32_t*>(p.starts + blockIdx.z + 1) - first_token) * group;
  }
  __device__ __forceinline__ int position(int row) const { return base + min(first + row, count - 1) / group; }
  // Of a row's query and output, in head_dims. Rows past the last are the last.
  __device__ __forceinline__ std::size_t offset(int row) const {
    const int inside = min(first + row, count - 1);
    return static_cast<std::size_t>(first_token + inside / group) * num_heads + first_head + inside % group;
  }
};

template <int HD, KvFormat F, int kRows>
__device__ __forceinline__ void fetch_queries(bf16* to, const bf16* q, const Rows& rows) {
  constexpr int kChunks = HD / 8;
  static_assert(kRows * kChunks % kThreads == 0);
#pragma unroll 4
  for (int i = 0; i < kRows * kChunks / kThreads; i++) {
    const int index = i * kThreads + static_cast<int>(threadIdx.x), row = index / kChunks, column = index % kChunks * 8;
    const bf16* from = q + rows.offset(row) * HD + column;
    bf16* place = to + row * kStride<HD> + column;
    if constexpr (F != KvFormat::fp16) {
      copy_async16(place, from, true);
    } else {
      const uint4 v = load_activation(from);
      *reinterpret_cast<uint4*>(place) = make_uint4(operand_from_bf16<F>(v.x), operand_from_bf16<F>(v.y),
                                                    operand_from_bf16<F>(v.z), operand_from_bf16<F>(v.w));
    }
  }
}

template <int HD, KvFormat F, int kRowTiles>
__global__ void __launch_bounds__(kThreads, kRowTiles == 1 && HD <= 128 ? 3 : 2)
    prefill_attention_kernel(const Params p) {
  using Element = typename Kv<F>::Element;
  constexpr int kRows = kWarps * kRowTiles * 16;
  constexpr int kOutTiles = HD / 8;  // of the output's dims
  constexpr int kScoreTiles = kTile / 8;
  extern __shared__ uint4 shared_memory[];
  bf16* queries = reinterpret_cast<bf16*>(shared_memory);
  bf16* key_tile = queries + kRows * kStride<HD>;
  bf16* value_tile = key_tile + kTile * kStride<HD>;
  start_dependents();
  wait_for_predecessor();

  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int g = lane >> 2, t = lane & 3;
  const Rows rows(p, kRows);
  if (rows.first >= rows.count) return;
  const int lowest = rows.position(0), end = rows.position(kRows - 1) + 1;
  const int begin = p.window > 0 ? max(0, lowest - p.window + 1) / kTile * kTile : 0;
  // This thread's share of a tile.
  const int copied_row = threadIdx.x / kRowThreads<HD>, copied_column = threadIdx.x % kRowThreads<HD> * 8;
  const std::size_t head_size = static_cast<std::size_t>(p.capacity) * HD;
  const Element* from = static_cast<const Element*>(p.cache) +
                        (static_cast<std::size_t>(p.slots[blockIdx.z]) * 2 * p.num_kv_heads + blockIdx.x) * head_size +
                        static_cast<std::size_t>(begin + copied_row) * HD + copied_column;
  bf16* copied = key_tile + copied_row * kStride<HD> + copied_column;

  fetch_queries<HD, F, kRows>(queries, p.q, rows);
  fetch_tile<HD, F>(copied, from, end - begin - copied_row, p.cache);
  commit_copies();

  const int warp_row = warp * kRowTiles * 16;
  float out[kRowTiles][kOutTiles][4] = {};
  float top[kRowTiles][2], total[kRowTiles][2] = {};  // before and after scaling
#pragma unroll
  for (int m = 0; m < kRowTiles; m++) top[m][0] = top[m][1] = -1e30f;  // finite: a row without scores yet gives no NaN

  // What a lane's address adds in ldmatrix: of a 16 x 16 tile of queries or values, and of two 8 x 16 tiles of keys.
  const bf16* query_from = queries + (warp_row + (lane & 15)) * kStride<HD> + (lane >> 4) * 8;
  const bf16* key_from = key_tile + ((lane >> 4) * 8 + (lane & 7)) * kStride<HD> + ((lane >> 3) & 1) * 8;
  const bf16* value_from = value_tile + (lane & 15) * kStride<HD> + (lane >> 4) * 8;

  for (int tile = begin; tile < end; tile += kTile, from += kTile * HD) {
    wait_for_copies<0>();
    __syncthreads();  // the keys are there, and all warps are done with the values of the tile before
    fetch_tile<HD, F>(copied + kTile * kStride<HD>, from + p.values_offset, end - tile - copied_row, p.cache);
    commit_copies();

    float scores[kRowTiles][kScoreTiles][4] = {};
#pragma unroll
    for (int s = 0; s < HD / 16; s++) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; m++) load_matrices(a[m], query_from + m * 16 * kStride<HD> + s * 16);
#pragma unroll
      for (int n = 0; n < kScoreTiles; n += 2) {
        uint32_t b[4];
        load_matrices(b, key_from + n * 8 * kStride<HD> + s * 16);
#pragma unroll
        for (int m = 0; m < kRowTiles; m++) {
          operand_mma<F>(scores[m][n], a[m], b[0], b[1]);
          operand_mma<F>(scores[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
    wait_for_copies<0>();
    __syncthreads();  // the values are there, and all warps are done with the keys
    if (tile + kTile < end) {
      fetch_tile<HD, F>(copied, from + kTile * HD, end - tile - kTile - copied_row, p.cache);
      commit_copies();
    }

    if (tile + kTile - 1 > lowest || (p.window > 0 && tile < end - p.window)) {
      const Rows again(p, kRows);
#pragma unroll
      for (int m = 0; m < kRowTiles; m++) {
        const int first = warp_row + m * 16 + g, positions[2] = {again.position(first), again.position(first + 8)};
#pragma unroll
        for (int n = 0; n < kScoreTiles; n++) {
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const int at = tile + n * 8 + 2 * t + (i & 1), own = positions[i >> 1];
            if (at > own || (p.window > 0 && at <= own - p.window)) scores[m][n][i] = -INFINITY;
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kRowTiles; m++) {
      float shrink[2], offset[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float higher = top[m][i];
#pragma unroll
        for (int n = 0; n < kScoreTiles; n++) {
          higher = fmaxf(higher, fmaxf(scores[m][n][2 * i], scores[m][n][2 * i + 1]));
        }
        higher = fmaxf(higher, __shfl_xor_sync(kAllLanes, higher, 1));
        higher = fmaxf(higher, __shfl_xor_sync(kAllLanes, higher, 2));
        shrink[i] = exp2_fast((top[m][i] - higher) * p.scale);
        offset[i] = -higher * p.scale;
        top[m][i] = higher;
      }
      float sums[2] = {};
#pragma unroll
      for (int n = 0; n < kScoreTiles; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          scores[m][n][i] = exp2_fast(fmaf(scores[m][n][i], p.scale, offset[i >> 1]));
          sums[i >> 1] += scores[m][n][i];
        }
      }
      // Written as one operation, so that every instance of this kernel rounds once here.
#pragma unroll
      for (int i = 0; i < 2; i++) total[m][i] = fmaf(total[m][i], shrink[i], sums[i]);
#pragma unroll
      for (int d = 0; d < kOutTiles; d++) {
#pragma unroll
        for (int i = 0; i < 4; i++) out[m][d][i] *= shrink[i >> 1];
      }
    }
#pragma unroll
    for (int s = 0; s < kTile / 16; s++) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; m++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const float* two = &scores[m][2 * s + (j >> 1)][2 * (j & 1)];
          a[m][j] = operand_pack<F>(two[0], two[1]);
        }
      }
#pragma unroll
      for (int d = 0; d < kOutTiles; d += 2) {
        uint32_t b[4];
        load_matrices_transposed(b, value_from + s * 16 * kStride<HD> + d * 8);
#pragma unroll
        for (int m = 0; m < kRowTiles; m++) {
          operand_mma<F>(out[m][d], a[m], b[0], b[1]);
          operand_mma<F>(out[m][d + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  const Rows again(p, kRows);
#pragma unroll
  for (int m = 0; m < kRowTiles; m++) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float sum = total[m][i];
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      const int row = warp_row + m * 16 + g + 8 * i;
      if (again.first + row >= again.count) continue;
      const float inverse = 1.0f / sum;
      bf16* to = p.out + again.offset(row) * HD + 2 * t;
#pragma unroll
      for (int d = 0; d < kOutTiles; d++) {
        *reinterpret_cast<uint32_t*>(to + d * 8) =
            pack_bf16(out[m][d][2 * i] * inverse, out[m][d][2 * i + 1] * inverse);
      }
    }
  }
}

template <int HD, KvFormat F, int kRowTiles>
void launch_rows(const PrefillAttentionArgs& args, const Params& p, cudaStream_t stream, bool pdl) {
  const auto kernel = prefill_attention_kernel<HD, F, kRowTiles>;
  constexpr std::size_t kBytes = kSharedBytes<HD, kRowTiles>;
  static_assert(kBytes <= 99 * 1024);
  EDGELLM_CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kBytes)));
  const int num_rows = args.max_tokens * (args.num_heads / args.kv.num_kv_heads);
  // Blocks start in this order: the late rows of all heads, which have the longest way, before the early ones of any.
  const dim3 grid(args.kv.num_kv_heads, ceil_div(num_rows, kWarps * kRowTiles * 16), args.num_sequences);
  assert(grid.y <= 65535);
  launch(kernel, grid, dim3(kThreads), kBytes, stream, pdl, p);
}

template <int HD, KvFormat F>
void launch_prefill(const PrefillAttentionArgs& args, const Params& p, cudaStream_t stream, bool pdl) {
  // A multiprocessor takes two blocks of the larger kind; fewer than that, and smaller ones share the work better.
  const int num_rows = args.max_tokens * (args.num_heads / args.kv.num_kv_heads);
  constexpr int kMost = kMostRowTiles<HD>;
  const int num_large = ceil_div(num_rows, kWarps * kMost * 16) * args.kv.num_kv_heads * args.num_sequences;
  if (num_large >= 2 * device_traits().num_sms) return launch_rows<HD, F, kMost>(args, p, stream, pdl);
  launch_rows<HD, F, 1>(args, p, stream, pdl);
}

template <int HD>
void launch_format(const PrefillAttentionArgs& args, const Params& p, cudaStream_t stream, bool pdl) {
  if (args.kv.format == KvFormat::fp8) return launch_prefill<HD, KvFormat::fp8>(args, p, stream, pdl);
  if (args.kv.format == KvFormat::fp16) return launch_prefill<HD, KvFormat::fp16>(args, p, stream, pdl);
  launch_prefill<HD, KvFormat::bf16>(args, p, stream, pdl);
}

}  // namespace

void prefill_attention_async(const PrefillAttentionArgs& args, cudaStream_t stream, bool pdl) {
  assert(args.num_heads % args.kv.num_kv_heads == 0);
  const Params p = {
      args.q,           args.kv.data,
      args.starts,      args.slots,
      args.positions,   args.out,
      args.num_heads,   args.kv.num_kv_heads,
      args.kv.capacity, static_cast<std::size_t>(args.kv.num_kv_heads) * args.kv.capacity * args.kv.head_dim,
      args.window,      args.scale * 1.4426950408889634f};
  switch (args.kv.head_dim) {
    case 64:
      return launch_format<64>(args, p, stream, pdl);
    case 80:
      return launch_format<80>(args, p, stream, pdl);
    case 96:
      return launch_format<96>(args, p, stream, pdl);
    case 128:
      return launch_format<128>(args, p, stream, pdl);
    case 256:
      return launch_format<256>(args, p, stream, pdl);
    default:
      throw std::invalid_argument("head_dim " + std::to_string(args.kv.head_dim) +
                                  " has no attention kernel; there are 64, 80, 96, 128 and 256");
  }
}

}  // namespace edgellm::kernels
