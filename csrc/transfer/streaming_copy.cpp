// A copy whose stores go past the caches: half the memory traffic of a plain one where the target is not in a cache,
// since the lines that are overwritten are not read first. C libraries do this for copies of tens of MiB only.

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>

namespace {

constexpr std::size_t kLine = 64;

__attribute__((target("avx512f"))) void lines_avx512(std::uint8_t* to, const std::uint8_t* from, std::size_t lines) {
  for (; lines; --lines, to += kLine, from += kLine) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
  }
}

__attribute__((target("avx2"))) void lines_avx2(std::uint8_t* to, const std::uint8_t* from, std::size_t lines) {
  for (; lines; --lines, to += kLine, from += kLine) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + kLine / 2));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), low);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + kLine / 2), high);
  }
}

using CopyLines = void (*)(std::uint8_t*, const std::uint8_t*, std::size_t);

CopyLines best_copy() {
  if (__builtin_cpu_supports("avx512f")) return lines_avx512;
  if (__builtin_cpu_supports("avx2")) return lines_avx2;
  return nullptr;
}

}  // namespace
#endif

// Copies `size` bytes between buffers that do not overlap, of any alignment. What was written is seen by every thread
// that learns of it from this one.
extern "C" void sale_streaming_copy(void* target, const void* source, std::size_t size) {
  auto* to = static_cast<std::uint8_t*>(target);
  const auto* from = static_cast<const std::uint8_t*>(source);
#if defined(__x86_64__)
  static const CopyLines copy_lines = best_copy();
  if (copy_lines != nullptr && size >= 2 * kLine) {
    const std::size_t head = (kLine - reinterpret_cast<std::uintptr_t>(to) % kLine) % kLine;
    std::memcpy(to, from, head);
    const std::size_t lines = (size - head) / kLine;
    copy_lines(to + head, from + head, lines);
    _mm_sfence();
    const std::size_t done = head + lines * kLine;
    to += done;
    from += done;
    size -= done;
  }
#endif
  std::memcpy(to, from, size);
}

// Copies `count` buffers to `target`, one after the other, through the caches: for short ones, whose copy is read next.
extern "C" void sale_gather(void* target, const void* const* sources, const std::size_t* sizes, std::size_t count) {
  auto* to = static_cast<std::uint8_t*>(target);
  for (std::size_t i = 0; i < count; to += sizes[i], ++i) std::memcpy(to, sources[i], sizes[i]);
}
