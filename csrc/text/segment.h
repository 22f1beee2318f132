// Token ids -> steps. The rule is stated by capo.segment; _segment_reference in capo/steps.py is its definition.
#pragma once
#include <cstdint>

namespace capo {

// The bytes of every token id, and what segmentation must know of an id without reading them.
struct TokenTable {
  int64_t size;            // V
  const uint8_t* data;     // all byte strings end to end
  const int64_t* offsets;  // [V + 1], into data
  const uint8_t* flags;    // [V], from token_flags
};

// How delimiters are found: runs of `newlines` line ends (\n or \r\n), searched here; or, with newlines = 0, spans that
// the caller has found. Spans are ordered byte positions [start, end) within each response's text.
struct Delimiters {
  int64_t newlines;
  const int64_t* starts;    // [S]
  const int64_t* ends;      // [S]
  const int64_t* cu_spans;  // [B + 1]
};

// flags [V] from the bytes; special [V] and eos [V] are 0 or 1. table.flags is not read.
void token_flags(const TokenTable& table, const uint8_t* special, const uint8_t* eos, uint8_t* flags);

// Steps of B packed responses: ids [N], cu_seqlens [B + 1] -> starts [M], ends [M], cu_steps [B + 1]; returns M. A step
// has a token of its own, so that M <= N: starts and ends must have room for N. Returns -1 - t where token t, the first
// such, has an id outside the table; the outputs then mean nothing. Id is int32_t or int64_t.
template <typename Id>
int64_t segment(const Id* ids, const int64_t* cu_seqlens, int64_t num_responses, const TokenTable& table,
                const Delimiters& delimiters, int64_t max_steps, int num_threads, int64_t* starts, int64_t* ends,
                int64_t* cu_steps);

}  // namespace capo
