// The quantiser's arithmetic for 8-bit codes, bit-identical to `quantise.py`.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace sale::cuda {

// Magnitudes as integers: their order is that of floats, with NaN above infinity, so that NaN wins a maximum.
__device__ __forceinline__ uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

__device__ __forceinline__ float scale_of(uint32_t largest) {
  const float top = __uint_as_float(largest);
  if (isnan(top)) return top;
  return fmaxf(__fdiv_rn(top, 127.0f), 1.17549435e-38f);
}

__device__ __forceinline__ uint32_t exact_code(float x, float scale) {
  const float quotient = __fdiv_rn(x, scale);
  const float limited = fminf(fmaxf(quotient, -127.0f), 127.0f);
  return static_cast<uint32_t>(isnan(quotient) ? 0 : __float2int_rn(limited)) & 0xffu;
}

// Eight codes of the quotients x / scale. The product with the reciprocal is within 3e-5 of the IEEE quotient, so both
// round alike unless it is nearer than that to a tie: then, and where the scale is not finite, the division decides.
// Adding 1.5 * 2^23 rounds half to even and leaves the code in the low byte.
__device__ __forceinline__ uint2 codes_of(const float (&x)[8], float scale, float reciprocal) {
  constexpr float kMagic = 12582912.0f, kClear = 0.4999f;
  uint32_t t[8];
  float farthest = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float rounded = fmaf(x[i], reciprocal, kMagic);
    t[i] = __float_as_uint(rounded);
    farthest = fmaxf(farthest, fabsf(fmaf(x[i], reciprocal, kMagic - rounded)));
  }
  if (farthest > kClear || !(scale <= 3.0e38f)) {
#pragma unroll
    for (int i = 0; i < 8; ++i) t[i] = exact_code(x[i], scale);
  }
  uint2 packed;
  packed.x = __byte_perm(__byte_perm(t[0], t[1], 0x0040), __byte_perm(t[2], t[3], 0x0040), 0x5410);
  packed.y = __byte_perm(__byte_perm(t[4], t[5], 0x0040), __byte_perm(t[6], t[7], 0x0040), 0x5410);
  return packed;
}

}  // namespace sale::cuda
