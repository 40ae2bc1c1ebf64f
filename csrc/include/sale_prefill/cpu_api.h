// The C interface of the CPU kernels: plain structs over pointers and strides, called from Python through ctypes.
// `server/sale_attention/cpu/abi.py` mirrors it field by field; change both, and SALE_CPU_ABI, together.
#pragma once

#include <cstdint>

#define SALE_CPU_ABI 2

extern "C" {

enum SaleDtype : int32_t { SALE_BF16 = 0, SALE_F16 = 1, SALE_F32 = 2, SALE_I8 = 3 };

enum SaleStatus : int32_t { SALE_OK = 0, SALE_NO_MEMORY = 1, SALE_UNKNOWN_ISA = 2 };

// Keys, values or codes, token by token. Strides count elements; a token's elements are contiguous.
// With a page table `batch_stride` is the stride of a page; entry [batch, p] is the page of tokens
// [p * page_tokens, (p + 1) * page_tokens), and a 32-token block never straddles two pages.
struct SaleTokens {
  void* data;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t token_stride;
  const int64_t* page_table;
  int64_t page_table_stride;  // between batch rows
  int64_t page_table_step;    // between pages of a row
  int64_t page_tokens;
  int32_t dtype;
};

// Rows of the query, or of the output: strides count elements, a row's elements are contiguous.
struct SaleRows {
  void* data;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t row_stride;
  int32_t dtype;
};

// Blocks of one call, as `BlockGrid` describes them; row i stands at absolute position offset + i.
struct SaleGrid {
  int64_t batch;
  int64_t heads;
  int64_t kv_heads;
  int64_t rows;
  int64_t offset;
  int64_t query_block;
  int64_t sink_blocks;
  int64_t local_tokens;
  int64_t head_dim;
  int64_t value_dim;
  int32_t threads;
};

struct SaleQuantiseQuery {
  SaleGrid grid;
  SaleRows query;
  int8_t* codes;   // [batch, heads, rows, head_dim]
  float* scales;   // [batch, heads, rows]
};

struct SaleQuantiseKey {
  SaleGrid grid;
  SaleTokens keys;
  SaleTokens codes;    // int8
  SaleTokens scales;   // float32, one "token" a 32-key block; page_tokens counts blocks
  const float* centre; // [batch, kv_heads, head_dim]
  int64_t start;       // first token, a multiple of 32
};

struct SaleSinkLocal {
  SaleGrid grid;
  SaleRows query;
  SaleTokens keys;
  const float* centre; // [batch, kv_heads, head_dim]
  float* lse;          // [batch, heads, rows]
  float scale;
};

struct SaleSampled {
  SaleGrid grid;
  const int8_t* query_codes;   // [batch, heads, rows, head_dim]
  const float* query_scales;   // [batch, heads, rows]
  SaleTokens key_codes;        // int8
  SaleTokens key_scales;       // as in SaleQuantiseKey
  const int32_t* strides;      // as in SaleSelect; rows that do not vote are left as they are
  int64_t unstrided_from;
  int64_t sample_stride;       // tokens, a multiple of 32
  float* lse;                  // [batch, heads, rows], in: of sink and local keys, out: with the sample
  float scale;
};

struct SaleSelect {
  SaleGrid grid;
  const int8_t* query_codes;   // [batch, heads, rows, head_dim]
  SaleTokens key_codes;        // int8
  SaleTokens key_scales;       // as in SaleQuantiseKey
  const float* thresholds;     // [batch, heads, rows]
  const int32_t* strides;      // [heads]; 0: this head selects nothing
  int64_t unstrided_from;      // absolute row
  uint32_t* words;             // [batch, heads, query blocks, mask_words], zero on entry
  int64_t mask_words;
};

struct SaleAttend {
  SaleGrid grid;
  SaleRows query;
  SaleTokens keys;
  SaleTokens values;
  const uint32_t* words;     // [batch, heads, query blocks, mask_words]; null: every block that causality allows
  int64_t mask_words;
  const uint8_t* skip_heads; // [heads]; 1: leave this head's rows as they are; null: none
  SaleRows output;
  float* lse;                // null: not wanted
  int64_t lse_batch_stride;
  int64_t lse_head_stride;
  float scale;
};

int32_t sale_cpu_abi();

// Instruction sets, best first; `sale_cpu_supports` says whether this machine runs one.
int32_t sale_cpu_isa_count();
const char* sale_cpu_isa_name(int32_t isa);
int32_t sale_cpu_supports(int32_t isa);

int32_t sale_cpu_quantise_query(int32_t isa, const SaleQuantiseQuery* call);
int32_t sale_cpu_quantise_key(int32_t isa, const SaleQuantiseKey* call);
int32_t sale_cpu_sink_local(int32_t isa, const SaleSinkLocal* call);
int32_t sale_cpu_sampled(int32_t isa, const SaleSampled* call);
int32_t sale_cpu_select(int32_t isa, const SaleSelect* call);
int32_t sale_cpu_attend(int32_t isa, const SaleAttend* call);

}  // extern "C"
