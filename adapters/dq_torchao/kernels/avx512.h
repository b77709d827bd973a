// What our kernels share: AVX512 registers of 16 float32.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <initializer_list>

constexpr int64_t LANES = 16;

inline __mmask16 first(int64_t n) { return n >= LANES ? 0xFFFF : n <= 0 ? 0 : (1u << n) - 1; }

// 2^t, relative error 2e-7: of all polynomials 1 + ... + c r^5 the nearest to 2^r on [-1/2, 1/2] (9e-8), times 2^(t - r)
inline __m512 exp2(__m512 t) {
  const __m512 r = _mm512_reduce_ps(t, _MM_FROUND_TO_NEAREST_INT);
  __m512 y = _mm512_set1_ps(1.3264727247032568e-3f);
  for (const float c : {9.6715126881474540e-3f, 5.5507337435743924e-2f, 2.4022242084635154e-1f,
                        6.9314697759871530e-1f, 1.0f})
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(y, _mm512_sub_ps(t, r));
}
