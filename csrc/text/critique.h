// A judge's reply -> votes. The rule is stated by capo.critique.parse, which is its definition.
#pragma once
#include <cstdint>
#include <string_view>

namespace capo {

// Why a reply does not count; the order of capo.critique.Reason, from 1.
enum class Reason : uint8_t {
  kNone,
  kEmptyReply,
  kTooLong,
  kNoAnswer,
  kNoList,
  kUnclosedList,
  kBadIndex,
  kOutOfRange,
  kConflicting,
};

// Reads one reply on `num_steps` steps, trusting its list. Writes the vote on step i, 0 or 1, to votes[i * stride], and
// nothing if the reply does not count. `reply` is UTF-8, of at most `max_reply` characters (half a character may stand
// in three bytes, as one); `nonce` is empty for plain tags.
Reason read_reply(std::string_view reply, std::string_view nonce, int64_t max_reply, int64_t num_steps, int8_t* votes,
                  int64_t stride);

}  // namespace capo
