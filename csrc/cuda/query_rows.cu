// Per query row, in one pass over Q: 8-bit codes and their scale (bit-identical to `quantise.py`), the log-sum-exp of
// scale * q . (k - centre) over sink and local keys (`sink_local.py`), and the threshold that follows from both
// (`row_thresholds`). Whatever has a null pointer is not wanted.
//
// A tile is 128 rows (by absolute position) of all heads of one KV head; a warp takes 16 rows of one head at a time. CTAs
// walk neighbouring tiles: most of a tile's keys are those of the one before, so they stay in shared memory, in a ring
// of 32-key blocks, and the next tile's last keys arrive while this one is computed. Where sink and local blocks are too
// many for the ring, they pass through shared memory piece by piece, head by head.
//
// mma.sync takes its k dimension in any order as long as both operands agree: a thread's share of 32 columns is eight
// neighbours, so that Q, codes and keys move 16, 8 and 16 bytes at a time. Products of 16-bit inputs are exact in
// float32 sums, so the centre is taken off afterwards as q . centre, once a row.
//
// Shared memory: 13 blocks x 32 keys x head_dim of 2 bytes (104 KiB at head_dim 128: two CTAs a multiprocessor on
// sm_80 and sm_90; 11 blocks where a multiprocessor has less), 16-byte pieces of odd keys swapped by halves against bank
// conflicts. Barriers: one __syncthreads a tile.
#include "codes.cuh"
#include "launch.cuh"
#include "layout.cuh"
#include "log_sum_exp.cuh"
#include "mma.cuh"
#include "ptx.cuh"

namespace sale::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kWarpRows = 16;
constexpr int kTileRows = kWarps * kWarpRows;
constexpr int kTileBlocks = kTileRows / kKeyBlock;

struct Launch {
  SaleCudaQueryRows call;
  int tiles;  // of one KV head
  int ring;   // slots of local blocks; 0: piece by piece
  int slots;  // all of them; in a ring, sink blocks come after the local ones
  uint32_t zero;
};

// The key blocks of some rows of one query block: sink blocks [0, sink), then [local, end) up to the last row's diagonal.
struct Window {
  int sink, local, end;

  __device__ __forceinline__ Window(const SaleCudaGrid& grid, int first, int last) {
    const int offset = static_cast<int>(grid.offset), tokens = offset + static_cast<int>(grid.rows);
    const int start = max(first, offset) / grid.query_block * grid.query_block - grid.local_tokens;
    end = (min(last, tokens) + kKeyBlock - 1) / kKeyBlock;
    sink = min(grid.sink_blocks, end);
    local = max(sink, max(start, 0) / kKeyBlock);
  }
  __device__ __forceinline__ int count() const { return sink + max(end - local, 0); }
  __device__ __forceinline__ int block(int i) const { return i < sink ? i : local + i - sink; }
  __device__ __forceinline__ bool has(int block) const { return block < sink || (block >= local && block < end); }
};

// Sixteen rows of one head as the A operand; `half` selects rows g and g + 8 of a thread.
template <class T, int kDim>
struct Rows {
  uint32_t a[kDim / 16][4];

  // `zero` keeps the compiler from leaving the words where the loads put them: it would then gather the four registers
  // of an operand anew for every product.
  __device__ __forceinline__ void load(const SaleCudaQueryRows& call, int batch, int head, int position, uint32_t zero) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Rows that are not there repeat one that is.
      const int row = min(max(position + 8 * half - static_cast<int>(call.grid.offset), 0), static_cast<int>(call.grid.rows) - 1);
      const T* source = row_at<const T>(call.query, batch, head, row) + threadIdx.x % 4 * 8;
#pragma unroll
      for (int c = 0; c < kDim / 32; ++c) {
        const uint4 raw = __ldg(reinterpret_cast<const uint4*>(source + 32 * c));
        a[2 * c][half] = raw.x ^ zero;
        a[2 * c][half + 2] = raw.y ^ zero;
        a[2 * c + 1][half] = raw.z ^ zero;
        a[2 * c + 1][half + 2] = raw.w ^ zero;
      }
    }
  }
  __device__ __forceinline__ void values(int half, int c, float (&x)[8]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = Wide<T>::unpack(a[2 * c + i / 2][half + i % 2 * 2]);
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
  }
};

template <class T, int kDim, bool kRing>
struct Cta {
  static constexpr int kPieces = kDim / 8;  // of 16 bytes in a row

