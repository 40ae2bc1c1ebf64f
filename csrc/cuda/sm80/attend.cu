// Block-sparse attention from sm_80 on, bf16 and fp16 with float32 sums, over lists of 32-key blocks decoded from the bitmask.
//
// One CTA: a query block of 64 or 128 rows, four warps of 16 or 32 rows each. A tile is one block, its keys and values,
// brought by 16-byte asynchronous copies; tokens that do not exist come as zeros, so that what lies behind a page's last
// token never counts. (64 keys a tile need 30 registers more than there are, and half of the last tile is often empty.)
// All threads decode the bitmask, one block each, into a list in shared memory. Its order, ascending, follows from absolute
// positions and the mask alone, so that a row's bits do too. Only tiles that reach the diagonal have masks.
//
// Barriers: __syncthreads once a tile: the tile is there, and all warps are done with the one before.
// Shared memory at head_dim 128, 128 rows: Q 32 KiB, kStages x (K 8 KiB + V 8 KiB), the list 3 KiB: 67 KiB with two stages,
// two CTAs a multiprocessor (sm_80, sm_90); 99 KiB with four, where one CTA is all that fits (sm_86, sm_89).
#include "../attend_work.cuh"
#include "../code_tiles.cuh"
#include "../launch.cuh"
#include "../mma.cuh"

namespace sale::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kScanBlocks = kThreads;  // that are decoded at a time
constexpr int kListBlocks = 2 * kScanBlocks - 16;
constexpr int kRing = 8;      // tiles whose block numbers are kept
constexpr int kAbsent = -1;   // no more blocks
constexpr float kNoMaximum = -1.0e30f;

template <class Element>
constexpr float kLift = 0.0f;
// Weights of fp16 are kept 2^12 times as large: its smallest normal number is no more than 2^-14.
template <>
constexpr float kLift<__half> = 12.0f;

struct Entry {
  int block, unit, token;  // the block's page or batch row, and its first token there
};

// The blocks that the CTA's item attends to, ascending; decoded again and again as far as there is room. What the loop
// over tiles needs to know of it is here as well: registers are scarce there.
struct List {
  Entry entries[kListBlocks];
  int count;
  int base;     // the first tile of these entries
  int scanned;  // blocks that were decoded so far
  int kv_head;

  __device__ __forceinline__ bool holds(int tile) const { return tile - base < count; }
};

template <class Element, int kDim, int kRows, int kStages>
struct Shared {
  alignas(128) Element query[kRows * kDim];
  struct {
    Element keys[kKeyBlock * kDim];
    Element values[kKeyBlock * kDim];
  } tiles[kStages];
  List list;
  int blocks[kRing];  // of the tiles
};

// The piece of eight elements at `column` of row `row`.
template <int kDim, class Element>
__device__ __forceinline__ Element* piece_at(Element* matrix, int row, int column) {
  return matrix + swizzled<2 * kDim>(row, column / 8) / 2;
}

// blockIdx.x, but what was made from it elsewhere is made again, and not kept in a register till then.
__device__ __forceinline__ int block_number() {
  int number;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(number));
  return number;
}

__device__ __forceinline__ uint32_t bits_below(int block, int first) {
  const int count = block - first;
  return count >= 32 ? 0xffffffffu : count <= 0 ? 0u : (1u << count) - 1u;
}

// Bits of the item's blocks [first, first + 32).
__device__ __forceinline__ uint32_t list_word(const SaleCudaAttend& call, const Blocks& blocks, const Item& item, int first) {
  const uint32_t reachable = bits_below(blocks.causal_end(item.index), first);
  if (reachable == 0) return 0;
  const uint32_t* words = words_of(call, blocks, item);
  if (words == nullptr) return reachable;
  const uint32_t always = bits_below(blocks.sink_blocks, first) | ~bits_below(blocks.local_start(item.index), first);
  return (words[first / 32] | always) & reachable;
}

__device__ __forceinline__ void start_list(List& list, int kv_head) {
  if (threadIdx.x != 0) return;
  list.count = list.base = list.scanned = 0;
  list.kv_head = kv_head;
}

