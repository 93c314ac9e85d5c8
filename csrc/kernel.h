// The arithmetic of one block of one tensor. grades_adamw.cpp includes this file once per
// instruction set, each time inside a namespace and under compiler options of its own. So it must
// neither define nor call anything that is shared with code compiled for another instruction set:
// only the macros and structs declared there, intrinsics and compiler built-ins.
//
// Numbers are computed in `Wide`, float or double, and rounded after every operation
// (-ffp-contract=off, no fast-math), in an order that does not depend on the width of a vector:
// every instruction set gives the same bits. Loops are plain and short so that compilers vectorize
// them. Where numbers have to be converted, a block is walked in chunks that stay in the
// first-level cache, so that measuring, updating and keeping can be loops of their own.

constexpr int64_t kChunk = 512;  // elements of a buffer
constexpr int kLanes = 16;

INLINE float absolute(float x) { return __builtin_fabsf(x); }
INLINE double absolute(double x) { return __builtin_fabs(x); }
INLINE float root(float x) { return __builtin_sqrtf(x); }
INLINE double root(double x) { return __builtin_sqrt(x); }

INLINE uint32_t bits(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, sizeof u);
  return u;
}
INLINE float number(uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, sizeof x);
  return x;
}

// How numbers are stored; they are computed as `Wide`.

template <class T>
struct Plain {
  using Wide = T;
  static constexpr int kTogether = 1;
  T stored;
  INLINE T get() const { return stored; }
  INLINE void set(T x) { stored = x; }
};

struct BFloat16 {
  using Wide = float;
  static constexpr int kTogether = 2;
  uint16_t stored;
  INLINE float get() const { return number(uint32_t(stored) << 16); }
  INLINE void set(float x) { stored = uint16_t(rounded(x) >> 16); }
  // In the upper half, to nearest even; a NaN stays one, with torch's bits.
  INLINE static uint32_t rounded(float x) {
    const uint32_t u = bits(x);
    return x == x ? u + 0x7fffu + ((u >> 16) & 1u) : 0x7fc00000u;
  }
};

// Works on the bits of a float: a power of two moves the exponent.
struct Half {
  using Wide = float;
#ifdef USE_F16C
  static constexpr int kTogether = 8;
#else
  static constexpr int kTogether = 1;
#endif
  uint16_t stored;
  INLINE float get() const {
    const uint32_t magnitude = uint32_t(stored & 0x7fffu) << 13;
    const uint32_t infinite = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
    const uint32_t sign = uint32_t(stored & 0x8000u) << 16;
    return number(bits(number(magnitude) * 0x1p112f) | infinite | sign);
  }
  // Rounds to nearest even; a NaN stays one.
  INLINE void set(float x) {
    const uint32_t u = bits(x), magnitude = u & 0x7fffffffu;
    const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
    // The last place of 0.5 is that of the subnormals, so adding it rounds to one of them.
    const uint32_t subnormal = bits(number(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t h = magnitude < 0x38800000u ? subnormal : normal;
    h = magnitude >= 0x477ff000u ? 0x7c00u : h;
    h = magnitude > 0x7f800000u ? 0x7e00u : h;
    stored = uint16_t(h | ((u >> 16) & 0x8000u));
  }
};

// `kTogether` neighbours, in the way that suits vectors best, and one of those that are left.

template <class Stored, class Wide>
INLINE void read(const Stored* x, Wide (&to)[1]) {
  to[0] = x->get();
}

template <class Stored, class Wide>
INLINE void write(Stored* x, const Wide (&from)[1]) {
  x->set(from[0]);
}

// Two in a word of 32 bits, so that no vector is widened or narrowed.
INLINE void read(const BFloat16* x, float (&to)[2]) {
  uint32_t both;
  __builtin_memcpy(&both, x, sizeof both);
  to[0] = number(both << 16);
  to[1] = number(both & 0xffff0000u);
}

INLINE void write(BFloat16* x, const float (&from)[2]) {
  const uint32_t both =
      BFloat16::rounded(from[0]) >> 16 | (BFloat16::rounded(from[1]) & 0xffff0000u);
  __builtin_memcpy(x, &both, sizeof both);
}

#ifdef USE_F16C  // compilers do not vectorize these conversions by themselves
INLINE void read(const Half* x, float (&to)[8]) {
  _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
}

INLINE void write(Half* x, const float (&from)[8]) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(x),
                   _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT));
}
#endif

template <class Stored, class Wide>
NOINLINE void widen(Wide* __restrict to, const void* from, int64_t n) {
  auto x = static_cast<const Stored*>(from);
  for (int64_t i = 0; i < n; ++i) to[i] = Wide(x[i].get());
}

