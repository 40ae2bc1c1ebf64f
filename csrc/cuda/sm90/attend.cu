// Block-sparse attention on sm_90a, bf16 or fp16 with float32 sums, over lists of 32-key blocks decoded from the bitmask.
//
// Persistent CTAs: two producer warps, and one consumer warpgroup per 64 rows of the query block (two at 128). The
// producers take work from a counter, decode the block list, and gather four 32-key boxes into each 128-key stage, one of
// keys, one of values: boxes of 32 rows are whole swizzle atoms, so they may come from anywhere. Softmax does not care about key order, so the
// diagonal blocks come first, together with what does not fill whole stages: only these "edge" tiles need masks.
// A consumer runs scores of tile t beside values of tile t - 1; two warpgroups take turns at the tensor cores, so that one's
// softmax hides behind the other's products.
//
// Barriers (each phase flips once a use):
//   work_full[2]  1 arrival a lane of a producer    the item's number, list lengths and edge slots are there
//   work_free[2]  1 a consumer warp, 1 a producer  nobody reads them any more
//   query_full    1 arrival + Q's bytes; query_free: 1 arrival a consumer warp
//   key_full[s], value_full[s]                   1 arrival + a stage's bytes
//   key_free[s], value_free[s]                   1 arrival a consumer warp
//   named 2, 3: turns of warpgroup 0, 1; named 4, 5: all of warpgroup 0, 1, after a tail of values was zeroed
// Shared memory at head_dim 128, 128 rows: Q 32 KiB, kStages x (K 32 KiB + V 32 KiB); 224 KiB in all.
#include "../attend_work.cuh"
#include "../launch.cuh"
#include "../layout.cuh"
#include "../mma.cuh"
#include "ptx.cuh"
#include "tensor_map.cuh"
#include "wgmma.cuh"

namespace sale::cuda {
namespace {

constexpr int kTileKeys = 128;
constexpr int kTileBlocks = kTileKeys / kKeyBlock;
constexpr int kStages = 3;
constexpr int kEdgeTiles = 2;
constexpr int kAbsent = -1;
constexpr float kNoMaximum = -1.0e30f;

struct Launch {
  SaleCudaAttend call;
  CUtensorMap query, keys, values;
  int items;
};

template <class T, int kDim, int kWarpgroups>
struct Shared {
  static constexpr int kHalves = kDim / 64;  // columns in pieces of 64: one 128-byte swizzle span
  static constexpr int kRows = 64 * kWarpgroups;
  alignas(1024) T query[kHalves][kRows][64];
  alignas(1024) T keys[kStages][kHalves][kTileKeys][64];
  alignas(1024) T values[kStages][kHalves][kTileKeys][64];
  uint64_t query_full, query_free;
  uint64_t work_full[2], work_free[2];
  uint64_t key_full[kStages], key_free[kStages], value_full[kStages], value_free[kStages];
  struct {
    int number;      // of the work item; kAbsent: no more
    int tiles;       // of its list
    int edge_tiles;  // the first of them, with slots
    int extra;       // blocks of the list, from its start, that the slots hold
    int slots[kEdgeTiles * kTileBlocks];
  } work[2];
};

// ---------------------------------------------------------------------------------------------------------- producer

// Two warps decode the same list: one loads Q and the keys, and says what the work is; the other loads the values.
template <class T, int kDim, int kWarpgroups, bool kOfKeys>
struct Producer {
  using SharedMemory = Shared<T, kDim, kWarpgroups>;
  static constexpr uint32_t kStageBytes = kTileKeys * kDim * 2;

  const Launch& launch;
  SharedMemory& shared;
  const int lane = threadIdx.x % 32;
  int stage = 0;
  uint32_t phase = 0;
  int waiting = 0;  // blocks of the next stage so far
  Place next{-1, 0};  // of the block that is put next: its page was looked up while others were on their way
  int edge_slot = kAbsent;  // of the item, slot `lane` of the edge tiles

