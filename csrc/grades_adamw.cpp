// One step of AdamW over lists of CPU tensors that measures while it updates: schema, instruction
// sets, threads. The arithmetic is in kernel.h; a measurement is interpreted in Python
// (grades_kernels/freezing/table.py), the one place that knows the rules.
//
// Built against torch's stable ABI: one binary serves every torch from 2.10 on.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum class DType { fp32, fp64, bf16, fp16 };

// The work on a tensor: a statistic plus any of the tasks, with the numbers of
// grades_kernels/backends/tasks.py.
enum class Statistic { none, change, norm, momentum, signal, weight_change, gain };
constexpr int64_t kStatistics = 7, kStatisticBits = 7;
constexpr int64_t kUpdate = 8, kKeep = 16, kUnscale = 32, kAmsgrad = 64;

constexpr int kMaxDims = 64;

struct Array {
  char* data = nullptr;
  DType dtype = DType::fp32;
  bool strided = false;  // its elements do not follow one another in row-major order
  int n_dims = 0;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;

  bool overlaps() const {
    for (int d = 0; d < n_dims; ++d) {
      if (strides[d] == 0 && sizes[d] > 1) return true;
    }
    return false;
  }
};

struct Coefficients {
  double sign, beta1, beta2, eps, decay_factor, step_size, sqrt_bias_correction2;
  double past_correction, past_eps;  // for "gain": sqrt(1 - beta2^t) of the step before, times eps
};

struct Work {
  Array param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, prev_grad;
  Coefficients coefficients;
  Statistic statistic;
  int64_t tasks;
  int64_t n_elements;
  double old_step;
  bool is_double = false;  // some tensor is fp64, so all is computed in it
  bool is_bf16 = false;    // every tensor is bf16 and in order
  bool is_fp16 = false;    // every tensor is fp16 and in order
  bool is_direct = false;  // no tensor has to be converted, put in order or copied

  bool does(int64_t task) const { return tasks & task; }
};

constexpr int64_t size_of(DType dtype) {
  return dtype == DType::fp64 ? 8 : dtype == DType::fp32 ? 4 : 2;
}
constexpr DType wide_dtype(float) { return DType::fp32; }
constexpr DType wide_dtype(double) { return DType::fp64; }

namespace portable {
#include "kernel.h"
}

#if defined(__x86_64__)
#if defined(__clang__)
#define BEGIN_TARGET(names) \
  PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#else
#define BEGIN_TARGET(names) PRAGMA(GCC push_options) PRAGMA(GCC target(names))
#define END_TARGET PRAGMA(GCC pop_options)
#endif
#define PRAGMA(text) _Pragma(#text)

#define USE_F16C
BEGIN_TARGET("avx2,f16c")
namespace avx2 {
#include "kernel.h"
}
END_TARGET

BEGIN_TARGET("avx512f,avx512vl,avx512bw,avx512dq,f16c")
namespace avx512 {
#include "kernel.h"
}
END_TARGET
#undef USE_F16C
#endif

struct Capability {
  const char* name;
  bool runs_here;
  void (*run_block)(const Work&, int64_t, int64_t, double, double*);
};