// Decodes what comes next, a block a thread, as the entries of `tile` and those after it; none if all were. All threads.
__device__ __forceinline__ void refill(List& list, const SaleCudaAttend& call, int tile) {
  const Blocks blocks(call.grid);
  const Item item(call.grid, blocks.query_blocks(), block_number());
  const int end = blocks.causal_end(item.index);
  __syncthreads();  // nobody reads the list any more
  int scanned = list.scanned, count = 0;
  for (; scanned < end && count + kScanBlocks <= kListBlocks; scanned += kScanBlocks) {
    int before = count;
#pragma unroll
    for (int w = 0; w < kScanBlocks / 32; ++w) {
      const uint32_t bits = list_word(call, blocks, item, scanned + 32 * w);
      if (w < static_cast<int>(threadIdx.x) / 32) before += __popc(bits);
      if (w == threadIdx.x / 32 && (bits >> threadIdx.x % 32 & 1) != 0) {
        const int block = scanned + threadIdx.x;
        const BlockPlace place = place_of_block(call.keys, item.batch, block);
        list.entries[before + __popc(bits & ((1u << threadIdx.x % 32) - 1))] = {block, static_cast<int>(place.unit), place.token};
      }
      count += __popc(bits);
    }
  }
  if (threadIdx.x == 0) {
    list.count = count;
    list.base = tile;
  }
  __syncthreads();
  if (threadIdx.x == 0) list.scanned = scanned;
}

// Copies a block's keys or values, of which `present` are there.
template <class Element, int kDim>
__device__ __forceinline__ void load_block(Element* target, const SaleCudaTokens& tokens, const Entry& entry, int kv_head,
                                           int present) {
  constexpr int kPieces = kDim / 8, kRowsAtOnce = kThreads / kPieces;
  const int column = threadIdx.x % kPieces * 8, first = threadIdx.x / kPieces;
  const Element* source = static_cast<const Element*>(tokens.data) + entry.unit * tokens.unit_stride +
                          kv_head * tokens.head_stride + (entry.token + first) * tokens.token_stride + column;
#pragma unroll
  for (int row = 0; row < kKeyBlock; row += kRowsAtOnce) {
    const bool there = first + row < present;
    copy_async(piece_at<kDim>(target, first + row, column), there ? static_cast<const void*>(source) : tokens.data, there);
    source += kRowsAtOnce * tokens.token_stride;
  }
}

template <class Element, int kDim, int kRows>
__device__ __forceinline__ void load_query(Element* target, const SaleCudaAttend& call, const Item& item, int64_t first_row) {
  constexpr int kPieces = kDim / 8, kRowsAtOnce = kThreads / kPieces;
  const int column = threadIdx.x % kPieces * 8;
  for (int at = threadIdx.x / kPieces; at < kRows; at += kRowsAtOnce) {
    const int64_t row = first_row + at;
    const bool present = row >= 0 && row < call.grid.rows;
    copy_async(piece_at<kDim>(target, at, column),
               row_at<const Element>(call.query, item.batch, item.head, present ? row : 0) + column, present);
  }
}

// Softmax state of sixteen rows: this thread's are g and g + 8. The maximum is exact: its weight is then a power of two,
// which rounds to itself.
struct Softmax {
  float maximum[2] = {kNoMaximum, kNoMaximum};
  float total[2] = {0.0f, 0.0f};

  // Scores -> weights times 2^lift, in place. Whether, and by which factors, the sums so far must shrink.
  template <int kTiles>
  __device__ __forceinline__ bool advance(float (&scores)[kTiles][4], float (&factors)[2], float scale, float lift) {
    bool moved = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = fmaxf(scores[0][2 * half], scores[0][2 * half + 1]);
#pragma unroll
      for (int j = 1; j < kTiles; ++j) top = fmaxf(top, fmaxf(scores[j][2 * half], scores[j][2 * half + 1]));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2)) * scale;
      const bool moves = top > maximum[half];
      const float now = moves ? top : maximum[half];
      factors[half] = moves ? exp2_fast(maximum[half] - now) : 1.0f;
      moved |= moves;
      maximum[half] = now;
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& value = scores[j][2 * half + i];
          value = exp2_fast(fmaf(value, scale, lift - now));
          sum += value;
        }
      total[half] = fmaf(total[half], factors[half], sum);
    }
    return __any_sync(0xffffffffu, moved);
  }
};

// A warp's rows, in kParts pieces of sixteen.
template <class Element, int kDim, int kParts>
struct Rows {
  static constexpr int kKeyTiles = kKeyBlock / 8, kColumnTiles = kDim / 8;
  using Mma = Wide<Element>;

