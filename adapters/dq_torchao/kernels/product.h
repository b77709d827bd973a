// Products of unsigned and signed codes with int32 sums, on AVX512-VNNI.
//
// The right operand lies in panels of 64 columns, the last one of as many as there are, rounded up to 16: for each four
// rows of it, and each column, four bytes side by side, as the instruction takes them. A tile of six rows by 64 columns
// stays in registers from the first product to the last.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "avx512.h"

constexpr int64_t TILE_ROWS = 6, TILE_REGISTERS = 4, PANEL = TILE_REGISTERS * LANES;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// The instruction itself: for its intrinsic, g++ copies sums from register to register until they no longer fit.
inline DQ_INLINE void add_products(__m512i& sum, __m512i unsigned_codes, __m512i signed_codes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_codes), "v"(signed_codes));
}

// f(0), f(1), ... f(N - 1), of constants.
template <int... I, class F>
inline DQ_INLINE void each(std::integer_sequence<int, I...>, const F& f) {
  (f(std::integral_constant<int, I>()), ...);
}
template <int N, class F>
inline DQ_INLINE void each(const F& f) {
  each(std::make_integer_sequence<int, N>(), f);
}

// A tile: rows at `rows[i] + taps[t]`, of `words` times four codes each, by a panel, one tap after the other. Sums begin
// as `start(j)` and go to `finish(i, j, sum)`, i a row and j a register of columns. Every index of a sum is a constant,
// which is what keeps them in registers.
template <int ROWS, int REGISTERS, class Start, class Finish>
inline DQ_INLINE void multiply_tile(const uint8_t* const* rows, const int64_t* taps, int64_t tap_count, int64_t words,
                                    const int8_t* panel, const Start& start, const Finish& finish) {
  __m512i sums[ROWS][REGISTERS];
  each<ROWS>([&](auto i) DQ_INLINE { each<REGISTERS>([&](auto j) DQ_INLINE { sums[i][j] = start(j); }); });
  for (int64_t t = 0; t < tap_count; t++) {
    const uint8_t* a[ROWS];
    each<ROWS>([&](auto i) DQ_INLINE { a[i] = rows[i] + taps[t]; });
    for (int64_t k = 0; k < words; k++, panel += REGISTERS * 64) {
      __m512i right[REGISTERS];
      each<REGISTERS>([&](auto j) DQ_INLINE {
        right[j] = _mm512_loadu_si512(panel + j * 64);
        asm("" : "+v"(right[j]));  // or g++ loads it again for every row
      });
      each<ROWS>([&](auto i) DQ_INLINE {
        int32_t word;
        __builtin_memcpy(&word, a[i] + 4 * k, 4);
        const __m512i left = _mm512_set1_epi32(word);
        each<REGISTERS>([&](auto j) DQ_INLINE { add_products(sums[i][j], left, right[j]); });
      });
    }
  }
  each<ROWS>([&](auto i) DQ_INLINE { each<REGISTERS>([&](auto j) DQ_INLINE { finish(i, j, sums[i][j]); }); });
}

// Rows `stride` bytes apart by a matrix in panels that are `depth` words deep, of which `words` count from `first_word`
// on. `columns` is a multiple of 16; sums begin as `start(column)` and go to `finish(row, column, sums)`, 16 at a time.
template <class Start, class Finish>
inline void multiply_rows(const uint8_t* a, int64_t stride, int64_t rows, const int8_t* panels, int64_t columns,
                          int64_t depth, int64_t first_word, int64_t words, const Start& start, const Finish& finish) {
  const int64_t no_tap = 0;
  for (int64_t column = 0; column < columns; column += PANEL) {
    const int64_t width = std::min(PANEL, columns - column);
    const int8_t* panel = panels + (column * depth + first_word * width) * 4;
    const auto by_panel = [&](auto registers) {
      constexpr int REGISTERS = decltype(registers)::value;
      const auto tile = [&](auto count, int64_t row) DQ_INLINE {
        constexpr int ROWS = decltype(count)::value;
        const uint8_t* at[ROWS];
        for (int i = 0; i < ROWS; i++) at[i] = a + (row + i) * stride;
        multiply_tile<ROWS, REGISTERS>(
            at, &no_tap, 1, words, panel, [&](int j) DQ_INLINE { return start(column + j * LANES); },
            [&](int i, int j, __m512i sums) DQ_INLINE { finish(row + i, column + j * LANES, sums); });
      };
      int64_t row = 0;
      for (; row + TILE_ROWS <= rows; row += TILE_ROWS) tile(std::integral_constant<int, TILE_ROWS>(), row);
      switch (rows - row) {
        case 5: return tile(std::integral_constant<int, 5>(), row);
        case 4: return tile(std::integral_constant<int, 4>(), row);
        case 3: return tile(std::integral_constant<int, 3>(), row);
        case 2: return tile(std::integral_constant<int, 2>(), row);
        case 1: return tile(std::integral_constant<int, 1>(), row);
      }
    };
    switch (width / LANES) {
      case 1: by_panel(std::integral_constant<int, 1>()); break;
      case 2: by_panel(std::integral_constant<int, 2>()); break;
      case 3: by_panel(std::integral_constant<int, 3>()); break;
      default: by_panel(std::integral_constant<int, 4>());
    }
  }
}
