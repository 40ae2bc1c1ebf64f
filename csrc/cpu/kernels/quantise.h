// 8-bit codes, bit-identical to `quantise.py`: IEEE division, round half to even, NaN codes 0, NaN or inf in the scale.
#pragma once

#include "common.h"

namespace sale::cpu {
namespace SALE_ISA {

constexpr float kCodeLimit = 127.0f;
constexpr float kTiniest = 1.17549435e-38f;  // FLT_MIN

template <class S>
struct Quantise {
  using F = typename S::F;

  // Largest magnitude met; NaN once any value was NaN.
  struct Largest {
    F value;
    typename S::M nan;

    static Largest none() {
      Largest largest;
      largest.value = S::zero();
      largest.nan = S::nowhere();
      return largest;
    }
    void take(F x) {
      value = S::max(S::abs(x), value);
      nan = S::either(nan, S::unordered(x));
    }
    float scale() const {
      if (S::any(nan)) return __builtin_nanf("");
      const float scale = S::reduce_max(value) / kCodeLimit;
      return scale > kTiniest ? scale : kTiniest;
    }
  };

  static void write_codes(F y, F scale, int8_t* codes) {
    const F quotient = S::zero_where_nan(S::div(y, scale));
    const F limited = S::max(S::set1(-kCodeLimit), S::sub(S::zero(), S::max(S::set1(-kCodeLimit), S::sub(S::zero(), quotient))));
    S::store_codes(codes, S::round_even(limited));
  }

  static int32_t query(const SaleQuantiseQuery& call) {
    const SaleGrid& grid = call.grid;
    const int64_t pieces = ceil_div(grid.rows, kTileRows);
    auto piece = [&](int64_t task, int) {
      const int64_t first = task % pieces * kTileRows, head = task / pieces % grid.heads;
      const int64_t batch = task / pieces / grid.heads;
      for (int64_t row = first; row < std::min(first + kTileRows, grid.rows); ++row) {
        const void* source = row_address(call.query, batch, head, row);
        Largest largest = Largest::none();
        for (int64_t i = 0; i < grid.head_dim; i += S::kLanes) largest.take(load_as_float<S>(source, i, call.query.dtype));
        const int64_t at = flat_row(grid, batch, head, row);
        const float scale = largest.scale();
        call.scales[at] = scale;
        int8_t* codes = call.codes + at * grid.head_dim;
        for (int64_t i = 0; i < grid.head_dim; i += S::kLanes)
          write_codes(load_as_float<S>(source, i, call.query.dtype), S::set1(scale), codes + i);
      }
    };
    for_each_task(grid.threads, grid.batch * grid.heads * pieces, piece);
    return SALE_OK;
  }

  static int32_t key(const SaleQuantiseKey& call) {
    const SaleGrid& grid = call.grid;
    const int64_t tokens = grid.offset + grid.rows, first_block = call.start / kKeyBlock;
    const int64_t blocks = ceil_div(tokens, kKeyBlock) - first_block;
    auto block = [&](int64_t task, int) {
      const int64_t index = first_block + task % blocks, head = task / blocks % grid.kv_heads;
      const int64_t batch = task / blocks / grid.kv_heads;
      const float* centre = call.centre + (batch * grid.kv_heads + head) * grid.head_dim;
      const int64_t begin = index * kKeyBlock, end = std::min(begin + kKeyBlock, tokens);
      Largest largest = Largest::none();
      for (int64_t token = begin; token < end; ++token) {
        const void* source = token_address(call.keys, batch, head, token);
        for (int64_t i = 0; i < grid.head_dim; i += S::kLanes)
          largest.take(S::sub(load_as_float<S>(source, i, call.keys.dtype), S::load(centre + i)));
      }
      const float scale = largest.scale();
      *token_at<float>(call.scales, batch, head, index) = scale;
      for (int64_t token = begin; token < end; ++token) {
        const void* source = token_address(call.keys, batch, head, token);
        int8_t* codes = token_at<int8_t>(call.codes, batch, head, token);
        for (int64_t i = 0; i < grid.head_dim; i += S::kLanes)
          write_codes(S::sub(load_as_float<S>(source, i, call.keys.dtype), S::load(centre + i)), S::set1(scale), codes + i);
      }
    };
    for_each_task(grid.threads, grid.batch * grid.kv_heads * blocks, block);
    return SALE_OK;
  }
};

}  // namespace SALE_ISA
}  // namespace sale::cpu
