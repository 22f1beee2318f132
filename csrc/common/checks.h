// Checks of the packed layout, shared by the ops.
#pragma once
#include <cstdint>

namespace capo {

// Whether values [count + 1] rise from 0 to total without falling.
inline bool cumulative(const int64_t* values, int64_t count, int64_t total) {
  if (values[0] != 0 || values[count] != total) return false;
  for (int64_t i = 0; i < count; ++i)
    if (values[i + 1] < values[i]) return false;
  return true;
}

}  // namespace capo
