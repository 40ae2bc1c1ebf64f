// Log-sum-exp of rows whose scores lie as mma.sync leaves them: a row's columns in the four lanes of a quad.
#pragma once

#include "ptx.cuh"

namespace sale::cuda {

// Sum of exponentials of a row, over this thread's columns; scores are raw products.
struct LogSumExp {
  float top = -1.0e30f, total = 0.0f;

  // As a tree: sixteen warps do not hide the latency of a chain.
  __device__ __forceinline__ void take(const float (&x)[8], float scale) {
    const float pairs[4] = {fmaxf(x[0], x[1]), fmaxf(x[2], x[3]), fmaxf(x[4], x[5]), fmaxf(x[6], x[7])};
    const float most = fmaxf(fmaxf(fmaxf(pairs[0], pairs[1]), fmaxf(pairs[2], pairs[3])), top);
    const float shift = -most * scale;
    float e[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) e[i] = exp2_fast(fmaf(x[i], scale, shift));
    const float sum = ((e[0] + e[1]) + (e[2] + e[3])) + ((e[4] + e[5]) + (e[6] + e[7]));
    total = fmaf(total, exp2_fast((top - most) * scale), sum);
    top = most;
  }
  __device__ __forceinline__ float of_quad(float scale, float centre) {
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
      const float other_top = __shfl_xor_sync(0xffffffffu, top, distance);
      const float other_total = __shfl_xor_sync(0xffffffffu, total, distance);
      const float most = fmaxf(top, other_top);
      total = total * exp2_fast((top - most) * scale) + other_total * exp2_fast((other_top - most) * scale);
      top = most;
    }
    return fmaf(top - centre, scale, log2f(total)) * kLn2;
  }
};

}  // namespace sale::cuda