template <class Stored, class Wide>
NOINLINE void narrow(void* to, const Wide* __restrict from, int64_t n) {
  auto x = static_cast<Stored*>(to);
  for (int64_t i = 0; i < n; ++i) x[i].set(typename Stored::Wide(from[i]));
}

#ifdef USE_F16C
template <>
NOINLINE void widen<Half, float>(float* __restrict to, const void* from, int64_t n) {
  auto x = static_cast<const Half*>(from);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) read(x + i, reinterpret_cast<float(&)[8]>(to[i]));
  for (; i < n; ++i) to[i] = x[i].get();
}

template <>
NOINLINE void narrow<Half, float>(void* to, const float* __restrict from, int64_t n) {
  auto x = static_cast<Half*>(to);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) write(x + i, reinterpret_cast<const float(&)[8]>(from[i]));
  for (; i < n; ++i) x[i].set(from[i]);
}
#endif

// Copies elements `first` to `first + n`, counted in row-major order, of a tensor that does not lie
// that way in memory: into `packed`, or from there with `back`.
template <class Word>
INLINE void pack(const Array& array, int64_t first, int64_t n, void* packed, bool back) {
  auto words = static_cast<Word*>(packed), base = reinterpret_cast<Word*>(array.data);
  int64_t index[kMaxDims];
  for (int d = array.n_dims - 1; d >= 0; --d) {
    index[d] = first % array.sizes[d];
    first /= array.sizes[d];
  }
  for (int64_t i = 0; i < n; ++i) {
    int64_t offset = 0;
    for (int d = 0; d < array.n_dims; ++d) offset += index[d] * array.strides[d];
    (back ? base[offset] : words[i]) = back ? words[i] : base[offset];
    for (int d = array.n_dims - 1; d >= 0 && ++index[d] == array.sizes[d]; --d) index[d] = 0;
  }
}

NOINLINE void pack_any(const Array& array, int64_t first, int64_t n, void* packed, bool back) {
  switch (size_of(array.dtype)) {
    case 2: return pack<uint16_t>(array, first, n, packed, back);
    case 4: return pack<uint32_t>(array, first, n, packed, back);
    default: return pack<uint64_t>(array, first, n, packed, back);
  }
}

// A stretch of a tensor as wide numbers: the tensor's own memory where these already stand there in
// order, else copies in `packed` (as stored, in order) and `converted` (wide).
template <class Wide>
struct Chunk {
  Array array;
  int64_t first, n;
  void* stored = nullptr;
  Wide* data = nullptr;
  alignas(64) char packed[8 * kChunk];
  alignas(64) Wide converted[kChunk];

  INLINE void at(const Array& a, int64_t where, int64_t count) {
    array = a;
    first = where;
    n = count;
    stored = a.strided ? packed : a.data + where * size_of(a.dtype);
    data = a.dtype == wide_dtype(Wide()) ? static_cast<Wide*>(stored) : converted;
  }

  INLINE void load(const Array& a, int64_t where, int64_t count) {
    at(a, where, count);
    if (array.strided) pack_any(array, first, n, packed, false);
    if (data != converted) return;
    switch (array.dtype) {
      case DType::fp32: return widen<Plain<float>>(converted, stored, n);
      case DType::fp64: return widen<Plain<double>>(converted, stored, n);
      case DType::bf16: return widen<BFloat16>(converted, stored, n);
      case DType::fp16: return widen<Half>(converted, stored, n);
    }
  }

  INLINE void store(const Wide* x) {
    switch (array.dtype) {
      case DType::fp32: narrow<Plain<float>>(stored, x, n); break;
      case DType::fp64: narrow<Plain<double>>(stored, x, n); break;
      case DType::bf16: narrow<BFloat16>(stored, x, n); break;
      case DType::fp16: narrow<Half>(stored, x, n); break;
    }
    if (array.strided) pack_any(array, first, n, packed, true);
  }

  // Stores the numbers written to `data` in the tensor.
  INLINE void flush() {
    if (data == converted) {
      store(converted);
    } else if (array.strided) {
      pack_any(array, first, n, packed, true);
    }
  }
};

// Sums in fp64, element i of a chunk in lane i % 16.
struct Sum {
  double lanes[kLanes] = {};

  INLINE double total() const {
    double sum = 0;
    for (int l = 0; l < kLanes; ++l) sum += lanes[l];
    return sum;
  }
};

struct Sums {
  Sum numerator, denominator, magnitude;
};

