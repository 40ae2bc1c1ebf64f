// XXH3, 64 bits, seed 0, of inputs longer than 240 bytes, after its specification (xxHash, doc/xxhash_spec.md), of data
// that comes in pieces: copies digest each piece while it is in a cache, without a call to another library for each.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace sale_prefill::xxh3 {

constexpr std::size_t kShortest = 241;
constexpr std::size_t kStripe = 64;
constexpr std::size_t kSecretSize = 192;
constexpr std::size_t kStripesOfBlock = (kSecretSize - kStripe) / 8;

constexpr std::uint64_t kPrime32[] = {0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D};
constexpr std::uint64_t kPrime64[] = {0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63,
                                      0x27D4EB2F165667C5};

alignas(64) constexpr std::uint8_t kSecret[kSecretSize] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

inline std::uint64_t read64(const std::uint8_t* from) {
  std::uint64_t value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// Consumes whole stripes of one block, from stripe `first` of it on.
using Accumulate = void (*)(std::uint64_t* acc, const std::uint8_t* data, std::size_t first, std::size_t stripes);

inline void accumulate_portable(std::uint64_t* acc, const std::uint8_t* data, std::size_t first, std::size_t stripes) {
  for (std::size_t n = 0; n < stripes; ++n, data += kStripe) {
    const std::uint8_t* secret = kSecret + 8 * (first + n);
    for (std::size_t lane = 0; lane < 8; ++lane) {
      const std::uint64_t value = read64(data + 8 * lane), key = value ^ read64(secret + 8 * lane);
      acc[lane ^ 1] += value;
      acc[lane] += (key & 0xFFFFFFFF) * (key >> 32);
    }
  }
}

#if defined(__x86_64__)
__attribute__((target("avx512f"))) inline void accumulate_avx512(std::uint64_t* acc, const std::uint8_t* data,
                                                                 std::size_t first, std::size_t stripes) {
  __m512i sum = _mm512_loadu_si512(acc);
  for (std::size_t n = 0; n < stripes; ++n, data += kStripe) {
    const __m512i value = _mm512_loadu_si512(data);
    const __m512i key = _mm512_xor_si512(value, _mm512_loadu_si512(kSecret + 8 * (first + n)));
    const __m512i product = _mm512_mul_epu32(key, _mm512_srli_epi64(key, 32));
    const __m512i swapped = _mm512_shuffle_epi32(value, static_cast<_MM_PERM_ENUM>(0x4E));
    sum = _mm512_add_epi64(sum, _mm512_add_epi64(product, swapped));
  }
  _mm512_storeu_si512(acc, sum);
}

__attribute__((target("avx2"))) inline void accumulate_avx2(std::uint64_t* acc, const std::uint8_t* data,
                                                            std::size_t first, std::size_t stripes) {
  __m256i sums[2];
  for (int half = 0; half < 2; ++half) sums[half] = _mm256_loadu_si256(reinterpret_cast<__m256i*>(acc) + half);
  for (std::size_t n = 0; n < stripes; ++n, data += kStripe) {
    const auto* secret = reinterpret_cast<const __m256i*>(kSecret + 8 * (first + n));
    for (int half = 0; half < 2; ++half) {
      const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data) + half);
      const __m256i key = _mm256_xor_si256(value, _mm256_loadu_si256(secret + half));
      const __m256i product = _mm256_mul_epu32(key, _mm256_srli_epi64(key, 32));
      sums[half] = _mm256_add_epi64(sums[half], _mm256_add_epi64(product, _mm256_shuffle_epi32(value, 0x4E)));
    }
  }
  for (int half = 0; half < 2; ++half) _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc) + half, sums[half]);
}
#endif

inline Accumulate best_accumulate() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return accumulate_avx512;
  if (__builtin_cpu_supports("avx2")) return accumulate_avx2;
#endif
  return accumulate_portable;
}

// The digest of `total` bytes, at least kShortest, that come in order by `update`.
class Digest {
 public:
  explicit Digest(std::size_t total) : total_(total), stripes_left_((total - 1) / kStripe) {}

  void update(const std::uint8_t* data, std::size_t size) {
    keep_last(data, size);
    if (carried_ > 0) {
      const std::size_t added = size < kStripe - carried_ ? size : kStripe - carried_;
      std::memcpy(carry_ + carried_, data, added);
      carried_ += added;
      data += added;
      size -= added;
      if (carried_ < kStripe) return;
      consume(carry_, 1);
      carried_ = 0;
    }
    const std::size_t stripes = size / kStripe;
    consume(data, stripes);
    carried_ = size - stripes * kStripe;
    std::memcpy(carry_, data + stripes * kStripe, carried_);
  }

  std::uint64_t value() {
    for (std::size_t lane = 0; lane < 8; ++lane) {  // the last 64 bytes, whatever of them was consumed
      const std::uint64_t word = read64(last_ + 8 * lane), key = word ^ read64(kSecret + 121 + 8 * lane);
      acc_[lane ^ 1] += word;
      acc_[lane] += (key & 0xFFFFFFFF) * (key >> 32);
    }
    std::uint64_t hash = total_ * kPrime64[0];
    for (std::size_t pair = 0; pair < 4; ++pair) {
      const std::uint8_t* secret = kSecret + 11 + 16 * pair;
      const auto product = static_cast<unsigned __int128>(acc_[2 * pair] ^ read64(secret)) *
                           (acc_[2 * pair + 1] ^ read64(secret + 8));
      hash += static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
    }
    hash = (hash ^ hash >> 37) * 0x165667919E3779F9;
    return hash ^ hash >> 32;
  }

 private:
  // The very last stripe is left to `value`.
  void consume(const std::uint8_t* data, std::size_t stripes) {
    static const Accumulate accumulate = best_accumulate();
    if (stripes > stripes_left_) stripes = stripes_left_;
    stripes_left_ -= stripes;
    while (stripes > 0) {
      const std::size_t left = kStripesOfBlock - stripe_;
      const std::size_t now = stripes < left ? stripes : left;
      accumulate(acc_, data, stripe_, now);
      data += now * kStripe;
      stripes -= now;
      stripe_ += now;
      if (stripe_ == kStripesOfBlock) scramble();
    }
  }

  void scramble() {
    stripe_ = 0;
    for (std::size_t lane = 0; lane < 8; ++lane) {
      const std::uint64_t value = acc_[lane];
      acc_[lane] = (value ^ value >> 47 ^ read64(kSecret + kSecretSize - kStripe + 8 * lane)) * kPrime32[0];
    }
  }

  void keep_last(const std::uint8_t* data, std::size_t size) {
    const std::size_t kept = size < kStripe ? kStripe - size : 0;
    std::memmove(last_, last_ + kStripe - kept, kept);
    std::memcpy(last_ + kept, data + size - (kStripe - kept), kStripe - kept);
  }

  std::size_t total_;
  std::size_t stripes_left_;
  std::size_t stripe_ = 0;
  std::size_t carried_ = 0;
  std::uint8_t carry_[kStripe];
  std::uint8_t last_[kStripe] = {};
  alignas(64) std::uint64_t acc_[8] = {kPrime32[2], kPrime64[0], kPrime64[1], kPrime64[2],
                                       kPrime64[3], kPrime32[1], kPrime64[4], kPrime32[0]};
};

}  // namespace sale_prefill::xxh3
