// Plain C++: eight lanes as arrays, for processors that nothing else here knows.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace sale::cpu {
namespace SALE_ISA {

struct Portable {
  static constexpr int kLanes = 8;

  struct F {
    float v[kLanes];
  };
  struct I {
    int32_t v[kLanes];
  };
  using M = bool;

  static constexpr bool kBf16Dot = false;
  static constexpr int kRowVectors = 1;
  static constexpr int kKeys = 4;
  static constexpr int kSelectRows = 1;
  static constexpr int kCodesPerLane = 2;
  static constexpr bool kKeysBiased = false;

  template <class Op>
  static F each(Op op) {
    F result;
    for (int i = 0; i < kLanes; ++i) result.v[i] = op(i);
    return result;
  }

  static F zero() { return set1(0.0f); }
  static F set1(float x) {
    return each([x](int) { return x; });
  }
  static F load(const float* p) {
    return each([p](int i) { return p[i]; });
  }
  static void store(float* p, const F& x) { std::memcpy(p, x.v, sizeof(x.v)); }
  static F load_bf16(const uint16_t* p) {
    return each([p](int i) { return from_bits(static_cast<uint32_t>(p[i]) << 16); });
  }
  static F load_f16(const uint16_t* p) {
    return each([p](int i) { return float_of_half(p[i]); });
  }
  static void store_bf16(uint16_t* p, const F& x) {
    for (int i = 0; i < kLanes; ++i) {
      const uint32_t bits = to_bits(x.v[i]);
      p[i] = std::isnan(x.v[i]) ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
  }
  static void store_f16(uint16_t* p, const F& x) {
    for (int i = 0; i < kLanes; ++i) p[i] = half_of_float(x.v[i]);
  }

  static F add(const F& a, const F& b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
  }
  static F sub(const F& a, const F& b) {
    return each([&](int i) { return a.v[i] - b.v[i]; });
  }
  static F mul(const F& a, const F& b) {
    return each([&](int i) { return a.v[i] * b.v[i]; });
  }
  static F div(const F& a, const F& b) {
    return each([&](int i) { return a.v[i] / b.v[i]; });
  }
  static F fma(const F& a, const F& b, const F& c) {
    return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
  }
  static F max(const F& a, const F& b) {  // b where either is NaN
    return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  static F abs(const F& a) {
    return each([&](int i) { return std::fabs(a.v[i]); });
  }
  static F round_even(const F& a) {
    return each([&](int i) { return std::nearbyintf(a.v[i]); });
  }
  static F where_greater(const F& a, const F& b, const F& yes, const F& no) {
    return each([&](int i) { return a.v[i] > b.v[i] ? yes.v[i] : no.v[i]; });
  }
  static F zero_where_nan(const F& a) {
    return each([&](int i) { return std::isnan(a.v[i]) ? 0.0f : a.v[i]; });
  }
  // -inf in the lanes below `first`.
  static F hide_before(const F& a, int first) {
    return each([&](int i) { return i < first ? -__builtin_inff() : a.v[i]; });
  }

  template <class Op>
  static M some(Op op) {
    bool result = false;
    for (int i = 0; i < kLanes; ++i) result |= op(i);
    return result;
  }
  static M nowhere() { return false; }
  static M unordered(const F& a) {
    return some([&](int i) { return std::isnan(a.v[i]); });
  }
  static M greater(const F& a, const F& b) {
    return some([&](int i) { return a.v[i] > b.v[i]; });
  }
  static M not_less_equal(const F& a, const F& b) {
    return some([&](int i) { return !(a.v[i] <= b.v[i]); });
  }
  static M either(M a, M b) { return a | b; }
  static bool any(M a) { return a; }
  static float reduce_max(const F& a) {
    float result = a.v[0];
    for (int i = 1; i < kLanes; ++i) result = a.v[i] > result ? a.v[i] : result;
    return result;
  }

  // 2^p for p in [-1/2, 1/2] comes as `poly`; multiplied by 2^n here, n an integer of at least -200 (or NaN).
  static F ldexp(const F& poly, const F& n) {
    return each([&](int i) {
      const int whole = std::isnan(n.v[i]) ? 0 : static_cast<int>(n.v[i] < 300.0f ? n.v[i] : 300.0f);
      const int half = whole / 2, rest = whole - half;
      return poly.v[i] * from_bits(static_cast<uint32_t>(half + 127) << 23) *
             from_bits(static_cast<uint32_t>(rest + 127) << 23);
    });
  }

  static I load_i(const void* p) {
    I result;
    std::memcpy(result.v, p, sizeof(result.v));
    return result;
  }
  static void store_i(void* p, const I& x) { std::memcpy(p, x.v, sizeof(x.v)); }
  static I set1_i(int32_t x) {
    I result;
    for (int i = 0; i < kLanes; ++i) result.v[i] = x;
    return result;
  }
  static I max_i(const I& a, const I& b) {
    I result;
    for (int i = 0; i < kLanes; ++i) result.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return result;
  }
  static F to_float(const I& a) {
    return each([&](int i) { return static_cast<float>(a.v[i]); });
  }
  static I dot_codes(const I& sum, const I& keys, const I& query) {
    int16_t k[2 * kLanes], q[2 * kLanes];
    std::memcpy(k, keys.v, sizeof(k));
    std::memcpy(q, query.v, sizeof(q));
    I result;
    for (int i = 0; i < kLanes; ++i) result.v[i] = sum.v[i] + k[2 * i] * q[2 * i] + k[2 * i + 1] * q[2 * i + 1];
    return result;
  }
  static void store_codes(int8_t* p, const F& rounded) {
    for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int8_t>(rounded.v[i]);
  }

  static void transpose(const uint32_t* source, int64_t source_stride, uint32_t* target, int64_t target_stride) {
    for (int i = 0; i < kLanes; ++i)
      for (int j = 0; j < kLanes; ++j) target[j * target_stride + i] = source[i * source_stride + j];
  }

 private:
  static float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  static uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
  }
  static float float_of_half(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
    if (exponent == 31) return from_bits(sign | 0x7f800000 | fraction << 13);
    const float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                          : from_bits((exponent + 112) << 23 | fraction << 13);
    return sign != 0 ? -magnitude : magnitude;
  }
  static uint16_t half_of_float(float value) {
    const uint16_t sign = static_cast<uint16_t>(to_bits(value) >> 16 & 0x8000);
    const float magnitude = std::fabs(value);
    if (std::isnan(value)) return static_cast<uint16_t>(sign | 0x7e00);
    if (magnitude >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00);
    if (magnitude < 6.103515625e-05f)  // subnormal: units of 2^-24
      return static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyintf(std::ldexp(magnitude, 24))));
    const uint32_t bits = to_bits(magnitude);
    return static_cast<uint16_t>(sign | ((bits + 0xfff + (bits >> 13 & 1)) - 0x38000000) >> 13);
  }
};

}  // namespace SALE_ISA
}  // namespace sale::cpu
