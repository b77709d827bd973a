// Attention with integer products on x86 CPUs with AVX512-VNNI; `dq_plugins.quantized.attention` states the definition.
//
// Codes are unsigned for queries and probabilities (left operands), signed for keys and values, as the instruction
// wants them. With q, k, v codes and zq, zk, zv their zero points, the score of query l and key n is
//
//     sq sk (sum_d (q[l,d] - zq) (k[n,d] - zk))  =  sq sk (sum_d q[l,d] k[n,d]  -  zq sum_d k[n,d])  +  r[l]
//
// r[l] is the same for all keys of a query and cancels in the softmax: the zero point of keys costs nothing. That of
// values comes out of the weighted mean: sum_n p[n] (v[n] - zv) / sum_n p[n] = sum_n p[n] v[n] / sum_n p[n] - zv.
//
// Each operand comes as values, which are quantized here, or as codes that what made it has written. The result is
// written as values, or as codes of the input of the next layer.
//
// Keys and values are laid out once for a head, in panels (product.h). Then blocks of queries run by themselves: scores of
// a block against all keys, the exact largest of a row, codes of the probabilities, their product with the values. Memory
// grows with the number of keys, never with its square.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "pointwise.h"
#include "product.h"

// Fields in the order of `dq_torchao.kernels.attention`. Strides are of elements: sample, head, token (mask: key, too).
// Channels are contiguous. A table has one entry for all samples (step 0) or one for each (step 1).
struct Job {
  const void *query, *key, *value;  // float, or stored codes: signed ones plus 128
  void* output;                     // float, or codes where there is a next factor
  const float* mask;                // added to the scores, or null
  const float *query_scale, *key_scale, *value_scale;
  const int32_t *query_zero, *key_zero, *value_zero;  // of stored codes
  const float* next_factor;  // one, or as many as heads have channels of values together; null: no codes
  const int32_t* next_zero;  // of the stored codes
  int64_t samples, heads, key_heads, queries, keys, channels, value_channels, table_step;
  int64_t query_stride[3], key_stride[3], value_stride[3], output_stride[3], mask_stride[4];
  int32_t low, high, causal, threads;  // low, high: the smallest and the largest signed code
  int32_t query_coded, key_coded, value_coded, one_factor, next_low, next_high;  // the last two: of the stored codes
  float scale;
};

namespace {

constexpr int64_t AHEAD = 8;            // rows that are fetched before they are needed
constexpr int64_t LONGEST = 1 << 16;    // keys whose products with values fit int32: 65536 * 255 * 128 < 2^31
constexpr int64_t SCRATCH = 80 << 10;   // bytes that scores and codes of a block of queries may take
constexpr float LOG2_E = 1.44269504088896341f, LOG2_255 = 7.99435343685885793f;

std::unique_ptr<uint8_t, void (*)(void*)> allocate(int64_t bytes) {
  return {static_cast<uint8_t*>(aligned_alloc(64, round_up(std::max<int64_t>(bytes, 64), 64))), free};
}

constexpr int32_t OFFSET = 128;  // of stored codes

// Signed codes of values, as `dq_plugins.affine.quantize`.
struct Quantized {
  using Element = float;
  __m512 inverse;
  Codes codes;

  Quantized(float scale, int32_t stored_zero, const Job& job)
      : inverse(_mm512_set1_ps(1.0f / scale)), codes(job.low, job.high, stored_zero - OFFSET) {}

  __m512i operator()(const float* x, __mmask16 lanes) const {
    return _mm512_maskz_mov_epi32(lanes, codes(_mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, x), inverse)));
  }
};

// Signed codes of stored ones.
struct Stored {
  using Element = uint8_t;

  Stored(float, int32_t, const Job&) {}

  __m512i operator()(const uint8_t* x, __mmask16 lanes) const {
    const __m512i codes = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes, x));
    return _mm512_maskz_sub_epi32(lanes, codes, _mm512_set1_epi32(OFFSET));
  }
};

// What is kept of one head's keys and values.
struct Head {
  int8_t *key, *value;  // panels of [D, S] and of [S, D']
  int32_t* shift;       // [S]: -zq sum_d k[n, d]
};

struct Attention {
  const Job& job;
  // padded: keys and channels of values to registers, channels to four; rows: of a block of queries
  const int64_t keys, channels, width, rows;
  const int64_t key_bytes, value_bytes, head_bytes;
  std::unique_ptr<uint8_t, void (*)(void*)> memory;

