// Codes of activations by ranges of their own, as `kernels.dynamic_codes` states it: the extremes of a unit (a token, or
// a sample), then its codes. A token stays in the processor's cache between the two; a sample is read twice.
//
// What lies before may be done on the way: a token's normalisation, factors and addends of channels, SiLU. Values are then
// kept between the two, those of one unit at a time. Where a range is given, nothing waits for it.

#include <omp.h>

#include <cstdlib>
#include <memory>

#include "ranges.h"
#include "statistics.h"

// Fields in the order of `dq_torchao.kernels.dynamic_codes`, of eight bytes each. Units of rows of channels; where nothing
// depends on the channel a unit may be one row. Scale and zero point have one entry for each unit.
struct DynamicCodesJob {
  const float* x;
  uint8_t* codes;
  float* scale;
  int32_t* zero_point;
  const float* factor;  // [channels], or null
  int64_t units, rows, channels, symmetric, least, most, offset;
  double smallest_scale, clip;
  int64_t normed;  // whether rows are normalised first; samples are where there are groups of channels
  double eps;
  struct {
    const float* rows;     // of channels, or null
    int64_t step, units;   // from one row to the next, and units that share one
  } parts[4];              // factor and addend, and those that come next
  int64_t silu, threads;
  const int32_t* given_zero;  // of the stored codes: by a given range, whose factor is [1] or [channels]; or null
  int64_t one_factor;
  int64_t groups;  // whose normalisation has the first factor and addend; 0: none
};

namespace {

constexpr int64_t PART = 1 << 14;     // values that a thread takes at once
constexpr int64_t TOGETHER = 8;       // tokens whose sums and extremes wait for each other's, not for their own
constexpr int64_t NEAR = 1 << 12;     // values of tokens that stay in the first level of the cache

using Job = DynamicCodesJob;

// What is done to the values of one unit first, and where they are.
struct Unit {
  const float* x;
  float* values;  // where they are kept
  uint8_t* codes;
  const float* parts[4];

  Unit(const Job& job, int64_t u, int64_t n, float* kept) : x(job.x + u * n), values(kept), codes(job.codes + u * n) {
    for (int p = 0; p < 4; p++) {
      const auto& part = job.parts[p];
      parts[p] = part.rows ? part.rows + u / part.units * part.step : nullptr;
    }
  }
};

struct DynamicCodes {
  const Job& job;
  const Form form;
  const int64_t n;
  const bool before;          // whether anything is done to the values first
  const int64_t row, length;  // of what is looked at at once, and what a thread takes, whole rows

  explicit DynamicCodes(const Job& j)
      : job(j),
        form{int32_t(j.symmetric), int32_t(j.least), int32_t(j.most), int32_t(j.offset), float(j.smallest_scale),
             float(j.clip)},
        n(j.rows * j.channels),
        before(j.normed || j.silu || j.parts[0].rows || j.parts[1].rows || j.given_zero),
        row(j.factor || before ? j.channels : PART),
        length(std::max<int64_t>(1, PART / row) * row) {}

  template <class Each>
  void rows_of(int64_t start, const Each& each) const {
    for (int64_t r = start; r < std::min(n, start + length); r += row) each(r, std::min(row, n - r));
  }

  Extremes look(const Unit& unit, int64_t start, const Statistics& of = {}) const {
    Seen seen;
    rows_of(start, [&](int64_t r, int64_t count) {
      if (!before) return see(seen, unit.x + r, job.factor, count);
      Seen own = seen;  // in registers
      const float* factor = job.factor;
      float* values = unit.values + r;
      transform(unit, of, r, [&](int64_t i, __m512 v, __mmask16 lanes) DQ_INLINE {
        v = _mm512_maskz_mov_ps(lanes, times(v, factor, i, lanes));
        own.see(v);
        store(values + i, v, lanes);
      });
      seen = own;
    });
    return seen.extremes();
  }

  // The codes of a row by the given range.
  void write_given(const Unit& unit, const Statistics& of, int64_t r) const {
    const Codes codes(int32_t(job.least + job.offset), int32_t(job.most + job.offset), *job.given_zero);
    const __m512 shared = _mm512_set1_ps(*job.factor);
    const float* factor = job.one_factor ? nullptr : job.factor;
    uint8_t* to = unit.codes + r;
    transform(unit, of, r, [&](int64_t i, __m512 v, __mmask16 lanes) DQ_INLINE {
      store_bytes(to + i, codes(factor ? times(v, factor, i, lanes) : _mm512_mul_ps(v, shared)), lanes);
    });
  }

