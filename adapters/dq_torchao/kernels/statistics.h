// Sums over rows, and with them mean and 1 / sqrt(variance + eps) of a row; `kernels.norm` says what for.
#pragma once

#include <cmath>

#include "avx512.h"

// The sum of value(x[i]), in four registers: additions wait for each other.
template <class Value>
inline float sum(const float* x, int64_t n, const Value& value) {
  __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  int64_t i = 0;
  for (; i + 4 * LANES <= n; i += 4 * LANES)
    for (int j = 0; j < 4; j++) sums[j] = _mm512_add_ps(sums[j], value(_mm512_loadu_ps(x + i + j * LANES), 0xFFFF));
  for (; i < n; i += LANES) {
    const __mmask16 lanes = first(n - i);
    sums[0] = _mm512_add_ps(sums[0], value(_mm512_maskz_loadu_ps(lanes, x + i), lanes));
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}

// Of groups of channels, of [samples][pixels][channels]; 0 without memory.
extern "C" int dq_group_statistics(const float* x, int64_t samples, int64_t pixels, int64_t channels, int64_t groups,
                                   float eps, float* mean, float* inverse, int32_t threads);

struct Statistics {
  float mean = 0.0f, inverse = 1.0f;
};

// The variance is the mean square of the differences to the mean: nothing cancels.
inline Statistics row_statistics(const float* row, int64_t columns, float eps) {
  const float mean = sum(row, columns, [](__m512 v, __mmask16) { return v; }) / float(columns);
  const __m512 middle = _mm512_set1_ps(mean);
  const float squares = sum(row, columns, [&](__m512 v, __mmask16 lanes) {
    const __m512 d = _mm512_maskz_sub_ps(lanes, v, middle);
    return _mm512_mul_ps(d, d);
  });
  return {mean, 1.0f / std::sqrt(squares / float(columns) + eps)};
}
