// Linear layers and convolutions on codes: y = s s_w (sum_k (q - z) w) + b, as `dq_torchao.layer` states it. All rows
// share s and z, or runs of rows have their own: tokens, or the samples of a convolution.
//
// A convolution is the same product: a row of the left operand is what lies under the kernel at one pixel, which is
// never written out. Codes are channels last, so for each tap of the kernel it is a run of channels, a fixed distance
// from the pixel. Where the image has a border, it is copied with one of zero points first.
//
// What follows in the network may be done to each block of results as long as it is in the cache: GELU, of the results or
// of their second half, which then is a factor of the first half, and the codes of the input of the next layer, which are
// then all that is written. Codes of results as they are need no second look: they are made in the registers.

#include "product.h"

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "ranges.h"

enum Activation { NONE, GELU_TANH, GELU_ERF, GATED = 4 };  // GATED: and one of the others

// Fields in the order of `dq_torchao.kernels.product`, of eight bytes each. A linear layer is an image of one row, one
// pixel for each of its rows, and a kernel of one tap.
struct ProductJob {
  const uint8_t* codes;  // [samples, height, width, channels]
  const int8_t* panels;  // of the weight, [taps][channels] by [outputs]; see product.h
  const int32_t* sums;   // [outputs], of the weight's codes
  const float *weight_scale, *bias;  // [outputs]; bias may be null
  const float* scale;
  const int32_t* zero_point;
  void* output;  // [samples, rows, columns, outputs or half]: float, or codes where there is a next factor
  int64_t samples, height, width, channels, outputs, rows, columns;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int64_t threads, activation;
  int64_t run;  // rows that share a scale and a zero point; 0: all
  const float* next_factor;  // one, or as many as outputs are written; null: no codes, or of values as they are
  const int32_t* next_zero;
  int64_t one_factor, low, high;  // of the stored codes
  float* own_scale;  // [rows of the result], where its codes have ranges of their own, which then go there; or null
  int32_t* own_zero;
  int64_t symmetric, least, most, offset;  // of these; see ranges.h
  double smallest_scale, clip;
};

