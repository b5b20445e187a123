// Vectors of logits: reading, writing, and powers of two.

#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/bit_cast.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>

namespace {

using Floats = at::vec::Vectorized<float>;
using Ints = at::vec::Vectorized<int32_t>;

constexpr int64_t LANES = Floats::size();
constexpr int64_t WIDTH = 2 * LANES;  // a vector of 16-bit numbers gives two vectors of float
constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();

struct Pair {
  Floats a, b;
};

// WIDTH columns from x on, in an order that `write` undoes: with AVX-512 one vector has the even columns of bfloat16 and the other the
// odd ones, each a single instruction away.
template <typename T>
Pair read(const T* x) {
  if constexpr (std::is_same_v<T, float>) {
    return {Floats::loadu(x), Floats::loadu(x + Floats::size())};
#ifdef CPU_CAPABILITY_AVX512
  } else if constexpr (std::is_same_v<T, c10::BFloat16>) {
    const __m512i both = _mm512_loadu_si512(x);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(0xffff0000)))};
#endif
  } else {
    const auto [a, b] = at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(x));
    return {a, b};
  }
}

// No NaN but the processor's own, whose payload rounding leaves alone.
template <typename T>
void write(T* x, Pair values) {
  if constexpr (std::is_same_v<T, float>) {
    values.a.store(x);
    values.b.store(x + Floats::size());
#ifdef CPU_CAPABILITY_AVX512
  } else if constexpr (std::is_same_v<T, c10::BFloat16>) {
    const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(0xffff0000);
    const __m512i even = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(values.a), half), 16);
    const __m512i odd = _mm512_add_epi32(_mm512_castps_si512(values.b), half);
    _mm512_storeu_si512(x, _mm512_ternarylogic_epi32(odd, upper, even, 0xEA));  // (odd & upper) | even
#endif
  } else {
    at::vec::convert_from_float<T>(values.a, values.b).store(x);
  }
}

// Zeros, past the caches where they are `streamed`: else memory is read before it is overwritten. `end_of_streams` makes them seen.
template <typename T>
void fill(T* to, int64_t columns, bool streamed) {
#ifdef __SSE2__
  if (streamed) {
    int64_t i = 0;
    for (; i < columns && reinterpret_cast<uintptr_t>(to + i) % 64; ++i) to[i] = 0;
    constexpr int64_t STEP = 16 / sizeof(T);
    for (; i + STEP <= columns; i += STEP) _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_setzero_si128());
    std::fill(to + i, to + columns, static_cast<T>(0.f));
    return;
  }
#endif
  std::memset(static_cast<void*>(to), 0, columns * sizeof(T));
}

inline void end_of_streams() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

// Calls body(values, column of the first) for all columns but those that end within a vector: tail(values, column), where the rest
// of the vector is -inf.
template <typename T, typename Body, typename Tail>
void for_each(const T* x, int64_t columns, const Body& body, const Tail& tail) {
  int64_t i = 0;
  for (; i + WIDTH <= columns; i += WIDTH) body(read(x + i), i);
  if (i < columns) {
    T rest[WIDTH];
    at::vec::Vectorized<T>(static_cast<T>(-INF)).store(rest);
    if constexpr (sizeof(T) == 4) Floats(-INF).store(rest + LANES);
    std::memcpy(static_cast<void*>(rest), x + i, (columns - i) * sizeof(T));
    tail(read(rest), i);
  }
}

// Makes rows of the columns of a square, of as many as there are lanes.
inline void transpose(float* square) {
  Floats rows[LANES], next[LANES];
  for (int64_t i = 0; i < LANES; ++i) rows[i] = Floats::loadu(square + i * LANES);
  for (int64_t moved = 1; moved < LANES; moved *= 2) {  // a bit of the row's number to the column's, and one of that to this
    for (int64_t i = 0; i < LANES / 2; ++i)
      std::tie(next[2 * i], next[2 * i + 1]) = at::vec::interleave2(rows[i], rows[LANES / 2 + i]);
    for (int64_t i = 0; i < LANES; ++i) rows[i] = next[i];
  }
  for (int64_t i = 0; i < LANES; ++i) rows[i].store(square + i * LANES);
}

// The larger of both; NaN where x is NaN.
Floats larger(Floats x, Floats bound) { return at::vec::clamp_min(x, bound); }

float sum(Floats v) {
  return at::vec::vec_reduce_all<float>([](Floats a, Floats b) { return a + b; }, v);
}

struct Extent {
  float max, min;  // either may be NaN where a logit is
};

