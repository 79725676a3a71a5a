// TensorRT's runtime library, found at run time: the module loads, and says what is missing, where there is none.
#pragma once

#include <string>
#include <vector>

namespace edgellm {

// Whether this module was compiled against NvInfer.h; without it nothing below can be loaded.
bool built_with_tensorrt() noexcept;
// "10.14" of those headers; empty without them.
std::string tensorrt_header_version();

// What was found when the candidates were tried in turn.
struct TrtLibraryInfo {
  std::string path;          // of the candidate that loaded; empty: none did
  std::vector<int> version;  // (major, minor, patch), then its build number where the library tells it
  std::string reason;        // why none did, or why the one that did cannot be used
};

// Tries `candidates`, file names or paths, in turn; the first that loads stays loaded until the process ends. Needs no
// GPU and creates nothing. Never throws.
TrtLibraryInfo find_tensorrt(const std::vector<std::string>& candidates);

}  // namespace edgellm
