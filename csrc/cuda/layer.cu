// A sparse call as a whole: the launches of all phases from one call of the host.
//
// Launched one by one from Python, the passes of a prompt of a few thousand tokens cost the host more time than the GPU.
#include <cuda_runtime.h>

#include "layout.cuh"

namespace {

int32_t mark(const SaleCudaLayer& call, int phase, cudaStream_t stream) {
  const auto event = static_cast<cudaEvent_t>(call.events[phase]);
  return event == nullptr ? 0 : cudaEventRecord(event, stream);
}

int32_t quantise_keys(const SaleCudaLayer& call, void* stream) {
  SaleCudaGrid grid = call.grid;  // keys alone
  grid.heads = grid.kv_heads;
  grid.rows = call.grid.offset + call.grid.rows;
  grid.offset = 0;
  if (call.centre_tokens > 0) {
    const SaleCudaKeyCentre centre{grid, call.keys, call.centre, call.centre_tokens};
    if (const int32_t status = sale_cuda_key_centre(&centre, stream); status != 0) return status;
  }
  const SaleCudaQuantiseKey codes{grid, call.keys, call.key_codes, call.key_scales, call.centre, call.start};
  return sale_cuda_quantise_key(&codes, stream);
}

// The rows that are not short.
SaleCudaGrid sparse_rows(const SaleCudaLayer& call) {
  SaleCudaGrid grid = call.grid;
  const int64_t start = call.dense_until > grid.offset ? call.dense_until : grid.offset;
  grid.rows -= start - grid.offset;
  grid.offset = start;
  return grid;
}

SaleCudaRows from_row(SaleCudaRows rows, int64_t row, int64_t element_bytes) {
  rows.data = static_cast<char*>(rows.data) + row * rows.row_stride * element_bytes;
  return rows;
}

int32_t prepare_rows(const SaleCudaLayer& call, const SaleCudaGrid& grid, void* stream) {
  SaleCudaQueryRows rows{};
  rows.grid = grid;
  rows.query = from_row(call.query, grid.offset - call.grid.offset, 2);
  rows.keys = call.keys;
  rows.centre = call.centre;
  rows.log_tau = call.log_tau;
  rows.codes = call.query_codes;
  rows.scale = call.scale;
  if (call.sample_stride == 0) {
    rows.thresholds = call.thresholds;
    return sale_cuda_query_rows(&rows, stream);
  }
  rows.scales = call.query_scales;
  rows.lse = call.row_lse;
  if (const int32_t status = sale_cuda_query_rows(&rows, stream); status != 0) return status;
  const SaleCudaSampled sampled{grid, call.query_codes, call.query_scales, call.key_codes, call.key_scales, call.strides,
                                call.unstrided_from, call.sample_stride, call.row_lse, call.log_tau, call.thresholds,
                                call.scale};
  return sale_cuda_sampled(&sampled, stream);
}

int32_t select(const SaleCudaLayer& call, const SaleCudaGrid& grid, void* stream) {
  const SaleCudaSelect select{grid,       call.query_codes, call.key_codes,      call.key_scales, call.thresholds,
                              call.strides, call.unstrided_from, call.words, call.mask_words};
  const int32_t status = sale_cuda_select(&select, stream);
  if (status != 0 || call.kept == nullptr) return status;
  const int64_t head_words = sale::cuda::Blocks(grid).query_blocks() * call.mask_words;
  const SaleCudaCountBlocks count{call.words, call.kept, head_words, grid.batch, grid.heads};
  return sale_cuda_count_blocks(&count, stream);
}

int32_t attend(const SaleCudaLayer& call, const SaleCudaGrid& sparse, void* stream) {
  SaleCudaAttend attend{};
  attend.grid = call.grid;
  attend.query = call.query;
  attend.keys = call.keys;
  attend.values = call.values;
  attend.output = call.output;
  attend.lse = call.lse;
  attend.lse_batch_stride = call.lse_batch_stride;
  attend.lse_head_stride = call.lse_head_stride;
  attend.scale = call.scale;
  attend.next_work = call.next_work;
  const int64_t short_rows = sparse.offset - call.grid.offset;
  if (call.skip_heads != nullptr && short_rows > 0) {  // of all heads, so in a launch of their own
    attend.grid.rows = short_rows;
    attend.keys.unit_tokens = call.keys.page_table == nullptr ? sparse.offset : call.keys.unit_tokens;
    attend.values.unit_tokens = call.values.page_table == nullptr ? sparse.offset : call.values.unit_tokens;
    if (const int32_t status = sale_cuda_attend(&attend, stream); status != 0) return status;
    attend.grid = sparse;
    attend.query = from_row(call.query, short_rows, 2);
    attend.output = from_row(call.output, short_rows, 2);
    attend.keys = call.keys;
    attend.values = call.values;
    if (attend.lse != nullptr) attend.lse += short_rows;
  }
  attend.words = call.words;
  attend.mask_words = call.mask_words;
  attend.dense_until = call.dense_until;
  attend.skip_heads = call.skip_heads;
  return sale_cuda_attend(&attend, stream);
}

}  // namespace

extern "C" int32_t sale_cuda_layer(const SaleCudaLayer* call, void* stream) {
  const auto at = static_cast<cudaStream_t>(stream);
  const SaleCudaGrid sparse = sparse_rows(*call);
  int32_t status = mark(*call, 0, at);
  if (status == 0) status = quantise_keys(*call, stream);
  if (status == 0) status = mark(*call, 1, at);
  if (status == 0) status = prepare_rows(*call, sparse, stream);
  if (status == 0) status = mark(*call, 2, at);
  if (status == 0) status = select(*call, sparse, stream);
  if (status == 0) status = mark(*call, 3, at);
  if (status == 0) status = attend(*call, sparse, stream);
  if (status == 0) status = mark(*call, 4, at);
  return status;
}
