// The C interface of the CUDA kernels: plain structs over device pointers and strides, called from Python through ctypes.
// `server/sale_attention/cuda/abi.py` mirrors it field by field; change both, and SALE_CUDA_ABI, together.
#pragma once

#include <cstdint>

#define SALE_CUDA_ABI 6

extern "C" {

enum SaleCudaDtype : int32_t { SALE_CUDA_BF16 = 0, SALE_CUDA_F16 = 1 };

// Keys, values or codes: [unit, head, token, element], where a unit is a batch row or, with a page table, a page.
// Strides count elements; elements of a token are contiguous.
struct SaleCudaTokens {
  void* data;
  int64_t unit_stride;
  int64_t head_stride;
  int64_t token_stride;
  int64_t units;              // batch rows or pages there are
  int64_t unit_tokens;        // tokens of a unit: all in use, or of a page
  const int64_t* page_table;  // [batch, pages], null: contiguous
  int64_t page_table_stride;  // between batch rows
  int64_t page_table_step;    // between pages of a row
};

// Query or output rows [batch, head, row, element].
struct SaleCudaRows {
  void* data;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t row_stride;
};

// Blocks of one call, as `BlockGrid` describes them; row i stands at absolute position offset + i.
struct SaleCudaGrid {
  int32_t batch;
  int32_t heads;
  int32_t kv_heads;
  int32_t head_dim;
  int64_t rows;
  int64_t offset;
  int32_t query_block;
  int32_t sink_blocks;
  int32_t local_tokens;
  int32_t multiprocessors;
  int32_t dtype;  // SaleCudaDtype of query, keys, values and output
};

struct SaleCudaKeyCentre {
  SaleCudaGrid grid;
  SaleCudaTokens keys;
  float* centre;   // [batch, kv_heads, head_dim]
  int64_t tokens;  // of which the mean is taken
};

struct SaleCudaQuantiseKey {
  SaleCudaGrid grid;
  SaleCudaTokens keys;
  SaleCudaTokens codes;  // int8
  SaleCudaTokens scales; // float32, one "token" a 32-key block
  const float* centre;   // [batch, kv_heads, head_dim]
  int64_t start;         // first token, a multiple of 32
};

// Outputs [batch, heads, rows]; null: not wanted. Thresholds need codes.
struct SaleCudaQueryRows {
  SaleCudaGrid grid;
  SaleCudaRows query;
  SaleCudaTokens keys;   // for lse and thresholds
  const float* centre;   // [batch, kv_heads, head_dim]
  const float* log_tau;  // device, [heads]
  int8_t* codes;         // [batch, heads, rows, head_dim]
  float* scales;
  float* lse;
  float* thresholds;
  float scale;
};

// Adds a sample of the keys between sink and local ones to the sums of rows that vote (`sampled.py`).
struct SaleCudaSampled {
  SaleCudaGrid grid;
  const int8_t* query_codes;
  const float* query_scales;  // [batch, heads, rows]
  SaleCudaTokens key_codes;
  SaleCudaTokens key_scales;
  const int32_t* strides;  // as in SaleCudaSelect
  int64_t unstrided_from;
  int64_t sample_stride;  // tokens, a multiple of 32
  float* lse;             // [batch, heads, rows], in: of sink and local keys, out: with the sample
  const float* log_tau;   // device, [heads]; for thresholds
  float* thresholds;      // [batch, heads, rows]; null: not wanted
  float scale;
};

struct SaleCudaSelect {
  SaleCudaGrid grid;
  const int8_t* query_codes;
  SaleCudaTokens key_codes;
  SaleCudaTokens key_scales;
  const float* thresholds;
  const int32_t* strides;  // host, [heads]; 0: this head selects nothing
  int64_t unstrided_from;
  uint32_t* words;  // [batch, heads, query blocks, mask_words]
  int64_t mask_words;
};

struct SaleCudaAttend {
  SaleCudaGrid grid;
  SaleCudaRows query;
  SaleCudaTokens keys;
  SaleCudaTokens values;
  // [batch, heads, query blocks from dense_until on, mask_words]; null: every block that causality allows.
  const uint32_t* words;
  int64_t mask_words;
  int64_t dense_until;  // absolute position, a multiple of query_block; rows before it attend to every block
  const uint8_t* skip_heads;  // device, [heads]; null: none
  SaleCudaRows output;
  float* lse;  // null: not wanted
  int64_t lse_batch_stride;
  int64_t lse_head_stride;
  float scale;
  int32_t* next_work;  // device; zero, and zero again when all is done: one launch at a time may have it
};

// 4-bit codes, which lie one a byte.
struct SaleCudaQuantiseQuery4 {
  SaleCudaGrid grid;
  SaleCudaRows query;
  int8_t* codes;       // [batch, heads, rows, head_dim]
  float* scales;       // [batch, heads, rows]
  float* block_means;  // [batch, heads, query blocks, head_dim]
};

struct SaleCudaSelect4 {
  SaleCudaGrid grid;
  const int8_t* query_codes;
  const float* query_scales;
  const float* block_means;
  SaleCudaTokens key_codes;
  SaleCudaTokens key_scales;
  SaleCudaTokens keys;
  const float* centre;  // [batch, kv_heads, head_dim]
  const float* thresholds;
  const int32_t* strides;  // as in SaleCudaSelect
  int64_t unstrided_from;
  uint32_t* words;
  int64_t mask_words;
};

// A sparse call as a whole, 8-bit codes: everything above, in order, from one call of the host.
struct SaleCudaLayer {
  SaleCudaGrid grid;  // of all rows
  SaleCudaRows query;
  SaleCudaRows output;
  SaleCudaTokens keys;
  SaleCudaTokens values;
  SaleCudaTokens key_codes;
  SaleCudaTokens key_scales;
  float* centre;          // [batch, kv_heads, head_dim]
  int64_t centre_tokens;  // 0: the centre is there; else it becomes the mean of that many first keys
  int64_t start;          // keys before it have their codes; a multiple of 32
  int64_t dense_until;    // absolute position, a multiple of query_block; rows before it attend to every block
  const float* log_tau;       // device, [heads]
  const int32_t* strides;     // host, [heads]; 0: this head selects nothing
  const uint8_t* skip_heads;  // device, [heads], whose rows from dense_until on are left as they are; null: none
  int64_t unstrided_from;
  int8_t* query_codes;  // scratch [batch, heads, rows from dense_until on, head_dim]
  float* thresholds;    // scratch [batch, heads, those rows]
  uint32_t* words;      // scratch [batch, heads, their query blocks, mask_words]
  float* query_scales;  // scratch as thresholds, and row_lse: with sample_stride only
  float* row_lse;
  int64_t sample_stride;  // 0: thresholds are relative to sink and local keys alone
  int32_t* next_work;   // as in SaleCudaAttend
  int64_t mask_words;
  int64_t* kept;  // [heads], kept blocks are added; null: not wanted
  float* lse;     // null: not wanted
  int64_t lse_batch_stride;
  int64_t lse_head_stride;
  float scale;
  void* events[5];  // cudaEvent_t before, between and after the four phases; null: not wanted
};

// Set bits by head, added to `kept`.
struct SaleCudaCountBlocks {
  const uint32_t* words;  // [batch, heads, head_words]
  int64_t* kept;          // [heads]
  int64_t head_words;
  int32_t batch;
  int32_t heads;
};

int32_t sale_cuda_abi();
// Each returns a cudaError_t, or -1 - CUresult where a tensor map could not be made; nothing waits for the device.
int32_t sale_cuda_key_centre(const SaleCudaKeyCentre* call, void* stream);
int32_t sale_cuda_quantise_key(const SaleCudaQuantiseKey* call, void* stream);
int32_t sale_cuda_query_rows(const SaleCudaQueryRows* call, void* stream);
int32_t sale_cuda_sampled(const SaleCudaSampled* call, void* stream);
int32_t sale_cuda_select(const SaleCudaSelect* call, void* stream);
int32_t sale_cuda_attend(const SaleCudaAttend* call, void* stream);
int32_t sale_cuda_count_blocks(const SaleCudaCountBlocks* call, void* stream);
int32_t sale_cuda_layer(const SaleCudaLayer* call, void* stream);
int32_t sale_cuda_quantise_query_4bit(const SaleCudaQuantiseQuery4* call, void* stream);
int32_t sale_cuda_quantise_key_4bit(const SaleCudaQuantiseKey* call, void* stream);
int32_t sale_cuda_select_4bit(const SaleCudaSelect4* call, void* stream);

// Decode: one query row a sequence, over the first lengths[b] tokens of its keys. The host reads nothing on the device,
// and neither the launch nor the scratch memory depends on the lengths, so that a captured call can be replayed.
struct SaleCudaDecode {
  SaleCudaRows query;  // [batch, heads, 1, head_dim]
  SaleCudaTokens keys;
  SaleCudaTokens values;
  SaleCudaRows output;
  float* lse;             // [batch, heads], natural; null: not wanted
  const void* lengths;    // [batch], int64 or int32
  float* partial;         // scratch [batch, heads, splits, head_dim]
  float* partial_lse;     // scratch [batch, heads, splits]
  int64_t capacity;       // tokens that a sequence can have, and a length's limit
  int32_t batch;
  int32_t heads;
  int32_t kv_heads;
  int32_t head_dim;
  int32_t dtype;  // SaleCudaDtype
  int32_t lengths_64_bit;
  int32_t splits;       // chunks that a sequence is cut into, at most 1024
  int32_t least_chunk;  // tokens, a multiple of 32; splits * least_chunk may be less than the capacity
  int32_t multiprocessors;
  float scale;
};
int32_t sale_cuda_decode(const SaleCudaDecode* call, void* stream);

}  // extern "C"
