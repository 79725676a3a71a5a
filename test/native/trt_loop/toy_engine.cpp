#include "toy_engine.hpp"

#include <cuda_fp16.h>

#include <cmath>
#include <map>
#include <set>
#include <string>

#include "stand_in.hpp"

using edgellm::TrtRole;
using stand_in::require;

namespace toy {
namespace {

// The bound tensors of one enqueue.
struct Bound {
  std::map<std::string, std::vector<std::int64_t>> shapes;
  std::map<std::string, void*> addresses;

  template <class T>
  T* get(const std::string& name) const {
    return static_cast<T*>(addresses.at(name));
  }
  // A value of the cache: token `place` of row `row`, in the first channel of the first head.
  __half& cell(int layer, int which, std::int64_t row, std::int64_t place) const {
    const std::string at = std::to_string(layer);
    const bool together = addresses.contains("past_kv" + at);
    const std::size_t one = std::size_t{kKvHeads} * kCapacity * kHeadDim;
    auto* data = get<__half>(together ? "past_kv" + at : (which == 0 ? "past_key" : "past_value") + at);
    const std::size_t start =
        together ? static_cast<std::size_t>(2 * row + which) * one : static_cast<std::size_t>(row) * one;
    return data[start + static_cast<std::size_t>(place) * kHeadDim];
  }
};

float adapter_of(const Bound& bound, int layer) {
  const std::string a = "lora_a" + std::to_string(layer), b = "lora_b" + std::to_string(layer);
  const std::int64_t rank = bound.shapes.at(a)[1];
  require(rank == bound.shapes.at(b)[0], "A and B of different ranks");
  float sum = 0.0F;
  for (std::int64_t r = 0; r < rank; ++r) {
    sum += __half2float(bound.get<__half>(a)[r]) * __half2float(bound.get<__half>(b)[r * kHidden]);
  }
  return sum;
}

// What a token sees of the cache, and where: a place's own position is that of the new token in it, if there is one.
class View {
 public:
  View(const Bound& bound, std::int64_t row, int window) : bound_(bound), row_(row), window_(window) {
    length_ = bound.shapes.at("embeds")[1];
    first_ = bound.get<std::int64_t>("write_indices")[row / length_];
  }
  bool sees(std::int64_t place) const {
    const std::string mask = "mask." + std::to_string(window_);
    if (bound_.addresses.contains(mask)) {
      require(
          bound_.shapes.at(mask) == std::vector<std::int64_t>({bound_.shapes.at("embeds")[0], 1, length_, kCapacity}),
          "a mask of another shape");
      const float value = __half2float(bound_.get<__half>(mask)[row_ * kCapacity + place]);
      require(value == 0.0F || value == -65504.0F, "a mask that neither shows nor hides");
      return value == 0.0F;
    }
    const bool near = window_ == 0 || position_of(place) > position() - window_;
    if (bound_.addresses.contains("tree_masks") && length_ > 1 && place >= first_) {
      const auto bits = static_cast<std::uint64_t>(bound_.get<std::int64_t>("tree_masks")[row_]);
      return near && place < first_ + length_ && (bits >> (place - first_) & 1) != 0;
    }
    return near && place <= position();
  }
  std::int64_t position_of(std::int64_t place) const {
    const bool is_new = place >= first_ && place < first_ + length_;
    return is_new ? bound_.get<std::int64_t>("positions")[row_ / length_ * length_ + place - first_] : place;
  }

 private:
  std::int64_t position() const { return bound_.get<std::int64_t>("positions")[row_]; }

