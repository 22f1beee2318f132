#include "text/segment.h"

#include <algorithm>
#include <atomic>
#include <type_traits>

#include "common/parallel.h"

namespace capo {
namespace {

enum Flag : uint8_t {
  kSpecial = 1,        // contributes no text
  kEos = 2,            // special, and ends a response
  kContent = 4,        // has a byte that is not white space
  kNewline = 8,        // has a \n or \r
  kContinuation = 16,  // begins with a UTF-8 continuation byte
  kEmpty = 32,         // text, but of no bytes
};

// A thread is worth starting for this many tokens.
constexpr int64_t kTokensPerPiece = 1 << 17;

bool is_blank(uint8_t byte) { return byte == ' ' || (byte >= '\t' && byte <= '\r'); }

bool is_continuation(uint8_t byte) { return (byte & 0xC0) == 0x80; }

// Bytes of the character that begins with `lead`; 1 for what begins none.
int character_length(uint8_t lead) {
  if (lead >= 0xC2 && lead <= 0xDF) return 2;
  if (lead >= 0xE0 && lead <= 0xEF) return 3;
  if (lead >= 0xF0 && lead <= 0xF4) return 4;
  return 1;
}

// The regular expression (\r?\n){wanted}, fed byte by byte. `start` is the first token that begins at or after the
// first byte of the match under way, -1 while no token has.
struct NewlineRuns {
  explicit NewlineRuns(int64_t newlines) : wanted(newlines) {}

  const int64_t wanted;
  int64_t found = 0;
  bool after_return = false;
  int64_t start = -1;

  void reset() {
    found = 0;
    after_return = false;
  }

  bool under_way() const { return found > 0 || after_return; }

  // True where the byte completes a match. `token` is the token that begins with this byte, -1 if none does.
  bool feed(uint8_t byte, int64_t token) {
    if (byte == '\r') {
      if (after_return) found = 0;
      if (found == 0) start = token;
      after_return = true;
      return false;
    }
    if (byte != '\n') {
      reset();
      return false;
    }
    if (!under_way()) start = token;
    after_return = false;
    if (++found < wanted) return false;
    found = 0;
    return true;
  }
};

// Spans of one response, met in order of position.
struct GivenSpans {
  const int64_t* starts;
  const int64_t* ends;
  int64_t count;
  int64_t next = 0;
  int64_t position = 0;  // of the next token's first byte
  int64_t inside_until = 0;

  void reset() {}

  bool touches(int64_t length) const {
    return position < inside_until || (next < count && starts[next] < position + length);
  }
};

// Walks the tokens of one response and writes its steps. Special tokens cut the response into sections; a section is
// walked in the states below.
template <typename Id>
class Walk {
 public:
  Walk(const Id* ids, const TokenTable& table, int64_t max_steps, int64_t* starts, int64_t* ends)
      : ids_(ids), table_(table), max_steps_(max_steps), starts_(starts), ends_(ends) {}

  int64_t num_steps() const { return num_steps_; }

  // Returns -1, or the first token whose id is outside the table.
  template <typename Matcher>
  int64_t run(int64_t first, int64_t last, Matcher& matcher) {
    constexpr bool kNewlines = std::is_same_v<Matcher, NewlineRuns>;
    for (int64_t token = first; token < last; ++token) {
      const auto id = static_cast<uint64_t>(static_cast<int64_t>(ids_[token]));
      if (id >= static_cast<uint64_t>(table_.size)) return token;
      const uint8_t flags = table_.flags[id];
      // Most tokens: text without a line end in the middle of a step.
      if (kNewlines && flags == kContent && state_ == State::kInStep) {
        matcher.reset();
        continue;
      }
      if (flags & kSpecial) {
        if (state_ != State::kOutside) close_section(token, flags & kEos);
        matcher.reset();
        continue;
      }
      if (state_ == State::kOutside) open_section(token);
      if (flags & kEmpty) continue;
      if (state_ == State::kCut && !begins_in_character(token, flags)) await_content(token);
      scan(token, flags, matcher);
    }
    if (state_ != State::kOutside) close_section(last, false);
    if (eos_step_ >= 0) ++ends_[eos_step_];
    return -1;
  }

 private:
  enum class State {
    kOutside,  // no section is open
    kPending,  // a step begins at pending_ once content comes
    kInStep,   // the current step has content
    kCut,      // a delimiter has begun inside a token: the next token that begins a character begins the pending step
  };

  void scan(int64_t token, uint8_t flags, NewlineRuns& runs) {
    if (!(flags & kNewline)) {
      runs.reset();
      if (flags & kContent) content();
      return;
    }
    if (runs.under_way() && runs.start < 0) runs.start = token;
    const int64_t begin = table_.offsets[ids_[token]], end = table_.offsets[ids_[token] + 1];
    for (int64_t i = begin; i < end; ++i) {
      if (runs.feed(table_.data[i], i == begin ? token : -1)) {
        delimiter(runs.start);
      } else if (!is_blank(table_.data[i])) {
        content();
      }
    }
  }

  void scan(int64_t token, uint8_t flags, GivenSpans& spans) {
    const int64_t begin = table_.offsets[ids_[token]], length = table_.offsets[ids_[token] + 1] - begin;
    if (spans.touches(length)) {
      for (int64_t i = 0; i < length; ++i) {
        const int64_t position = spans.position + i;
        for (; spans.next < spans.count && spans.starts[spans.next] <= position; ++spans.next) {
          delimiter(i == 0 && !begins_in_character(token, flags) ? token : -1);
          spans.inside_until = spans.ends[spans.next];
        }
        if (position >= spans.inside_until && !is_blank(table_.data[begin + i])) content();
      }
    } else if (flags & kContent) {
      content();
    }
    spans.position += length;
  }