namespace {

constexpr int64_t CACHE = 400 << 10;       // bytes of the left operand that stay in the second level of the cache
constexpr int64_t FEW = 16 * TILE_ROWS;    // rows whose results stay in the first
constexpr int64_t WAITING = 256 << 10;      // bytes of results that wait in the second level for their ranges
constexpr int64_t WORTH = 1 << 18;         // products that are worth a second thread

struct Image {
  const uint8_t* codes;
  int64_t row, sample;  // bytes from one to the next
};

// What follows, done to rows of results of one panel, and of one of gates if there are any; codes or values go to `to`.
void follow(const ProductJob& job, const float* results, const float* gates, int64_t rows, void* to, int64_t column,
            int64_t width, int64_t stride) {
  const bool coded = job.next_factor && !job.own_scale, tanh = job.activation & GELU_TANH;
  const Codes codes(int32_t(job.low), int32_t(job.high), coded ? *job.next_zero : 0);
  const auto gelu = [&](__m512 x) { return tanh ? gelu::by_tanh(x) : gelu::by_erf(x); };
  for (int64_t j = 0; j < width; j += LANES) {
    const __mmask16 lanes = first(width - j);
    const __m512 factor = !coded            ? _mm512_setzero_ps()
                          : job.one_factor ? _mm512_set1_ps(*job.next_factor)
                                           : _mm512_maskz_loadu_ps(lanes, job.next_factor + column + j);
    for (int64_t i = 0; i < rows; i++) {
      const int64_t at = i * stride + column + j;
      __m512 y = _mm512_loadu_ps(results + i * PANEL + j);
      if (gates)
        y = _mm512_mul_ps(y, gelu(_mm512_loadu_ps(gates + i * PANEL + j)));
      else if (job.activation != NONE)
        y = gelu(y);
      if (coded)
        store_bytes(static_cast<uint8_t*>(to) + at, codes(_mm512_mul_ps(y, factor)), lanes);
      else
        _mm512_mask_storeu_ps(static_cast<float*>(to) + at, lanes, y);
    }
  }
}

// Codes of rows of values, each by its own range.
void write_own_codes(const ProductJob& job, const float* values, int64_t from, int64_t to, int64_t width, int64_t stride) {
  const Form form{int32_t(job.symmetric), int32_t(job.least), int32_t(job.most), int32_t(job.offset),
                  float(job.smallest_scale), float(job.clip)};
  for (int64_t r = from; r < to; r++, values += stride) {
    Seen seen;
    see(seen, values, job.next_factor, width);
    const Range range = form.range(seen.extremes());
    job.own_scale[r] = range.scale, job.own_zero[r] = range.zero_point;
    quantize(values, job.next_factor, width, range, form, static_cast<uint8_t*>(job.output) + r * width);
  }
}

// Results of rows and of one panel to `output`, values or codes, whose rows are `row` apart.
template <int REGISTERS, bool RUNS, class Output>
void multiply_panel(const ProductJob& job, const Image& image, const int64_t* taps, int64_t from, int64_t to, int64_t column,
                    Output* output, int64_t row) {
  constexpr bool CODED = sizeof(Output) == 1;
  const int64_t words = (job.channels + 3) / 4, tap_count = job.kernel[0] * job.kernel[1];
  const int64_t left = job.outputs - column;
  const __m512 scale = _mm512_set1_ps(RUNS ? 1.0f : *job.scale);
  const __m512i minus_zero = _mm512_set1_epi32(RUNS ? 1 : -*job.zero_point);
  __m512 factor[REGISTERS], bias[REGISTERS];
  __m512i begin[REGISTERS];  // of the sums; with runs, what a zero point is multiplied by
  for (int j = 0; j < REGISTERS; j++) {
    const __mmask16 lanes = first(left - j * LANES);
    factor[j] = _mm512_mul_ps(scale, _mm512_maskz_loadu_ps(lanes, job.weight_scale + column + j * LANES));
    bias[j] = job.bias ? _mm512_maskz_loadu_ps(lanes, job.bias + column + j * LANES) : _mm512_setzero_ps();
    begin[j] = _mm512_mullo_epi32(minus_zero, _mm512_maskz_loadu_epi32(lanes, job.sums + column + j * LANES));
  }
  const __mmask16 last = first(left - (REGISTERS - 1) * LANES);
  const Codes codes(int32_t(job.low), int32_t(job.high), CODED ? *job.next_zero : 0);
  const auto next = [&](int j) DQ_INLINE {
    return job.one_factor ? _mm512_set1_ps(*job.next_factor)
                          : _mm512_maskz_loadu_ps(first(left - j * LANES), job.next_factor + column + j * LANES);
  };
  const int8_t* panel = job.panels + column * tap_count * words * 4;
  const int64_t pixels = job.rows * job.columns, step = job.stride[1] * job.channels;
  int64_t y = from % pixels / job.columns, x = from % job.columns;
  const uint8_t* line = image.codes + from / pixels * image.sample + y * job.stride[0] * image.row;
  int64_t unit = RUNS ? from / job.run : 0, within = RUNS ? from % job.run : 0;
  const auto tile = [&](auto count, Output* to) DQ_INLINE {
    constexpr int ROWS = decltype(count)::value;
    const uint8_t* rows[ROWS];
    int64_t units[ROWS];
    for (int i = 0; i < ROWS; i++) {
      units[i] = unit;
      if (RUNS && ++within == job.run) within = 0, unit++;
      rows[i] = line + x * step;
      if (++x < job.columns) continue;
      x = 0;
      line += job.stride[0] * image.row;
      if (++y < job.rows) continue;
      y = 0;
      line += image.sample - job.rows * job.stride[0] * image.row;
    }
    for (int i = 0; i < ROWS; i++)  // to have the lines in the cache when the sums are ready
      for (int j = 0; j < REGISTERS; j++) __builtin_prefetch(to + i * row + j * LANES, 1);
    multiply_tile<ROWS, REGISTERS>(
        rows, taps, tap_count, words, panel, [&](int j) DQ_INLINE { return RUNS ? _mm512_setzero_si512() : begin[j]; },
        [&](int i, int j, __m512i sum) DQ_INLINE {
          __m512 own = factor[j];
          if (RUNS) {
            const __m512i zero = _mm512_set1_epi32(job.zero_point[units[i]]);
            sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(zero, begin[j]));
            own = _mm512_mul_ps(_mm512_set1_ps(job.scale[units[i]]), own);
          }
          const __m512 y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), own, bias[j]);
          const __mmask16 lanes = j + 1 < REGISTERS ? ALL : last;
          if constexpr (CODED)
            store_bytes(to + i * row + j * LANES, codes(_mm512_mul_ps(y, next(j))), lanes);
          else
            _mm512_mask_storeu_ps(to + i * row + j * LANES, lanes, y);
        });
  };
  for (; from + TILE_ROWS <= to; from += TILE_ROWS, output += TILE_ROWS * row)
    tile(std::integral_constant<int, TILE_ROWS>(), output);
  switch (to - from) {
    case 5: return tile(std::integral_constant<int, 5>(), output);
    case 4: return tile(std::integral_constant<int, 4>(), output);
    case 3: return tile(std::integral_constant<int, 3>(), output);
    case 2: return tile(std::integral_constant<int, 2>(), output);
    case 1: return tile(std::integral_constant<int, 1>(), output);
  }
}

template <int REGISTERS, class Output>
void multiply(const ProductJob& job, const Image& image, const int64_t* taps, int64_t from, int64_t to, int64_t column,
              Output* output, int64_t row) {
  const auto function = job.run ? multiply_panel<REGISTERS, true, Output> : multiply_panel<REGISTERS, false, Output>;
  function(job, image, taps, from, to, column, output, row);
}

// The same, by as many registers as the outputs from `column` on take.
template <class Output>
void multiply_columns(const ProductJob& job, const Image& image, const int64_t* taps, int64_t from, int64_t to,
                      int64_t column, Output* output, int64_t row) {
  switch (std::min(TILE_REGISTERS, (job.outputs - column + LANES - 1) / LANES)) {
    case 1: return multiply<1>(job, image, taps, from, to, column, output, row);
    case 2: return multiply<2>(job, image, taps, from, to, column, output, row);
    case 3: return multiply<3>(job, image, taps, from, to, column, output, row);
    default: return multiply<4>(job, image, taps, from, to, column, output, row);
  }
}

}  // namespace