// Of bits instead of numbers: twice as many fit a vector, and only the sign has to be minded. As signed integers the numbers above 0 are
// in order and above all others; as unsigned ones those below 0 are above all others, and in reverse order.
template <typename T>
Extent extent(const T* x, int64_t columns) {
  using Signed = std::conditional_t<sizeof(T) == 4, int32_t, int16_t>;
  using Unsigned = std::make_unsigned_t<Signed>;
  typedef Signed __attribute__((may_alias)) Bits;
  const Bits* bits = reinterpret_cast<const Bits*>(x);
  Signed above = std::numeric_limits<Signed>::min();
  Unsigned below = 0;
  for (int64_t i = 0; i < columns; ++i) {
    above = std::max<Signed>(above, bits[i]);
    below = std::max<Unsigned>(below, static_cast<Unsigned>(bits[i]));
  }
  Unsigned max = static_cast<Unsigned>(above), min = below;
  if (above < 0 || static_cast<Signed>(below) >= 0) {  // all of one sign, as rows that are shifted
    Unsigned least = std::numeric_limits<Unsigned>::max();
    for (int64_t i = 0; i < columns; ++i) least = std::min<Unsigned>(least, static_cast<Unsigned>(bits[i]));
    (above < 0 ? max : min) = least;
  }
  return {static_cast<float>(c10::bit_cast<T>(max)), static_cast<float>(c10::bit_cast<T>(min))};
}

// 2 ** (x c - offset), as a product of two, for exponents from -120 to 120. Exact where x c - offset = 0, NaN for NaN.
//
// An addend leaves the exponent in units of GRAIN in the lowest bits, which become the power; what the rounding left is for a
// polynomial. The addend counts the offset, so that the product x c is rounded but once, with the offset.
struct Powers {
  struct Product {
    Floats power, rest;
  };

#ifdef CPU_CAPABILITY_AVX512
  // A table of 32 powers in two registers leaves |f| <= 1/64, for which 2 ** f = SCALE ((f + SHIFT) ** 2 + B) up to 2.2e-7; SHIFT is a
  // multiple of GRAIN, so that adding it costs nothing, and SCALE is in the table, whose entries lack the bits that their index adds.
  static constexpr float GRAIN = 1.f / 32, SHIFT = 1.4375f, B = 2.0812616f, SCALE = 0.24109934f;

  Powers(Floats c, Floats offset)
      : c_(c), addend_(Floats(1.5f * (1 << 18)) - offset), shifted_(addend_ + Floats(SHIFT)),
        low_(_mm512_load_ps(table())), high_(_mm512_load_ps(table() + 16)) {}

  Product operator()(Floats x) const {
    const Floats sum = at::vec::fmadd(x, c_, addend_), rest = at::vec::fmsub(x, c_, sum - shifted_);
    const __m512i bits = _mm512_castps_si512(sum);
    const __m512i entry = _mm512_castps_si512(_mm512_permutex2var_ps(low_, bits, high_));
    return {_mm512_castsi512_ps(_mm512_add_epi32(entry, _mm512_slli_epi32(bits, 18))), at::vec::fmadd(rest, rest, Floats(B))};
  }

 private:
  static const float* table() {
    alignas(64) static const std::array<float, 32> entries = [] {
      std::array<float, 32> of;
      for (int32_t j = 0; j < 32; ++j)
        of[j] = c10::bit_cast<float>(c10::bit_cast<int32_t>(static_cast<float>(SCALE * std::exp2(j / 32.))) - (j << 18));
      return of;
    }();
    return entries.data();
  }

  Floats c_, addend_, shifted_;
  __m512 low_, high_;
#else
  // For |f| <= 1/2 the polynomial of degree 5 with the least relative error, 9e-8, found by iterated weighted least squares.
  static constexpr float GRAIN = 1;

  Powers(Floats c, Floats offset) : c_(c), addend_(Floats(1.5f * (1 << 23) + 127 /* the bias of exponents */) - offset) {}

  Product operator()(Floats x) const {
    const Floats sum = at::vec::fmadd(x, c_, addend_), f = at::vec::fmsub(x, c_, sum - addend_);
    Floats p = at::vec::fmadd(f, Floats(1.3264727e-3f), Floats(9.6715130e-3f));
    p = at::vec::fmadd(p, f, Floats(5.5507336e-2f));
    p = at::vec::fmadd(p, f, Floats(2.4022242e-1f));
    p = at::vec::fmadd(p, f, Floats(6.9314700e-1f));
    return {at::vec::cast<float>(at::vec::cast<int32_t>(sum) << Ints(23)), at::vec::fmadd(p, f, Floats(1.f))};
  }

 private:
  Floats c_, addend_;
#endif
};

// `values` where x > bound, else 0.
Floats where_above(Floats x, Floats bound, Floats values) {
#ifdef CPU_CAPABILITY_AVX512
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, bound, _CMP_GT_OQ), values);
#else
  return Floats::blendv(Floats(0.f), values, x > bound);
#endif
}

// The nearest number that `Powers` takes for an offset.
inline float rounded_offset(float bits) { return std::nearbyint(bits / Powers::GRAIN) * Powers::GRAIN; }

}  // namespace
