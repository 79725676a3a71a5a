// Random steps, runs, trees of drafts, prefixes and adapters through TrtDecoder over the toy engine; each token is
// compared with what a plain list of the sequence's tokens says. Prints how many were compared, and how many were
// wrong.
#include <cuda_fp16.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <limits>
#include <random>
#include <span>
#include <stdexcept>
#include <string>

#include "edgellm/cuda_try.hpp"
#include "stand_in.hpp"
#include "toy_engine.hpp"

namespace {

using edgellm::RunSequence;
using edgellm::SequenceStep;

constexpr int kSlots = 10, kMostNodes = 5;  // more slots than one batch has sequences
static_assert(kSlots > edgellm::kMaxBatch);

class Walk {
 public:
  Walk(bool batched, bool together, bool trees, unsigned seed)
      : random_(seed), trees_(trees), decoder_(engine_, config(batched, together, trees)) {
    std::vector<__half> table(static_cast<std::size_t>(toy::kVocab * toy::kHidden));
    for (std::size_t i = 0; i < table.size(); ++i) {
      table[i] = __float2half(static_cast<float>(toy::value(static_cast<int>(i) / toy::kHidden)));
    }
    edgellm::HostTensor host;
    host.data = table.data();
    host.dtype = edgellm::DType::kFloat16;
    host.shape = edgellm::Shape{toy::kVocab, toy::kHidden};
    decoder_.load_embedding(host, nullptr);
    decoder_.finish_load();
  }

  void make_current() const { decoder_.make_current(); }

  void round() {
    change_adapters();
    const std::vector<int> slots = some_slots();
    step(slots);
    run(slots);
    if (trees_) verify(slots.front());
    copy();
  }

  // Whether rows of logits that somebody holds stay what they were when a step needs a larger buffer.
  bool rows_outlive_their_buffer() {
    const std::vector<std::int32_t> few = {1, 2}, many(24, 3);
    decoder_.step(std::vector<SequenceStep>{{0, few, 0, 2}});
    const auto memory = decoder_.logits_memory();
    const float* rows = decoder_.logits();
    const std::vector<float> kept(rows, rows + 2 * toy::kVocab);
    decoder_.step(std::vector<SequenceStep>{{0, many, 0, 24}});
    return decoder_.logits() != rows && std::equal(kept.begin(), kept.end(), rows);
  }

  // How many of six calls with values that fit no slot, no run and no memory are refused, and change nothing.
  int refused_values() {
    constexpr int kLargest = std::numeric_limits<int>::max();
    const std::vector<std::int32_t> token = {1}, slot = {0}, at = {1}, moves = {1}, many(40, 3);
    int refused = 0;
    const auto count = [&](auto&& call) {
      try {
        call();
      } catch (const std::invalid_argument&) {
        ++refused;
      }
    };
    const auto next = [&](std::span<const std::int32_t> tokens) {
      const auto size = static_cast<int>(tokens.size());
      decoder_.step(std::vector<SequenceStep>{{0, tokens, 0, size}});
      const float* last = decoder_.logits() + (size - 1) * toy::kVocab;
      return static_cast<int>(std::max_element(last, last + toy::kVocab) - last);
    };
    const int first = next(token);
    count([&] { decoder_.step(std::vector<SequenceStep>{{0, token, kLargest}}); });
    count([&] { decoder_.verify_tree(0, kLargest, token, {}); });
    count([&] { decoder_.accept_path(0, kLargest, moves); });
    count([&] { decoder_.accept_path(0, toy::kCapacity - 2, moves); });
    count([&] { decoder_.time_run(slot, at, token, -1, {}, {}); });
    stand_in::fill_host_memory(true);
    count([&] { decoder_.step(std::vector<SequenceStep>{{0, many, 0, 40}}); });
    stand_in::fill_host_memory(false);
    const bool unchanged = next(token) == first && next(many) == toy::expected({many.begin(), many.end()}, 0);
    return unchanged ? refused : -refused;
  }