  const Launch& launch;
  const SaleCudaQueryRows& call = launch.call;
  const SaleCudaGrid& grid = launch.call.grid;
  const int offset = static_cast<int>(launch.call.grid.offset);
  const int tokens = offset + static_cast<int>(launch.call.grid.rows);
  const int group = launch.call.grid.heads / launch.call.grid.kv_heads;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint4* keys;    // [slot][key][piece]
  float* centre;  // [kDim]
  int batch = 0, kv_head = 0;

  __device__ __forceinline__ int tile_start(int tile) const { return (offset / kTileRows + tile) * kTileRows; }

  __device__ __forceinline__ void fetch(int block, int slot) const {
    const int piece = threadIdx.x % kPieces;
    const T* source = token_at<const T>(call.keys, batch, kv_head, block * kKeyBlock) + piece * 8;
#pragma unroll
    for (int i = 0; i < kKeyBlock * kPieces / (32 * kWarps); ++i) {
      const int key = threadIdx.x / kPieces + i * (32 * kWarps / kPieces);
      const bool present = block * kKeyBlock + key < tokens;
      copy_async(keys + (slot * kKeyBlock + key) * kPieces + (piece ^ (key & 1) * 4),
                 source + (present ? key * call.keys.token_stride : 0), present);
    }
  }

  __device__ __forceinline__ void load_centre() const {
    if (call.centre == nullptr) return;
    for (int i = threadIdx.x; i < kDim; i += 32 * kWarps)
      centre[i] = call.centre[(static_cast<int64_t>(batch) * grid.kv_heads + kv_head) * kDim + i];
  }

  __device__ __forceinline__ float centre_product(const Rows<T, kDim>& rows, int half) const {
    float sum = 0.0f;
#pragma unroll
    for (int c = 0; c < kDim / 32; ++c) {
      float x[8];
      rows.values(half, c, x);
      const float4* k = reinterpret_cast<const float4*>(centre + 32 * c + lane % 4 * 8);
      const float4 low = k[0], high = k[1];
      sum += fmaf(x[0], low.x, fmaf(x[1], low.y, fmaf(x[2], low.z, x[3] * low.w)));
      sum += fmaf(x[4], high.x, fmaf(x[5], high.y, fmaf(x[6], high.z, x[7] * high.w)));
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    return sum + __shfl_xor_sync(0xffffffffu, sum, 2);
  }

  // One block of keys, in `slot`, against a warp's rows, of which the first stands at `first`.
  __device__ __forceinline__ void attend(const Rows<T, kDim>& rows, int block, int slot, int first,
                                         LogSumExp (&sums)[2]) const {
    const float scale = call.scale * kLog2E;
    const int g = lane / 4, t = lane % 4;
    const uint4* source = keys + (slot * kKeyBlock + g) * kPieces + t;
    float scores[4][4] = {};
#pragma unroll
    for (int c = 0; c < kDim / 32; ++c) {
      uint4 b[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) b[n] = source[n * 8 * kPieces + 4 * (c ^ (g & 1))];
      // Four sums side by side: one product's latency hides behind the others.
#pragma unroll
      for (int n = 0; n < 4; ++n) Wide<T>::multiply(scores[n], rows.a[2 * c], b[n].x, b[n].y);
#pragma unroll
      for (int n = 0; n < 4; ++n) Wide<T>::multiply(scores[n], rows.a[2 * c + 1], b[n].z, b[n].w);
    }
    const int key = block * kKeyBlock;
    if (key + kKeyBlock > first) {  // some row of the warp sees not all
      const int visible = first - key + g - 2 * t;
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (8 * n + i % 2 > visible + i / 2 * 8) scores[n][i] = -INFINITY;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float x[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) x[j] = scores[j / 2][2 * half + j % 2];
      sums[half].take(x, scale);
    }
  }

  // Codes, scales, log-sum-exp and thresholds of a warp's rows.
  __device__ __forceinline__ void write(const Rows<T, kDim>& rows, int head, int position, LogSumExp (&sums)[2]) const {
    const int64_t plane = (static_cast<int64_t>(batch) * grid.heads + head) * grid.rows;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = position + 8 * half;
      const int64_t row = plane + at - offset;
      const bool present = at >= offset && at < tokens;
      const float row_scale = quantise(rows, half, row, present);
      if (call.lse == nullptr && call.thresholds == nullptr) continue;
      const float lse = sums[half].of_quad(call.scale * kLog2E, centre_product(rows, half));
      if (lane % 4 != 0 || !present) continue;
      if (call.lse != nullptr) call.lse[row] = lse;
      if (call.thresholds != nullptr)
        call.thresholds[row] = __fdiv_rn(__fdiv_rn(__fadd_rn(call.log_tau[head], lse), call.scale), row_scale);
    }
  }

