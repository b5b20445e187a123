// Log-probabilities, entropy and their gradient on a CPU. The logits are read once forward and once backward.
//
// N rows, V vocabulary, K labels a row. A tile is a stretch of a row that fits the first-level cache. Tiles, not rows, are shared out
// among the threads, so that one long row keeps all of them busy; and as the sums of a tile know nothing of other rows, a row has
// the same bits whatever rows it came with. Exponentials are powers of two: with c = log2(e) / temperature,
// exp((x - m) / temperature) = 2 ** ((x - m) c).

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <omp.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace {

using Floats = at::vec::Vectorized<float>;
using Ints = at::vec::Vectorized<int32_t>;

constexpr int64_t WIDTH = 2 * Floats::size();  // a vector of 16-bit numbers gives two vectors of float
constexpr int64_t TILE = 4096;
constexpr int64_t SAMPLE = 512;  // columns of a tile, whose maximum is the reference of its exponentials
constexpr float HEADROOM = 8;    // how far, in powers of two, the reference may lie below the maximum: an exponent's error grows with it
constexpr float LEAST = -127;    // an exponent whose bits are those of 0: a power that is bounded by it is 0
constexpr float LOG2_E = 1.44269504088896341f;
constexpr float LN_2 = 0.693147180559945309f;
constexpr float INF = std::numeric_limits<float>::infinity();
constexpr int64_t LARGE = 32 << 20;  // bytes from which on an allocation has pages of its own

struct Pair {
  Floats low, high;
};

template <typename T>
Pair read(const T* x) {
  if constexpr (std::is_same_v<T, float>) {
    return {Floats::loadu(x), Floats::loadu(x + Floats::size())};
  } else {
    const auto [low, high] = at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(x));
    return {low, high};
  }
}

template <typename T>
void write(T* x, Pair values) {
  if constexpr (std::is_same_v<T, float>) {
    values.low.store(x);
    values.high.store(x + Floats::size());
  } else {
    at::vec::convert_from_float<T>(values.low, values.high).store(x);
  }
}

// Calls body(values, column of the first) for all columns; where they end within a vector, the rest of it is -inf.
template <typename T, typename Body>
void for_each(const T* x, int64_t columns, const Body& body) {
  int64_t i = 0;
  for (; i + WIDTH <= columns; i += WIDTH) body(read(x + i), i);
  if (i < columns) {
    T rest[WIDTH];
    std::fill(std::copy(x + i, x + columns, rest), rest + WIDTH, static_cast<T>(-INF));
    body(read(rest), i);
  }
}

// The larger of both; NaN, or `bound`, where x is NaN.
Floats larger(Floats x, Floats bound) { return at::vec::clamp_min(x, bound); }

float largest(Floats v) {
  return at::vec::vec_reduce_all<float>([](Floats a, Floats b) { return larger(a, b); }, v);
}

float sum(Floats v) {
  return at::vec::vec_reduce_all<float>([](Floats a, Floats b) { return a + b; }, v);
}

// 2 ** u for LEAST < u < 128, 0 for LEAST, and NaN for NaN. The integer part of u becomes the exponent; for the rest, in [-0.5, 0.5], the
// polynomial of degree 5 with the least relative error, 9e-8, found by iterated weighted least squares.
Floats exp2(Floats u) {
  const Floats shift(1.5f * (1 << 23) + 127);  // an addend that leaves the integer, and the bias of exponents, in the lowest bits
  const Floats shifted = u + shift;
  const Floats rest = u - (shifted - shift);
  const Floats power = at::vec::cast<float>(at::vec::cast<int32_t>(shifted) << Ints(23));
  Floats p = at::vec::fmadd(rest, Floats(1.3264727e-3f), Floats(9.6715130e-3f));
  p = at::vec::fmadd(p, rest, Floats(5.5507336e-2f));
  p = at::vec::fmadd(p, rest, Floats(2.4022242e-1f));
  p = at::vec::fmadd(p, rest, Floats(6.9314700e-1f));
  p = at::vec::fmadd(p, rest, Floats(1.0f));
  return p * power;
}

// What the rows are; mirrored by `_Rows` in cpp.py.
struct Rows {
  int64_t n, vocab, labels_per_row;
  int64_t stride;          // from row to row, in elements
  const int64_t* offsets;  // or that of each row, where one stride does not say it; else null
  const int64_t* labels;   // [N, K]
  const float* temperatures;  // [N], or null
  float temperature;
  int64_t threads;

  int64_t tiles() const { return (vocab + TILE - 1) / TILE; }
  int64_t offset(int64_t row) const { return offsets ? offsets[row] : row * stride; }
  float t(int64_t row) const { return temperatures ? temperatures[row] : temperature; }
  float c(int64_t row) const { return LOG2_E / t(row); }
};

// Calls body(item) for the items that the calling thread gets. torch counts on teams of one size, so spare threads sit by.
template <typename Body>
void share(int64_t items, int64_t threads, const Body& body) {
  const int64_t team = std::min<int64_t>(omp_get_num_threads(), threads), me = omp_get_thread_num();
  if (me >= team) return;
  for (int64_t i = items * me / team; i < items * (me + 1) / team; ++i) body(i);
}