  __device__ __forceinline__ Producer(const Launch& l, SharedMemory& s) : launch(l), shared(s) {}

  __device__ __forceinline__ void run() {
    const SaleCudaAttend& call = launch.call;
    const Blocks blocks(call.grid);
    for (uint32_t turn = 0;; ++turn) {
      const int number = kOfKeys ? plan(blocks, turn) : told_number(turn);
      if (number == kAbsent) return;
      const Item item(call.grid, blocks.query_blocks(), number);
      if (kOfKeys && lane == 0) load_query(blocks, item, turn);
      serve(blocks, item, turn);
    }
  }

  __device__ __forceinline__ int told_number(uint32_t turn) {
    barrier_wait(&shared.work_full[turn & 1], turn >> 1 & 1);
    return shared.work[turn & 1].number;
  }

  // Takes the next item and works out its edge tiles, while the consumers are still at the one before.
  __device__ __forceinline__ int plan(const Blocks& blocks, uint32_t turn) {
    auto& work = shared.work[turn & 1];
    int number = 0;
    if (lane == 0) number = take(blocks);
    number = __shfl_sync(0xffffffffu, number, 0);
    barrier_wait(&shared.work_free[turn & 1], (turn >> 1 & 1) ^ 1);  // every lane: all of them write
    if (number >= launch.items) number = kAbsent;
    if (number != kAbsent) plan_edges(blocks, Item(launch.call.grid, blocks.query_blocks(), number), work);
    if (lane == 0) work.number = number;
    barrier_arrive(&shared.work_full[turn & 1]);  // every lane, for what it wrote
    return number;
  }

  __device__ __forceinline__ int take(const Blocks& blocks) const {
    for (;;) {
      const int number = atomicAdd(launch.call.next_work, 1);
      // Each CTA is told once that there is no more, so this is the last number of all: the next launch finds a zero.
      if (number == launch.items + static_cast<int>(gridDim.x) - 1) *launch.call.next_work = 0;
      const uint8_t* skip = launch.call.skip_heads;
      if (number >= launch.items || skip == nullptr) return number;
      if (skip[Item(launch.call.grid, blocks.query_blocks(), number).head] == 0) return number;
    }
  }

  // Word `w` of the item's list, diagonal blocks (from `diagonal` on) left out.
  __device__ __forceinline__ uint32_t list_word(const Blocks& blocks, const Item& item, const uint32_t* words, int w, int diagonal) const {
    const auto below = [w](int end) {
      const int count = end - 32 * w;
      return count >= 32 ? 0xffffffffu : count <= 0 ? 0u : (1u << count) - 1u;
    };
    const uint32_t reachable = below(diagonal);
    if (words == nullptr) return reachable;
    if (reachable == 0) return 0;
    const uint32_t always = below(blocks.sink_blocks) | ~below(blocks.local_start(item.index));
    return (words[w] | always) & reachable;
  }

  // Calls visit(block) for the item's blocks before `diagonal`, ascending, in all lanes alike, until it returns false.
  template <class Visit>
  __device__ __forceinline__ void enumerate(const Blocks& blocks, const Item& item, const uint32_t* words, int diagonal, Visit visit) {
    const int word_count = (diagonal + 31) / 32;
    for (int first = 0; first < word_count; first += 32) {
      const uint32_t mine = first + lane < word_count ? list_word(blocks, item, words, first + lane, diagonal) : 0;
      for (uint32_t busy = __ballot_sync(0xffffffffu, mine != 0); busy != 0; busy &= busy - 1) {
        const int source = __ffs(busy) - 1;
        for (uint32_t bits = __shfl_sync(0xffffffffu, mine, source); bits != 0; bits &= bits - 1)
          if (!visit(32 * (first + source) + __ffs(bits) - 1)) return;
      }
    }
  }

  __device__ __forceinline__ const uint32_t* words_of(const Blocks& blocks, const Item& item) const {
    return sale::cuda::words_of(launch.call, blocks, item);
  }

