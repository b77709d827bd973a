// What our kernels share: AVX512 registers of 16 float32.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <initializer_list>

constexpr int64_t LANES = 16;

inline __mmask16 first(int64_t n) { return n >= LANES ? 0xFFFF : n <= 0 ? 0 : (1u << n) - 1; }

// 2^t, relative error 2e-7: the Taylor polynomial of 2^r on [-1/2, 1/2], times 2^(t - r)
inline __m512 exp2(__m512 t) {
  const __m512 r = _mm512_reduce_ps(t, _MM_FROUND_TO_NEAREST_INT);
  __m512 y = _mm512_set1_ps(1.5403530393381609e-4f);
  for (const float c : {1.3333558146428443e-3f, 9.6181291076284772e-3f, 5.5504108664821580e-2f,
                        2.4022650695910072e-1f, 6.9314718055994531e-1f, 1.0f})
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(y, _mm512_sub_ps(t, r));
}