// What is known of a tile, with u = (x - reference) c; mirrored by PARTIAL_FLOATS in cpp.py.
struct Partial {
  float max, reference, sum /* of 2 ** u */, weighted /* of u 2 ** u */;
};

template <bool ENTROPY, typename T>
Partial sums(const T* x, int64_t columns, float c, float reference) {
  Floats max_low(-INF), max_high(-INF), sum_low(0.f), sum_high(0.f), weighted_low(0.f), weighted_high(0.f);
  for_each(x, columns, [&](Pair v, int64_t) {
    max_low = larger(v.low, max_low);
    max_high = larger(v.high, max_high);
    // Bounded, so that a masked logit adds 0 to either sum, and not 0 times infinity.
    const Floats u_low = larger((v.low - Floats(reference)) * Floats(c), Floats(LEAST));
    const Floats u_high = larger((v.high - Floats(reference)) * Floats(c), Floats(LEAST));
    const Floats e_low = exp2(u_low), e_high = exp2(u_high);
    sum_low = sum_low + e_low;
    sum_high = sum_high + e_high;
    if constexpr (ENTROPY) {
      weighted_low = at::vec::fmadd(e_low, u_low, weighted_low);
      weighted_high = at::vec::fmadd(e_high, u_high, weighted_high);
    }
  });
  return {largest(larger(max_low, max_high)), reference, sum(sum_low + sum_high),
          ENTROPY ? sum(weighted_low + weighted_high) : 0.f};
}

// One pass over memory: exponentials are held against the maximum of a sample, and computed anew, from the cache, where that is too
// low to serve. A NaN makes the sums NaN whatever the reference.
template <bool ENTROPY, typename T>
Partial reduce(const T* x, int64_t columns, float c) {
  Floats max(-INF);
  for_each(x, std::min(columns, SAMPLE), [&](Pair v, int64_t) { max = larger(v.high, larger(v.low, max)); });
  const float sample = largest(max);
  const Partial first = sums<ENTROPY>(x, columns, c, sample == -INF ? 0.f : sample);
  if (first.max == -INF) return {-INF, -INF, 0 * first.sum, 0};  // all of the tile is masked, or NaN
  if (sample != -INF && (first.max - sample) * c <= HEADROOM) return first;
  return sums<ENTROPY>(x, columns, c, first.max);
}

template <bool ENTROPY, typename T>
void forward(const T* logits, const Rows& rows, Partial* partials, float* log_probs, float* m, float* log_s, float* entropy) {
  const int64_t tiles = rows.tiles(), K = rows.labels_per_row;
#pragma omp parallel if (rows.threads > 1)
  {
    share(rows.n * tiles, rows.threads, [&](int64_t i) {
      const int64_t row = i / tiles, start = i % tiles * TILE;
      partials[i] = reduce<ENTROPY>(logits + rows.offset(row) + start, std::min(TILE, rows.vocab - start), rows.c(row));
    });
#pragma omp barrier
    share(rows.n, rows.threads, [&](int64_t row) {
      const Partial* own = partials + row * tiles;
      const float c = rows.c(row);
      float max = -INF, sum = 0, weighted = 0;
      for (int64_t i = 0; i < tiles; ++i) max = own[i].max > max ? own[i].max : max;
      for (int64_t i = 0; i < tiles; ++i) {
        if (own[i].sum == 0) continue;
        const float u = (own[i].reference - max) * c;
        const float bounded = u < LEAST ? LEAST : u, e = u < LEAST ? 0 : std::exp2(u);
        sum += own[i].sum * e;
        weighted += (own[i].weighted + own[i].sum * bounded) * e;
      }
      m[row] = max;
      log_s[row] = std::log(sum);
      if constexpr (ENTROPY) entropy[row] = log_s[row] - LN_2 * weighted / sum;
      const T* x = logits + rows.offset(row);
      for (int64_t k = row * K; k < (row + 1) * K; ++k)
        log_probs[k] = (static_cast<float>(x[rows.labels[k]]) - max) / rows.t(row) - log_s[row];
    });
  }
}

// What forward left of the rows, and the gradients that come from above; mirrored by `_Upstream` in cpp.py.
struct Upstream {
  const float *m, *log_s, *entropy;  // [N]; entropy may be null where grad_entropy is
  const bool* ignored;               // [N]
  const float* grad_log_probs;       // [N, K]
  const float* grad_entropy;         // [N], or null
};

// The gradient of a row at logits x; `own` is that of the label there, if one is.
template <bool ENTROPY>
struct Gradient {
  float m, log2_s, c, inverse_t, total, grad_entropy, entropy;

  Floats operator()(Floats x, Floats own = Floats(0.f)) const {
    const Floats log2_p = at::vec::fmsub(x - Floats(m), Floats(c), Floats(log2_s));
    const Floats bounded = larger(log2_p, Floats(LEAST)), p = exp2(bounded);
    Floats weight(total);
    if constexpr (ENTROPY)
      weight = at::vec::fmadd(Floats(grad_entropy), at::vec::fmadd(bounded, Floats(LN_2), Floats(entropy)), weight);
    return (own - p * weight) * Floats(inverse_t);
  }