  // Edge slots: diagonal blocks, the first `extra` others, then none; the rest of the list fills whole tiles.
  template <class Work>
  __device__ __forceinline__ void plan_edges(const Blocks& blocks, const Item& item, Work& work) {
    const uint32_t* words = words_of(blocks, item);
    const int diagonal = static_cast<int>(blocks.start(item.index) / kKeyBlock);
    const int diagonals = blocks.causal_end(item.index) - diagonal;
    int others = 0;
    for (int w = lane; w < (diagonal + 31) / 32; w += 32) others += __popc(list_word(blocks, item, words, w, diagonal));
    others = __reduce_add_sync(0xffffffffu, others);
    const int extra = others % kTileBlocks;
    const int edge_tiles = diagonals + extra <= kTileBlocks ? 1 : kEdgeTiles;
    edge_slot = lane < diagonals ? diagonal + lane : kAbsent;
    if (extra > 0) {
      int at = diagonals;
      enumerate(blocks, item, words, diagonal, [&](int block) {
        if (lane == at) edge_slot = block;
        return ++at < diagonals + extra;
      });
    }
    if (lane < kEdgeTiles * kTileBlocks) work.slots[lane] = edge_slot;
    if (lane == 0) {
      work.edge_tiles = edge_tiles;
      work.tiles = edge_tiles + (others - extra) / kTileBlocks;
      work.extra = extra;
    }
    __syncwarp();
  }

  __device__ __forceinline__ void serve(const Blocks& blocks, const Item& item, uint32_t turn) {
    const auto& work = shared.work[turn & 1];
    const int diagonal = static_cast<int>(blocks.start(item.index) / kKeyBlock), extra = work.extra;
    const int edge_blocks = work.edge_tiles * kTileBlocks;
    if (!kOfKeys) edge_slot = work.slots[lane % (kEdgeTiles * kTileBlocks)];
    __syncwarp();
    if (lane == 0) barrier_arrive(&shared.work_free[turn & 1]);
#pragma unroll 1
    for (int i = 0; i < edge_blocks; ++i) {
      const int block = __shfl_sync(0xffffffffu, edge_slot, i);
      if (lane == 0) put(item, block == kAbsent ? diagonal : block);
    }
    int passed = 0;
    enumerate(blocks, item, words_of(blocks, item), diagonal, [&](int block) {
      if (passed++ >= extra && lane == 0) put(item, block);
      return true;
    });
    if (lane == 0) fetch(item);
    next.unit = -1;
  }

  __device__ __forceinline__ void load_query(const Blocks& blocks, const Item& item, uint32_t turn) {
    barrier_wait(&shared.query_free, turn & 1 ^ 1);
    barrier_expect(&shared.query_full, sizeof(shared.query));
    const int row = static_cast<int>(blocks.start(item.index) - blocks.offset);  // rows that are not there come as zeros
#pragma unroll
    for (int half = 0; half < SharedMemory::kHalves; ++half)
      tensor_load(shared.query[half], &launch.query, &shared.query_full, half * 64, row, item.head, item.batch);
  }

  // One more block, fetched when the next one is put: by then its page is known.
  __device__ __forceinline__ void put(const Item& item, int block) {
    const SaleCudaTokens& tokens = kOfKeys ? launch.call.keys : launch.call.values;
    const BlockPlace place = place_of_block(tokens, item.batch, block);
    if (next.unit >= 0) fetch(item);
    next = {place.unit, place.token};
  }

