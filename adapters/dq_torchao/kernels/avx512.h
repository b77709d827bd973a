// What our kernels share: AVX512 registers of 16 float32.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <initializer_list>

#define DQ_INLINE __attribute__((always_inline))

constexpr int64_t LANES = 16;

inline __mmask16 first(int64_t n) { return n >= LANES ? 0xFFFF : n <= 0 ? 0 : (1u << n) - 1; }

constexpr __mmask16 ALL = 0xFFFF;

// Instructions without a mask are faster: where it is known to have all lanes, there is none.
inline DQ_INLINE __m512 load(const float* x, __mmask16 lanes) {
  return lanes == ALL ? _mm512_loadu_ps(x) : _mm512_maskz_loadu_ps(lanes, x);
}
inline DQ_INLINE void store(float* x, __m512 values, __mmask16 lanes) {
  if (lanes == ALL)
    _mm512_storeu_ps(x, values);
  else
    _mm512_mask_storeu_ps(x, lanes, values);
}

// f(i, lanes) for each 16 of n values, and for what is left.
template <class F>
inline DQ_INLINE void by_lanes(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) f(i, ALL);
  if (i < n) f(i, first(n - i));
}

// 2^t, relative error 2e-7: of all polynomials 1 + ... + c r^5 the nearest to 2^r on [-1/2, 1/2] (9e-8), times 2^(t - r)
inline __m512 exp2(__m512 t) {
  const __m512 r = _mm512_reduce_ps(t, _MM_FROUND_TO_NEAREST_INT);
  __m512 y = _mm512_set1_ps(1.3264727247032568e-3f);
  for (const float c : {9.6715126881474540e-3f, 5.5507337435743924e-2f, 2.4022242084635154e-1f,
                        6.9314697759871530e-1f, 1.0f})
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(y, _mm512_sub_ps(t, r));
}