// Whether it has computed ``job->output``.
extern "C" int dq_product(const ProductJob* given) {
  const ProductJob& job = *given;
  const int64_t height = job.height + 2 * job.padding[0], width = job.width + 2 * job.padding[1];
  Image image{job.codes, width * job.channels, height * width * job.channels};
  std::unique_ptr<uint8_t, void (*)(void*)> bordered{nullptr, free};
  const int64_t all = job.samples * job.rows * job.columns;
  const bool gated = job.activation & GATED;  // panels of values and of gates must not overlap
  if (gated && job.outputs % (2 * PANEL)) return 0;
  const int64_t outputs = gated ? job.outputs / 2 : job.outputs;
  const int64_t panels = (outputs + PANEL - 1) / PANEL, tap_count = job.kernel[0] * job.kernel[1];
  const bool own = job.own_scale, followed = job.activation != NONE || own, coded = job.next_factor && !followed;
  const bool parallel = job.threads > 1 && all * job.outputs * job.channels * tap_count > WORTH;
  // rows that a thread multiplies by one panel after the other, or by all of them: enough parts for all threads
  const int64_t together = own ? panels : 1;
  const int64_t parts = parallel ? (4 * job.threads * together + panels - 1) / panels : 1;
  const int64_t fit = own        ? std::clamp(WAITING / (4 * outputs) / TILE_ROWS * TILE_ROWS, TILE_ROWS, FEW)
                      : followed ? FEW
                                 : std::max(CACHE / std::max<int64_t>(job.channels * tap_count, 1), FEW);
  const int64_t block = round_up(std::min(fit, (all + parts - 1) / parts), TILE_ROWS);
  const int64_t blocks = (all + block - 1) / block;
  if (job.padding[0] || job.padding[1]) {
    bordered.reset(static_cast<uint8_t*>(malloc(job.samples * image.sample)));
    if (!bordered) return 0;
    image.codes = bordered.get();
    const int64_t before = job.padding[1] * job.channels, line = job.width * job.channels;
#pragma omp parallel for num_threads(job.threads) if (parallel)
    for (int64_t i = 0; i < job.samples * height; i++) {
      uint8_t* to = bordered.get() + i * image.row;
      const int64_t sample = i / height, y = i % height - job.padding[0];
      const int32_t zero = job.zero_point[job.run ? sample * job.rows * job.columns / job.run : 0];
      if (y < 0 || y >= job.height) {
        memset(to, zero, image.row);
        continue;
      }
      memset(to, zero, before);
      memcpy(to + before, job.codes + (sample * job.height + y) * line, line);
      memset(to + before + line, zero, before);
    }
  }
  const std::unique_ptr<int64_t[]> taps(new (std::nothrow) int64_t[tap_count]);
  if (!taps) return 0;
  for (int64_t t = 0; t < tap_count; t++)
    taps[t] = t / job.kernel[1] * job.dilation[0] * image.row + t % job.kernel[1] * job.dilation[1] * job.channels;
  // what waits: rows that a multiple of 4 KB lies between would drive each other out of the first level
  const int64_t stride = own ? round_up(outputs, LANES) + LANES : outputs, waiting = own ? block * stride : 0;
  const std::unique_ptr<float, void (*)(void*)> memory(
      static_cast<float*>(malloc(4 * waiting * (parallel ? job.threads : 1) + 1)), free);
  if (!memory) return 0;
#pragma omp parallel for num_threads(job.threads) if (parallel)
  for (int64_t i = 0; i < blocks * panels / together; i++) {
    const int64_t from = i * together / panels * block, to = std::min(from + block, all);
    const int64_t first_panel = i * together % panels;
    float* values = memory.get() + omp_get_thread_num() * waiting;
    for (int64_t column = first_panel * PANEL; column < std::min(outputs, (first_panel + together) * PANEL); column += PANEL) {
      const int64_t at = from * outputs + column;
      if (coded) {
        multiply_columns(job, image, taps.get(), from, to, column, static_cast<uint8_t*>(job.output) + at, outputs);
        continue;
      }
      if (!followed) {
        multiply_columns(job, image, taps.get(), from, to, column, static_cast<float*>(job.output) + at, outputs);
        continue;
      }
      alignas(64) float results[FEW * PANEL], gates[FEW * PANEL];
      multiply_columns(job, image, taps.get(), from, to, column, results, PANEL);
      if (gated) multiply<4>(job, image, taps.get(), from, to, outputs + column, gates, PANEL);
      const int64_t bytes = job.next_factor ? 1 : 4;
      void* written = values;
      if (!own) written = static_cast<uint8_t*>(job.output) + from * outputs * bytes;
      follow(job, results, gated ? gates : nullptr, to - from, written, column, std::min(outputs - column, PANEL), stride);
    }
    if (own) write_own_codes(job, values, from, to, outputs, stride);
  }
  return 1;
}