  __device__ __forceinline__ float quantise(const Rows<T, kDim>& rows, int half, int64_t row, bool present) const {
    if (call.codes == nullptr) return 1.0f;
    uint32_t tops = 0;  // of both 16-bit halves: magnitudes are in the order of their bits, NaN above infinity
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) tops = __vmaxu2(tops, rows.a[i / 2][half + i % 2 * 2] & 0x7fff7fffu);
    uint32_t top = max(tops >> 16, tops & 0xffffu);
    top = max(top, __shfl_xor_sync(0xffffffffu, top, 1));
    top = max(top, __shfl_xor_sync(0xffffffffu, top, 2));
    top = magnitude(Wide<T>::unpack(top).x);
    const float scale = scale_of(top), reciprocal = __frcp_rn(scale);
#pragma unroll
    for (int c = 0; c < kDim / 32; ++c) {
      float x[8];
      rows.values(half, c, x);
      const uint2 packed = codes_of(x, scale, reciprocal);
      if (present) *reinterpret_cast<uint2*>(call.codes + row * kDim + 32 * c + lane % 4 * 8) = packed;
    }
    if (call.scales != nullptr && present && lane % 4 == 0) call.scales[row] = scale;
    return scale;
  }

  // This warp's first row in the tile, for the i-th head: alternating, so that long and short windows even out.
  __device__ __forceinline__ int warp_start(int tile, int member) const {
    return tile_start(tile) + (member % 2 ? kWarps - 1 - warp : warp) * kWarpRows;
  }

  __device__ __forceinline__ bool is_absent(int first) const {
    return first + kWarpRows <= offset || first >= tokens;
  }

  // All heads of a tile whose keys are in the ring.
  __device__ __forceinline__ void ring_tile(int tile) const {
#pragma unroll 1
    for (int member = 0; member < group; ++member) {
      const int first = warp_start(tile, member);
      if (is_absent(first)) continue;
      const int head = kv_head * group + member;
      Rows<T, kDim> rows;
      rows.load(call, batch, head, first + lane / 4, launch.zero);
      LogSumExp sums[2];
      const Window window(grid, first, first + kWarpRows);
#pragma unroll 1
      for (int block = 0; block < window.sink; ++block) attend(rows, block, launch.ring + block, first, sums);
      int slot = window.local % launch.ring;
#pragma unroll 1
      for (int block = window.local; block < window.end; ++block) {
        attend(rows, block, slot, first, sums);
        slot = slot + 1 == launch.ring ? 0 : slot + 1;
      }
      write(rows, head, first + lane / 4, sums);
    }
  }

  // The same with as many blocks at a time as there are slots; none where only codes are wanted.
  __device__ __forceinline__ void piecewise_tile(int tile, bool wants_keys) const {
    const int start = tile_start(tile);
    const Window all(grid, start, start + kTileRows);
#pragma unroll 1
    for (int member = 0; member < group; ++member) {
      const int first = warp_start(tile, member);
      const int head = kv_head * group + member;
      Rows<T, kDim> rows;
      rows.load(call, batch, head, first + lane / 4, launch.zero);
      LogSumExp sums[2];
      const Window window(grid, first, first + kWarpRows);
#pragma unroll 1
      for (int done = 0; wants_keys && done < all.count(); done += launch.slots) {
        const int count = min(launch.slots, all.count() - done);
        __syncthreads();
#pragma unroll 1
        for (int i = 0; i < count; ++i) fetch(all.block(done + i), i);
        copy_commit();
        copy_wait<0>();
        __syncthreads();
#pragma unroll 1
        for (int i = 0; i < count; ++i)
          if (window.has(all.block(done + i)) && !is_absent(first)) attend(rows, all.block(done + i), i, first, sums);
      }
      write(rows, head, first + lane / 4, sums);
    }
  }

  __device__ __forceinline__ void enter_head(int head_number) {
    __syncthreads();  // everyone is done with the last head's keys
    batch = head_number / grid.kv_heads;
    kv_head = head_number % grid.kv_heads;
    load_centre();
  }

  __device__ void run() {
    const int units = launch.tiles * grid.kv_heads * grid.batch;
    const int begin = static_cast<int>(int64_t{units} * blockIdx.x / gridDim.x);
    const int end = static_cast<int>(int64_t{units} * (blockIdx.x + 1) / gridDim.x);
    const bool wants_keys = call.lse != nullptr || call.thresholds != nullptr;
    int present = 0;  // local blocks in the ring end here
    for (int unit = begin; unit < end; ++unit) {
      const int tile = unit % launch.tiles;
      const bool enters = unit == begin || tile == 0;
      if (enters) enter_head(unit / launch.tiles);
      if constexpr (!kRing) {
        if (enters) __syncthreads();
        piecewise_tile(tile, wants_keys);
        continue;
      }
      const int start = tile_start(tile);
      const Window window(grid, start, start + kTileRows);
      if (enters) {
#pragma unroll 1
        for (int block = 0; block < window.sink; ++block) fetch(block, launch.ring + block);
#pragma unroll 1
        for (int block = window.local; block < window.end; ++block) fetch(block, block % launch.ring);
        copy_commit();
        present = window.end;
      }
      copy_wait<0>();
      __syncthreads();
      if (unit + 1 < end && tile + 1 < launch.tiles) {
        const Window next(grid, start + kTileRows, start + 2 * kTileRows);
#pragma unroll 1
        for (int block = max(present, next.local); block < next.end; ++block) fetch(block, block % launch.ring);
        copy_commit();
        present = next.end;
      }
      ring_tile(tile);
    }
  }
};

