// All device memory of a decoder is planned by name first, then taken in one allocation and handed out by name.
#pragma once

#include <cstddef>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "edgellm/memory.hpp"

namespace edgellm {

// Names, sizes and offsets of everything in an arena, grouped for the report.
class MemoryPlan {
 public:
  static constexpr std::size_t kAlignment = 256;

  // group: "weights", "kv_cache", "workspace", …; names are unique.
  void add(std::string_view group, const std::string& name, std::size_t num_bytes);

  // What the driver will take beside, for kernels' code and captured graphs; no part of total().
  void set_aside(std::size_t num_bytes) noexcept { set_aside_ = num_bytes; }

  std::size_t total() const noexcept { return total_; }
  std::size_t set_aside() const noexcept { return set_aside_; }
  std::size_t offset(const std::string& name) const;  // throws std::logic_error for a name that was never planned
  std::size_t size(const std::string& name) const;
  bool contains(const std::string& name) const { return entries_.contains(name); }
  const std::map<std::string, std::size_t, std::less<>>& groups() const noexcept { return groups_; }

 private:
  struct Entry {
    std::size_t offset;
    std::size_t size;
  };
  const Entry& entry(const std::string& name) const;

  std::map<std::string, Entry> entries_;
  std::map<std::string, std::size_t, std::less<>> groups_;
  std::size_t total_ = 0;
  std::size_t set_aside_ = 0;
};

// The memory of a plan.
class Arena {
 public:
  Arena() = default;
  explicit Arena(MemoryPlan plan) : plan_(std::move(plan)), buffer_(plan_.total()) {}

  template <typename T>
  T* get(const std::string& name) const {
    return reinterpret_cast<T*>(buffer_.data() + plan_.offset(name));
  }
  const MemoryPlan& plan() const noexcept { return plan_; }

 private:
  MemoryPlan plan_;
  DeviceBuffer buffer_;
};

}  // namespace edgellm
