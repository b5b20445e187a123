// Log-probabilities, what else a row tells, and the gradient, on a CPU: the whole contract, with finished numbers. Logits are read once
// forward and once backward; rows that are ignored are not read at all.
//
// N rows, V vocabulary, K labels a row. A tile is a stretch of a row that fits the first-level cache. Tiles, not rows, are shared out
// among the threads, so that one long row keeps all of them busy; and as the sums of a tile know nothing of other rows, a row has
// the same bits whatever rows it came with. Exponentials are powers of two: with c = log2(e) / temperature,
// exp((x - m) / temperature) = 2 ** ((x - m) c).

#include "cpp_vectors.h"

#include <omp.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <memory>

namespace {

constexpr int64_t TILE = 4096;
constexpr int64_t BLOCK = 8 * WIDTH;  // columns that are summed by themselves: a lane adds few numbers, so that 1 swallows no tail
constexpr int64_t SHORT = 4 * WIDTH;  // columns for which it takes longer to ask for the faster way than to go the other
#if defined(CPU_CAPABILITY_DEFAULT) && !defined(__ARM_NEON)
constexpr float FAR = 0;  // products are rounded before they are added to
constexpr int64_t NARROW = WIDTH;
#else
constexpr int64_t NARROW = 128;  // columns below which one row a lane is faster than one after another
constexpr float FAR = 1e5f;  // in bits, from 0: from there on the sum of an exponent and an offset loses digits
#endif
constexpr float RANGE = 120;  // in bits, below the maximum: what `Powers` has, and more than a sum can tell
constexpr float RANGE_P = 90;  // of probabilities, backward: what lies below is nothing beside the row's others
constexpr int64_t FEW = 16;  // labels a row
constexpr float LOG2_E = 1.44269504088896341f;
constexpr float LN_2 = 0.693147180559945309f;
constexpr int64_t LARGE = 32 << 20;  // bytes of a gradient that no cache keeps, and that has pages of its own where it is new

// A call, as cpp.py packs it: whole numbers and pointers, null for what is not wanted or not there.
struct Call {
  int64_t dtype, threads, vocab, labels_per_row, label_bytes, ignore_index;
  double temperature;
  const float* temperatures;  // [N], instead of the one
  const void* logits;
  const void* labels;   // [N, K]
  float* stats;         // [2 or 3, N]: maximum, log of the sum, entropy
  float* log_probs;     // [N, K]; backward, their upstream
  float* entropy;       // [N]; backward, its upstream
  float* logsumexp;     // [N]; backward, its upstream
  int64_t* argmax;      // [N]
  float* sum_p_squared; // [N]
  void* gradient;       // [N, V] contiguous, or `logits`
  int64_t dimensions;   // leading ones of the logits
  int64_t sizes_and_strides[];  // of these

  int64_t n() const {
    int64_t n = 1;
    for (int64_t d = 0; d < dimensions; ++d) n *= sizes_and_strides[d];
    return n;
  }
  int64_t gradient_bytes() const { return n() * vocab * (dtype == 0 ? 4 : 2); }
  int64_t tiles() const { return (vocab + TILE - 1) / TILE; }
  int64_t label(int64_t i) const {
    return label_bytes == 4 ? static_cast<const int32_t*>(labels)[i] : static_cast<const int64_t*>(labels)[i];
  }
};

enum class Kind { COMPUTED, IGNORED, INVALID };

Kind kind_of(const Call& call, int64_t row, float t) {
  const int64_t K = call.labels_per_row;
  bool ignored = true, valid = true;
  for (int64_t k = row * K; k < (row + 1) * K; ++k) {
    const int64_t label = call.label(k);
    if (label == call.ignore_index) continue;
    ignored = false;
    valid &= label >= 0 && label < call.vocab;
  }
  valid &= t >= std::numeric_limits<float>::min() && t <= std::numeric_limits<float>::max();
  return ignored ? Kind::IGNORED : valid ? Kind::COMPUTED : Kind::INVALID;
}

struct Row {
  int64_t index, offset;  // where it begins, in elements
  Kind kind;
  float t, c;
};

// All rows of a call: first those that are computed, so that these can be shared out evenly.
struct Rows {
  explicit Rows(const Call& call) : n(call.n()), list(new Row[n]) {
    const int64_t D = call.dimensions, *sizes = call.sizes_and_strides, *strides = sizes + D;
    int64_t others = n;
    for (int64_t row = 0; row < n; ++row) {
      int64_t offset = 0, left = row;
      for (int64_t d = D - 1; d > 0; left /= sizes[d--]) offset += left % sizes[d] * strides[d];
      offset += left * strides[0];
      const float t = call.temperatures ? call.temperatures[row] : static_cast<float>(call.temperature);
      const Kind kind = kind_of(call, row, t);
      list[kind == Kind::COMPUTED ? computed++ : --others] = {row, offset, kind, t, LOG2_E / t};
    }
  }

