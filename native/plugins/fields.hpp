// A plugin's settings as TensorRT's fields: read from a node's attributes or a plan, handed out to be serialised.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace edgellm::plugins {

// One field of the struct S: `integer` or `real` says which member it is.
template <class S>
struct Field {
  const char* name;
  std::int32_t S::* integer;
  float S::* real;
  bool required;

  nvinfer1::PluginFieldType type() const {
    return integer ? nvinfer1::PluginFieldType::kINT32 : nvinfer1::PluginFieldType::kFLOAT32;
  }
};

inline void read_number(const nvinfer1::PluginField& field, std::int32_t& to) {
  using Type = nvinfer1::PluginFieldType;
  if (field.length != 1 || (field.type != Type::kINT32 && field.type != Type::kINT64)) {
    throw std::invalid_argument(std::string("field ") + field.name + " is not one INT32");
  }
  to = field.type == Type::kINT32 ? *static_cast<const std::int32_t*>(field.data)
                                  : static_cast<std::int32_t>(*static_cast<const std::int64_t*>(field.data));
}

inline void read_number(const nvinfer1::PluginField& field, float& to) {
  if (field.length != 1 || field.type != nvinfer1::PluginFieldType::kFLOAT32) {
    throw std::invalid_argument(std::string("field ") + field.name + " is not one FLOAT32");
  }
  to = *static_cast<const float*>(field.data);
}

// S by `fields`; throws std::invalid_argument for one that is unknown, of another type, or missing.
template <class S>
S read_fields(const std::vector<Field<S>>& fields, const nvinfer1::PluginFieldCollection* collection) {
  S settings;
  std::vector<bool> seen(fields.size());
  for (std::int32_t i = 0; collection && i < collection->nbFields; i++) {
    const nvinfer1::PluginField& given = collection->fields[i];
    if (!given.data) continue;  // an attribute that the node has not
    bool known = false;
    for (std::size_t j = 0; j < fields.size(); j++) {
      if (std::string(fields[j].name) != given.name) continue;
      known = seen[j] = true;
      if (fields[j].integer) {
        read_number(given, settings.*fields[j].integer);
      } else {
        read_number(given, settings.*fields[j].real);
      }
    }
    if (!known)
      throw std::invalid_argument(std::string("there is no field ") + given.name + "; export the model again");
  }
  for (std::size_t j = 0; j < fields.size(); j++) {
    if (fields[j].required && !seen[j]) {
      throw std::invalid_argument(std::string("the field ") + fields[j].name + " is missing; export the model again");
    }
  }
  return settings;
}

// TensorRT's list of `fields`, pointing into `settings`, or at nothing.
template <class S>
std::vector<nvinfer1::PluginField> list_fields(const std::vector<Field<S>>& fields, const S* settings) {
  std::vector<nvinfer1::PluginField> list;
  for (const Field<S>& field : fields) {
    const void* data = nullptr;
    if (settings && field.integer) data = &(settings->*field.integer);
    if (settings && field.real) data = &(settings->*field.real);
    list.emplace_back(field.name, data, field.type(), 1);
  }
  return list;
}

}  // namespace edgellm::plugins