  Softmax softmax[kParts];
  float sums[kParts][kColumnTiles][4] = {};

  __device__ __forceinline__ static void score(float (&scores)[kParts][kKeyTiles][4], const Element* query, const Element* keys) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
      uint32_t a[kParts][4];
#pragma unroll
      for (int part = 0; part < kParts; ++part)
        load_matrices(a[part], piece_at<kDim>(query, part * 16 + lane % 16, step * 16 + lane / 16 * 8));
#pragma unroll
      for (int j = 0; j < kKeyTiles; j += 2) {
        uint32_t b[4];
        load_matrices(b, piece_at<kDim>(keys, j * 8 + lane % 16, step * 16 + lane / 16 * 8));
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          Mma::multiply(scores[part][j], a[part], b[0], b[2]);
          Mma::multiply(scores[part][j + 1], a[part], b[1], b[3]);
        }
      }
    }
  }

  // -inf where a key comes after its row; `position` of this thread's first row.
  __device__ __forceinline__ static void mask(float (&scores)[kParts][kKeyTiles][4], int block, int position) {
    const int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int j = 0; j < kKeyTiles; ++j) {
        const int key = block * kKeyBlock + j * 8 + column;
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (key + i % 2 > position + part * 16 + i / 2 * 8) scores[part][j][i] = -INFINITY;
      }
  }

  __device__ __forceinline__ void add(const float (&weights)[kParts][kKeyTiles][4], const Element* values) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < kKeyBlock / 16; ++step) {
      uint32_t a[kParts][4];
#pragma unroll
      for (int part = 0; part < kParts; ++part)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = &weights[part][2 * step + i / 2][i % 2 * 2];
          a[part][i] = Mma::pack(pair[0], pair[1]);
        }
#pragma unroll
      for (int j = 0; j < kColumnTiles; j += 2) {
        uint32_t b[4];
        load_matrices_transposed(b, piece_at<kDim>(values, step * 16 + lane % 16, j * 8 + lane / 16 * 8));
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          Mma::multiply(sums[part][j], a[part], b[0], b[1]);
          Mma::multiply(sums[part][j + 1], a[part], b[2], b[3]);
        }
      }
    }
  }

  // Scores -> weights, and the sums so far brought down to the new maximum.
  __device__ __forceinline__ void weigh(float (&scores)[kParts][kKeyTiles][4], float scale) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      float factors[2];
      if (softmax[part].advance(scores[part], factors, scale, kLift<Element>))
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[part][j][i] *= factors[i / 2];
    }
  }

  __device__ __forceinline__ void write(const SaleCudaAttend& call, const Item& item, int64_t first_row) const {
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float total = softmax[part].total[half];
        total += __shfl_xor_sync(0xffffffffu, total, 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
        const int64_t row = first_row + part * 16 + 8 * half;
        if (row < 0 || row >= call.grid.rows) continue;
        const float inverse = 1.0f / total;
        uint32_t* out = reinterpret_cast<uint32_t*>(row_at<Element>(call.output, item.batch, item.head, row)) + threadIdx.x % 4;
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j)
          out[4 * j] = Mma::pack(sums[part][j][2 * half] * inverse, sums[part][j][2 * half + 1] * inverse);
        if (call.lse != nullptr && threadIdx.x % 4 == 0)
          call.lse[item.batch * call.lse_batch_stride + item.head * call.lse_head_stride + row] =
              (softmax[part].maximum[half] + (log2f(total) - kLift<Element>)) * kLn2;
      }
  }
};

// Asks for a tile, or notes that there is none.
template <class Element, int kDim, int kRows, int kStages>
__device__ __forceinline__ void load_tile(Shared<Element, kDim, kRows, kStages>& shared, const SaleCudaAttend& call, int tile) {
  if (!shared.list.holds(tile)) refill(shared.list, call, tile);
  const List& list = shared.list;
  int block = kAbsent;
  if (list.holds(tile)) {
    const Entry entry = list.entries[tile - list.base];
    block = entry.block;
    const int present = static_cast<int>(call.grid.offset + call.grid.rows) - block * kKeyBlock;
    auto& target = shared.tiles[tile % kStages];
    load_block<Element, kDim>(target.keys, call.keys, entry, list.kv_head, present);
    load_block<Element, kDim>(target.values, call.values, entry, list.kv_head, present);
  }
  if (threadIdx.x == 0) shared.blocks[tile % kRing] = block;
  copy_commit();
}