template <class F>
NOINLINE void add(Sum& sum, int64_t n, F value) {
  double lanes[kLanes];  // a copy, which stays in registers
  for (int l = 0; l < kLanes; ++l) lanes[l] = sum.lanes[l];
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) lanes[l] += double(value(i + l));
  }
  for (int l = 0; i + l < n; ++l) lanes[l] += double(value(i + l));
  for (int l = 0; l < kLanes; ++l) sum.lanes[l] = lanes[l];
}

// The term of an element, in both ways of measuring.

template <class Wide>
INLINE Wide difference(Wide sign, Wide x, Wide y) { return absolute(sign * x - y); }

template <class Wide>  // one division, the slowest operation
INLINE Wide gain(Wide eps, Wide g, Wide m, Wide v) { return (g * m) / (root(v) + eps); }

template <class Wide>
INLINE void add_differences(Sum& sum, Wide sign, const Wide* x, const Wide* y, int64_t n) {
  add(sum, n, [=](int64_t i) INLINE_LAMBDA { return difference(sign, x[i], y[i]); });
}

template <class Wide>  // the coefficients as the update uses them
struct Rule {
  Wide sign, beta2, square_weight, decay_factor, correction, step_size, eps;
  bool near_m;  // as torch's lerp, from the nearer of its two ends; `weight` counts from there
  Wide weight;

  INLINE explicit Rule(const Coefficients& c)
      : sign(Wide(c.sign)),
        beta2(Wide(c.beta2)),
        square_weight(Wide(1 - c.beta2)),
        decay_factor(Wide(c.decay_factor)),
        correction(Wide(c.sqrt_bias_correction2)),
        step_size(Wide(c.step_size)),
        eps(Wide(c.eps)),
        near_m(Wide(1 - c.beta1) < Wide(0.5)),
        weight(near_m ? Wide(1 - c.beta1) : Wide(1 - c.beta1) - Wide(1)) {}
};

// AdamW as torch's reference computes it, in the same order of operations, on N neighbours from i.
template <int N, bool AMSGRAD, class S, class Wide>
INLINE void update(const Rule<Wide>& c, S* p, const S* g, S* m, S* v, S* v_max, int64_t i) {
  Wide ps[N], gs[N], ms[N], vs[N], maxs[N];
  read(p + i, ps);
  read(g + i, gs);
  read(m + i, ms);
  read(v + i, vs);
  if (AMSGRAD) read(v_max + i, maxs);
  for (int k = 0; k < N; ++k) {
    const Wide signed_g = c.sign * gs[k], away = signed_g - ms[k];
    ms[k] = (c.near_m ? ms[k] : signed_g) + c.weight * away;
    vs[k] = vs[k] * c.beta2 + (c.square_weight * signed_g) * signed_g;
    if (AMSGRAD) {
      const bool larger = (vs[k] > maxs[k]) | (vs[k] != vs[k]);  // NaN wins, as in torch
      maxs[k] = larger ? vs[k] : maxs[k];
    }
    const Wide denominator = root(AMSGRAD ? maxs[k] : vs[k]) / c.correction + c.eps;
    ps[k] = ps[k] * c.decay_factor - (c.step_size * ms[k]) / denominator;
  }
  write(p + i, ps);
  write(m + i, ms);
  write(v + i, vs);
  if (AMSGRAD) write(v_max + i, maxs);
}

template <class S, bool AMSGRAD>
NOINLINE void update(const Coefficients& c, S* __restrict p, const S* __restrict g,
                     S* __restrict m, S* __restrict v, S* __restrict v_max, int64_t n) {
  const Rule<typename S::Wide> rule(c);
  constexpr int N = S::kTogether;
  int64_t i = 0;
  for (; i + N <= n; i += N) update<N, AMSGRAD>(rule, p, g, m, v, v_max, i);
  for (; i < n; ++i) update<1, AMSGRAD>(rule, p, g, m, v, v_max, i);
}

template <class S>
INLINE void update(const Coefficients& c, void* p, const void* g, void* m, void* v, void* v_max,
                   int64_t n) {
  auto param = static_cast<S*>(p), exp_avg = static_cast<S*>(m), exp_avg_sq = static_cast<S*>(v);
  auto grad = static_cast<const S*>(g);
  if (v_max) {
    update<S, true>(c, param, grad, exp_avg, exp_avg_sq, static_cast<S*>(v_max), n);
  } else {
    update<S, false>(c, param, grad, exp_avg, exp_avg_sq, nullptr, n);
  }
}