  float at_label(float x, float own) const {
    float values[Floats::size()];
    (*this)(Floats(x), Floats(own)).store(values);
    return values[0];
  }
};

template <bool ENTROPY, typename T>
void backward(const T* logits, const Rows& rows, const Upstream& upstream, T* gradient, T* at_labels, bool inplace) {
  const int64_t tiles = rows.tiles(), K = rows.labels_per_row;
#pragma omp parallel if (rows.threads > 1)
  share(rows.n * tiles, rows.threads, [&](int64_t i) {
    const int64_t row = i / tiles, start = i % tiles * TILE, end = std::min(start + TILE, rows.vocab);
    const T* x = logits + rows.offset(row);
    T* out = gradient + (inplace ? rows.offset(row) : row * rows.vocab);
    if (upstream.ignored[row]) {
      std::fill(out + start, out + end, static_cast<T>(0.f));
      return;
    }
    const int64_t* labels = rows.labels + row * K;
    const float* g = upstream.grad_log_probs + row * K;
    float total = 0;
    for (int64_t k = 0; k < K; ++k) total += g[k];
    const float inverse_t = 1 / rows.t(row);
    const Gradient<ENTROPY> at{upstream.m[row], upstream.log_s[row] * LOG2_E, rows.c(row), inverse_t, total,
                               ENTROPY ? upstream.grad_entropy[row] : 0.f, ENTROPY ? upstream.entropy[row] : 0.f};
    // In place, the logits at the labels have to be read before they are overwritten.
    for (int64_t k = 0; k < K; ++k) {
      if (labels[k] < start || labels[k] >= end) continue;
      float own = 0;  // a repeated label gets the sum of its gradients, each time
      for (int64_t j = 0; j < K; ++j) own += labels[j] == labels[k] ? g[j] : 0.f;
      at_labels[row * K + k] = static_cast<T>(at.at_label(static_cast<float>(x[labels[k]]), own));
    }
    for_each(x + start, end - start, [&](Pair v, int64_t column) {
      const Pair result{at(v.low), at(v.high)};
      T* target = out + start + column;
      if (target + WIDTH <= out + end) return write(target, result);
      T rest[WIDTH];
      write(rest, result);
      std::copy(rest, rest + (out + end - target), target);
    });
    for (int64_t k = 0; k < K; ++k)
      if (labels[k] >= start && labels[k] < end) out[labels[k]] = at_labels[row * K + k];
  });
}

// A new gradient is written to memory that the system has yet to provide, which in pages of 4 KiB takes longer than the computation.
void ask_for_huge_pages(void* memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  if (bytes < LARGE) return;
  const uintptr_t page = sysconf(_SC_PAGESIZE), address = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (address + page - 1) / page * page;
  madvise(reinterpret_cast<void*>(first), bytes - (first - address), MADV_HUGEPAGE);
#endif
}

// Calls body with a null pointer of the type that `dtype` stands for, as DTYPES in cpp.py has it.
template <typename Body>
void with_type(int32_t dtype, const Body& body) {
  if (dtype == 0) body(static_cast<float*>(nullptr));
  if (dtype == 1) body(static_cast<c10::BFloat16*>(nullptr));
  if (dtype == 2) body(static_cast<c10::Half*>(nullptr));
}

}  // namespace

extern "C" {

extern const int64_t tile = TILE;

// partials [N, tiles a row]; log_probs [N, K]; m, log_s and entropy, which may be null, [N].
void log_probs_forward(int32_t dtype, const void* logits, const Rows* rows, Partial* partials, float* log_probs, float* m,
                       float* log_s, float* entropy) {
  with_type(dtype, [&]<typename T>(T*) {
    const T* x = static_cast<const T*>(logits);
    if (entropy) {
      forward<true>(x, *rows, partials, log_probs, m, log_s, entropy);
    } else {
      forward<false>(x, *rows, partials, log_probs, m, log_s, entropy);
    }
  });
}

// gradient [N, V], contiguous unless it is `logits`; at_labels [N, K] is scratch memory. Both in the dtype of the logits.
void log_probs_backward(int32_t dtype, const void* logits, const Rows* rows, const Upstream* upstream, void* gradient,
                        void* at_labels) {
  const bool inplace = gradient == logits;
  with_type(dtype, [&]<typename T>(T*) {
    const T* x = static_cast<const T*>(logits);
    if (!inplace) ask_for_huge_pages(gradient, rows->n * rows->vocab * static_cast<int64_t>(sizeof(T)));
    if (upstream->grad_entropy) {
      backward<true>(x, *rows, *upstream, static_cast<T*>(gradient), static_cast<T*>(at_labels), inplace);
    } else {
      backward<false>(x, *rows, *upstream, static_cast<T*>(gradient), static_cast<T*>(at_labels), inplace);
    }
  });
}
}