template <class Element, int kDim, int kParts, int kStages>
__global__ void __launch_bounds__(kThreads, kStages == 2 ? 2 : 1) attend(const __grid_constant__ SaleCudaAttend call) {
  constexpr int kRows = 16 * kParts * kWarps;
  extern __shared__ uint4 memory[];
  auto& shared = *reinterpret_cast<Shared<Element, kDim, kRows, kStages>*>(memory);
  const Blocks blocks(call.grid);
  const Item item(call.grid, blocks.query_blocks(), blockIdx.x);
  if (call.skip_heads != nullptr && call.skip_heads[item.head] != 0) return;
  const int start = static_cast<int>(blocks.start(item.index)), warp_row = threadIdx.x / 32 * 16 * kParts;
  const int warp_start = start + warp_row, own = threadIdx.x % 32 / 4;

  load_query<Element, kDim, kRows>(shared.query, call, item, start - blocks.offset);
  start_list(shared.list, item.kv_head);
  __syncthreads();
#pragma unroll 1
  for (int tile = 0; tile < kStages - 1; ++tile) load_tile<Element, kDim, kRows, kStages>(shared, call, tile);
  Rows<Element, kDim, kParts> rows;
  const Element* query = shared.query + warp_row * kDim;
#pragma unroll 1
  for (int tile = 0;; ++tile) {
    copy_wait<kStages - 2>();
    __syncthreads();
    const int block = shared.blocks[tile % kRing];
    if (block == kAbsent) break;
    load_tile<Element, kDim, kRows, kStages>(shared, call, tile + kStages - 1);
    if (block * kKeyBlock >= warp_start + 16 * kParts) continue;  // after all of the warp's rows
    const auto& tokens = shared.tiles[tile % kStages];
    float scores[kParts][kKeyBlock / 8][4] = {};
    rows.score(scores, query, tokens.keys);
    if ((block + 1) * kKeyBlock > warp_start) rows.mask(scores, block, warp_start + own);
    rows.weigh(scores, call.scale * kLog2E);
    rows.add(scores, tokens.values);
  }
  copy_wait<0>();
  rows.write(call, item, static_cast<int64_t>(warp_start) + own - blocks.offset);
}

template <class Element, int kDim, int kParts, int kStages>
int run(const SaleCudaAttend& call, cudaStream_t stream) {
  constexpr int kBytes = sizeof(Shared<Element, kDim, 16 * kParts * kWarps, kStages>);
  static_assert(kBytes <= 99 * 1024, "a CTA of sm_86 and sm_89 has no more");
  const cudaError_t allowed = allow_shared_memory<attend<Element, kDim, kParts, kStages>>(kBytes);
  if (allowed != cudaSuccess) return allowed;
  const int items = Blocks(call.grid).query_blocks() * call.grid.batch * call.grid.heads;
  attend<Element, kDim, kParts, kStages><<<items, kThreads, kBytes, stream>>>(call);
  return cudaGetLastError();
}

// Two stages and two CTAs a multiprocessor where these fit, else four stages.
template <class Element, int kDim, int kParts>
int run(const SaleCudaAttend& call, cudaStream_t stream) {
  constexpr int kBytes = sizeof(Shared<Element, kDim, 16 * kParts * kWarps, 2>);
  int device = 0, most = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  if (status != cudaSuccess) return status;
  return 2 * (kBytes + 1024) <= most ? run<Element, kDim, kParts, 2>(call, stream) : run<Element, kDim, kParts, 4>(call, stream);
}

template <class Element>
int run(const SaleCudaAttend& call, cudaStream_t stream) {
  if (call.grid.query_block == 128)
    return call.grid.head_dim == 128 ? run<Element, 128, 2>(call, stream) : run<Element, 64, 2>(call, stream);
  return call.grid.head_dim == 128 ? run<Element, 128, 1>(call, stream) : run<Element, 64, 1>(call, stream);
}

}  // namespace
}  // namespace sale::cuda

extern "C" int32_t sale_cuda_attend(const SaleCudaAttend* call, void* stream) {
  const auto at = static_cast<cudaStream_t>(stream);
  return call->grid.dtype == SALE_CUDA_F16 ? sale::cuda::run<__half>(*call, at) : sale::cuda::run<__nv_bfloat16>(*call, at);
}
