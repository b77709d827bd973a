// Ranges of activations by their own extremes, and codes by these; `kernels.dynamic_codes` states them. A unit is what
// shares a range: a token of a linear layer's input, or a sample of a convolution's.
#pragma once

#include <algorithm>
#include <cmath>

#include "pointwise.h"

struct Extremes {
  float low = 0.0f, high = 0.0f;  // a range always contains zero
  int32_t broken = 0;             // there is a NaN

  void also(const Extremes& other) {
    low = std::min(low, other.low), high = std::max(high, other.high), broken |= other.broken;
  }
};

// The extremes of values that are seen 16 at a time.
struct Seen {
  __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
  __mmask16 unordered = 0;

  void see(__m512 value) {
    low = _mm512_min_ps(low, value), high = _mm512_max_ps(high, value);
    unordered |= _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  }
  Extremes extremes() const { return {_mm512_reduce_min_ps(low), _mm512_reduce_max_ps(high), unordered != 0}; }
};

struct Range {
  float scale;
  int32_t zero_point;  // of the stored codes
};

// least and most are of the signed codes, offset is what the stored ones have more.
struct Form {
  int32_t symmetric, least, most, offset;
  float smallest_scale;
  float clip;  // what extremes are multiplied by

  Range range(const Extremes& found) const {
    const float low = found.low * clip, high = found.high * clip;
    const float reach = symmetric ? std::max(-low, high) / float(std::max(most, 1)) : (high - low) / float(most - least);
    const float scale = !found.broken && reach > smallest_scale ? reach : 1.0f;
    if (symmetric || found.broken || !std::isfinite(scale)) return {scale, offset};
    const float zero = float(least) - std::nearbyint(low / scale);
    return {scale, int32_t(std::min(std::max(zero, float(least)), float(most))) + offset};
  }
};

inline __m512 times(__m512 value, const float* factor, int64_t i, __mmask16 lanes) {
  return factor ? _mm512_mul_ps(value, load(factor + i, lanes)) : value;
}

// Look at n values side by side, with a factor each or without.
inline void see(Seen& seen, const float* x, const float* factor, int64_t n) {
  Seen own = seen;  // in registers
  by_lanes(n, [&](int64_t i, __mmask16 lanes) DQ_INLINE { own.see(times(load(x + i, lanes), factor, i, lanes)); });
  seen = own;
}

inline void quantize(const float* x, const float* factor, int64_t n, const Range& range, const Form& form, uint8_t* y) {
  const Codes codes(form.least + form.offset, form.most + form.offset, range.zero_point);
  const __m512 inverse = _mm512_set1_ps(1.0f / range.scale);
  by_lanes(n, [&](int64_t i, __mmask16 lanes) DQ_INLINE {
    store_bytes(y + i, codes(_mm512_mul_ps(times(load(x + i, lanes), factor, i, lanes), inverse)), lanes);
  });
}
