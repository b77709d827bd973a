// GELU in one pass over memory; `kernels.gelu` states the formulas, and says what for.

#include <algorithm>

#include "pointwise.h"

namespace {

constexpr int64_t PART = 1 << 14;  // values that a thread takes at once

}  // namespace

extern "C" void dq_gelu(const float* x, float* y, int64_t total, int32_t tanh, int32_t threads) {
#pragma omp parallel for num_threads(threads) if (total > 2 * PART)
  for (int64_t start = 0; start < total; start += PART) {
    const int64_t end = std::min(total, start + PART);
    for (int64_t i = start; i < end; i += LANES) {
      const __mmask16 lanes = first(end - i);
      const __m512 v = _mm512_maskz_loadu_ps(lanes, x + i);
      _mm512_mask_storeu_ps(y + i, lanes, tanh ? gelu::by_tanh(v) : gelu::by_erf(v));
    }
  }
}
