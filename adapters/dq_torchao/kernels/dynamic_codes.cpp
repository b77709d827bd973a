// Codes of activations by ranges of their own, as `kernels.dynamic_codes` states it: the extremes of a unit (a token, or
// a sample), then its codes. A token stays in the processor's cache between the two; a sample is read twice.

#include <algorithm>
#include <cmath>

#include "avx512.h"

namespace {

constexpr int64_t PART = 1 << 14;  // values that a thread takes at once

struct Extremes {
  float low = 0.0f, high = 0.0f;  // a range always contains zero
  int32_t broken = 0;             // there is a NaN
};

// Values of one unit: rows of channels with a factor each, or any n values without factors.
struct Values {
  const float* x;
  const float* factor;
  int64_t n, row, step;  // step: what a thread takes at once, whole rows
};

struct Form {
  int32_t symmetric, least, most, offset;
  float smallest_scale;
};

struct Range {
  float scale;
  int32_t zero_point;
};

__m512 loaded(const float* x, const float* factor, int64_t i, __mmask16 lanes) {
  const __m512 v = _mm512_maskz_loadu_ps(lanes, x + i);
  return factor ? _mm512_mul_ps(v, _mm512_maskz_loadu_ps(lanes, factor + i)) : v;
}

Extremes extremes(const Values& v, int64_t start) {
  __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
  __mmask16 unordered = 0;
  for (int64_t r = start; r < std::min(v.n, start + v.step); r += v.row)
    for (int64_t i = 0, n = std::min(v.row, v.n - r); i < n; i += LANES) {
      const __m512 value = loaded(v.x + r, v.factor, i, first(n - i));
      low = _mm512_min_ps(low, value), high = _mm512_max_ps(high, value);
      unordered |= _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    }
  return {_mm512_reduce_min_ps(low), _mm512_reduce_max_ps(high), unordered != 0};
}

void quantize(const Values& v, int64_t start, const Range& range, const Form& form, uint8_t* y) {
  const __m512 inverse = _mm512_set1_ps(1.0f / range.scale);
  const __m512 low = _mm512_set1_ps(float(form.least - range.zero_point));
  const __m512 high = _mm512_set1_ps(float(form.most - range.zero_point));
  const __m512i zero = _mm512_set1_epi32(range.zero_point + form.offset);
  for (int64_t r = start; r < std::min(v.n, start + v.step); r += v.row)
    for (int64_t i = 0, n = std::min(v.row, v.n - r); i < n; i += LANES) {
      const __m512 scaled = _mm512_mul_ps(loaded(v.x + r, v.factor, i, first(n - i)), inverse);
      const __m512i code = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(scaled, low), high));
      _mm512_mask_cvtepi32_storeu_epi8(y + r + i, first(n - i), _mm512_add_epi32(code, zero));
    }
}

Range range_of(const Extremes& found, const Form& form) {
  const float reach = form.symmetric ? std::max(-found.low, found.high) / float(std::max(form.most, 1))
                                     : (found.high - found.low) / float(form.most - form.least);
  const float scale = !found.broken && reach > form.smallest_scale ? reach : 1.0f;
  if (form.symmetric || found.broken || !std::isfinite(scale)) return {scale, 0};
  const float zero = float(form.least) - std::nearbyint(found.low / scale);
  return {scale, int32_t(std::min(std::max(zero, float(form.least)), float(form.most)))};
}

Range one_thread(const Values& v, const Form& form, uint8_t* y) {
  Extremes found;
  for (int64_t start = 0; start < v.n; start += v.step) {
    const Extremes part = extremes(v, start);
    found = {std::min(found.low, part.low), std::max(found.high, part.high), found.broken | part.broken};
  }
  const Range range = range_of(found, form);
  for (int64_t start = 0; start < v.n; start += v.step) quantize(v, start, range, form, y);
  return range;
}

Range many_threads(const Values& v, const Form& form, uint8_t* y, int32_t threads) {
  float low = 0.0f, high = 0.0f;
  int32_t broken = 0;
#pragma omp parallel for num_threads(threads) reduction(min : low) reduction(max : high) reduction(| : broken)
  for (int64_t start = 0; start < v.n; start += v.step) {
    const Extremes part = extremes(v, start);
    low = std::min(low, part.low), high = std::max(high, part.high), broken |= part.broken;
  }
  const Range range = range_of({low, high, broken}, form);
#pragma omp parallel for num_threads(threads)
  for (int64_t start = 0; start < v.n; start += v.step) quantize(v, start, range, form, y);
  return range;
}

}  // namespace

// units of rows of channels; without factors a unit may be one row. least and most are of the signed codes, offset is what
// the stored ones have more. scale and zero_point, of the signed codes, have one entry for each unit.
extern "C" void dq_dynamic_codes(const float* x, uint8_t* y, int64_t units, int64_t rows, int64_t channels,
                                 const float* factor, int32_t symmetric, int32_t least, int32_t most, int32_t offset,
                                 float smallest_scale, float* scale, int32_t* zero_point, int32_t threads) {
  const int64_t n = rows * channels, row = factor ? channels : PART, step = std::max<int64_t>(1, PART / row) * row;
  const Form form{symmetric, least, most, offset, smallest_scale};
  const bool shared = units < threads && n > 2 * PART;  // the threads share each unit
#pragma omp parallel for num_threads(threads) if (!shared && units * n > 2 * PART)
  for (int64_t u = 0; u < units; ++u) {
    const Values values{x + u * n, factor, n, row, step};
    const Range range = shared ? many_threads(values, form, y + u * n, threads) : one_thread(values, form, y + u * n);
    scale[u] = range.scale, zero_point[u] = range.zero_point;
  }
}
