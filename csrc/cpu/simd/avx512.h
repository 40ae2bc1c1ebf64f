// AVX-512: 16 float lanes, 32 registers, byte products by VNNI; bf16 products where kBf16 says so.
// Include under a target pragma that allows what is used, in one translation unit per instruction set.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace sale::cpu {
namespace SALE_ISA {

template <bool kBf16>
struct Avx512 {
  using F = __m512;
  using I = __m512i;
  using M = __mmask16;

  static constexpr int kLanes = 16;
  static constexpr bool kBf16Dot = kBf16;
  static constexpr int kRowVectors = 4;   // attend: 4 x 16 rows by kKeys keys of accumulators, 16 of 32 registers
  static constexpr int kKeys = 4;
  static constexpr int kSelectRows = 8;   // select: 8 rows by 2 vectors of keys, 16 registers
  static constexpr int kCodesPerLane = 4; // unsigned keys by signed queries
  static constexpr bool kKeysBiased = true;

  static F zero() { return _mm512_setzero_ps(); }
  static F set1(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F load_bf16(const uint16_t* p) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
  }
  static F load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store_bf16(uint16_t* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(round_bf16(x)));
  }
  static void store_f16(uint16_t* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }

  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }  // b where either is NaN
  static F abs(F a) { return _mm512_abs_ps(a); }
  static F round_even(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F where_greater(F a, F b, F yes, F no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), no, yes);
  }
  static F zero_where_nan(F a) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, a, _CMP_ORD_Q), a); }
  // -inf in the lanes below `first`.
  static F hide_before(F a, int first) {
    return _mm512_mask_mov_ps(a, static_cast<__mmask16>((1u << first) - 1u), _mm512_set1_ps(-__builtin_inff()));
  }

  static M nowhere() { return 0; }
  static M unordered(F a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
  static M greater(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  static M not_less_equal(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }
  static M either(M a, M b) { return static_cast<M>(a | b); }
  static bool any(M a) { return a != 0; }
  static float reduce_max(F a) { return _mm512_reduce_max_ps(a); }

  // 2^p for p in [-1/2, 1/2] comes as `poly`; multiplied by 2^n here.
  static F ldexp(F poly, F n) { return _mm512_scalef_ps(poly, n); }

  static I load_i(const void* p) { return _mm512_loadu_si512(p); }
  static void store_i(void* p, I x) { _mm512_storeu_si512(p, x); }
  static I set1_i(int32_t x) { return _mm512_set1_epi32(x); }
  static I max_i(I a, I b) { return _mm512_max_epi32(a, b); }
  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static I dot_codes(I sum, I keys, I query) { return _mm512_dpbusd_epi32(sum, keys, query); }
  static void store_codes(int8_t* p, F rounded) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(rounded)));
  }

#if SALE_HAS_BF16
  static F dot_bf16(F sum, I a, I b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  // Lane by lane: bf16(low) in the lower half, bf16(high) in the upper one.
  static I pair_bf16(F low, F high) {
    const I both = reinterpret_cast<I>(_mm512_cvtne2ps_pbh(high, low));
    return _mm512_permutexvar_epi16(interleave_index(), both);
  }
#endif
  // 32 columns of two rows of 16-bit values -> [column][row] in 32 lanes of 32 bits.
  static void interleave16(const uint16_t* first, const uint16_t* second, uint32_t* out) {
    const I a = load_i(first), b = load_i(second);
    store_i(out, _mm512_permutex2var_epi16(a, interleave_low(), b));
    store_i(out + 16, _mm512_permutex2var_epi16(a, interleave_high(), b));
  }
  static constexpr int kInterleaveColumns = 32;

  // A 16 x 16 tile of 32-bit values, rows to columns.
  static void transpose(const uint32_t* source, int64_t source_stride, uint32_t* target, int64_t target_stride) {
    I r[16], t[16];
    for (int i = 0; i < 16; ++i) r[i] = load_i(source + i * source_stride);
    for (int i = 0; i < 8; ++i) {
      t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
      t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
      r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
      r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
      r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
      r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
      t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
      t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
      t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
      store_i(target + i * target_stride, _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88));
      store_i(target + (8 + i) * target_stride, _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd));
      store_i(target + (4 + i) * target_stride, _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88));
      store_i(target + (12 + i) * target_stride, _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd));
    }
  }

 private:
  // Round to nearest even into the lower 16 bits; NaN stays NaN.
  static I round_bf16(F x) {
    const I bits = _mm512_castps_si512(x);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const I rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
  }
  static I interleave_index() {
    return _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19,
                            3, 18, 2, 17, 1, 16, 0);
  }
  static I interleave_low() {
    return _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35,
                            3, 34, 2, 33, 1, 32, 0);
  }
  static I interleave_high() {
    return _mm512_add_epi16(interleave_low(), _mm512_set1_epi16(16));
  }
};

}  // namespace SALE_ISA
}  // namespace sale::cpu
