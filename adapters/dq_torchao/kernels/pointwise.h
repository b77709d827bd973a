// What is done to each value by itself: codes of activations, SiLU and GELU; `kernels.codes` and `kernels.gelu` state them.
#pragma once

#include "avx512.h"

// clip(round(x) + zero, low, high), of values that are scaled already. low, high and zero are of the stored codes;
// clipped before it is rounded, which is the same because the bounds are integers, and fits int32.
struct Codes {
  __m512 smallest, largest;
  __m512i zero;

  Codes(int32_t low, int32_t high, int32_t z)
      : smallest(_mm512_set1_ps(float(low - z))), largest(_mm512_set1_ps(float(high - z))), zero(_mm512_set1_epi32(z)) {}

  __m512i operator()(__m512 scaled) const {
    const __m512 clipped = _mm512_min_ps(_mm512_max_ps(scaled, smallest), largest);
    return _mm512_add_epi32(_mm512_cvtps_epi32(clipped), zero);
  }
};

inline void store_bytes(uint8_t* to, __m512i codes, __mmask16 lanes) {
  if (lanes == 0xFFFF)  // much faster than with a mask
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(codes));
  else
    _mm512_mask_cvtepi32_storeu_epi8(to, lanes, codes);
}

// 1 / x of normal x, relative error 1e-7: one step of Newton's from 14 bits
inline __m512 inverse(__m512 x) {
  const __m512 y = _mm512_rcp14_ps(x);
  return _mm512_fmadd_ps(_mm512_fnmadd_ps(x, y, _mm512_set1_ps(1.0f)), y, y);
}

// The second operand of min and max is kept where the first is NaN, and NaN has to stay.

constexpr float OVERFLOWS = 126.0f;  // beyond it 1 + 2^t is 2^t, and x / 2^t is 0

// x / (1 + 2^t)
inline __m512 over_one_and_power(__m512 x, __m512 t) {
  const __m512 power = exp2(_mm512_min_ps(_mm512_set1_ps(OVERFLOWS), t));
  return _mm512_mul_ps(x, inverse(_mm512_add_ps(_mm512_set1_ps(1.0f), power)));
}

// x / (1 + exp(-x))
inline __m512 silu(__m512 x) {
  return over_one_and_power(x, _mm512_mul_ps(x, _mm512_set1_ps(-1.4426950408889634f)));  // -log2(e)
}

namespace gelu {

constexpr float FACTOR = -2.302208198144325f;          // -2 sqrt(2 / pi) log2(e)
constexpr float CUBE = 0.044715f;
constexpr float HALF_LOG2_E = -0.7213475204444817f;    // -x^2 / 2 as an exponent of two
constexpr float BEYOND = 13.0f;                        // of it the tail is 0 in float32
constexpr float ERF_FACTOR = 0.2316418903f;            // 0.3275911 / sqrt(2)

inline __m512 by_tanh(__m512 x) {
  const __m512 inner = _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(CUBE), _mm512_set1_ps(1.0f));
  const __m512 t = _mm512_mul_ps(_mm512_mul_ps(x, inner), _mm512_set1_ps(FACTOR));
  return over_one_and_power(x, t);
}

inline __m512 by_erf(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 size = _mm512_min_ps(_mm512_set1_ps(BEYOND), _mm512_abs_ps(x));
  const __m512 t = inverse(_mm512_fmadd_ps(size, _mm512_set1_ps(ERF_FACTOR), one));
  __m512 series = _mm512_set1_ps(1.061405429f);
  for (const float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f})
    series = _mm512_fmadd_ps(series, t, _mm512_set1_ps(c));
  const __m512 power = exp2(_mm512_mul_ps(_mm512_mul_ps(size, size), _mm512_set1_ps(HALF_LOG2_E)));
  const __m512 tail = _mm512_mul_ps(_mm512_mul_ps(_mm512_mul_ps(size, _mm512_set1_ps(0.5f)), power),
                                    _mm512_mul_ps(series, t));
  // not x - tail where x is not positive, but -tail: nothing cancels
  return _mm512_sub_ps(_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ), x), tail);
}

}  // namespace gelu