  // How many of five calls are refused after a device error, in the words of the first.
  int refused_after_an_error() {
    const std::vector<std::int32_t> token = {1};
    const std::vector<SequenceStep> batch = {{0, token, 0}};
    const std::vector<std::int32_t> stays = {0}, moves = {1};
    stand_in::fail_from_now_on();
    const auto error_of = [](auto&& call) -> std::string {
      try {
        call();
      } catch (const edgellm::CudaError& error) {
        return error.what();
      }
      return "";
    };
    const std::string first = error_of([&] { decoder_.step(batch); });
    int refused = 0;
    const auto count = [&](auto&& call) {
      refused += !first.empty() && error_of(call).find(first) != std::string::npos;
    };
    count([&] { decoder_.step(batch); });
    count([&] { decoder_.copy_prefix(0, 1, 1); });
    count([&] { decoder_.verify_tree(0, 1, token, {}); });
    count([&] { decoder_.accept_path(0, 1, stays); });
    count([&] { decoder_.accept_path(0, 1, moves); });
    return refused;
  }

  int compared() const { return compared_; }
  int wrong() const { return wrong_; }
  // How many steps had more single tokens than one batch has sequences.
  int over_batch() const { return over_batch_; }
  std::pair<std::size_t, std::size_t> made() const { return decoder_.num_contexts_and_graphs(); }

 private:
  struct Sequence {
    std::vector<int> tokens;  // whose keys are in the slot
    int adapter = 0;
  };

  static edgellm::TrtDecoderConfig config(bool batched, bool together, bool trees) {
    edgellm::TrtDecoderConfig config;
    edgellm::DecoderConfig& loop = config.loop;
    loop.num_layers = toy::kLayers;
    loop.hidden_size = toy::kHidden;
    loop.num_heads = loop.num_kv_heads = toy::kKvHeads;
    loop.head_dim = toy::kHeadDim;
    loop.vocab_size = toy::kVocab;
    loop.kv_format = edgellm::kernels::KvFormat::fp16;
    loop.embedding_format = edgellm::kernels::WeightFormat::fp16;
    loop.num_slots = kSlots;
    loop.capacity = toy::kCapacity - (batched ? 1 : 0);
    loop.max_tokens = 10;
    loop.max_verify_tokens = trees ? kMostNodes : 0;
    loop.max_adapters = 2;
    config.engine_capacity = toy::kCapacity;
    config.max_batch = batched ? 4 : 1;
    config.decode_tokens = kMostNodes;
    config.max_logits = 6;
    config.tensors = toy::tensors(together, trees);
    return config;
  }

  int below(int limit) { return static_cast<int>(random_() % static_cast<unsigned>(limit)); }

  std::vector<int> some_slots() {
    std::vector<int> slots(kSlots);
    for (int i = 0; i < kSlots; ++i) slots[static_cast<std::size_t>(i)] = i;
    std::shuffle(slots.begin(), slots.end(), random_);
    slots.resize(static_cast<std::size_t>(below(kSlots) + 1));
    return slots;
  }

  Sequence& at(int slot) { return sequences_[static_cast<std::size_t>(slot)]; }
  int addend(const Sequence& sequence) const { return adapters_[static_cast<std::size_t>(sequence.adapter)]; }

  void compare(int token, const Sequence& sequence) {
    ++compared_;
    wrong_ += token != toy::expected(sequence.tokens, addend(sequence)) ? 1 : 0;
  }

  void change_adapters() {
    if (below(8) != 0) return;
    const int index = below(2) + 1;
    for (Sequence& sequence : sequences_) {
      if (sequence.adapter == index) sequence = {};
    }
    int& known = adapters_[static_cast<std::size_t>(index)];
    if (known != 0 && below(2) == 0) {
      decoder_.unload_adapter(index);
      known = 0;
      return;
    }
    const int rank = below(toy::kMaxRank) + 1;
    known = rank * (below(5) + 1);  // A of ones, B of known / rank
    std::vector<__half> a(static_cast<std::size_t>(toy::kHidden * rank), __float2half(1.0F));
    std::vector<__half> b(a.size(), __float2half(static_cast<float>(known / rank)));
    std::vector<edgellm::TrtLoraTensor> tensors;
    for (int layer = 0; layer < toy::kLayers; ++layer) {
      tensors.push_back({"lora_a" + std::to_string(layer), rank, std::as_bytes(std::span(a))});
      tensors.push_back({"lora_b" + std::to_string(layer), rank, std::as_bytes(std::span(b))});
    }
    decoder_.load_adapter(index, tensors);
  }