  // Into the stage being gathered: the first block waits for the stage, the fourth fills it up.
  __device__ __forceinline__ void fetch(const Item& item) {
    const CUtensorMap& map = kOfKeys ? launch.keys : launch.values;
    uint64_t* full = kOfKeys ? &shared.key_full[stage] : &shared.value_full[stage];
    auto& target = kOfKeys ? shared.keys[stage] : shared.values[stage];
    if (waiting == 0) {
      barrier_wait(kOfKeys ? &shared.key_free[stage] : &shared.value_free[stage], phase ^ 1);
      barrier_expect(full, kStageBytes);
    }
#pragma unroll
    for (int half = 0; half < SharedMemory::kHalves; ++half)
      tensor_load(target[half][waiting * kKeyBlock], &map, full, half * 64, static_cast<int>(next.token), item.kv_head,
                  static_cast<int>(next.unit));
    if (++waiting < kTileBlocks) return;
    waiting = 0;
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// ---------------------------------------------------------------------------------------------------------- consumers

// Pins values to this place in the program: neither the arithmetic before nor a wgmma's wait after may cross it.
template <int kCount>
__device__ __forceinline__ void pin(float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(values[i])::"memory");
}

// Softmax state of a thread's two rows (g and g + 8 of wgmma's layout), scores and probabilities of a tile.
struct Softmax {
  float scale;  // of scores, to powers of two
  float maximum[2] = {kNoMaximum, kNoMaximum};
  float total[2] = {0.0f, 0.0f};

  // scores -> probabilities in place. True where some row's maximum moved, so that the sums so far must shrink by
  // `factors`. The maximum is exact: its probability is then 1, which bfloat16 rounds to itself.
  __device__ __forceinline__ bool advance(float (&scores)[64], float (&factors)[2]) {
    bool moved = false;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float top = scores[2 * row];
#pragma unroll
      for (int j = 0; j < 16; ++j) top = fmaxf(top, fmaxf(scores[4 * j + 2 * row], scores[4 * j + 2 * row + 1]));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2)) * scale;
      const bool moves = top > maximum[row];
      const float now = moves ? top : maximum[row];
      factors[row] = moves ? exp2_fast(maximum[row] - now) : 1.0f;
      moved |= moves;
      maximum[row] = now;
      float sum[2] = {0.0f, 0.0f};
#pragma unroll
      for (int j = 0; j < 16; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& value = scores[4 * j + 2 * row + i];
          value = exp2_fast(fmaf(value, scale, -now));
          sum[i] += value;
        }
      total[row] = fmaf(total[row], factors[row], sum[0] + sum[1]);
      // Never true. It makes the vote, and with it the caller's branch and the wait behind that, depend on every
      // exponential: ptxas would move them all behind the wait for the products that they should run beside.
      moved |= sum[0] + sum[1] < 0.0f;
    }
    return __any_sync(0xffffffffu, moved);
  }
};

template <class T, int kDim, int kWarpgroups>
struct Consumer {
  using SharedMemory = Shared<T, kDim, kWarpgroups>;
  static constexpr uint32_t kHalfBytes = kTileKeys * 128;

  const Launch& launch;
  SharedMemory& shared;
  const int warpgroup = uniform(threadIdx.x / 128);
  const bool leader = threadIdx.x % 32 == 0;  // of the warp
  int stage = 0;       // of the next tile's keys
  uint32_t phase = 0;

  __device__ __forceinline__ Consumer(const Launch& l, SharedMemory& s) : launch(l), shared(s) {}

  __device__ __forceinline__ void run() {
    const SaleCudaAttend& call = launch.call;
    const Blocks blocks(call.grid);
    if (kWarpgroups == 2 && warpgroup == 1) named_arrive(2, 256);  // the first turn is warpgroup 0's
    for (uint32_t turn = 0;; ++turn) {
      barrier_wait(&shared.work_full[turn & 1], turn >> 1 & 1);
      const int number = uniform(shared.work[turn & 1].number);
      if (number == kAbsent) return;
      attend(blocks, Item(call.grid, blocks.query_blocks(), number), turn);
    }
  }

  __device__ __forceinline__ void my_turn() const {
    if (kWarpgroups == 2) named_sync(2 + warpgroup, 256);
  }
  __device__ __forceinline__ void your_turn() const {
    if (kWarpgroups == 2) named_arrive(3 - warpgroup, 256);
  }