  explicit Attention(const Job& j)
      : job(j),
        keys(round_up(j.keys, LANES)),
        channels(round_up(j.channels, 4)),
        width(round_up(j.value_channels, LANES)),
        rows(std::clamp<int64_t>(SCRATCH / (5 * keys) / TILE_ROWS * TILE_ROWS, 4 * TILE_ROWS, 16 * TILE_ROWS)),
        key_bytes(round_up(channels * keys, 64)),
        value_bytes(round_up(keys * width, 64)),
        head_bytes(key_bytes + value_bytes + 4 * keys),
        memory(allocate(head_bytes * j.samples * j.key_heads)) {}

  Head head(int64_t which) const {
    uint8_t* at = memory.get() + which * head_bytes;
    return {reinterpret_cast<int8_t*>(at), reinterpret_cast<int8_t*>(at + key_bytes),
            reinterpret_cast<int32_t*>(at + key_bytes + value_bytes)};
  }

  // The first word of a column of a matrix in panels of `depth` words; the next is as many words on as its panel is wide.
  static int32_t* word_of(int8_t* panels, int64_t depth, int64_t columns, int64_t column) {
    const int64_t before = column / PANEL * PANEL;
    return reinterpret_cast<int32_t*>(panels) + before * depth + column - before;
  }

  // Rows of one head lie apart, where the processor does not look ahead by itself.
  template <class T>
  static void fetch(const T* row, int64_t n) {
    for (int64_t d = 0; d < n; d += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + d);
  }

  // Where the rows of a head begin.
  template <class T>
  static const T* rows_of(const void* operand, const int64_t* stride, int64_t sample, int64_t h) {
    return static_cast<const T*>(operand) + sample * stride[0] + h * stride[1];
  }