  // A delimiter has begun; `start` is the first token that begins at or after it, -1 if none has so far.
  void delimiter(int64_t start) {
    if (state_ != State::kInStep) return;
    if (start >= 0) {
      await_content(start);
    } else {
      state_ = State::kCut;
    }
  }

  void await_content(int64_t start) {
    pending_ = start;
    state_ = State::kPending;
  }

  void content() {
    if (state_ != State::kPending) return;
    state_ = State::kInStep;
    if (num_steps_ == max_steps_) return;
    if (step_open_) ends_[num_steps_ - 1] = pending_;
    starts_[num_steps_++] = pending_;
    step_open_ = true;
  }

  void open_section(int64_t token) {
    section_ = token;
    eos_step_ = -1;
    await_content(token);
  }

  void close_section(int64_t token, bool at_eos) {
    if (step_open_) {
      ends_[num_steps_ - 1] = token;
      if (at_eos) eos_step_ = num_steps_ - 1;
    }
    step_open_ = false;
    state_ = State::kOutside;
  }

  bool begins_in_character(int64_t token, uint8_t flags) const {
    if (!(flags & kContinuation)) return false;
    int back = 0;
    for (int64_t previous = token - 1; previous >= section_; --previous) {
      const int64_t begin = table_.offsets[ids_[previous]];
      for (int64_t i = table_.offsets[ids_[previous] + 1] - 1; i >= begin; --i) {
        const uint8_t byte = table_.data[i];
        ++back;
        if (!is_continuation(byte)) return character_length(byte) > back;
        if (back == 3) return false;
      }
    }
    return false;
  }

  const Id* const ids_;
  const TokenTable& table_;
  const int64_t max_steps_;
  int64_t* const starts_;
  int64_t* const ends_;
  int64_t num_steps_ = 0;
  State state_ = State::kOutside;
  int64_t section_ = 0;     // first token of the open section
  int64_t pending_ = 0;     // first token of the step to come
  int64_t eos_step_ = -1;   // step that takes in the EOS after it, if no text follows
  bool step_open_ = false;  // the last step belongs to the open section
};

}  // namespace

void token_flags(const TokenTable& table, const uint8_t* special, const uint8_t* eos, uint8_t* flags) {
  for (int64_t id = 0; id < table.size; ++id) {
    const int64_t begin = table.offsets[id], end = table.offsets[id + 1];
    int flag = (special[id] ? kSpecial : 0) | (eos[id] ? kSpecial | kEos : 0);
    if (begin == end) {
      flag |= kEmpty;
    } else if (is_continuation(table.data[begin])) {
      flag |= kContinuation;
    }
    for (int64_t i = begin; i < end; ++i) {
      const uint8_t byte = table.data[i];
      flag |= (is_blank(byte) ? 0 : kContent) | (byte == '\n' || byte == '\r' ? kNewline : 0);
    }
    flags[id] = static_cast<uint8_t>(flag);
  }
}

template <typename Id>
int64_t segment(const Id* ids, const int64_t* cu_seqlens, int64_t num_responses, const TokenTable& table,
                const Delimiters& delimiters, int64_t max_steps, int num_threads, int64_t* starts, int64_t* ends,
                int64_t* cu_steps) {
  const int64_t num_tokens = cu_seqlens[num_responses];
  const int64_t grain = std::max<int64_t>(num_responses * kTokensPerPiece / std::max<int64_t>(num_tokens, 1), 1);
  std::atomic<int64_t> first_unknown{num_tokens};
  // A piece of responses has at most as many steps as tokens: it writes them from its first token's place on.
  parallel_for(num_responses, grain, num_threads, [&](int64_t first, int64_t last) {
    int64_t place = cu_seqlens[first];
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = cu_seqlens[i], end = cu_seqlens[i + 1];
      Walk<Id> walk(ids, table, max_steps, starts + place, ends + place);
      int64_t unknown;
      if (delimiters.newlines > 0) {
        NewlineRuns runs(delimiters.newlines);
        unknown = walk.run(begin, end, runs);
      } else {
        const int64_t span = delimiters.cu_spans[i];
        GivenSpans spans{delimiters.starts + span, delimiters.ends + span, delimiters.cu_spans[i + 1] - span};
        unknown = walk.run(begin, end, spans);
      }
      cu_steps[i + 1] = walk.num_steps();
      place += walk.num_steps();
      if (unknown >= 0) {
        int64_t seen = first_unknown.load();
        while (unknown < seen && !first_unknown.compare_exchange_weak(seen, unknown)) {
        }
      }
    }
  });
  if (first_unknown < num_tokens) return -1 - first_unknown;

  // Counts to offsets, and the pieces end to end; a step only ever moves down.
  cu_steps[0] = 0;
  for (int64_t i = 0; i < num_responses; ++i) cu_steps[i + 1] += cu_steps[i];
  for (int64_t first = 0; first < num_responses; first += grain) {
    const int64_t place = cu_seqlens[first], begin = cu_steps[first];
    const int64_t count = cu_steps[std::min(first + grain, num_responses)] - begin;
    std::copy_n(starts + place, count, starts + begin);
    std::copy_n(ends + place, count, ends + begin);
  }
  return cu_steps[num_responses];
}

template int64_t segment(const int32_t*, const int64_t*, int64_t, const TokenTable&, const Delimiters&, int64_t, int,
                         int64_t*, int64_t*, int64_t*);
template int64_t segment(const int64_t*, const int64_t*, int64_t, const TokenTable&, const Delimiters&, int64_t, int,
                         int64_t*, int64_t*, int64_t*);

}  // namespace capo
