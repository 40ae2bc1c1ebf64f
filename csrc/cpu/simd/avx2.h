// AVX2 + FMA + F16C: 8 float lanes, 16 registers. Byte codes are widened to 16 bits: vpmaddubsw would saturate.
// Include under a target pragma that allows what is used, in one translation unit per instruction set.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace sale::cpu {
namespace SALE_ISA {

struct Avx2 {
  using F = __m256;
  using I = __m256i;
  using M = int;

  static constexpr int kLanes = 8;
  static constexpr bool kBf16Dot = false;
  static constexpr int kRowVectors = 2;   // attend: 2 x 8 rows by kKeys keys of accumulators, 8 of 16 registers
  static constexpr int kKeys = 4;
  static constexpr int kSelectRows = 2;   // select: 2 rows by 4 vectors of keys, 8 registers
  static constexpr int kCodesPerLane = 2; // 16-bit keys by 16-bit queries
  static constexpr bool kKeysBiased = false;

  static F zero() { return _mm256_setzero_ps(); }
  static F set1(float x) { return _mm256_set1_ps(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static F load_bf16(const uint16_t* p) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
  }
  static F load_f16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store_bf16(uint16_t* p, F x) {
    const I bits = _mm256_castps_si256(x);
    const I odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const I rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const I nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const I safe = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    const I packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(safe, safe), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  static void store_f16(uint16_t* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }

  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }  // b where either is NaN
  static F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  static F round_even(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F where_greater(F a, F b, F yes, F no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
  }
  static F zero_where_nan(F a) { return _mm256_and_ps(a, _mm256_cmp_ps(a, a, _CMP_ORD_Q)); }
  // -inf in the lanes below `first`.
  static F hide_before(F a, int first) {
    const I lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const I hidden = _mm256_cmpgt_epi32(_mm256_set1_epi32(first), lane);
    return _mm256_blendv_ps(a, _mm256_set1_ps(-__builtin_inff()), _mm256_castsi256_ps(hidden));
  }

  static M nowhere() { return 0; }
  static M unordered(F a) { return _mm256_movemask_ps(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)); }
  static M greater(F a, F b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
  static M not_less_equal(F a, F b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLE_UQ)); }
  static M either(M a, M b) { return a | b; }
  static bool any(M a) { return a != 0; }
  static float reduce_max(F a) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
  }

  // 2^p for p in [-1/2, 1/2] comes as `poly`; multiplied by 2^n here, n an integer of at least -200.
  static F ldexp(F poly, F n) {
    // Two steps, since 2^n alone leaves the normal range below -126.
    const I whole = _mm256_cvtps_epi32(n);
    const I half = _mm256_srai_epi32(whole, 1);
    const I rest = _mm256_sub_epi32(whole, half);
    return _mm256_mul_ps(_mm256_mul_ps(poly, power(half)), power(rest));
  }

  static I load_i(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store_i(void* p, I x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
  static I set1_i(int32_t x) { return _mm256_set1_epi32(x); }
  static I max_i(I a, I b) { return _mm256_max_epi32(a, b); }
  static F to_float(I a) { return _mm256_cvtepi32_ps(a); }
  static I dot_codes(I sum, I keys, I query) { return _mm256_add_epi32(sum, _mm256_madd_epi16(keys, query)); }
  static void store_codes(int8_t* p, F rounded) {
    const I words = _mm256_packs_epi32(_mm256_cvtps_epi32(rounded), _mm256_setzero_si256());
    const I bytes = _mm256_packs_epi16(words, words);
    const int32_t low = _mm256_cvtsi256_si32(bytes), high = _mm256_extract_epi32(bytes, 4);
    std::memcpy(p, &low, 4);
    std::memcpy(p + 4, &high, 4);
  }

  // An 8 x 8 tile of 32-bit values, rows to columns.
  static void transpose(const uint32_t* source, int64_t source_stride, uint32_t* target, int64_t target_stride) {
    I r[8], t[8];
    for (int i = 0; i < 8; ++i) r[i] = load_i(source + i * source_stride);
    for (int i = 0; i < 4; ++i) {
      t[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
      t[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
      r[4 * i] = _mm256_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
      r[4 * i + 1] = _mm256_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
      r[4 * i + 2] = _mm256_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
      r[4 * i + 3] = _mm256_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
      store_i(target + i * target_stride, _mm256_permute2x128_si256(r[i], r[4 + i], 0x20));
      store_i(target + (4 + i) * target_stride, _mm256_permute2x128_si256(r[i], r[4 + i], 0x31));
    }
  }

 private:
  static F power(I n) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23)); }
};

}  // namespace SALE_ISA
}  // namespace sale::cpu