  // What becomes of a row: `each(i, values, lanes)`.
  template <class Each>
  DQ_INLINE void transform(const Unit& unit, const Statistics& of, int64_t r, const Each& each) const {
    const Unit own = unit;  // what lies on the stack is not loaded again after every store
    const float* x = own.x + r;
    const bool normed = job.normed, activated = job.silu;
    const __m512 mean = _mm512_set1_ps(of.mean), inverse = _mm512_set1_ps(of.inverse);
    by_lanes(row, [&](int64_t i, __mmask16 lanes) DQ_INLINE {
      __m512 v = load(x + i, lanes);
      if (normed) v = _mm512_mul_ps(_mm512_sub_ps(v, mean), inverse);
      for (int p = 0; p < 4; p += 2) {
        if (own.parts[p]) v = _mm512_mul_ps(v, load(own.parts[p] + i, lanes));
        if (own.parts[p + 1]) v = _mm512_add_ps(v, load(own.parts[p + 1] + i, lanes));
      }
      each(i, activated ? silu(v) : v, lanes);
    });
  }

  void write(const Unit& unit, int64_t start, const Range& range) const {
    rows_of(start, [&](int64_t r, int64_t count) {
      quantize((before ? unit.values : unit.x) + r, before ? nullptr : job.factor, count, range, form, unit.codes + r);
    });
  }

  Range put(int64_t u, const Extremes& found) const {
    const Range range = form.range(found);
    job.scale[u] = range.scale, job.zero_point[u] = range.zero_point;
    return range;
  }

  // Tokens: one row each.
  void tokens(int64_t from, int64_t count, float* kept) const {
    Statistics of[TOGETHER];
    Range range[TOGETHER];
    const auto unit = [&](int64_t i) { return Unit(job, from + i, n, kept + i * n * before); };
    if (job.normed)
      for (int64_t i = 0; i < count; i++) of[i] = row_statistics(job.x + (from + i) * n, n, float(job.eps));
    if (job.given_zero) {
      for (int64_t i = 0; i < count; i++) write_given(unit(i), of[i], 0);
      return;
    }
    for (int64_t i = 0; i < count; i++) {
      Extremes found;
      for (int64_t start = 0; start < n; start += length) found.also(look(unit(i), start, of[i]));
      range[i] = put(from + i, found);
    }
    for (int64_t i = 0; i < count; i++)
      for (int64_t start = 0; start < n; start += length) write(unit(i), start, range[i]);
  }

  // Group normalisation of a sample as a factor and an addend for each channel, as a compiler has it; false without memory.
  bool put_group_normalisation(Unit& unit, float* kept, int64_t threads) const {
    const int64_t channels = job.channels, size = channels / job.groups;
    float *factor = kept, *addend = factor + channels, *mean = addend + channels, *inverse = mean + job.groups;
    if (!dq_group_statistics(unit.x, 1, job.rows, channels, job.groups, float(job.eps), mean, inverse, int32_t(threads)))
      return false;
    for (int64_t c = 0; c < channels; c++) {
      factor[c] = inverse[c / size] * unit.parts[0][c];
      addend[c] = -mean[c / size] * factor[c] + unit.parts[1][c];
    }
    unit.parts[0] = factor, unit.parts[1] = addend;
    return true;
  }

  // Whether there was memory.
  bool sample(int64_t u, float* kept, int64_t threads) const {
    Unit unit(job, u, n, kept);
    if (job.groups && !put_group_normalisation(unit, kept + (job.given_zero ? 0 : n), threads)) return false;
    put_codes(u, unit, threads);
    return true;
  }

  void put_codes(int64_t u, const Unit& unit, int64_t threads) const {
    if (job.given_zero) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
      for (int64_t start = 0; start < n; start += length)
        rows_of(start, [&](int64_t r, int64_t) { write_given(unit, {}, r); });
      return;
    }
    Extremes found;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      Extremes own;
#pragma omp for
      for (int64_t start = 0; start < n; start += length) own.also(look(unit, start));
#pragma omp critical
      found.also(own);
    }
    const Range range = put(u, found);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t start = 0; start < n; start += length) write(unit, start, range);
  }

  bool run() const {
    const bool shared = job.units < job.threads && n > 2 * PART && !job.normed;  // the threads share each unit
    const bool parallel = !shared && job.units * n > 2 * PART;
    const int64_t threads = parallel ? job.threads : 1, inner = shared ? job.threads : 1;
    const int64_t together = n == job.channels ? std::clamp(NEAR / n, int64_t(1), TOGETHER) : 1;
    const int64_t kept = (before && !job.given_zero ? together * n : 0) + (job.groups ? 2 * (job.channels + job.groups) : 0);
    const std::unique_ptr<float, void (*)(void*)> memory(static_cast<float*>(malloc(4 * threads * kept + 1)), free);
    if (!memory) return false;
    bool done = true;
#pragma omp parallel for num_threads(threads) if (parallel) reduction(&& : done)
    for (int64_t u = 0; u < job.units; u += together) {
      float* own = memory.get() + (parallel ? omp_get_thread_num() : 0) * kept;
      if (shared || n != job.channels || job.groups)
        done = sample(u, own, inner) && done;
      else
        tokens(u, std::min(together, job.units - u), own);
    }
    return done;
  }
};

}  // namespace

// Whether there was memory to keep the values of units in.
extern "C" int dq_dynamic_codes(const Job* job) { return DynamicCodes(*job).run(); }
