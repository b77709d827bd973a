// GELU with the tanh approximation in one pass over memory; `kernels.gelu` says what for.
//
//     y = x (1 + tanh u) / 2 = x / (1 + exp(-2 u)),    u = sqrt(2 / pi) (x + 0.044715 x^3)

#include <algorithm>

#include "avx512.h"

constexpr int64_t PART = 1 << 14;                     // values that a thread takes at once
constexpr float FACTOR = -2.302208198144325f;         // -2 sqrt(2 / pi) log2(e)
constexpr float CUBE = 0.044715f, OVERFLOWS = 126.0f;  // beyond it 1 + 2^t is 2^t, and x / 2^t is 0

extern "C" void dq_gelu(const float* x, float* y, int64_t total, int32_t threads) {
  const __m512 one = _mm512_set1_ps(1.0f), most = _mm512_set1_ps(OVERFLOWS);
#pragma omp parallel for num_threads(threads) if (total > 2 * PART)
  for (int64_t start = 0; start < total; start += PART) {
    const int64_t end = std::min(total, start + PART);
    for (int64_t i = start; i < end; i += LANES) {
      const __mmask16 lanes = first(end - i);
      const __m512 v = _mm512_maskz_loadu_ps(lanes, x + i);
      const __m512 inner = _mm512_fmadd_ps(_mm512_mul_ps(v, v), _mm512_set1_ps(CUBE), one);
      const __m512 t = _mm512_mul_ps(_mm512_mul_ps(v, inner), _mm512_set1_ps(FACTOR));
      // the second operand of min is kept where the first is NaN, and NaN has to stay
      const __m512 power = exp2(_mm512_min_ps(most, t));
      _mm512_mask_storeu_ps(y + i, lanes, _mm512_div_ps(v, _mm512_add_ps(one, power)));
    }
  }
}
