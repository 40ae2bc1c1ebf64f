// Products by mma.sync, a warp each, and where the fragments' elements stand.
//
// Lane l holds, with g = l / 4 and q = l % 4: of A [16, k] rows g and g + 8; of B [k, 8] column g; of C [16, 8] rows g and
// g + 8, columns 2q and 2q + 1. Along k, a register holds 4 bytes: those at byte 4q of a 16-byte piece, A in the order
// (row g, piece 0), (g + 8, 0), (g, 1), (g + 8, 1), B in the order piece 0, piece 1.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ptx.cuh"

namespace sale::cuda {

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of a row of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&b)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
               : "r"(shared_address(row)));
}

// The same, each transposed on the way.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&b)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
               : "r"(shared_address(row)));
}

// C[16, 8] += A[16, 16] * B[16, 8].
__device__ __forceinline__ void multiply_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// C[16, 8] += A[16, 32] * B[32, 8], exact.
__device__ __forceinline__ void multiply_s8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// C[16, 8] += A[16, 64] * B[64, 8] of 4-bit integers, exact.
__device__ __forceinline__ void multiply_s4(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// What differs between the two 16-bit types.
template <class Element>
struct Wide;

template <>
struct Wide<__nv_bfloat16> {
  __device__ __forceinline__ static uint32_t pack(float low, float high) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
  }
  __device__ __forceinline__ static float2 unpack(uint32_t bits) {
    return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
  }
  __device__ __forceinline__ static __nv_bfloat16 of(float x) { return __float2bfloat16_rn(x); }
  __device__ __forceinline__ static float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
  __device__ __forceinline__ static void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply_bf16(c, a, b0, b1);
  }
};

template <>
struct Wide<__half> {
  __device__ __forceinline__ static uint32_t pack(float low, float high) {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
  }
  __device__ __forceinline__ static float2 unpack(uint32_t bits) {
    return __half22float2(*reinterpret_cast<const __half2*>(&bits));
  }
  __device__ __forceinline__ static __half of(float x) { return __float2half_rn(x); }
  __device__ __forceinline__ static float widen(__half x) { return __half2float(x); }
  __device__ __forceinline__ static void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply_f16(c, a, b0, b1);
  }
};

// Eight neighbouring elements as float32.
template <class Element>
__device__ __forceinline__ void unpack_eight(float (&x)[8], const uint4& raw) {
  const uint32_t pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 both = Wide<Element>::unpack(pairs[i]);
    x[2 * i] = both.x;
    x[2 * i + 1] = both.y;
  }
}

}  // namespace sale::cuda