// Measures, updates and keeps in one loop, where no number has to be converted. Loops of their own,
// over chunks, read memory in starts and stops, which costs where memory is busy: on two threads of
// a shared Zen 5 "momentum" took 1.4 to 1.6 times torch's fused AdamW so, and takes 1.0 like this.
template <class Wide, Statistic STATISTIC, bool KEEP, bool AMSGRAD>
NOINLINE void step(const Coefficients& c, Wide* __restrict p, const Wide* __restrict g,
                   Wide* __restrict m, Wide* __restrict v, Wide* __restrict v_max,
                   Wide* __restrict prev, int64_t n, Sums& sums) {
  using S = Plain<Wide>;
  const Rule<Wide> rule(c);
  const Wide past_eps = Wide(c.past_eps);
  auto params = reinterpret_cast<S*>(p);
  auto grads = reinterpret_cast<const S*>(g);
  auto exp_avgs = reinterpret_cast<S*>(m), exp_avg_sqs = reinterpret_cast<S*>(v);
  auto maxima = reinterpret_cast<S*>(v_max);
  Sums own = sums;  // a copy, which stays in registers
  // A loop for each sum: where one loop added to several, compilers left most of it scalar.
  auto measure = [&](int64_t first, int n_lanes) INLINE_LAMBDA {
    auto add = [=](Sum& sum, auto value) INLINE_LAMBDA {
      for (int l = 0; l < n_lanes; ++l) sum.lanes[l] += double(value(first + l));
    };
    if (STATISTIC == Statistic::change) {
      add(own.numerator,
          [=](int64_t i) INLINE_LAMBDA { return difference(Wide(1), g[i], prev[i]); });
    }
    if (STATISTIC == Statistic::momentum) {
      add(own.numerator,
          [=](int64_t i) INLINE_LAMBDA { return difference(rule.sign, g[i], m[i]); });
    }
    if (STATISTIC == Statistic::signal) {
      add(own.numerator, [=](int64_t i) INLINE_LAMBDA { return m[i] * m[i]; });
      add(own.denominator, [=](int64_t i) INLINE_LAMBDA { return v[i]; });
    }
    if (STATISTIC == Statistic::gain) {
      add(own.numerator,
          [=](int64_t i) INLINE_LAMBDA { return gain(past_eps, g[i], m[i], v[i]); });
    }
    if (STATISTIC != Statistic::none) {
      add(own.magnitude, [=](int64_t i) INLINE_LAMBDA { return absolute(g[i]); });
    }
  };
  auto change = [&](int64_t i) INLINE_LAMBDA {
    if (KEEP) prev[i] = g[i];
    update<1, AMSGRAD>(rule, params, grads, exp_avgs, exp_avg_sqs, maxima, i);
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    measure(i, kLanes);
    for (int l = 0; l < kLanes; ++l) change(i + l);
  }
  measure(i, int(n - i));
  for (; i < n; ++i) change(i);
  sums = own;
}

template <class Wide, Statistic STATISTIC, bool KEEP = false>
NOINLINE void step(const Work& work, int64_t first, int64_t n, Sums& sums) {
  auto data = [=](const Array& array) INLINE_LAMBDA {
    return array.data ? reinterpret_cast<Wide*>(array.data) + first : nullptr;
  };
  auto take = work.does(kAmsgrad) ? step<Wide, STATISTIC, KEEP, true>
                                  : step<Wide, STATISTIC, KEEP, false>;
  take(work.coefficients, data(work.param), data(work.grad), data(work.exp_avg),
       data(work.exp_avg_sq), data(work.max_exp_avg_sq), data(work.prev_grad), n, sums);
}

// The function that takes a block in one loop; none where numbers are converted, gradients divided,
// or where it is no update.
template <class Wide>
INLINE auto whole_step(const Work& work) -> void (*)(const Work&, int64_t, int64_t, Sums&) {
  if (!work.is_direct || !work.does(kUpdate) || work.does(kUnscale)) return nullptr;
  if (work.does(kKeep)) {
    if (work.statistic == Statistic::none) return step<Wide, Statistic::none, true>;
    if (work.statistic == Statistic::change) return step<Wide, Statistic::change, true>;
    return nullptr;
  }
  switch (work.statistic) {
    case Statistic::change: return step<Wide, Statistic::change>;
    case Statistic::norm: return step<Wide, Statistic::norm>;
    case Statistic::momentum: return step<Wide, Statistic::momentum>;
    case Statistic::signal: return step<Wide, Statistic::signal>;
    case Statistic::gain: return step<Wide, Statistic::gain>;
    default: return nullptr;
  }
}

