// Reads the JSON of a double's plan: objects, arrays, strings without \u, numbers and booleans.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace edgellm::nvinfer_double {

class Json {
 public:
  using Array = std::vector<Json>;
  using Object = std::map<std::string, Json, std::less<>>;

  // Throws std::invalid_argument that names the byte where it is not JSON.
  static Json parse(std::string_view text);

  // Each throws std::invalid_argument that names what was expected.
  const Json& at(std::string_view key) const;
  bool has(std::string_view key) const;
  const Object& object() const;
  const Array& array() const;
  const std::string& text() const;
  bool flag() const;
  double number() const;
  std::int64_t integer() const;
  std::vector<std::int64_t> integers() const;

 private:
  friend class JsonReader;
  std::variant<std::nullptr_t, bool, double, std::string, Array, Object> value_ = nullptr;
};

}  // namespace edgellm::nvinfer_double
