// Products of unsigned and signed codes with int32 sums, on AVX512-VNNI.
//
// The right operand lies in panels of 64 columns, the last one of as many as there are, rounded up to 16: for each four
// rows of it, and each column, four bytes side by side, as the instruction takes them. A tile of six rows by 64 columns
// stays in registers from the first product to the last.
#pragma once

#include <type_traits>

#include "avx512.h"

#define DQ_INLINE __attribute__((always_inline))

constexpr int64_t TILE_ROWS = 6, TILE_REGISTERS = 4, PANEL = TILE_REGISTERS * LANES;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// The instruction itself: for its intrinsic, g++ copies sums from register to register until they no longer fit.
inline DQ_INLINE void add_products(__m512i& sum, __m512i unsigned_codes, __m512i signed_codes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_codes), "v"(signed_codes));
}

// A tile: rows at `rows[i] + taps[t]`, of `words` times four codes each, by a panel, one tap after the other. Sums begin
// as `start(j)` and go to `finish(i, j, sum)`, i a row and j a register of columns. Every loop over sums is unrolled,
// which is what keeps them in registers.
template <int ROWS, int REGISTERS, class Start, class Finish>
inline DQ_INLINE void multiply_tile(const uint8_t* const* rows, const int64_t* taps, int64_t tap_count, int64_t words,
                                    const int8_t* panel, const Start& start, const Finish& finish) {
  __m512i sums[ROWS][REGISTERS];
#pragma GCC unroll 6
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
    for (int j = 0; j < REGISTERS; j++) sums[i][j] = start(j);
  for (int64_t t = 0; t < tap_count; t++) {
    const uint8_t* a[ROWS];
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++) a[i] = rows[i] + taps[t];
    for (int64_t k = 0; k < words; k++, panel += REGISTERS * 64) {
      __m512i right[REGISTERS];
#pragma GCC unroll 4
      for (int j = 0; j < REGISTERS; j++) right[j] = _mm512_loadu_si512(panel + j * 64);
#pragma GCC unroll 6
      for (int i = 0; i < ROWS; i++) {
        int32_t word;
        __builtin_memcpy(&word, a[i] + 4 * k, 4);
        const __m512i left = _mm512_set1_epi32(word);
#pragma GCC unroll 4
        for (int j = 0; j < REGISTERS; j++) add_products(sums[i][j], left, right[j]);
      }
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
    for (int j = 0; j < REGISTERS; j++) finish(i, j, sums[i][j]);
}
