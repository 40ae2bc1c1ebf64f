// Key codes in shared memory: tiles of whole blocks, by 16-byte asynchronous copies, rows swizzled so that ldmatrix meets
// no bank conflict; and the blocks' scales beside them.
#pragma once

#include "layout.cuh"
#include "mma.cuh"
#include "ptx.cuh"

namespace sale::cuda {

// Where the 16-byte piece `piece` of row `row` lies; rows are kBytes long, 64 or a multiple of 128.
template <int kBytes>
__device__ __forceinline__ int swizzled(int row, int piece) {
  return row * kBytes + (piece ^ (kBytes == 64 ? row / 2 % 4 : row % 8)) * 16;
}

template <int kDim, int kBlocks>
struct CodeTile {
  alignas(128) int8_t keys[kBlocks * kKeyBlock * kDim];
  alignas(16) float scales[kBlocks];
};

// Codes of keys [key, key + 8), 64 of them each from `column` on: a B fragment of multiply_s8, then the next one.
template <int kDim, int kBlocks>
__device__ __forceinline__ void load_codes(uint32_t (&b)[4], const CodeTile<kDim, kBlocks>& tile, int key, int column) {
  const int lane = threadIdx.x % 32;
  load_matrices(b, tile.keys + swizzled<kDim>(key + lane % 8, column / 16 + lane / 8));
}

// One thread's share of bringing in tiles: some pieces of one block, whose place it looks up a tile ahead.
template <int kDim, int kBlocks, int kThreads>
struct CodeLoader {
  static constexpr int kBlockThreads = kThreads / kBlocks, kPieces = kDim / 16, kRowsAtOnce = kBlockThreads / kPieces;
  static_assert(kKeyBlock % kRowsAtOnce == 0);

  const SaleCudaTokens& codes;
  const SaleCudaTokens& scales;
  const int batch, head, end;  // blocks from `end` on come as zeros
  const int slot = threadIdx.x / kBlockThreads;
  const int row = threadIdx.x % kBlockThreads / kPieces, piece = threadIdx.x % kPieces;
  const int8_t* source;
  const float* scale;
  bool present;

  __device__ __forceinline__ CodeLoader(const SaleCudaTokens& its_codes, const SaleCudaTokens& its_scales, int batch_row,
                                        int kv_head, int end_block)
      : codes(its_codes), scales(its_scales), batch(batch_row), head(kv_head), end(end_block) {}

  __device__ __forceinline__ void look_up(int tile) {
    const int wanted = tile * kBlocks + slot;
    present = wanted < end;
    const int block = present ? wanted : end - 1;
    const BlockPlace place = place_of_block(codes, batch, block);
    source = static_cast<const int8_t*>(codes.data) + place.unit * codes.unit_stride + head * codes.head_stride +
             (place.token + row) * codes.token_stride + piece * 16;
    const BlockPlace scale_place = place_of_scale(scales, batch, block);
    scale = static_cast<const float*>(scales.data) + scale_place.unit * scales.unit_stride + head * scales.head_stride +
            scale_place.token * scales.token_stride;
  }
  // The tile that was looked up, then looks up `next`.
  __device__ __forceinline__ void load(CodeTile<kDim, kBlocks>& tile, int next) {
#pragma unroll
    for (int i = 0; i < kKeyBlock / kRowsAtOnce; ++i) {
      const int key = row + i * kRowsAtOnce;
      copy_async(tile.keys + swizzled<kDim>(slot * kKeyBlock + key, piece), source + i * kRowsAtOnce * codes.token_stride,
                 present);
    }
    if (threadIdx.x % kBlockThreads == 0) copy_async_word(&tile.scales[slot], scale, present);
    look_up(next);
  }
};

}  // namespace sale::cuda
