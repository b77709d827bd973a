// What normalisation needs: means, and 1 / sqrt(variance + eps), of rows or of groups of channels; `kernels.norm` says
// what for.

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>

#include "statistics.h"

namespace {

constexpr int64_t PART = 1 << 14;  // values that are worth a second thread

constexpr int64_t REGISTERS = 4, WIDTH = REGISTERS * LANES;  // of channels that are summed up at once
constexpr int64_t RUN = 64;                                  // pixels whose sum is rounded by itself
constexpr int64_t AHEAD = 8;                                 // pixels that are fetched before they are needed

// For up to 64 channels that lie side by side, `channels` values from one pixel to the next: the sums over all pixels of
// x, or, where there is a middle for each channel, of (x - middle)^2.
void by_channel(const float* x, int64_t pixels, int64_t channels, int64_t count, const float* middle, float* sums) {
  __m512 total[REGISTERS], center[REGISTERS];
  __mmask16 lanes[REGISTERS];
  for (int j = 0; j < REGISTERS; j++) {
    lanes[j] = first(count - j * LANES);
    total[j] = _mm512_setzero_ps();
    center[j] = middle ? _mm512_maskz_loadu_ps(lanes[j], middle + j * LANES) : _mm512_setzero_ps();
  }
  for (int64_t from = 0; from < pixels; from += RUN) {
    __m512 part[REGISTERS];
    for (auto& each : part) each = _mm512_setzero_ps();
    for (int64_t p = from; p < std::min(pixels, from + RUN); p++)
      for (int j = 0; j < REGISTERS; j++) {
        const float* at = x + p * channels + j * LANES;
        __builtin_prefetch(at + AHEAD * channels);
        const __m512 v = _mm512_sub_ps(_mm512_maskz_loadu_ps(lanes[j], at), center[j]);
        part[j] = middle ? _mm512_fmadd_ps(v, v, part[j]) : _mm512_add_ps(v, part[j]);
      }
    for (int j = 0; j < REGISTERS; j++) total[j] = _mm512_add_ps(total[j], part[j]);
  }
  for (int j = 0; j < REGISTERS; j++) _mm512_mask_storeu_ps(sums + j * LANES, lanes[j], total[j]);
}

}  // namespace

extern "C" int dq_group_statistics(const float* x, int64_t samples, int64_t pixels, int64_t channels, int64_t groups,
                                   float eps, float* mean, float* inverse, int32_t threads) {
  const int64_t blocks = (channels + WIDTH - 1) / WIDTH, size = channels / groups;
  const std::unique_ptr<float[]> memory(new (std::nothrow) float[2 * samples * channels]);
  if (!memory) return 0;
  float *sums = memory.get(), *middle = sums + samples * channels;
  const auto sum_up = [&](const float* center) {
#pragma omp parallel for num_threads(threads) if (samples * pixels * channels > 2 * PART)
    for (int64_t i = 0; i < samples * blocks; i++) {
      const int64_t sample = i / blocks, column = i % blocks * WIDTH, at = sample * channels + column;
      by_channel(x + sample * pixels * channels + column, pixels, channels, std::min(WIDTH, channels - column),
                 center ? center + at : nullptr, sums + at);
    }
  };
  const auto of_group = [&](int64_t g) {
    double total = 0;
    for (int64_t c = 0; c < size; c++) total += sums[g * size + c];
    return total / double(size * pixels);
  };
  sum_up(nullptr);
  for (int64_t g = 0; g < samples * groups; g++) {
    mean[g] = float(of_group(g));
    std::fill_n(middle + g * size, size, mean[g]);
  }
  sum_up(middle);
  for (int64_t g = 0; g < samples * groups; g++) inverse[g] = float(1.0 / std::sqrt(of_group(g) + double(eps)));
  return 1;
}

extern "C" void dq_row_statistics(const float* x, int64_t rows, int64_t columns, float eps, float* mean, float* inverse,
                                  int32_t threads) {
#pragma omp parallel for num_threads(threads) if (rows * columns > 2 * PART)
  for (int64_t r = 0; r < rows; r++) {
    const Statistics found = row_statistics(x + r * columns, columns, eps);
    mean[r] = found.mean, inverse[r] = found.inverse;
  }
}