  int64_t n, computed = 0;
  std::unique_ptr<Row[]> list;
};

// Calls body(row, tile) for the tiles that the calling thread gets. torch counts on teams of one size, so spare threads sit by.
template <typename Body>
void share(int64_t rows, int64_t tiles, int64_t threads, const Body& body) {
  const int64_t team = std::min<int64_t>(omp_get_num_threads(), threads), me = omp_get_thread_num(), items = rows * tiles;
  if (me >= team || items == 0) return;
  int64_t i = items * me / team, row = i / tiles, tile = i % tiles;
  for (; i < items * (me + 1) / team; ++i) {
    body(row, tile);
    if (++tile == tiles) ++row, tile = 0;
  }
}

// What is wanted beside the log-probabilities, each with all before it; the sums that all have in common do not depend on it.
enum Level { SUM, ENTROPY, SQUARES };

// The exponents of a tile, in bits: (x - reference) c - offset, and 0 instead of the power where x - reference is not above `least`.
struct Exponents {
  Floats c, reference, offset, least;
};

// By `bits` below x, but finite.
float below(float x, float bits, float c) { return std::max(x - bits / c, std::numeric_limits<float>::lowest()); }

template <Level LEVEL>
struct Sums {  // of e = 2 ** u, of u e, and of e ** 2
  Floats e{0.f}, weighted{0.f}, squares{0.f};

  template <bool SAFE>
  void add(Floats x, const Powers& powers, const Exponents& exponents) {
    Floats d = x;
    if constexpr (SAFE) d = larger(x - exponents.reference, exponents.least);
    auto [power, rest] = powers(d);
    if constexpr (SAFE) power = where_above(d, exponents.least, power);
    e = at::vec::fmadd(power, rest, e);
    if constexpr (LEVEL >= ENTROPY) {
      const Floats own = power * rest;
      weighted = at::vec::fmadd(own, at::vec::fmsub(d, exponents.c, exponents.offset), weighted);
      if constexpr (LEVEL >= SQUARES) squares = at::vec::fmadd(own, own, squares);
    }
  }