  __device__ __forceinline__ void scores_of(float (&scores)[64], int at) const {
    const uint64_t query = matrix_descriptor(shared.query[0][64 * warpgroup], 16, 1024, 1);
    const uint64_t keys = moved(matrix_descriptor(shared.keys[0], 16, 1024, 1), at * sizeof(shared.keys[0]));
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step)
      Wgmma<T>::scores(scores, moved(query, step / 4 * sizeof(shared.query[0]) + step % 4 * 32),
                      moved(keys, step / 4 * sizeof(shared.keys[0][0]) + step % 4 * 32), step > 0);
    wgmma_commit();
  }

  __device__ __forceinline__ void add_values(float (&sums)[kDim / 2], const uint32_t (&weights)[kTileKeys / 16][4], int at,
                                             bool add) const {
    const uint64_t values = moved(matrix_descriptor(shared.values[0], kHalfBytes, 1024, 1), at * sizeof(shared.values[0]));
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kTileKeys / 16; ++step)
      Wgmma<T>::values(sums, weights[step], moved(values, step * 16 * 128), add || step > 0);
    wgmma_commit();
  }

  __device__ __forceinline__ static void to_weights(const float (&scores)[64], uint32_t (&weights)[kTileKeys / 16][4]) {
#pragma unroll
    for (int step = 0; step < kTileKeys / 16; ++step)
#pragma unroll
      for (int i = 0; i < 4; ++i) weights[step][i] = Wide<T>::pack(scores[8 * step + 2 * i], scores[8 * step + 2 * i + 1]);
  }

  // -inf where an edge tile's slot is empty or its key comes after the row.
  __device__ __forceinline__ void mask(float (&scores)[64], const int* slots, int64_t position) const {
#pragma unroll
    for (int s = 0; s < kTileBlocks; ++s) {
      const int slot = slots[s];
      // Columns of this thread in the block that its first row sees end here.
      const int64_t reach = position - static_cast<int64_t>(slot) * kKeyBlock - threadIdx.x % 4 * 2;
      const int visible = slot == kAbsent ? -64 : static_cast<int>(reach < 64 ? reach : 64);
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (8 * j + i % 2 > visible + i / 2 * 8) scores[16 * s + 4 * j + i] = -INFINITY;
    }
  }

  // Values behind the last token of a page may be anything; a weight of zero does not hide a NaN. Each warpgroup clears
  // them for itself: waiting for the other one in the middle of a turn would be waiting for ever.
  __device__ __forceinline__ void clear_tail(int at, const int* slots, int64_t tokens) const {
    for (int i = threadIdx.x % 128; i < kTileKeys * SharedMemory::kHalves * 8; i += 128) {
      const int key = i / 8 % kTileKeys, half = i / 8 / kTileKeys;
      const int slot = slots[key / kKeyBlock];
      const bool absent = slot == kAbsent || static_cast<int64_t>(slot) * kKeyBlock + key % kKeyBlock >= tokens;
      if (absent) *reinterpret_cast<uint4*>(&shared.values[at][half][key][i % 8 * 8]) = make_uint4(0, 0, 0, 0);
    }
    proxy_fence();
    named_sync(4 + warpgroup, 128);
  }

  __device__ __forceinline__ void attend(const Blocks& blocks, const Item& item, uint32_t turn) {
    const SaleCudaAttend& call = launch.call;
    const int tiles = uniform(shared.work[turn & 1].tiles), edge_tiles = uniform(shared.work[turn & 1].edge_tiles);
    const int* slots = shared.work[turn & 1].slots;
    const int64_t position = blocks.start(item.index) + 64 * warpgroup + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    const bool ragged = call.values.page_table != nullptr && blocks.tokens % kKeyBlock != 0;

    Softmax softmax;
    softmax.scale = call.scale * kLog2E;
    float sums[kDim / 2], scores[64], factors[2];
    uint32_t weights[kTileKeys / 16][4];

    int value_stage = stage;
    uint32_t value_phase = phase;
    barrier_wait(&shared.query_full, turn & 1);
    barrier_wait(&shared.key_full[stage], phase);
    my_turn();
    scores_of(scores, stage);
    your_turn();
    wgmma_wait<0>();
    pin(scores);
    next_keys();
    mask(scores, slots, position);
    softmax.advance(scores, factors);
    to_weights(scores, weights);

#pragma unroll 1
    for (int tile = 1; tile < tiles; ++tile) {
      barrier_wait(&shared.key_full[stage], phase);
      my_turn();
      scores_of(scores, stage);
      barrier_wait(&shared.value_full[value_stage], value_phase);
      if (ragged && tile <= edge_tiles) clear_tail(value_stage, slots + (tile - 1) * kTileBlocks, blocks.tokens);
      add_values(sums, weights, value_stage, tile > 1);
      your_turn();
      wgmma_wait<1>();
      pin(scores);
      next_keys();
      if (tile < edge_tiles) mask(scores, slots + kTileBlocks, position);
      const bool moved = softmax.advance(scores, factors);
      if (moved) {
        asm volatile("wgmma.wait_group.sync.aligned 0;  // and rescale" ::: "memory");
        pin(sums);
#pragma unroll
        for (int i = 0; i < kDim / 2; ++i) sums[i] *= factors[i % 4 / 2];
      } else {
        wgmma_wait<0>();
        pin(sums);
      }
      if (leader) barrier_arrive(&shared.value_free[value_stage]);
      advance(value_stage, value_phase);
      to_weights(scores, weights);
    }
    if (leader) barrier_arrive(&shared.query_free);
    barrier_wait(&shared.value_full[value_stage], value_phase);
    if (ragged && tiles <= edge_tiles) clear_tail(value_stage, slots + (tiles - 1) * kTileBlocks, blocks.tokens);
    __syncwarp();
    if (leader) barrier_arrive(&shared.work_free[turn & 1]);
    add_values(sums, weights, value_stage, tiles > 1);
    wgmma_wait<0>();
    pin(sums);
    if (leader) barrier_arrive(&shared.value_free[value_stage]);
    write(blocks, item, position, softmax, sums);
  }

  __device__ __forceinline__ static void advance(int& at, uint32_t& its_phase) {
    if (++at == kStages) {
      at = 0;
      its_phase ^= 1;
    }
  }
  __device__ __forceinline__ void next_keys() {
    if (leader) barrier_arrive(&shared.key_free[stage]);
    advance(stage, phase);
  }

  __device__ __forceinline__ void write(const Blocks& blocks, const Item& item, int64_t position, const Softmax& softmax,
                        const float (&sums)[kDim / 2]) const {
    const SaleCudaAttend& call = launch.call;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = softmax.total[half];
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      const int64_t row = position + 8 * half - blocks.offset;
      if (row < 0 || row >= call.grid.rows) continue;
      const float inverse = 1.0f / total;
      uint32_t* out = reinterpret_cast<uint32_t*>(row_at<T>(call.output, item.batch, item.head, row)) +
                      threadIdx.x % 4;
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j)
        out[4 * j] = Wide<T>::pack(sums[4 * j + 2 * half] * inverse, sums[4 * j + 2 * half + 1] * inverse);
      if (call.lse != nullptr && threadIdx.x % 4 == 0)
        call.lse[item.batch * call.lse_batch_stride + item.head * call.lse_head_stride + row] =
            (softmax.maximum[half] + log2f(total)) * kLn2;
    }
  }
};

