// GELU in one pass over memory; `kernels.gelu` states the formulas, and says what for.

#include <algorithm>

#include "avx512.h"

namespace {

constexpr int64_t PART = 1 << 14;                      // values that a thread takes at once
constexpr float FACTOR = -2.302208198144325f;          // -2 sqrt(2 / pi) log2(e)
constexpr float CUBE = 0.044715f, OVERFLOWS = 126.0f;  // beyond it 1 + 2^t is 2^t, and x / 2^t is 0
constexpr float HALF_LOG2_E = -0.7213475204444817f;    // -x^2 / 2 as an exponent of two
constexpr float BEYOND = 13.0f;                        // of it the tail is 0 in float32
constexpr float ERF_FACTOR = 0.2316418903f;            // 0.3275911 / sqrt(2)

// The second operand of min and max is kept where the first is NaN, and NaN has to stay.

__m512 by_tanh(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 inner = _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(CUBE), one);
  const __m512 t = _mm512_mul_ps(_mm512_mul_ps(x, inner), _mm512_set1_ps(FACTOR));
  return _mm512_div_ps(x, _mm512_add_ps(one, exp2(_mm512_min_ps(_mm512_set1_ps(OVERFLOWS), t))));
}

__m512 by_erf(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 size = _mm512_min_ps(_mm512_set1_ps(BEYOND), _mm512_abs_ps(x));
  const __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(size, _mm512_set1_ps(ERF_FACTOR), one));
  __m512 series = _mm512_set1_ps(1.061405429f);
  for (const float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f})
    series = _mm512_fmadd_ps(series, t, _mm512_set1_ps(c));
  const __m512 power = exp2(_mm512_mul_ps(_mm512_mul_ps(size, size), _mm512_set1_ps(HALF_LOG2_E)));
  const __m512 tail = _mm512_mul_ps(_mm512_mul_ps(_mm512_mul_ps(size, _mm512_set1_ps(0.5f)), power),
                                    _mm512_mul_ps(series, t));
  // not x - tail where x is not positive, but -tail: nothing cancels
  return _mm512_sub_ps(_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ), x), tail);
}

}  // namespace

extern "C" void dq_gelu(const float* x, float* y, int64_t total, int32_t tanh, int32_t threads) {
#pragma omp parallel for num_threads(threads) if (total > 2 * PART)
  for (int64_t start = 0; start < total; start += PART) {
    const int64_t end = std::min(total, start + PART);
    for (int64_t i = start; i < end; i += LANES) {
      const __mmask16 lanes = first(end - i);
      const __m512 v = _mm512_maskz_loadu_ps(lanes, x + i);
      _mm512_mask_storeu_ps(y + i, lanes, tanh ? by_tanh(v) : by_erf(v));
    }
  }
}