  void operator+=(const Sums& other) {
    e = e + other.e;
    weighted = weighted + other.weighted;
    squares = squares + other.squares;
  }
};

// What is known of a tile, with u = (x - max) c - excess: its sums are not quite relative to its maximum.
struct Partial {
  float max, excess, sum, weighted, squares;
};

template <Level LEVEL, bool SAFE, typename T>
Partial sums(const T* x, int64_t columns, float max, const Exponents& exponents) {
  const Powers powers(exponents.c, exponents.offset);
  Sums<LEVEL> a, b;
  for (int64_t start = 0; start < columns; start += BLOCK) {
    Sums<LEVEL> block_a, block_b;
    for_each(
        x + start, std::min(BLOCK, columns - start),
        [&](Pair v, int64_t i) {
          __builtin_prefetch(x + start + i + columns);
          if constexpr (sizeof(T) == 4) __builtin_prefetch(x + start + i + columns + Floats::size());
          block_a.template add<SAFE>(v.a, powers, exponents);
          block_b.template add<SAFE>(v.b, powers, exponents);
        },
        [&](Pair v, int64_t) {
          block_a.template add<true>(v.a, powers, exponents);
          block_b.template add<true>(v.b, powers, exponents);
        });
    a += block_a;
    b += block_b;
  }
  a += b;
  return {max, 0, sum(a.e), LEVEL >= ENTROPY ? sum(a.weighted) : 0, LEVEL >= SQUARES ? sum(a.squares) : 0};
}

// One pass over memory: the extent of the tile brings it into the cache, and tells whether all exponents are in reach of `Powers`.
template <Level LEVEL, typename T>
Partial reduce(const T* x, int64_t columns, float c) {
  const auto [max, min] = extent(x, columns);
  if (!(max < INF) || std::isnan(min)) return {max, 0, NOT_A_NUMBER, NOT_A_NUMBER, NOT_A_NUMBER};
  if (max == -INF) return {max, 0, 0, 0, 0};
  if (columns > SHORT && std::abs(max * c) < FAR && (max - min) * c < RANGE) {
    const float offset = rounded_offset(max * c);
    Partial partial = sums<LEVEL, false>(x, columns, max, {c, 0, offset, below(max, RANGE, c)});
    partial.excess = std::fma(-max, c, offset);
    return partial;
  }
  return sums<LEVEL, true>(x, columns, max, {c, max, 0, below(0, RANGE, c)});
}

// Of up to as many rows as there are lanes, `count`: one row a lane, since with few columns it takes longer to add lanes up, and to see
// to what is left of a vector, than to compute.
template <Level LEVEL, typename T>
void reduce_narrow(const Call& call, const Row* rows, int64_t count, Partial* partials) {
  alignas(64) float x[NARROW * LANES], c[LANES], lanes[LANES];
  const int64_t columns = (call.vocab + WIDTH - 1) / WIDTH * WIDTH;  // with -inf in those that there are not
  for (int64_t lane = 0; lane < LANES; ++lane) {
    const Row& row = rows[std::min(lane, count - 1)];
    const auto lay = [&](Pair v, int64_t column) {
      v.a.store(x + (column + lane) * LANES);
      v.b.store(x + (column + LANES + lane) * LANES);
    };
    for_each(static_cast<const T*>(call.logits) + row.offset, call.vocab, lay, lay);
    c[lane] = row.c;
  }
  for (int64_t v = 0; v < columns; v += LANES) transpose(x + v * LANES);
  const auto at = [&](int64_t v) { return Floats::loadu(x + v * LANES); };
  Floats max(-INF);  // a NaN may get lost here, but not in the sum
  for (int64_t v = 0; v < columns; v += 4) max = larger(larger(larger(at(v), at(v + 1)), larger(at(v + 2), at(v + 3))), max);
  const Floats C = Floats::loadu(c);
  const Floats reference = Floats::blendv(max, Floats(0.f), max == Floats(-INF));
  const Exponents exponents{C, reference, 0, larger(Floats(-RANGE) / C, Floats(std::numeric_limits<float>::lowest()))};
  const Powers powers(C, Floats(0.f));
  Sums<LEVEL> sums[4];
  for (int64_t v = 0; v < columns; v += 4)
    for (int64_t j = 0; j < 4; ++j) sums[j].template add<true>(at(v + j), powers, exponents);
  sums[0] += sums[1];
  sums[2] += sums[3];
  sums[0] += sums[2];
  const auto keep = [&](Floats values, float Partial::*field) {
    values.store(lanes);
    for (int64_t lane = 0; lane < count; ++lane) partials[lane].*field = lanes[lane];
  };
  keep(max, &Partial::max);
  keep(Floats(0.f), &Partial::excess);
  keep(sums[0].e, &Partial::sum);
  if constexpr (LEVEL >= ENTROPY) keep(sums[0].weighted, &Partial::weighted);
  if constexpr (LEVEL >= SQUARES) keep(sums[0].squares, &Partial::squares);
}

template <typename T>
int64_t first_maximum(const T* x, int64_t vocab, const Partial* tiles, float max) {
  int64_t start = 0;
  for (; tiles->max != max; ++tiles) start += TILE;
  const T* end = x + std::min(start + TILE, vocab);
  return std::find_if(x + start, end, [max](T value) { return static_cast<float>(value) == max; }) - x;
}

// The finished numbers of a row.
template <Level LEVEL, typename T>
void finish(const Call& call, const Rows& rows, const Row& row, const Partial* of) {
  const int64_t i = row.index, K = call.labels_per_row;
  const float missing = row.kind == Kind::IGNORED ? 0.f : NOT_A_NUMBER;
  const T* x = static_cast<const T*>(call.logits) + row.offset;
  float max = -INF, log_s = missing, entropy = missing, logsumexp = missing, sum_p_squared = missing;
  int64_t argmax = -1;
  if (row.kind == Kind::COMPUTED) {
    const int64_t tiles = call.tiles();
    double sum = 0, weighted = 0, squares = 0;
    for (int64_t j = 0; j < tiles; ++j) max = std::max(max, of[j].max);
    for (int64_t j = 0; j < tiles; ++j) {
      const float u = max == -INF ? 0 : std::max((of[j].max - max) * row.c + of[j].excess, -2 * RANGE);
      const double e = u == 0 ? 1 : std::exp2(u);
      sum += of[j].sum * e;
      if constexpr (LEVEL >= ENTROPY) weighted += (of[j].weighted + static_cast<double>(of[j].sum) * u) * e;
      if constexpr (LEVEL >= SQUARES) squares += of[j].squares * e * e;
    }
    if (sum > 0) {  // else all is -inf, or something NaN
      log_s = std::log(static_cast<float>(sum));
      if (call.entropy) entropy = std::max(0., log_s - LN_2 * weighted / sum);
      if (call.logsumexp) logsumexp = max / row.t + log_s;
      if (call.sum_p_squared) sum_p_squared = squares / (sum * sum);
      if (call.argmax) argmax = first_maximum(x, call.vocab, of, max);
    } else if (std::isnan(sum)) {
      max = NOT_A_NUMBER;
    }
  }
  call.stats[i] = max;
  call.stats[rows.n + i] = log_s;
  if (call.entropy) call.stats[2 * rows.n + i] = call.entropy[i] = entropy;
  if (call.logsumexp) call.logsumexp[i] = logsumexp;
  if (call.argmax) call.argmax[i] = argmax;
  if (call.sum_p_squared) call.sum_p_squared[i] = sum_p_squared;
  for (int64_t k = i * K; k < (i + 1) * K; ++k) {
    const int64_t label = call.label(k);
    float log_p = missing;
    if (label == call.ignore_index) log_p = 0;
    else if (row.kind == Kind::COMPUTED) log_p = (static_cast<float>(x[label]) - max) / row.t - log_s;
    call.log_probs[k] = log_p > 0 ? 0 : log_p;
  }
}

template <Level LEVEL, typename T>
void forward(const Call& call) {
  const Rows rows(call);
  const int64_t tiles = call.tiles();
  const std::unique_ptr<Partial[]> partials(new Partial[rows.computed * tiles]);
  const bool narrow = call.vocab < NARROW;
#pragma omp parallel if (call.threads > 1)
  {
    if (narrow) share((rows.computed + LANES - 1) / LANES, 1, call.threads, [&](int64_t i, int64_t) {
      const int64_t first = i * LANES;
      reduce_narrow<LEVEL, T>(call, &rows.list[first], std::min(LANES, rows.computed - first), &partials[first]);
    });
    else share(rows.computed, tiles, call.threads, [&](int64_t i, int64_t tile) {
      const int64_t start = tile * TILE;
      const Row& row = rows.list[i];
      const T* x = static_cast<const T*>(call.logits) + row.offset + start;
      partials[i * tiles + tile] = reduce<LEVEL>(x, std::min(TILE, call.vocab - start), row.c);
    });
#pragma omp barrier
    share(rows.n, 1, call.threads, [&](int64_t i, int64_t) { finish<LEVEL, T>(call, rows, rows.list[i], &partials[i * tiles]); });
  }
}

// The gradient of a row at logits x, (own - p (total + h (log p + H))) / T; `own` is the upstream of the label there, if one is.
template <bool ENTROPY>
struct Gradient {
  Powers powers;  // p, but for a factor that is in `weight` and `slope`
  float m, c, offset, least, weight, slope, inverse_t;

