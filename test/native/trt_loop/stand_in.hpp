// What the stand-ins of this directory share.
#pragma once

#include <functional>
#include <vector>

namespace stand_in {

using Launch = std::function<void()>;

void launch(Launch body);  // now, or into the capture under way
bool is_capturing();
void fail_from_now_on();                            // as a device does: whoever waits for it gets an error
void fill_host_memory(bool full);                   // whether pinned memory is taken no more
void require(bool condition, const char* message);  // ends the program with a message

}  // namespace stand_in