  const Bound& bound_;
  std::int64_t row_;
  int window_;
  std::int64_t length_ = 0;
  std::int64_t first_ = 0;
};

void compute(const Bound& bound) {
  const std::int64_t batch = bound.shapes.at("embeds")[0], length = bound.shapes.at("embeds")[1];
  const auto* embeds = bound.get<__half>("embeds");
  const auto* places = bound.get<std::int64_t>("write_indices");
  for (std::int64_t row = 0; row < batch * length; ++row) {
    const std::int64_t place = places[row / length] + row % length;
    require(place >= 0 && place < kCapacity, "a place outside the cache");
    for (int layer = 0; layer < kLayers; ++layer) {
      for (const int which : {0, 1}) bound.cell(layer, which, row / length, place) = embeds[row * kHidden];
    }
  }
  for (std::int64_t i = 0; i < bound.shapes.at("logit_indices")[0]; ++i) {
    const std::int64_t row = bound.get<std::int64_t>("logit_indices")[i];
    require(row >= 0 && row < batch * length, "a row of logits outside the step");
    float score = adapter_of(bound, 0) + adapter_of(bound, kLayers - 1);
    const View all(bound, row, 0), near(bound, row, kWindow);
    for (std::int64_t place = 0; place < kCapacity; ++place) {
      const float key = __half2float(bound.cell(0, 0, row / length, place));
      const float value = __half2float(bound.cell(kLayers - 1, 1, row / length, place));
      require(!all.sees(place) || key == value, "keys and values of different tokens");
      if (all.sees(place)) score += static_cast<float>(all.position_of(place) % 5 + 1) * key;
      if (near.sees(place)) score += static_cast<float>(near.position_of(place) % 3) * value;
    }
    for (int v = 0; v < kVocab; ++v) {
      bound.get<float>("logits")[i * kVocab + v] = -std::abs(static_cast<float>(v - static_cast<int>(score) % kVocab));
    }
  }
}

}  // namespace

int value(int token) { return token % 7 + 1; }

int expected(const std::vector<int>& tokens, int adapter) {
  int score = 2 * adapter;
  for (std::size_t p = 0; p < tokens.size(); ++p) {
    score += static_cast<int>(p % 5 + 1) * value(tokens[p]);
    if (p + kWindow >= tokens.size()) score += static_cast<int>(p % 3) * value(tokens[p]);
  }
  return score % kVocab;
}

std::vector<edgellm::TrtTensor> tensors(bool together, bool trees) {
  std::vector<edgellm::TrtTensor> all = {{"embeds", TrtRole::embeds, -1, {-1, -1, kHidden}, 0, 0},
                                         {"positions", TrtRole::positions, -1, {-1, -1}, 0, 0},
                                         {"write_indices", TrtRole::write_indices, -1, {-1}, 0, 0},
                                         {"logit_indices", TrtRole::logit_indices, -1, {-1}, 0, 0},
                                         {"logits", TrtRole::logits, -1, {-1, kVocab}, 0, 0}};
  if (trees && together) all.push_back({"tree_masks", TrtRole::tree_masks, -1, {-1, -1}, 0});
  for (const int window : {0, kWindow}) {
    if (!trees || together) continue;
    all.push_back({"mask." + std::to_string(window), TrtRole::mask, -1, {-1, 1, -1, kCapacity}, 0, window});
  }
  const std::vector<std::int64_t> cache = {-1, kKvHeads, kCapacity, kHeadDim};
  for (int layer = 0; layer < kLayers; ++layer) {
    const std::string at = std::to_string(layer);
    if (together) {
      all.push_back({"past_kv" + at, TrtRole::past_kv, layer, {-1, 2, kKvHeads, kCapacity, kHeadDim}, 0});
      all.push_back({"present_kv" + at, TrtRole::present_kv, layer, {-1, 2, kKvHeads, kCapacity, kHeadDim}, 0});
    } else {
      all.push_back({"past_key" + at, TrtRole::past_key, layer, cache, 0});
      all.push_back({"present_key" + at, TrtRole::present_key, layer, cache, 0});
      all.push_back({"past_value" + at, TrtRole::past_value, layer, cache, 0});
      all.push_back({"present_value" + at, TrtRole::present_value, layer, cache, 0});
    }
    all.push_back({"lora_a" + at, TrtRole::lora_a, layer, {kHidden, -1}, kMaxRank});
    all.push_back({"lora_b" + at, TrtRole::lora_b, layer, {-1, kHidden}, kMaxRank});
  }
  return all;
}

}  // namespace toy

namespace edgellm {

struct TrtContext::State {
  toy::Bound bound;
  int profile = 0;
  bool changed = true;  // since the last enqueue: TensorRT does not let that be captured
};

TrtContext::TrtContext(std::unique_ptr<State> state) : state_(std::move(state)) {}
TrtContext::~TrtContext() = default;
TrtContext::TrtContext(TrtContext&&) noexcept = default;
TrtContext& TrtContext::operator=(TrtContext&&) noexcept = default;

void TrtContext::use_profile_async(int profile, cudaStream_t) {
  if (state_->profile == profile) return;
  state_->profile = profile;
  state_->bound.shapes.clear();
  state_->changed = true;
}

void TrtContext::set_shape(const std::string& name, std::span<const std::int64_t> dims) {
  std::vector<std::int64_t> shape(dims.begin(), dims.end());
  std::vector<std::int64_t>& known = state_->bound.shapes[name];
  state_->changed = state_->changed || known != shape;
  known = std::move(shape);
}

void TrtContext::set_address(const std::string& name, void* data) {
  require(reinterpret_cast<std::uintptr_t>(data) % 256 == 0, "an address that is not a multiple of 256");
  state_->bound.addresses[name] = data;
}

void TrtContext::enqueue_async(cudaStream_t) {
  require(!stand_in::is_capturing() || !state_->changed, "an enqueue is captured after a change of shapes");
  state_->changed = false;
  const auto& addresses = state_->bound.addresses;
  for (const auto& [name, data] : addresses) {
    if (name.starts_with("present_")) require(addresses.at("past_" + name.substr(8)) == data, "a cache out of place");
  }
  stand_in::launch([bound = state_->bound] { toy::compute(bound); });
}

struct TrtEngine::State {};

TrtEngine::TrtEngine(const std::string&, const std::vector<std::string>&, const std::string&) {}
TrtEngine::~TrtEngine() = default;
int TrtEngine::num_profiles() const noexcept { return 2; }
std::size_t TrtEngine::context_bytes() const noexcept { return 4096; }
TrtContext TrtEngine::make_context(std::byte*) { return TrtContext(std::make_unique<TrtContext::State>()); }

}  // namespace edgellm
