#include "json.hpp"

#include <charconv>
#include <cmath>
#include <stdexcept>

namespace edgellm::nvinfer_double {

class JsonReader {
 public:
  explicit JsonReader(std::string_view text) : text_(text) {}

  Json read_all() {
    Json value = read(0);
    skip_space();
    if (at_ != text_.size()) fail("the end");
    return value;
  }

 private:
  static constexpr int kDeepest = 32;

  [[noreturn]] void fail(const std::string& expected) const {
    throw std::invalid_argument("the plan's JSON lacks " + expected + " at byte " + std::to_string(at_));
  }
  void skip_space() {
    while (at_ < text_.size() && std::string_view(" \n\r\t").find(text_[at_]) != std::string_view::npos) ++at_;
  }
  char peek() {
    skip_space();
    return at_ < text_.size() ? text_[at_] : '\0';
  }
  bool take(std::string_view word) {
    skip_space();
    if (!text_.substr(at_).starts_with(word)) return false;
    at_ += word.size();
    return true;
  }
  void expect(std::string_view word) {
    if (!take(word)) fail("'" + std::string(word) + "'");
  }

  Json read(int depth) {
    if (depth > kDeepest) fail("an end of nesting");
    Json result;
    const char next = peek();
    if (next == '{') {
      result.value_ = read_object(depth);
    } else if (next == '[') {
      result.value_ = read_array(depth);
    } else if (next == '"') {
      result.value_ = read_string();
    } else if (take("true")) {
      result.value_ = true;
    } else if (take("false")) {
      result.value_ = false;
    } else if (!take("null")) {
      double number = 0.0;
      const auto [end, error] = std::from_chars(text_.data() + at_, text_.data() + text_.size(), number);
      if (error != std::errc()) fail("a value");
      at_ = static_cast<std::size_t>(end - text_.data());
      result.value_ = number;
    }
    return result;
  }

  Json::Object read_object(int depth) {
    Json::Object object;
    expect("{");
    if (take("}")) return object;
    do {
      if (peek() != '"') fail("a key");
      std::string key = read_string();
      expect(":");
      object.insert_or_assign(std::move(key), read(depth + 1));
    } while (take(","));
    expect("}");
    return object;
  }

  Json::Array read_array(int depth) {
    Json::Array array;
    expect("[");
    if (take("]")) return array;
    do {
      array.push_back(read(depth + 1));
    } while (take(","));
    expect("]");
    return array;
  }

  std::string read_string() {
    std::string result;
    ++at_;  // the quote
    while (at_ < text_.size() && text_[at_] != '"') {
      if (text_[at_] != '\\') {
        result += text_[at_++];
        continue;
      }
      const char escaped = at_ + 1 < text_.size() ? text_[at_ + 1] : '\0';
      const std::size_t index = std::string_view("\"\\/nt").find(escaped);
      if (escaped == '\0' || index == std::string_view::npos) fail("an escape that this reader knows");
      result += "\"\\/\n\t"[index];
      at_ += 2;
    }
    if (at_ == text_.size()) fail("a closing quote");
    ++at_;
    return result;
  }

  std::string_view text_;
  std::size_t at_ = 0;
};

namespace {

template <class T, class Value>
const T& as(const Value& value, const char* what) {
  const T* found = std::get_if<T>(&value);
  if (found == nullptr) throw std::invalid_argument(std::string("a value of the plan is not ") + what);
  return *found;
}

}  // namespace

Json Json::parse(std::string_view text) { return JsonReader(text).read_all(); }

const Json& Json::at(std::string_view key) const {
  const auto found = object().find(key);
  if (found == object().end()) throw std::invalid_argument("the plan has no field '" + std::string(key) + "'");
  return found->second;
}

bool Json::has(std::string_view key) const { return object().contains(key); }
const Json::Object& Json::object() const { return as<Object>(value_, "an object"); }
const Json::Array& Json::array() const { return as<Array>(value_, "an array"); }
const std::string& Json::text() const { return as<std::string>(value_, "a string"); }
bool Json::flag() const { return as<bool>(value_, "true or false"); }
double Json::number() const { return as<double>(value_, "a number"); }

std::int64_t Json::integer() const {
  const double value = number();
  if (value != std::floor(value) || std::abs(value) > 9e15) throw std::invalid_argument("a number is not whole");
  return static_cast<std::int64_t>(value);
}

std::vector<std::int64_t> Json::integers() const {
  std::vector<std::int64_t> result;
  for (const Json& item : array()) result.push_back(item.integer());
  return result;
}

}  // namespace edgellm::nvinfer_double