  // `stats` are those of the row, n apart.
  Gradient(const Row& row, const float* stats, int64_t n, float total, float h)
      : Gradient(row, stats[0], stats[n] * static_cast<double>(LOG2_E), ENTROPY ? stats[2 * n] : 0.f, total, h) {}

  Gradient(const Row& row, float m, double log2_s, float entropy, float total, float h)
      : powers(row.c, rounded_offset(log2_s)), m(m), c(row.c), offset(rounded_offset(log2_s)), least(below(0, RANGE_P, row.c)),
        inverse_t(1 / row.t) {
    const float excess = offset - log2_s, factor = std::exp2(excess);
    weight = factor * (ENTROPY ? total + h * (entropy + LN_2 * excess) : total);
    slope = factor * h * LN_2;
  }

  Floats operator()(Floats x, Floats own = Floats(0.f)) const {
    const Floats d = larger(x - Floats(m), Floats(least));
    const auto [power, rest] = powers(d);
    const Floats p = where_above(d, Floats(least), power) * rest;
    Floats w(weight);
    if constexpr (ENTROPY) w = at::vec::fmadd(at::vec::fmsub(d, Floats(c), Floats(offset)), Floats(slope), w);
    return (own - p * w) * Floats(inverse_t);
  }

  float at_label(float x, float own) const {
    float values[Floats::size()];
    (*this)(Floats(x), Floats(own)).store(values);
    return values[0];
  }
};

// A new gradient is written to memory that the system has yet to provide, which in pages of 4 KiB takes longer than the computation.
void ask_for_huge_pages(void* memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t page = sysconf(_SC_PAGESIZE), address = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (address + page - 1) / page * page;
  madvise(reinterpret_cast<void*>(first), bytes - (first - address), MADV_HUGEPAGE);
#endif
}

template <bool ENTROPY, typename T>
void backward_tile(const Call& call, const Row& row, int64_t n, const T* x, T* out, int64_t start, int64_t end) {
  const int64_t i = row.index, K = call.labels_per_row;
  const float* g = call.log_probs + i * K;
  const auto counts = [&](int64_t k) { return call.label(i * K + k) != call.ignore_index; };
  float total = call.logsumexp ? -call.logsumexp[i] : 0.f;
  for (int64_t k = 0; k < K; ++k) total += counts(k) ? g[k] : 0.f;
  const float h = ENTROPY ? call.entropy[i] : 0.f;
  const float m = call.stats[i], log_s = call.stats[n + i];
  if (!std::isfinite(m) || !std::isfinite(log_s) || std::isnan(total) || std::isnan(h)) {
    std::fill(out + start, out + end, static_cast<T>(NOT_A_NUMBER));
    return;
  }
  const Gradient<ENTROPY> at(row, call.stats + i, n, total, h);
  // In place, the logits at the labels have to be read before they are overwritten.
  T few[FEW];
  const std::unique_ptr<T[]> many(K > FEW ? new T[K] : nullptr);
  T* const at_labels = many ? many.get() : few;
  const auto is_here = [&](int64_t k) {
    const int64_t label = call.label(i * K + k);
    return counts(k) && label >= start && label < end;
  };
  for (int64_t k = 0; k < K; ++k) {
    if (!is_here(k)) continue;
    const int64_t label = call.label(i * K + k);
    float own = 0;  // a repeated label gets the sum of its gradients, each time
    for (int64_t j = 0; j < K; ++j) own += call.label(i * K + j) == label ? g[j] : 0.f;
    at_labels[k] = static_cast<T>(at.at_label(static_cast<float>(x[label]), own));
  }
  const auto compute = [&](Pair v) { return Pair{at(v.a), at(v.b)}; };
  for_each(
      x + start, end - start, [&](Pair v, int64_t column) { write(out + start + column, compute(v)); },
      [&](Pair v, int64_t column) {
        T rest[WIDTH];
        write(rest, compute(v));
        std::copy(rest, rest + (end - start - column), out + start + column);
      });
  for (int64_t k = 0; k < K; ++k)
    if (is_here(k)) out[call.label(i * K + k)] = at_labels[k];
}

template <bool ENTROPY, typename T>
void backward(const Call& call) {
  const Rows rows(call);
  const int64_t tiles = call.tiles();
  const T* logits = static_cast<const T*>(call.logits);
  T* gradient = static_cast<T*>(call.gradient);
  const bool inplace = call.gradient == call.logits, large = call.gradient_bytes() >= LARGE;
  if (large && !inplace) ask_for_huge_pages(gradient, call.gradient_bytes());
  const auto at = [&](const Row& row) { return gradient + (inplace ? row.offset : row.index * call.vocab); };
#pragma omp parallel if (call.threads > 1)
  {
    share(rows.computed, tiles, call.threads, [&](int64_t i, int64_t tile) {
      const Row& row = rows.list[i];
      const int64_t start = tile * TILE;
      backward_tile<ENTROPY>(call, row, rows.n, logits + row.offset, at(row), start, std::min(start + TILE, call.vocab));
    });
    share(rows.n - rows.computed, tiles, call.threads, [&](int64_t i, int64_t tile) {
      const Row& row = rows.list[rows.computed + i];
      const int64_t start = tile * TILE, end = std::min(start + TILE, call.vocab);
      if (row.kind == Kind::IGNORED) fill(at(row) + start, end - start, large);
      else std::fill(at(row) + start, at(row) + end, static_cast<T>(NOT_A_NUMBER));
    });
    end_of_streams();
  }
}

// Calls body with a null pointer of the type that `dtype` stands for, as DTYPES in cpp.py has it.
template <typename Body>
void with_type(int64_t dtype, const Body& body) {
  if (dtype == 0) body(static_cast<float*>(nullptr));
  if (dtype == 1) body(static_cast<c10::BFloat16*>(nullptr));
  if (dtype == 2) body(static_cast<c10::Half*>(nullptr));
}

}  // namespace

extern "C" {

void log_probs_forward(const Call* call) {
  with_type(call->dtype, [&]<typename T>(T*) {
    if (call->sum_p_squared) forward<SQUARES, T>(*call);
    else if (call->entropy) forward<ENTROPY, T>(*call);
    else forward<SUM, T>(*call);
  });
}

void log_probs_backward(const Call* call) {
  with_type(call->dtype, [&]<typename T>(T*) {
    if (call->entropy) backward<true, T>(*call);
    else backward<false, T>(*call);
  });
}
}