  void step(const std::vector<int>& slots) {
    std::vector<std::vector<std::int32_t>> fed;
    const bool one_each = below(3) == 0;  // or there are seldom more than a batch has
    for (const int slot : slots) {
      Sequence& sequence = at(slot);
      if (sequence.tokens.size() > 40 || below(8) == 0) sequence = {};
      if (sequence.tokens.empty()) {
        const int adapter = below(3);
        sequence.adapter = adapters_[static_cast<std::size_t>(adapter)] != 0 ? adapter : 0;
      }
      const bool several = !one_each && (sequence.tokens.empty() || below(3) == 0);
      const int length = several ? below(18) + 1 : 1;
      std::vector<std::int32_t> tokens;
      for (int i = 0; i < length; ++i) tokens.push_back(below(toy::kVocab));
      fed.push_back(std::move(tokens));
    }
    std::vector<SequenceStep> batch;
    for (std::size_t i = 0; i < slots.size(); ++i) {
      const Sequence& sequence = at(slots[i]);
      const int wanted = below(4) == 0 ? 0 : below(static_cast<int>(fed[i].size())) + 1;
      batch.push_back({slots[i], fed[i], static_cast<int>(sequence.tokens.size()), wanted, sequence.adapter});
    }
    const auto is_single = [](const auto& tokens) { return tokens.size() == 1; };
    over_batch_ += std::count_if(fed.begin(), fed.end(), is_single) > edgellm::kMaxBatch ? 1 : 0;
    decoder_.step(batch);
    const float* row = decoder_.logits();
    for (std::size_t i = 0; i < slots.size(); ++i) {
      Sequence& sequence = at(slots[i]);
      for (std::size_t k = 0; k < fed[i].size(); ++k) {
        sequence.tokens.push_back(fed[i][k]);
        if (k + static_cast<std::size_t>(batch[i].num_logits) < fed[i].size()) continue;
        compare(static_cast<int>(std::max_element(row, row + toy::kVocab) - row), sequence);
        row += toy::kVocab;
      }
    }
  }

  void run(std::vector<int> slots) {
    std::shuffle(slots.begin(), slots.end(), random_);
    std::erase_if(slots, [this](int slot) { return at(slot).tokens.empty() || at(slot).tokens.size() > 45; });
    if (slots.size() > edgellm::kMaxBatch) slots.resize(edgellm::kMaxBatch);
    if (slots.empty()) return;
    std::vector<RunSequence> sequences;
    for (const int slot : slots) {
      RunSequence sequence;
      sequence.slot = slot;
      sequence.position = static_cast<int>(at(slot).tokens.size()) - 1;
      sequence.token_id = at(slot).tokens.back();
      sequence.row.num_top = -1;
      sequence.row.repetition_penalty = 1.0F;
      sequence.adapter = at(slot).adapter;
      sequences.push_back(sequence);
    }
    decoder_.start_run(sequences);
    const int num_steps = below(5) + 1;
    for (int i = 0; i <= num_steps; ++i) {
      if (i < num_steps) decoder_.launch_run_step_async();
      if (i == 0) continue;
      const edgellm::RunStep read = decoder_.read_run_step();
      for (std::size_t k = 0; k < slots.size(); ++k) {
        compare(read.tokens[k], at(slots[k]));
        at(slots[k]).tokens.push_back(read.tokens[k]);
      }
    }
    for (const int slot : slots) at(slot).tokens.pop_back();  // drawn last, and never computed
  }

