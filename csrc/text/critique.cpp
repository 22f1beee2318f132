#include "text/critique.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

namespace capo {
namespace {

using std::string_view;

constexpr string_view kBlanks = "\t ";
constexpr string_view kMarks = "*`\t ";

bool is_digit(char c) { return c >= '0' && c <= '9'; }

char lower(char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + ('a' - 'A')) : c; }

// White space as str.strip has it.
bool is_space(string_view character) {
  if (character.size() == 1) {
    const char c = character[0];
    return c == ' ' || (c >= '\t' && c <= '\r') || (c >= '\x1c' && c <= '\x1f');
  }
  if (character.size() == 2) return character == "\xC2\x85" || character == "\xC2\xA0";
  if (character.substr(0, 2) == "\xE2\x80") {
    const char c = character[2];
    return (c >= '\x80' && c <= '\x8A') || c == '\xA8' || c == '\xA9' || c == '\xAF';
  }
  return character == "\xE1\x9A\x80" || character == "\xE2\x81\x9F" || character == "\xE3\x80\x80";
}

// Bytes of the white space that the text begins or ends with, of one character; 0 if there is none.
size_t space_length(string_view text, bool at_end) {
  for (size_t length = 1; length <= std::min<size_t>(3, text.size()); ++length)
    if (is_space(text.substr(at_end ? text.size() - length : 0, length))) return length;
  return 0;
}

// Takes from a text what it is asked for, from its beginning.
struct Cursor {
  string_view rest;

  bool take(string_view wanted) {
    if (!rest.starts_with(wanted)) return false;
    rest.remove_prefix(wanted.size());
    return true;
  }

  // In any case of the ASCII letters; `wanted` is in small ones.
  bool take_word(string_view wanted) {
    if (rest.size() < wanted.size()) return false;
    for (size_t i = 0; i < wanted.size(); ++i)
      if (lower(rest[i]) != wanted[i]) return false;
    rest.remove_prefix(wanted.size());
    return true;
  }

  bool take_one_of(string_view set) {
    if (rest.empty() || set.find(rest[0]) == string_view::npos) return false;
    rest.remove_prefix(1);
    return true;
  }

  // How many characters of the set were taken; at most `limit`.
  int take_many_of(string_view set, int limit) {
    int taken = 0;
    while (taken < limit && take_one_of(set)) ++taken;
    return taken;
  }