#if defined(__x86_64__)
bool has_f16c() {  // Clang 14 has no __builtin_cpu_supports("f16c")
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

// The fastest first.
const std::vector<Capability>& capabilities() {
  static const std::vector<Capability> all = {
#if defined(__x86_64__)
      {"avx512",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"),
       avx512::run_block},
      {"avx2", __builtin_cpu_supports("avx2") && has_f16c(), avx2::run_block},
#endif
      {"portable", true, portable::run_block},
  };
  return all;
}

// The CPU capability that runs; GRADES_KERNELS_CPU_CAPABILITY asks for one by name.
const Capability& current_capability() {
  const char* asked = std::getenv("GRADES_KERNELS_CPU_CAPABILITY");
  std::string available;
  for (const Capability& capability : capabilities()) {
    if (!capability.runs_here) continue;
    if (!asked || !*asked || !std::strcmp(capability.name, asked)) return capability;
    available += std::string(available.empty() ? "" : ", ") + capability.name;
  }
  STD_TORCH_CHECK(false, "GRADES_KERNELS_CPU_CAPABILITY=", asked, " cannot run here; choose from ",
                  available);
}

std::string capability_name() { return current_capability().name; }

Array array_of(const Tensor& x, const char* name, int64_t n_elements) {
  Array array;
  switch (x.scalar_type()) {
    case ScalarType::Float: array.dtype = DType::fp32; break;
    case ScalarType::Double: array.dtype = DType::fp64; break;
    case ScalarType::BFloat16: array.dtype = DType::bf16; break;
    case ScalarType::Half: array.dtype = DType::fp16; break;
    default: STD_TORCH_CHECK(false, name, " must be fp32, fp64, bf16 or fp16");
  }
  STD_TORCH_CHECK(x.is_cpu(), name, " must lie on the CPU");
  STD_TORCH_CHECK(x.numel() == n_elements, name, " has ", x.numel(), " elements, its parameter ",
                  n_elements);
  array.data = static_cast<char*>(x.data_ptr());
  array.strided = !x.is_contiguous();
  if (array.strided) {
    array.n_dims = int(x.dim());
    STD_TORCH_CHECK(array.n_dims <= kMaxDims, name, " has more than ", kMaxDims, " dimensions");
    array.sizes = x.sizes().data();
    array.strides = x.strides().data();
  }
  return array;
}

// Whether strided tensors have one layout, without gaps or overlaps: then their elements may be
// taken in the order in which they lie in memory.
bool lie_alike(const Array* const* arrays, size_t n) {
  const Array& first = *arrays[0];
  for (size_t k = 0; k < n; ++k) {
    if (!arrays[k]->strided || arrays[k]->n_dims != first.n_dims) return false;
    for (int d = 0; d < first.n_dims; ++d) {
      if (arrays[k]->sizes[d] != first.sizes[d]) return false;
      if (arrays[k]->strides[d] != first.strides[d] && first.sizes[d] > 1) return false;
    }
  }
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int d = 0; d < first.n_dims; ++d) {
    if (first.sizes[d] > 1) dims.push_back({first.strides[d], first.sizes[d]});
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (auto [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

double read_step(const Tensor& step, bool increment) {
  STD_TORCH_CHECK(step.is_cpu() && step.numel() == 1, "a step must be one number on the CPU");
  auto next = [=](auto* value) {
    const double old = *value;
    if (increment) *value += 1;
    return old;
  };
  if (step.scalar_type() == ScalarType::Float) return next(static_cast<float*>(step.data_ptr()));
  STD_TORCH_CHECK(step.scalar_type() == ScalarType::Double, "a step must be fp32 or fp64");
  return next(static_cast<double*>(step.data_ptr()));
}

// Threads take several parameters at the same time, so those in one stretch of memory would lose
// updates. Where that is known before the first step, torch's operations take it.
void check_apart(const std::vector<Work>& works) {
  std::vector<std::pair<const char*, const char*>> spans;
  for (const Work& work : works) {
    if (!work.does(kUpdate) || work.n_elements == 0) continue;
    const Array& x = work.param;
    int64_t last = x.strided ? 0 : work.n_elements - 1;
    for (int d = 0; x.strided && d < x.n_dims; ++d) last += (x.sizes[d] - 1) * x.strides[d];
    spans.push_back({x.data, x.data + (last + 1) * size_of(x.dtype)});
  }
  std::sort(spans.begin(), spans.end());
  for (size_t k = 1; k < spans.size(); ++k) {
    STD_TORCH_CHECK(spans[k].first >= spans[k - 1].second,
                    "two parameters have come to share memory since the first step: make the "
                    "optimizer anew, or use fused=False");
  }
}

// Elements per block, the unit of work that a thread takes. A sum is that of its blocks' sums in
// order, so it depends on this number and on nothing else. Large, since every start of a block
// costs: with 8192 an update takes 1.02 to 1.09 times as long (Zen 5, 25 M fp32, 2 threads).
constexpr int64_t kBlock = 32768;
// Fewer elements than this start no thread, as in torch (at::internal::GRAIN_SIZE).
constexpr int64_t kGrain = 32768;
constexpr size_t kSums = 3, kHypers = 6;

using Tensors = std::vector<Tensor>;

void adamw_(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs,
            const Tensors& exp_avg_sqs, const Tensors& max_exp_avg_sqs, const Tensors& prev_grads,
            const Tensors& steps, const Tensor& sums, const std::vector<int64_t>& tasks,
            const std::vector<int64_t>& rows, const std::vector<double>& hypers,
            double grad_scale) {
  const size_t n = params.size();
  const auto run_block = current_capability().run_block;
  STD_TORCH_CHECK(grads.size() == n && exp_avgs.size() == n && exp_avg_sqs.size() == n &&
                      steps.size() == n && tasks.size() == n && rows.size() == n,
                  "grads, exp_avgs, exp_avg_sqs, steps, tasks and rows must be as many as params");
  STD_TORCH_CHECK(sums.scalar_type() == ScalarType::Double && sums.is_contiguous() &&
                      sums.is_cpu() && sums.numel() == int64_t(kSums * n),
                  "sums must be three contiguous fp64 numbers per tensor on the CPU");

  // All is checked before anything is written.
  std::vector<Work> works(n);
  size_t n_max = 0, n_prev = 0;
  for (size_t k = 0; k < n; ++k) {
    Work& work = works[k];
    work.tasks = tasks[k];
    STD_TORCH_CHECK(tasks[k] >= 0 && (tasks[k] & kStatisticBits) < kStatistics, "no such task");
    STD_TORCH_CHECK(rows[k] >= 0 && kHypers * (rows[k] + 1) <= hypers.size(), "no such row");
    work.statistic = Statistic(tasks[k] & kStatisticBits);
    work.n_elements = params[k].numel();
    work.param = array_of(params[k], "a parameter", work.n_elements);
    work.grad = array_of(grads[k], "a gradient", work.n_elements);
    work.exp_avg = array_of(exp_avgs[k], "exp_avg", work.n_elements);
    work.exp_avg_sq = array_of(exp_avg_sqs[k], "exp_avg_sq", work.n_elements);
    Array* arrays[6] = {&work.param, &work.grad, &work.exp_avg, &work.exp_avg_sq};
    size_t n_arrays = 4;
    if (work.does(kAmsgrad)) {
      STD_TORCH_CHECK(n_max < max_exp_avg_sqs.size(), "max_exp_avg_sqs are too few");
      work.max_exp_avg_sq = array_of(max_exp_avg_sqs[n_max++], "max_exp_avg_sq", work.n_elements);
      arrays[n_arrays++] = &work.max_exp_avg_sq;
    }
    if (work.does(kKeep) || work.statistic == Statistic::change) {
      STD_TORCH_CHECK(n_prev < prev_grads.size(), "prev_grads are too few");
      work.prev_grad = array_of(prev_grads[n_prev++], "prev_grad", work.n_elements);
      arrays[n_arrays++] = &work.prev_grad;
    }
    STD_TORCH_CHECK(!work.param.overlaps(), "a parameter has elements that share memory");
    STD_TORCH_CHECK(!work.does(kUnscale) || !work.grad.overlaps(),
                    "a gradient whose elements share memory cannot be unscaled in place");
    if (work.param.strided && lie_alike(arrays, n_arrays)) {
      for (size_t a = 0; a < n_arrays; ++a) arrays[a]->strided = false;
    }
    work.is_bf16 = work.is_fp16 = true;
    work.is_direct = work.statistic != Statistic::weight_change;
    for (size_t a = 0; a < n_arrays; ++a) {
      work.is_double |= arrays[a]->dtype == DType::fp64;
      work.is_bf16 &= arrays[a]->dtype == DType::bf16 && !arrays[a]->strided;
      work.is_fp16 &= arrays[a]->dtype == DType::fp16 && !arrays[a]->strided;
      work.is_direct &= arrays[a]->dtype == work.param.dtype && !arrays[a]->strided;
    }
    work.is_direct &= size_of(work.param.dtype) >= 4;
    read_step(steps[k], false);
  }
  check_apart(works);

  struct Block {
    size_t k;       // of the tensor
    int64_t first;  // its first element there
    int64_t position;  // and among the elements of all tensors
  };
  std::vector<Block> blocks;
  int64_t n_elements = 0;
  for (size_t k = 0; k < n; ++k) {
    Work& work = works[k];
    const double* row = hypers.data() + kHypers * rows[k];
    const double lr = row[0], beta1 = row[1], beta2 = row[2], eps = row[3], weight_decay = row[4];
    work.old_step = read_step(steps[k], work.does(kUpdate));
    const double step = work.old_step + 1;
    const double past_correction = std::sqrt(1 - std::pow(beta2, work.old_step));
    work.coefficients = {row[5], beta1, beta2, eps, 1 - lr * weight_decay,
                         lr / (1 - std::pow(beta1, step)), std::sqrt(1 - std::pow(beta2, step)),
                         past_correction, past_correction * eps};
    for (int64_t first = 0; first < work.n_elements; first += kBlock) {
      blocks.push_back({k, first, n_elements + first});
    }
    n_elements += work.n_elements;
  }

  // Each thread takes the blocks that begin in its stretch of all elements. Taking the next block
  // from a shared counter instead, so that two threads work on neighbouring 32 KiB, cost 1.27 to
  // 1.9 times torch's fused AdamW where this costs 1.0 to 1.2 (Zen 5, 2 threads, 25 M fp32).
  std::vector<double> partials(kSums * blocks.size());
  torch::stable::parallel_for(0, n_elements, kGrain, [&](int64_t begin, int64_t end) {
    auto begins_before = [](const Block& x, int64_t position) { return x.position < position; };
    size_t b =
        std::lower_bound(blocks.begin(), blocks.end(), begin, begins_before) - blocks.begin();
    for (; b < blocks.size() && blocks[b].position < end; ++b) {
      const Work& work = works[blocks[b].k];
      const int64_t first = blocks[b].first, last = std::min(first + kBlock, work.n_elements);
      run_block(work, first, last, grad_scale, &partials[kSums * b]);
    }
  });

  double* sum = static_cast<double*>(sums.data_ptr());
  std::fill(sum, sum + kSums * n, 0.0);
  for (size_t b = 0; b < blocks.size(); ++b) {
    for (size_t j = 0; j < kSums; ++j) sum[kSums * blocks[b].k + j] += partials[kSums * b + j];
  }
  for (size_t k = 0; k < n; ++k, sum += kSums) {
    const Work& work = works[k];
    const bool uses_moments =
        work.statistic == Statistic::momentum || work.statistic == Statistic::gain;
    const double least_steps = work.statistic == Statistic::signal ? 2 : uses_moments ? 1 : 0;
    const double beta1 = work.coefficients.beta1;
    if (work.old_step < least_steps) {
      sum[0] = std::numeric_limits<double>::quiet_NaN();
    } else if (work.statistic == Statistic::signal) {
      sum[0] /= (1 - beta1) / (1 + beta1) * (1 - std::pow(beta1, 2 * work.old_step));
      sum[1] /= 1 - std::pow(work.coefficients.beta2, work.old_step);
    } else if (work.statistic == Statistic::gain) {
      // g * m_hat / (sqrt(v_hat) + eps), with v_hat = v / past_correction^2
      sum[0] *= work.coefficients.sign * work.coefficients.past_correction /
                (1 - std::pow(beta1, work.old_step));
    }
  }
}

}  // namespace

STABLE_TORCH_LIBRARY(grades_kernels, m) {
  // Per tensor: `tasks` has its work, `rows` the index of its six numbers in `hypers`: lr, beta1,
  // beta2, eps, weight_decay, and -1 to maximize, else 1. `max_exp_avg_sqs` and `prev_grads` have
  // only the tensors that the tasks need, in order. Gradients are written with kUnscale alone,
  // which divides them by `grad_scale`. `sums` receives numerator and denominator (0 unless
  // "signal") of the statistic and the sum of |g|; NaN as the numerator where the moments have not
  // seen as many gradients as it needs.
  m.def(
      "adamw_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, "
      "Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] max_exp_avg_sqs, Tensor(f!)[] prev_grads, "
      "Tensor(g!)[] steps, Tensor(h!) sums, int[] tasks, int[] rows, float[] hypers, "
      "float grad_scale) -> ()");
  m.def("cpu_capability() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(grades_kernels, CPU, m) { m.impl("adamw_", TORCH_BOX(&adamw_)); }

STABLE_TORCH_LIBRARY_IMPL(grades_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&capability_name));
}
