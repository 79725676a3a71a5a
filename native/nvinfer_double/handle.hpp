// What a caller of the double gets, deletes and calls: TensorRT's public class around an implementation of its ABI.
#pragma once

#include <memory>
#include <utility>

namespace edgellm::nvinfer_double {

// Interface: nvinfer1::IRuntime, …; Implementation: a class of its own that has `void set_handle(Interface*)`.
template <class Interface, class Implementation>
class Handle final : public Interface {
 public:
  explicit Handle(std::unique_ptr<Implementation> implementation) : implementation_(std::move(implementation)) {
    this->mImpl = implementation_.get();
    implementation_->set_handle(this);
  }

 private:
  std::unique_ptr<Implementation> implementation_;
};

// Counts the objects that must be deleted before the one that owns this: contexts before their engine, and so on.
class Dependents {
 public:
  class Ticket {
   public:
    explicit Ticket(std::shared_ptr<int> count) : count_(std::move(count)) { ++*count_; }
    Ticket(const Ticket&) = delete;
    Ticket& operator=(const Ticket&) = delete;
    ~Ticket() { --*count_; }

   private:
    std::shared_ptr<int> count_;
  };

  Ticket ticket() const { return Ticket(count_); }
  int count() const noexcept { return *count_; }

 private:
  std::shared_ptr<int> count_ = std::make_shared<int>(0);
};

}  // namespace edgellm::nvinfer_double