template <class T, int kDim, bool kRing>
__global__ void __launch_bounds__(32 * kWarps, 2) query_rows(const __grid_constant__ Launch launch) {
  extern __shared__ uint4 memory[];
  __shared__ alignas(16) float centre[kDim];
  Cta<T, kDim, kRing> cta{launch};
  cta.keys = memory;
  cta.centre = centre;
  cta.run();
}

template <class T, int kDim>
int run(Launch& launch, cudaStream_t stream) {
  const SaleCudaGrid& grid = launch.call.grid;
  int device = 0, most_bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&most_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  constexpr int kBlockBytes = kKeyBlock * kDim * 2;
  launch.slots = most_bytes >= 160 * 1024 || kDim == 64 ? 13 : 11;  // below that, one CTA a multiprocessor has 99 KiB
  // A tile's local blocks, and the next tile's last ones.
  const int local_blocks = (grid.local_tokens + kKeyBlock - 1) / kKeyBlock + 2 * kTileBlocks;
  launch.ring = launch.slots - grid.sink_blocks;
  if (launch.ring < local_blocks) launch.ring = 0;
  // Sink blocks come with the first tile of a head; those that it does not see yet would never come.
  if (grid.sink_blocks * kKeyBlock > (grid.offset / kTileRows + 1) * kTileRows) launch.ring = 0;
  const bool wants_keys = launch.call.lse != nullptr || launch.call.thresholds != nullptr;
  if (!wants_keys) launch.ring = 0;
  const int64_t first = grid.offset / kTileRows, last = (grid.offset + grid.rows + kTileRows - 1) / kTileRows;
  launch.tiles = static_cast<int>(last - first);
  const int64_t units = int64_t{launch.tiles} * grid.kv_heads * grid.batch, resident = 2 * grid.multiprocessors;
  const int ctas = static_cast<int>(units < resident ? units : resident);
  const auto kernel = launch.ring > 0 ? query_rows<T, kDim, true> : query_rows<T, kDim, false>;
  const int bytes = wants_keys ? launch.slots * kBlockBytes : 0;
  const cudaError_t allowed = launch.ring > 0 ? allow_shared_memory<query_rows<T, kDim, true>>(bytes)
                                              : allow_shared_memory<query_rows<T, kDim, false>>(bytes);
  if (allowed != cudaSuccess) return allowed;
  kernel<<<ctas, 32 * kWarps, bytes, stream>>>(launch);
  return cudaGetLastError();
}

}  // namespace
}  // namespace sale::cuda

extern "C" int32_t sale_cuda_query_rows(const SaleCudaQueryRows* call, void* stream) {
  using namespace sale::cuda;
  Launch launch{};
  launch.call = *call;
  const auto at = static_cast<cudaStream_t>(stream);
  if (call->grid.dtype == SALE_CUDA_F16)
    return call->grid.head_dim == 128 ? run<__half, 128>(launch, at) : run<__half, 64>(launch, at);
  return call->grid.head_dim == 128 ? run<__nv_bfloat16, 128>(launch, at) : run<__nv_bfloat16, 64>(launch, at);
}
