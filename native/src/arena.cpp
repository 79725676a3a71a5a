#include "edgellm/arena.hpp"

#include <stdexcept>

namespace edgellm {

void MemoryPlan::add(std::string_view group, const std::string& name, std::size_t num_bytes) {
  if (!entries_.emplace(name, Entry{total_, num_bytes}).second) {
    throw std::logic_error("planned twice: " + name);
  }
  const std::size_t padded = (num_bytes + kAlignment - 1) / kAlignment * kAlignment;
  total_ += padded;
  groups_[std::string(group)] += padded;
}

const MemoryPlan::Entry& MemoryPlan::entry(const std::string& name) const {
  const auto found = entries_.find(name);
  if (found == entries_.end()) throw std::logic_error("never planned: " + name);
  return found->second;
}

std::size_t MemoryPlan::offset(const std::string& name) const { return entry(name).offset; }

std::size_t MemoryPlan::size(const std::string& name) const { return entry(name).size; }

}  // namespace edgellm