template <class Wide>
NOINLINE void run(const Work& work, int64_t first, int64_t end, double grad_scale, double* sums) {
  const Coefficients& c = work.coefficients;
  const Statistic statistic = work.statistic;
  const bool updates = work.does(kUpdate), amsgrad = work.does(kAmsgrad);
  // Where all is bf16, or all is fp16, the update converts in registers: half the time of going
  // through buffers.
  const bool in_registers = work.is_bf16 || (work.is_fp16 && Half::kTogether > 1);
  const bool only_updates = in_registers && work.tasks == kUpdate;
  Sums of_block;
  auto& [numerator, denominator, magnitude] = of_block;
  Chunk<Wide> p, g, m, v, v_max, prev;
  Wide old_p[kChunk];
  if (auto take = whole_step<Wide>(work)) {
    take(work, first, end - first, of_block);
    first = end;
  }
  // An update alone takes its block in one go.
  const bool is_alone = statistic == Statistic::none && !work.does(kKeep);
  const int64_t longest = only_updates || (work.is_direct && is_alone) ? end - first : kChunk;
  for (int64_t n; first < end; first += n) {
    n = end - first < longest ? end - first : longest;
    if (!only_updates) g.load(work.grad, first, n);
    if (work.does(kUnscale)) {
      const Wide scale = Wide(grad_scale);
      for (int64_t i = 0; i < n; ++i) g.data[i] /= scale;
      g.flush();
      g.load(work.grad, first, n);  // as stored, and as if it had been unscaled beforehand
    }
    if (statistic != Statistic::none) {
      add(magnitude, n, [x = g.data](int64_t i) INLINE_LAMBDA { return absolute(x[i]); });
    }
    switch (statistic) {
      case Statistic::change:
        prev.load(work.prev_grad, first, n);
        add_differences(numerator, Wide(1), g.data, prev.data, n);
        break;
      case Statistic::momentum:
        m.load(work.exp_avg, first, n);
        add_differences(numerator, Wide(c.sign), g.data, m.data, n);
        break;
      case Statistic::signal:
        m.load(work.exp_avg, first, n);
        v.load(work.exp_avg_sq, first, n);
        add(numerator, n, [x = m.data](int64_t i) INLINE_LAMBDA { return x[i] * x[i]; });
        add(denominator, n, [x = v.data](int64_t i) INLINE_LAMBDA { return x[i]; });
        break;
      case Statistic::gain:
        m.load(work.exp_avg, first, n);
        v.load(work.exp_avg_sq, first, n);
        add(numerator, n, [eps = Wide(c.past_eps), g = g.data, m = m.data, v = v.data](
                              int64_t i) INLINE_LAMBDA { return gain(eps, g[i], m[i], v[i]); });
        break;
      case Statistic::weight_change:
        p.load(work.param, first, n);
        __builtin_memcpy(old_p, p.data, n * sizeof(Wide));
        break;
      case Statistic::none:
      case Statistic::norm:
        break;
    }
    if (updates && in_registers) {
      p.at(work.param, first, n);
      g.at(work.grad, first, n);
      m.at(work.exp_avg, first, n);
      v.at(work.exp_avg_sq, first, n);
      if (amsgrad) v_max.at(work.max_exp_avg_sq, first, n);
      if (work.is_bf16) {
        update<BFloat16>(c, p.stored, g.stored, m.stored, v.stored, v_max.stored, n);
      } else {
        update<Half>(c, p.stored, g.stored, m.stored, v.stored, v_max.stored, n);
      }
    } else if (updates) {
      p.load(work.param, first, n);
      m.load(work.exp_avg, first, n);
      v.load(work.exp_avg_sq, first, n);
      if (amsgrad) v_max.load(work.max_exp_avg_sq, first, n);
      update<Plain<Wide>>(c, p.data, g.data, m.data, v.data, v_max.data, n);
      p.flush();
      m.flush();
      v.flush();
      if (amsgrad) v_max.flush();
    }
    if (statistic == Statistic::weight_change) {
      p.load(work.param, first, n);  // as stored
      add_differences(numerator, Wide(1), p.data, old_p, n);
    }
    if (work.does(kKeep)) {
      prev.at(work.prev_grad, first, n);
      prev.store(g.data);
    }
  }
  sums[0] = statistic == Statistic::norm ? magnitude.total() : numerator.total();
  sums[1] = denominator.total();
  sums[2] = magnitude.total();
}

// Elements `first` to `end` of one tensor; writes three sums (see the schema).
void run_block(const Work& work, int64_t first, int64_t end, double grad_scale, double* sums) {
  if (work.is_double) {
    run<double>(work, first, end, grad_scale, sums);
  } else {
    run<float>(work, first, end, grad_scale, sums);
  }
}