  // A random tree behind a slot's tokens, and one of its paths kept, or none.
  void verify(int slot) {
    Sequence& sequence = at(slot);
    if (sequence.tokens.empty() || sequence.tokens.size() > 45) return;
    const auto position = static_cast<int>(sequence.tokens.size());
    const int count = below(kMostNodes) + 1;
    std::vector<std::int32_t> tokens, parents;
    std::vector<std::vector<std::int32_t>> paths;  // nodes from a root to each
    for (int i = 0; i < count; ++i) {
      tokens.push_back(below(toy::kVocab));
      parents.push_back(below(i + 1) - 1);
      paths.push_back(parents.back() < 0 ? std::vector<std::int32_t>{}
                                         : paths[static_cast<std::size_t>(parents.back())]);
      paths.back().push_back(i);
    }
    const auto taken = [&](const std::vector<std::int32_t>& path) {
      Sequence longer = sequence;
      for (const std::int32_t node : path) longer.tokens.push_back(tokens[static_cast<std::size_t>(node)]);
      return longer;
    };
    decoder_.verify_tree(slot, position, tokens, parents, sequence.adapter);
    const float* row = decoder_.logits();
    for (const auto& path : paths) {
      compare(static_cast<int>(std::max_element(row, row + toy::kVocab) - row), taken(path));
      row += toy::kVocab;
    }
    if (below(4) == 0) return;
    const auto& kept = paths[static_cast<std::size_t>(below(count))];
    decoder_.accept_path(slot, position, kept);
    sequence = taken(kept);
  }

  void copy() {
    const int source = below(kSlots), target = below(kSlots), restored = below(kSlots);
    const auto length = static_cast<int>(at(source).tokens.size());
    if (length == 0) return;
    if (source != target) decoder_.copy_prefix(source, target, length);
    at(target) = at(source);
    std::vector<std::byte> saved(static_cast<std::size_t>(length) * decoder_.config().kv_bytes_per_token());
    decoder_.save_prefix(source, length, saved.data());
    decoder_.load_prefix(restored, length, saved.data());
    at(restored) = at(source);
  }

  std::mt19937 random_;
  bool trees_;
  edgellm::TrtEngine engine_{"", {}};
  edgellm::TrtDecoder decoder_;
  std::array<Sequence, kSlots> sequences_;
  std::array<int, 3> adapters_{};  // what each adds; 0: not loaded
  int compared_ = 0;
  int wrong_ = 0;
  int over_batch_ = 0;
};

}  // namespace

int main() {
  int wrong = 0;
  for (const bool batched : {false, true}) {
    for (const bool together : {false, true}) {
      for (const bool trees : {false, true}) {
        cudaSetDevice(1);
        Walk walk(batched, together, trees, batched ? 1 : 2);
        cudaSetDevice(0);  // as in a thread that began later
        int device = -1;
        for (const bool own : {false, true}) {  // and as in one that took the decoder's for good
          if (own) walk.make_current();
          for (int i = 0; i < 125; ++i) walk.round();
          cudaGetDevice(&device);
          if (device != (own ? 1 : 0)) std::printf("the thread's GPU is %d\n", device);
        }
        const auto [contexts, graphs] = walk.made();
        std::printf("batched %d together %d trees %d: %d of %d wrong; %zu contexts, %zu graphs; %d steps of 9 or 10\n",
                    batched, together, trees, walk.wrong(), walk.compared(), contexts, graphs, walk.over_batch());
        wrong += walk.wrong();
      }
    }
  }
  cudaSetDevice(1);
  Walk last(true, true, true, 3);
  cudaSetDevice(0);
  const bool outlive = last.rows_outlive_their_buffer();
  const int values = last.refused_values();
  int device = -1;
  cudaGetDevice(&device);
  std::printf("values refused: %d of 6; the caller's GPU: %d\n", values, device);
  std::printf("rows outlive their buffer: %d; refused after an error: %d of 5\n", outlive,
              last.refused_after_an_error());
  return wrong == 0 ? 0 : 1;
}