  void take_space() {
    while (const size_t length = space_length(rest, false)) rest.remove_prefix(length);
  }
};

string_view strip(string_view text) {
  while (const size_t length = space_length(text, false)) text.remove_prefix(length);
  while (const size_t length = space_length(text, true)) text.remove_suffix(length);
  return text;
}

// Calls found(begin, end, closes) for each tag: < or </, then what take_name takes, then >.
template <typename Name, typename Found>
void for_each_tag(string_view text, const Name& take_name, const Found& found) {
  for (size_t begin = text.find('<'); begin != string_view::npos;) {
    Cursor cursor{text.substr(begin + 1)};
    const bool closes = cursor.take("/");
    size_t next = begin + 1;
    if (take_name(cursor) && cursor.take(">")) {
      next = text.size() - cursor.rest.size();
      found(begin, next, closes);
    }
    begin = text.find('<', next);
  }
}

// The text outside reasoning blocks; `joined` holds it if it is in pieces.
string_view without_reasoning(string_view text, std::string& joined) {
  std::vector<string_view> kept;
  size_t done = 0;
  bool inside = false;
  const auto name = [](Cursor& cursor) {
    if (!cursor.take_word("think")) return false;
    cursor.take_word("ing");
    return true;
  };
  for_each_tag(text, name, [&](size_t begin, size_t end, bool closes) {
    if (!closes) {
      if (!inside) kept.push_back(text.substr(done, begin - done));
      inside = true;
      return;
    }
    // Chat templates may open the block in the prompt, so that the reply only closes it.
    if (!inside) kept.clear();
    done = end;
    inside = false;
  });
  if (!inside) kept.push_back(text.substr(done));
  if (kept.size() == 1) return kept[0];
  for (const string_view piece : kept) joined += piece;
  return joined;
}

enum Verdict : unsigned { kNoVerdict = 0, kYes = 1, kNo = 2 };

Verdict verdict_of(string_view line) {
  Cursor cursor{line};
  cursor.take_many_of("#*`\t ", 12);
  if (!cursor.take_word("judg")) return kNoVerdict;
  cursor.take_word("e");
  if (!cursor.take_word("ment")) return kNoVerdict;
  cursor.take_many_of(kMarks, 8);
  if (!cursor.take(":")) return kNoVerdict;
  cursor.take_many_of(kMarks, 8);
  if (cursor.take_word("is the solution correct")) {
    cursor.take_many_of(kBlanks, 8);
    cursor.take_word("(yes/no)");
    cursor.take_many_of(kBlanks, 8);
    if (!cursor.take_one_of("?:")) return kNoVerdict;
    cursor.take_many_of(kMarks, 8);
  }
  const Verdict verdict = cursor.take("Yes") ? kYes : cursor.take("No") ? kNo : kNoVerdict;
  const int marks = cursor.take_many_of("*`", 6);
  if (cursor.take(".")) {
    if (marks > 3) return kNoVerdict;
    cursor.take_many_of("*`", 3);
  }
  cursor.take_many_of("\t\r ", 8);
  return cursor.rest.empty() ? verdict : kNoVerdict;
}

// The verdicts of all judgment lines, as a set.
unsigned verdicts_of(string_view text) {
  unsigned verdicts = kNoVerdict;
  for (;;) {
    const size_t end = text.find('\n');
    verdicts |= verdict_of(text.substr(0, end));
    if (end == string_view::npos) return verdicts;
    text.remove_prefix(end + 1);
  }
}

struct Block {
  bool found = false;  // a complete one
  bool unclosed = false;
  string_view content;
};

bool take_nonce(Cursor& cursor, string_view nonce) { return nonce.empty() || (cursor.take(":") && cursor.take(nonce)); }

// The last complete step list, and whether one is left open at the end.
Block last_block(string_view text, string_view nonce) {
  Block block;
  size_t inside = 0;
  const auto name = [&](Cursor& cursor) { return cursor.take("incorrect_steps") && take_nonce(cursor, nonce); };
  for_each_tag(text, name, [&](size_t begin, size_t end, bool closes) {
    if (!closes) {
      inside = end;
      block.unclosed = true;
    } else if (block.unclosed) {
      block.unclosed = false;
      const string_view content = strip(text.substr(inside, begin - inside));
      if (content == "...") return;  // the prompt quoted back
      block.found = true;
      block.content = content;
    }
  });
  return block;
}

// The digits of one index: 5, step_5 or <step_5>, the last with or without the nonce; empty if there is none.
string_view take_index(Cursor& cursor, string_view nonce) {
  const bool tag = cursor.take("<");
  if (!cursor.take("step_") && tag) return {};
  string_view digits = cursor.rest;
  if (!cursor.take("0"))
    while (!cursor.rest.empty() && is_digit(cursor.rest[0])) cursor.rest.remove_prefix(1);
  digits.remove_suffix(cursor.rest.size());
  if (tag && !cursor.take(">") && !(!nonce.empty() && take_nonce(cursor, nonce) && cursor.take(">"))) return {};
  return digits;
}

bool in_range(string_view digits, int64_t num_steps, int64_t& index) {
  if (digits.size() > 9) return false;
  index = 0;
  for (const char digit : digits) index = 10 * index + (digit - '0');
  return index < num_steps;
}

using Spans = std::vector<std::pair<int64_t, int64_t>>;  // first and last step

Reason read_item(string_view item, string_view nonce, int64_t num_steps, Spans& spans) {
  Cursor cursor{strip(item)};
  const string_view first_digits = take_index(cursor, nonce);
  if (first_digits.empty()) return Reason::kBadIndex;
  string_view last_digits = first_digits;
  if (!cursor.rest.empty()) {
    cursor.take_space();
    if (!cursor.take("-") && !cursor.take("\xE2\x80\x93")) return Reason::kBadIndex;
    cursor.take_space();
    last_digits = take_index(cursor, nonce);
    if (last_digits.empty() || !cursor.rest.empty()) return Reason::kBadIndex;
  }
  int64_t first, last;
  if (!in_range(first_digits, num_steps, first) || !in_range(last_digits, num_steps, last)) return Reason::kOutOfRange;
  if (first > last) return Reason::kBadIndex;
  spans.emplace_back(first, last);
  return Reason::kNone;
}

Reason read_list(string_view list, string_view nonce, int64_t num_steps, Spans& spans) {
  if (list.empty()) return Reason::kNone;
  for (;;) {
    const size_t comma = list.find(',');
    const Reason reason = read_item(list.substr(0, comma), nonce, num_steps, spans);
    if (reason != Reason::kNone || comma == string_view::npos) return reason;
    list.remove_prefix(comma + 1);
  }
}

}  // namespace

Reason read_reply(string_view reply, string_view nonce, int64_t max_reply, int64_t num_steps, Said& said) {
  const auto begins_character = [](char c) { return (static_cast<uint8_t>(c) & 0xC0) != 0x80; };
  if (static_cast<int64_t>(reply.size()) > max_reply &&
      std::count_if(reply.begin(), reply.end(), begins_character) > max_reply)
    return Reason::kTooLong;
  std::string joined;
  Cursor answer{without_reasoning(reply, joined)};
  while (answer.take("\xEF\xBB\xBF")) {
  }
  if (strip(answer.rest).empty()) return Reason::kEmptyReply;

  const Block block = last_block(answer.rest, nonce);
  const unsigned verdicts = verdicts_of(answer.rest);
  Spans spans;
  if (block.found) {
    const Reason reason = read_list(block.content, nonce, num_steps, spans);
    if (reason != Reason::kNone) return reason;
  } else {
    if (verdicts == (kYes | kNo)) return Reason::kConflicting;
    if (block.unclosed) return Reason::kUnclosedList;
    if (verdicts == kNoVerdict) return Reason::kNoAnswer;
    if (verdicts == kNo) return Reason::kNoList;
  }
  said.verdict = verdicts == kYes || verdicts == kNo ? std::optional(verdicts == kYes) : std::nullopt;
  said.flagged.clear();
  // In order, so that overlapping ranges cost no more than the steps they cover.
  std::sort(spans.begin(), spans.end());
  int64_t next = 0;
  for (const auto& [first, last] : spans)
    for (next = std::max(next, first); next <= last; ++next) said.flagged.push_back(next);
  return Reason::kNone;
}

}  // namespace capo