template <class T, int kDim, int kWarpgroups>
__global__ void __launch_bounds__(128 * (kWarpgroups + 1), 1) attend_kernel(const __grid_constant__ Launch launch) {
  extern __shared__ uint8_t memory[];
  using SharedMemory = Shared<T, kDim, kWarpgroups>;
  SharedMemory& shared = *reinterpret_cast<SharedMemory*>(aligned(memory));
  if (threadIdx.x == 0) {
    barrier_init(&shared.query_full, 1);
    barrier_init(&shared.query_free, 4 * kWarpgroups);
    for (int turn = 0; turn < 2; ++turn) {
      barrier_init(&shared.work_full[turn], 32);
      barrier_init(&shared.work_free[turn], 4 * kWarpgroups + 2);
    }
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(&shared.key_full[stage], 1);
      barrier_init(&shared.value_full[stage], 1);
      barrier_init(&shared.key_free[stage], 4 * kWarpgroups);
      barrier_init(&shared.value_free[stage], 4 * kWarpgroups);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x / 128 == kWarpgroups) {
    registers_down<56>();  // 2 x 224 + 56 = 3 x 168: more than the launch had would wait forever
    const int warp = threadIdx.x / 32 - 4 * kWarpgroups;
    if (warp == 0) Producer<T, kDim, kWarpgroups, true>(launch, shared).run();
    if (warp == 1) Producer<T, kDim, kWarpgroups, false>(launch, shared).run();
  } else {
    registers_up<224>();
    Consumer<T, kDim, kWarpgroups>(launch, shared).run();
  }
}

