// A judge's reply -> what it says. The rule is stated by capo.critique.parse, which is its definition.
#pragma once
#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

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

// What a reply says.
struct Said {
  std::optional<bool> verdict;
  std::vector<int64_t> flagged;  // ascending, each once
};

// Reads one reply on `num_steps` steps, trusting its list. `said` is filled only if the reply counts. `reply` is UTF-8,
// of at most `max_reply` characters (half a character may stand in three bytes, as one); `nonce` is empty for plain
// tags.
Reason read_reply(std::string_view reply, std::string_view nonce, int64_t max_reply, int64_t num_steps, Said& said);

}  // namespace capo
