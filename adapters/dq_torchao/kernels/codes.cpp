// Codes of activations in one pass over memory: clip(round(x * factor) + zero, low, high), as `kernels.codes` states it.

#include <algorithm>

#include "pointwise.h"

namespace {

constexpr int64_t PART = 1 << 14;  // values that a thread takes at once

void quantize(const float* x, const float* factor, bool one_factor, int64_t n, const Codes& codes, uint8_t* y) {
  const __m512 shared = _mm512_set1_ps(factor[0]);
  for (int64_t i = 0; i < n; i += LANES) {
    const __mmask16 lanes = first(n - i);
    const __m512 f = one_factor ? shared : _mm512_maskz_loadu_ps(lanes, factor + i);
    store_bytes(y + i, codes(_mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, x + i), f)), lanes);
  }
}

}  // namespace

// rows of channels that lie side by side in memory; one factor for all, or one for each channel. low, high and zero are
// of the stored, unsigned codes.
extern "C" void dq_codes(const float* x, uint8_t* y, int64_t rows, int64_t channels, const float* factor,
                         int32_t one_factor, const int32_t* zero_point, int32_t low, int32_t high, int32_t threads) {
  const Codes codes(low, high, *zero_point);
  const int64_t step = one_factor ? PART : std::max<int64_t>(1, PART / channels) * channels, total = rows * channels;
#pragma omp parallel for num_threads(threads) if (total > 2 * PART)
  for (int64_t start = 0; start < total; start += step) {
    const int64_t end = std::min(total, start + step);
    if (one_factor)
      quantize(x + start, factor, true, end - start, codes, y + start);
    else
      for (int64_t i = start; i < end; i += channels)
        quantize(x + i, factor, false, channels, codes, y + i);
  }
}