  template <class Source>
  void pack_keys(int64_t sample, int64_t h, const Head& to, int8_t* row) const {
    const int64_t entry = sample * job.table_step, words = channels / 4;
    const Source codes_of(job.key_scale[entry], job.key_zero[entry], job);
    const auto* x = rows_of<typename Source::Element>(job.key, job.key_stride, sample, h);
    const int32_t query_zero = job.query_zero[entry];
    for (int64_t n = 0; n < keys; n++, x += job.key_stride[2]) {
      int32_t* packed = word_of(to.key, words, keys, n);
      const int64_t step = std::min(PANEL, keys - n / PANEL * PANEL);
      if (n >= job.keys) {
        for (int64_t w = 0; w < words; w++) packed[w * step] = 0;
        to.shift[n] = 0;
        continue;
      }
      if (n + AHEAD < job.keys) fetch(x + AHEAD * job.key_stride[2], job.channels);
      __m512i sum = _mm512_setzero_si512();
      for (int64_t d = 0; d < job.channels; d += LANES) {
        const __m512i codes = codes_of(x + d, first(job.channels - d));
        sum = _mm512_add_epi32(sum, codes);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(row + d), _mm512_cvtepi32_epi8(codes));
      }
      to.shift[n] = -query_zero * _mm512_reduce_add_epi32(sum);
      for (int64_t w = 0; w < words; w++) packed[w * step] = reinterpret_cast<const int32_t*>(row)[w];
    }
  }

  template <class Source>
  void pack_values(int64_t sample, int64_t h, const Head& to) const {
    const int64_t entry = sample * job.table_step, stride = job.value_stride[2];
    const Source codes_of(job.value_scale[entry], job.value_zero[entry], job);
    const auto* x = rows_of<typename Source::Element>(job.value, job.value_stride, sample, h);
    const __m512i byte = _mm512_set1_epi32(255);
    for (int64_t n = 0; n < keys; n += 4, x += 4 * stride) {
      for (int64_t i = AHEAD; i < AHEAD + 4 && n + i < job.keys; i++) fetch(x + i * stride, job.value_channels);
      for (int64_t d = 0; d < width; d += LANES) {
        const __mmask16 lanes = first(job.value_channels - d);
        __m512i word = _mm512_setzero_si512();
        for (int64_t i = 0; i < 4 && n + i < job.keys; i++) {
          const __m512i codes = _mm512_and_si512(codes_of(x + i * stride + d, lanes), byte);
          word = _mm512_or_si512(word, _mm512_slli_epi32(codes, unsigned(8 * i)));
        }
        const int64_t step = std::min(PANEL, width - d / PANEL * PANEL);
        _mm512_storeu_si512(word_of(to.value, keys / 4, width, d) + n / 4 * step, word);
      }
    }
  }

  void pack(int64_t sample, int64_t h, const Head& to, int8_t* row) const {
    if (job.key_coded)
      pack_keys<Stored>(sample, h, to, row);
    else
      pack_keys<Quantized>(sample, h, to, row);
    if (job.value_coded)
      pack_values<Stored>(sample, h, to);
    else
      pack_values<Quantized>(sample, h, to);
  }

  // Codes of the probabilities of one query from its int32 scores; returns their sum.
  int64_t probabilities(const int32_t* scores, int64_t seen, float factor, uint8_t* codes) const {
    __m512i most = _mm512_set1_epi32(INT32_MIN), sum = _mm512_setzero_si512();
    by_lanes(seen, [&](int64_t n, __mmask16 lanes) DQ_INLINE {
      const __m512i found = integers(scores + n);
      most = lanes == ALL ? _mm512_max_epi32(most, found) : _mm512_mask_max_epi32(most, lanes, most, found);
    });
    const __m512i largest = _mm512_set1_epi32(_mm512_reduce_max_epi32(most));
    const auto power = [&](int64_t n) DQ_INLINE {
      const __m512 below = _mm512_cvtepi32_ps(_mm512_sub_epi32(integers(scores + n), largest));
      return exp2(_mm512_fmadd_ps(below, _mm512_set1_ps(factor), _mm512_set1_ps(LOG2_255)));
    };
    int64_t n = 0;
    for (; n + 4 * LANES <= seen; n += 4 * LANES) {
      __m512i part[4];
      each<4>([&](auto i) DQ_INLINE { part[i] = _mm512_cvtps_epi32(power(n + i * LANES)); });
      const __m512i together = in_bytes(part);
      sum = _mm512_add_epi64(sum, _mm512_sad_epu8(together, _mm512_setzero_si512()));
      _mm512_storeu_si512(codes + n, together);
    }
    int64_t total = _mm512_reduce_add_epi64(sum);
    for (; n < keys; n += LANES) total += _mm512_reduce_add_epi32(store_codes(codes + n, power(n), first(seen - n)));
    return total;
  }

  // Four registers of numbers that fit a byte, as one.
  static __m512i in_bytes(const __m512i* part) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i low = _mm512_packus_epi32(part[0], part[1]), high = _mm512_packus_epi32(part[2], part[3]);
    return _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high));
  }

  // The same where a mask is added to the scores; they become float32, times log2(e), on the way.
  int64_t masked_probabilities(int32_t* scores, const float* mask, int64_t seen, float factor, uint8_t* codes) const {
    float* shifted = reinterpret_cast<float*>(scores);
    const int64_t step = job.mask_stride[3];
    float largest = -INFINITY;
    for (int64_t n = 0; n < seen; n++) {
      shifted[n] = float(scores[n]) * factor + mask[n * step] * LOG2_E;
      largest = std::max(largest, shifted[n]);
    }
    __m512i sum = _mm512_setzero_si512();
    for (int64_t n = 0; n < keys; n += LANES) {
      const __mmask16 lanes = largest == -INFINITY ? 0 : first(seen - n);
      const __m512 below = _mm512_sub_ps(_mm512_maskz_loadu_ps(lanes, shifted + n), _mm512_set1_ps(largest));
      sum = _mm512_add_epi32(sum, store_codes(codes + n, exp2(_mm512_add_ps(below, _mm512_set1_ps(LOG2_255))), lanes));
    }
    return _mm512_reduce_add_epi32(sum);
  }

  static __m512i integers(const int32_t* x) { return _mm512_loadu_si512(x); }

  static __m512i store_codes(uint8_t* to, __m512 probabilities, __mmask16 lanes) {
    const __m512i codes = _mm512_maskz_cvtps_epi32(lanes, probabilities);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(codes));
    return codes;
  }

  struct Scratch {
    int32_t* scores;
    uint8_t *codes, *queries;
    std::vector<float> sums;  // [rows][D'], of products; for more keys than int32 holds
    std::vector<int64_t> totals;
  };

  // Stored codes of queries, side by side.
  template <class Source>
  void pack_queries(int64_t sample, int64_t h, int64_t start, int64_t count, uint8_t* to) const {
    const int64_t entry = sample * job.table_step, stride = job.query_stride[2];
    const Source codes_of(job.query_scale[entry], job.query_zero[entry], job);
    const auto* x = rows_of<typename Source::Element>(job.query, job.query_stride, sample, h) + start * stride;
    for (int64_t l = 0; l < count; l++, x += stride, to += channels) {
      if (start + l + AHEAD < job.queries) fetch(x + AHEAD * stride, job.channels);
      for (int64_t d = 0; d < channels; d += LANES) {
        const __m512i codes = codes_of(x + d, first(job.channels - d));
        store_bytes(to + d, _mm512_add_epi32(codes, _mm512_set1_epi32(OFFSET)), first(channels - d));
      }
    }
  }

  // Results of one query, or the codes of the next layer's input: `channel` is where they begin among its channels.
  void write(const float* results, int64_t at, int64_t channel) const {
    if (!job.next_factor) {
      by_lanes(job.value_channels, [&](int64_t d, __mmask16 lanes) DQ_INLINE {
        store(static_cast<float*>(job.output) + at + d, load(results + d, lanes), lanes);
      });
      return;
    }
    const Codes codes(job.next_low, job.next_high, *job.next_zero);
    by_lanes(job.value_channels, [&](int64_t d, __mmask16 lanes) DQ_INLINE {
      const __m512 factor = job.one_factor ? _mm512_set1_ps(*job.next_factor) : load(job.next_factor + channel + d, lanes);
      store_bytes(static_cast<uint8_t*>(job.output) + at + d, codes(_mm512_mul_ps(load(results + d, lanes), factor)), lanes);
    });
  }

  void attend(int64_t sample, int64_t h, int64_t start, Scratch& s) const {
    const int64_t entry = sample * job.table_step;
    const int64_t count = std::min(rows, job.queries - start);
    const Head from = head(sample * job.key_heads + h / (job.heads / job.key_heads));
    if (job.query_coded)
      pack_queries<Stored>(sample, h, start, count, s.queries);
    else
      pack_queries<Quantized>(sample, h, start, count, s.queries);
    multiply_rows(s.queries, channels, count, from.key, keys, channels / 4, 0, channels / 4,
                  [&](int64_t n) DQ_INLINE { return integers(from.shift + n); },
                  [&](int64_t l, int64_t n, __m512i sums) DQ_INLINE { _mm512_storeu_si512(s.scores + l * keys + n, sums); });
    const float factor = job.query_scale[entry] * job.key_scale[entry] * job.scale * LOG2_E;
    for (int64_t l = 0; l < count; l++) {
      int32_t* scores = s.scores + l * keys;
      const int64_t seen = job.causal ? std::min(job.keys, start + l + 1) : job.keys;
      const float* mask = job.mask == nullptr ? nullptr
                                              : job.mask + sample * job.mask_stride[0] + h * job.mask_stride[1] +
                                                    (start + l) * job.mask_stride[2];
      s.totals[l] = mask ? masked_probabilities(scores, mask, seen, factor, s.codes + l * keys)
                         : probabilities(scores, seen, factor, s.codes + l * keys);
    }
    std::fill(s.sums.begin(), s.sums.end(), 0.0f);
    for (int64_t n = 0; n < keys; n += LONGEST) {
      const int64_t part = std::min(LONGEST, keys - n);
      multiply_rows(s.codes + n, keys, count, from.value, width, keys / 4, n / 4, part / 4,
                    [](int64_t) DQ_INLINE { return _mm512_setzero_si512(); },
                    [&](int64_t l, int64_t d, __m512i sums) DQ_INLINE {
                      float* to = s.sums.data() + l * width + d;
                      _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), _mm512_cvtepi32_ps(sums)));
                    });
    }
    const float value_scale = job.value_scale[entry], zero = value_scale * float(job.value_zero[entry] - OFFSET);
    for (int64_t l = 0; l < count; l++) {
      const float factor = s.totals[l] ? value_scale / float(s.totals[l]) : 0.0f, less = s.totals[l] ? zero : 0.0f;
      float* y = s.sums.data() + l * width;
      for (int64_t d = 0; d < width; d++) y[d] = y[d] * factor - less;
      const int64_t* stride = job.output_stride;
      write(y, sample * stride[0] + h * stride[1] + (start + l) * stride[2], h * job.value_channels);
    }
  }

  bool run() const {
    std::atomic<bool> failed{false};
    const int64_t packed = job.samples * job.key_heads, blocks = (job.queries + rows - 1) / rows;
    const auto guarded = [&failed](auto&& part) {  // an exception must not leave a parallel region
      try {
        if (!failed) part();
      } catch (...) {
        failed = true;
      }
    };
#pragma omp parallel num_threads(job.threads)
    {
      const int64_t score_bytes = 4 * rows * keys;
      const auto own = allocate(score_bytes + rows * keys + rows * channels);
      std::vector<int8_t> row(round_up(channels, LANES));
      Scratch s{reinterpret_cast<int32_t*>(own.get()), own.get() + score_bytes,
                own.get() + score_bytes + rows * keys, std::vector<float>(rows * width), std::vector<int64_t>(rows)};
#pragma omp for
      for (int64_t i = 0; i < packed; i++)
        guarded([&] {
          pack(i / job.key_heads, i % job.key_heads, head(i), row.data());
        });
#pragma omp for
      for (int64_t i = 0; i < job.samples * job.heads * blocks; i++)
        guarded([&] { attend(i / blocks / job.heads, i / blocks % job.heads, i % blocks * rows, s); });
    }
    return !failed;
  }
};

}  // namespace

// Whether it has computed ``job.output``.
extern "C" int dq_attention(const Job* job) {
  try {
    return Attention(*job).run();
  } catch (...) {
    return 0;
  }
}