template <class T, int kDim, int kWarpgroups>
int run(Launch& launch, cudaStream_t stream) {
  const SaleCudaGrid& grid = launch.call.grid;
  using SharedMemory = Shared<T, kDim, kWarpgroups>;
  const size_t bytes = sizeof(SharedMemory) + 1024;
  const cudaError_t allowed = allow_shared_memory<attend_kernel<T, kDim, kWarpgroups>>(bytes);
  if (allowed != cudaSuccess) return allowed;
  const SaleCudaRows& query = launch.call.query;
  const SaleCudaTokens rows{query.data,  query.batch_stride, query.head_stride, query.row_stride,
                            grid.batch, grid.rows,          nullptr,           0,               0};
  constexpr auto kType = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  constexpr auto kSwizzle = CU_TENSOR_MAP_SWIZZLE_128B;
  int made = make_tensor_map(&launch.query, rows, kType, 2, kDim, grid.heads, 64, SharedMemory::kRows, kSwizzle);
  if (made == 0) made = make_tensor_map(&launch.keys, launch.call.keys, kType, 2, kDim, grid.kv_heads, 64, kKeyBlock, kSwizzle);
  if (made == 0) made = make_tensor_map(&launch.values, launch.call.values, kType, 2, kDim, grid.kv_heads, 64, kKeyBlock, kSwizzle);
  if (made != 0) return made;
  const int ctas = launch.items < grid.multiprocessors ? launch.items : grid.multiprocessors;
  attend_kernel<T, kDim, kWarpgroups><<<ctas, 128 * (kWarpgroups + 1), bytes, stream>>>(launch);
  return cudaGetLastError();
}

template <class T>
int run_size(Launch& launch, cudaStream_t stream) {
  const SaleCudaGrid& grid = launch.call.grid;
  if (grid.query_block == 128) return grid.head_dim == 128 ? run<T, 128, 2>(launch, stream) : run<T, 64, 2>(launch, stream);
  return grid.head_dim == 128 ? run<T, 128, 1>(launch, stream) : run<T, 64, 1>(launch, stream);
}

}  // namespace
}  // namespace sale::cuda

extern "C" int32_t sale_cuda_attend(const SaleCudaAttend* call, void* stream) {
  using namespace sale::cuda;
  Launch launch{};
  launch.call = *call;
  launch.items = Blocks(call->grid).query_blocks() * call->grid.batch * call->grid.heads;
  const auto at = static_cast<cudaStream_t>(stream);
  if (call->grid.dtype == SALE_CUDA_F16) return run_size<__half>(launch, at);
  return run_size<__nv_bfloat16>(launch, at);
}
