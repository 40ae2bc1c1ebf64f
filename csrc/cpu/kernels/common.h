// What the kernels share: reading rows as float32, panels with rows in lanes, the product micro-kernel, exp2.
// A "panel" holds up to 64 rows side by side: value t of row r lies at [t * kTileRows + r], 32 bits each, so that one
// vector holds the same value of neighbouring rows and softmax needs no reduction across lanes.
#pragma once

#include "../grid.h"
#include "../tasks.h"

namespace sale::cpu {
namespace SALE_ISA {

inline int32_t load32(const void* p) {
  int32_t value;
  std::memcpy(&value, p, 4);
  return value;
}

inline float float_of(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

template <class S>
inline typename S::F load_as_float(const void* data, int64_t index, int32_t dtype) {
  if (dtype == SALE_BF16) return S::load_bf16(static_cast<const uint16_t*>(data) + index);
  if (dtype == SALE_F16) return S::load_f16(static_cast<const uint16_t*>(data) + index);
  return S::load(static_cast<const float*>(data) + index);
}

// A row of the query or a token of keys or values, whatever its type.
inline const void* row_address(const SaleRows& rows, int64_t batch, int64_t head, int64_t row) {
  return rows.dtype == SALE_F32 ? static_cast<const void*>(row_at<float>(rows, batch, head, row))
                                : static_cast<const void*>(row_at<uint16_t>(rows, batch, head, row));
}

inline const void* token_address(const SaleTokens& tokens, int64_t batch, int64_t head, int64_t token) {
  return tokens.dtype == SALE_F32 ? static_cast<const void*>(token_at<float>(tokens, batch, head, token))
                                  : static_cast<const void*>(token_at<uint16_t>(tokens, batch, head, token));
}

inline int64_t element_bytes(int32_t dtype) { return dtype == SALE_F32 ? 4 : 2; }

// Rows (32-bit values, `stride` apart) into a panel; lanes from `rows` up to `lanes` (a multiple of the vector) are 0.
template <class S>
void fill_panel(const uint32_t* source, int64_t stride, int rows, int columns, int lanes, uint32_t* panel) {
  constexpr int kLanes = S::kLanes;
  for (int r = 0; r < lanes; r += kLanes) {
    int c = 0;
    if (r + kLanes <= rows)
      for (; c + kLanes <= columns; c += kLanes)
        S::transpose(source + r * stride + c, stride, panel + c * kTileRows + r, kTileRows);
    for (; c < columns; ++c)
      for (int lane = r; lane < r + kLanes; ++lane)
        panel[c * kTileRows + lane] =
            lane < rows ? static_cast<uint32_t>(load32(reinterpret_cast<const char*>(source + lane * stride) + 4 * c))
                        : 0;
  }
}

// out[c][r] (+)= sum over t of panel[t][r] * b[c][t], for kKeys columns c and RV vectors of rows; out is a panel of
// floats. A value is one float, or with kBf16 a pair of bfloat16 whose products both join the sum.
template <class S, bool kBf16, int RV>
inline void multiply(const uint32_t* panel, const uint32_t* const* b, int64_t b_step, int steps, float* out,
                     bool accumulate) {
  using F = typename S::F;
  constexpr int kKeys = S::kKeys, kLanes = S::kLanes;
  F sum[kKeys][RV];
#pragma GCC unroll 8
  for (int c = 0; c < kKeys; ++c)
#pragma GCC unroll 8
    for (int v = 0; v < RV; ++v) sum[c][v] = accumulate ? S::load(out + c * kTileRows + v * kLanes) : S::zero();
  int64_t at = 0;
  for (int t = 0; t < steps; ++t, at += b_step, panel += kTileRows) {
    if constexpr (kBf16) {
      typename S::I rows[RV];
#pragma GCC unroll 8
      for (int v = 0; v < RV; ++v) rows[v] = S::load_i(panel + v * kLanes);
#pragma GCC unroll 8
      for (int c = 0; c < kKeys; ++c) {
        const typename S::I value = S::set1_i(load32(b[c] + at));
#pragma GCC unroll 8
        for (int v = 0; v < RV; ++v) sum[c][v] = S::dot_bf16(sum[c][v], rows[v], value);
      }
    } else {
      F rows[RV];
#pragma GCC unroll 8
      for (int v = 0; v < RV; ++v) rows[v] = S::load(reinterpret_cast<const float*>(panel) + v * kLanes);
#pragma GCC unroll 8
      for (int c = 0; c < kKeys; ++c) {
        const F value = S::set1(float_of(load32(b[c] + at)));
#pragma GCC unroll 8
        for (int v = 0; v < RV; ++v) sum[c][v] = S::fma(rows[v], value, sum[c][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < kKeys; ++c)
#pragma GCC unroll 8
    for (int v = 0; v < RV; ++v) S::store(out + c * kTileRows + v * kLanes, sum[c][v]);
}

// 2^x for x <= about 0 (any x below 128); -inf gives 0, NaN stays. Relative error 2.6e-6 where the result becomes
// bfloat16, 7.5e-8 elsewhere: minimax polynomials of degree 4 and 5 on [-1/2, 1/2], found by Remez exchange.
template <class S, bool kBf16>
inline typename S::F exp2(typename S::F x) {
  using F = typename S::F;
  x = S::max(S::set1(-200.0f), x);
  const F whole = S::round_even(x);
  const F f = S::sub(x, whole);
  F poly;
  if constexpr (kBf16) {
    poly = S::fma(S::set1(0.009570102207362652f), f, S::set1(0.05591785907745361f));
    poly = S::fma(poly, f, S::set1(0.240247443318367f));
    poly = S::fma(poly, f, S::set1(0.6931217908859253f));
    poly = S::fma(poly, f, S::set1(0.9999992847442627f));
  } else {
    poly = S::fma(S::set1(0.0013276472454890609f), f, S::set1(0.009675540961325169f));
    poly = S::fma(poly, f, S::set1(0.05550713092088699f));
    poly = S::fma(poly, f, S::set1(0.24022120237350464f));
    poly = S::fma(poly, f, S::set1(0.6931469440460205f));
    poly = S::fma(poly, f, S::set1(1.0000001192092896f));
  }
  return S::ldexp(poly, whole);
}

}  // namespace SALE_ISA
}  // namespace sale::cpu
