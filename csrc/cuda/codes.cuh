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

// Eight codes of x / scale, given the correctly rounded reciprocal. The quotient is the IEEE one: a product, corrected by
// its residual (Markstein), without the branches of a division; once more where residuals may be subnormal. Adding
// 1.5 * 2^23 rounds half to even and leaves the code in the low byte. Where the scale is not finite, every quotient is 0
// or NaN, and the code 0.
__device__ __forceinline__ uint2 codes_of(const float (&x)[8], float scale, float reciprocal) {
  float quotients[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float product = __fmul_rn(x[i], reciprocal);
    quotients[i] = fmaf(fmaf(-product, scale, x[i]), reciprocal, product);
  }
  if (scale < 1.0e-30f) {
#pragma unroll
    for (int i = 0; i < 8; ++i) quotients[i] = fmaf(fmaf(-quotients[i], scale, x[i]), reciprocal, quotients[i]);
  }
  uint32_t t[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) t[i] = __float_as_uint(__fadd_rn(quotients[i], 12582912.0f));
  if (!(scale <= 3.0e38f)) return make_uint2(0, 0);
  uint2 packed;
  packed.x = __byte_perm(__byte_perm(t[0], t[1], 0x0040), __byte_perm(t[2], t[3], 0x0040), 0x5410);
  packed.y = __byte_perm(__byte_perm(t[4], t[5], 0x0040), __byte_perm(t[6], t[7], 0x0040), 0x5410);
  return packed;
}

}  // namespace sale::cuda
