// Kernels for few bf16 tokens on a CPU, built on demand (libortho.core.ops.native), never needed.
//
//   int8_linear(x, codes, scales)              y[t, n]  = scale[n] * sum_k x[t, k] code[n, k]
//   add_columns_(y, x, index, values, alpha)   y[t, n] += alpha[t] * sum_j x[t, index[j]] values[j, n], if alpha[t] != 0
//
// Sums are fp32 and rounded to bf16 once. Neither writes a temporary tensor. Both return None, and do nothing, for
// arguments that are not theirs (another dtype, device or layout, a wanted gradient, a tensor subclass, any mode or
// transform that must see operators): the caller then takes torch's path. Indices are trusted: they are checked where
// streams are made and read.
//
// The file includes itself once for each instruction set; which one runs is decided by the processor at run time.
#ifndef LANES

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

// Rows of `codes` from first to last, for T tokens of x, fp32, each padded to `width`; y (T, rows) bf16.
struct Product {
  const float* x;
  int64_t width;
  const int8_t* codes;
  const void* scales;
  bool wide_scales;
  uint16_t* y;
  int64_t rows, columns;
};

// Outputs of `y` from first to last; x (T, k) fp32 is gathered and scaled.
struct Addition {
  const float* x;
  const uint16_t* values;
  uint16_t* y;
  int64_t k, rows;
};

inline float widened(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  float number;
  std::memcpy(&number, &bits, 4);
  return number;
}

inline uint16_t rounded(float number) {
  return c10::BFloat16(number).x;
}

#define INLINE inline __attribute__((always_inline))

#define ISA portable
#define TARGET
#define LANES 4
#define SUMS 8
#include "native.cpp"

#if defined(__x86_64__)
#define ISA avx2
#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#define SUMS 10
#include "native.cpp"

#define ISA avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define LANES 16
#define SUMS 16
#include "native.cpp"
#endif

struct Level {
  const char* name;
  void (*product)(const Product&, int tokens, int64_t first, int64_t last);
  void (*add)(const Addition&, int tokens, int64_t first, int64_t last);
};

std::vector<Level> levels() {  // of this processor, the best last
  std::vector<Level> found{{"portable", portable::product, portable::add}};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    found.push_back({"avx2", avx2::product, avx2::add});
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
      found.push_back({"avx512", avx512::product, avx512::add});
  }
#endif
  return found;
}

const std::vector<Level> LEVELS = levels();
const Level* level = &LEVELS.back();

constexpr int MOST = 8;                      // tokens of one pass over the weights
constexpr int MOST_ADDED = 32;               // beyond so many tokens torch's matrix product adds columns faster
constexpr int64_t GRAIN = int64_t(1) << 17;  // products that are worth a thread

// True if no mode, transform or tracer is on that would have to see an operator.
bool unobserved() {
  return (c10::impl::tls_local_dispatch_key_set().included_ - c10::default_included_set).empty();
}

// True if `t` is an ordinary CPU tensor whose memory may be read, and no gradient is wanted of it.
bool plain(const at::Tensor& t, at::ScalarType dtype) {
  static const auto ours = c10::DispatchKeySet(c10::DispatchKey::CPU);
  static const auto harmless = c10::autograd_dispatch_keyset_with_ADInplaceOrView |
      c10::DispatchKeySet(c10::DispatchKey::AutocastCPU);
  return t.scalar_type() == dtype && (t.key_set() - harmless) == ours &&
      !(t.requires_grad() && at::GradMode::is_enabled());
}

float* scratch(int64_t size) {
  static thread_local std::vector<float> memory;
  if (int64_t(memory.size()) < size) memory.resize(size);
  return memory.data();
}

template <class Kernel>
void in_parallel(int64_t size, int64_t work_each, const Kernel& kernel) {
  if (size * work_each <= 2 * GRAIN)
    kernel(0, size);
  else  // whole blocks of 64, so that threads share no cache line
    at::parallel_for(0, (size + 63) / 64, std::max<int64_t>(1, GRAIN / (64 * work_each)), [&](int64_t a, int64_t b) {
      kernel(a * 64, std::min(size, b * 64));
    });
}

struct Unlocked {  // other Python threads may run
  PyThreadState* state = PyEval_SaveThread();
  ~Unlocked() { PyEval_RestoreThread(state); }
};

bool tensors(PyObject* const* from, int count) {
  for (int i = 0; i < count; i++)
    if (!THPVariable_Check(from[i])) return false;
  return true;
}

PyObject* int8_linear(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 3 && tensors(given, 3), "int8_linear takes (x, codes, scales)");
  const at::Tensor &x = THPVariable_Unpack(given[0]), &codes = THPVariable_Unpack(given[1]),
                   &scales = THPVariable_Unpack(given[2]);
  const bool wide = scales.scalar_type() == at::kFloat;
  if (!unobserved() || !plain(x, at::kBFloat16) || !plain(codes, at::kChar) ||
      !plain(scales, wide ? at::kFloat : at::kBFloat16) || x.dim() != 2 || codes.dim() != 2 ||
      x.size(1) != codes.size(1) || scales.numel() != codes.size(0) || !codes.is_contiguous() ||
      !scales.is_contiguous())
    Py_RETURN_NONE;
  const int64_t tokens = x.size(0), columns = x.size(1), rows = codes.size(0);
  const int64_t width = (columns + 15) / 16 * 16;
  at::Tensor y = at::empty({tokens, rows}, x.options());
  if (y.numel()) {
    Unlocked unlocked;
    const auto* from = static_cast<const uint16_t*>(x.const_data_ptr());
    const int64_t down = x.stride(0), across = x.stride(1);
    float* wider = scratch(tokens * width);
    for (int64_t t = 0; t < tokens; t++) {
      float* to = wider + t * width;
      if (across == 1)
        for (int64_t k = 0; k < columns; k++) to[k] = widened(from[t * down + k]);
      else
        for (int64_t k = 0; k < columns; k++) to[k] = widened(from[t * down + k * across]);
    }
    for (int64_t t = 0; t < tokens; t += MOST) {
      const int some = int(std::min<int64_t>(MOST, tokens - t));
      const Product task{wider + t * width, width, static_cast<const int8_t*>(codes.const_data_ptr()),
                         scales.const_data_ptr(), wide, static_cast<uint16_t*>(y.data_ptr()) + t * rows, rows, columns};
      in_parallel(rows, some * columns, [&](int64_t a, int64_t b) { level->product(task, some, a, b); });
    }
  }
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

PyObject* add_columns_(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 5 && tensors(given, 4), "add_columns_ takes (y, x, index, values, alpha)");
  const at::Tensor &y = THPVariable_Unpack(given[0]), &x = THPVariable_Unpack(given[1]),
                   &index = THPVariable_Unpack(given[2]), &values = THPVariable_Unpack(given[3]);
  if (!unobserved() || !plain(y, at::kBFloat16) || !plain(x, at::kBFloat16) || !plain(index, at::kInt) ||
      !plain(values, at::kBFloat16) || y.dim() != 2 || x.dim() != 2 || index.dim() != 1 || values.dim() != 2 ||
      x.size(0) != y.size(0) || x.size(0) > MOST_ADDED || values.size(0) != index.size(0) || values.size(1) != y.size(1) ||
      !y.is_contiguous() || !values.is_contiguous() || !index.is_contiguous())
    Py_RETURN_NONE;
  const int64_t tokens = x.size(0), k = index.size(0), rows = y.size(1);
  const float* alphas = nullptr;
  float alpha = 0;
  if (THPVariable_Check(given[4])) {
    const at::Tensor& each = THPVariable_Unpack(given[4]);
    if (!plain(each, at::kFloat) || each.numel() != tokens || !each.is_contiguous()) Py_RETURN_NONE;
    alphas = static_cast<const float*>(each.const_data_ptr());
  } else {
    alpha = float(PyFloat_AsDouble(given[4]));
    if (PyErr_Occurred()) throw python_error();
  }
  if (y.numel() && k) {
    const auto* from = static_cast<const uint16_t*>(x.const_data_ptr());
    const auto* chosen = static_cast<const int32_t*>(index.const_data_ptr());
    const int64_t down = x.stride(0), across = x.stride(1);
    for (int64_t j = 0; j < k; j++)
      TORCH_CHECK_INDEX(chosen[j] >= 0 && chosen[j] < x.size(1), "column ", chosen[j], " of an input with ", x.size(1));
    float* gathered = scratch(tokens * k);
    const auto share = [&](int64_t t) { return alphas ? alphas[t] : alpha; };
    for (int64_t t = 0; t < tokens; t++)
      if (share(t) != 0)
        for (int64_t j = 0; j < k; j++) gathered[t * k + j] = share(t) * widened(from[t * down + chosen[j] * across]);
    auto* to = static_cast<uint16_t*>(y.data_ptr());
    for (int64_t t = 0; t < tokens;) {
      int some = 0;  // tokens at alpha 0 are left out: a product with zero would bring inf and NaN of a stream to them
      while (some < MOST && t + some < tokens && share(t + some) != 0) some++;
      if (!some) {
        t++;
        continue;
      }
      const Addition task{gathered + t * k, static_cast<const uint16_t*>(values.const_data_ptr()), to + t * rows, k, rows};
      in_parallel(rows, some * k, [&](int64_t a, int64_t b) { level->add(task, some, a, b); });
      t += some;
    }
    y.unsafeGetTensorImpl()->bump_version();
  }
  Py_INCREF(given[0]);
  return given[0];
  END_HANDLE_TH_ERRORS
}

PyObject* level_names(PyObject*, PyObject*) {
  PyObject* names = PyTuple_New(Py_ssize_t(LEVELS.size()));
  for (size_t i = 0; names && i < LEVELS.size(); i++) PyTuple_SET_ITEM(names, i, PyUnicode_FromString(LEVELS[i].name));
  return names;
}

PyObject* level_name(PyObject*, PyObject*) {
  return PyUnicode_FromString(level->name);
}

PyObject* use_level(PyObject*, PyObject* name) {
  const char* wanted = PyUnicode_AsUTF8(name);
  if (!wanted) return nullptr;
  for (const Level& one : LEVELS)
    if (!std::strcmp(one.name, wanted)) {
      level = &one;
      Py_RETURN_NONE;
    }
  return PyErr_Format(PyExc_ValueError, "this processor has no level %s", wanted);
}

PyMethodDef METHODS[] = {
    {"int8_linear", (PyCFunction)(void (*)())int8_linear, METH_FASTCALL, "(x, codes, scales) -> y, or None"},
    {"add_columns_", (PyCFunction)(void (*)())add_columns_, METH_FASTCALL, "(y, x, index, values, alpha) -> y, or None"},
    {"levels", level_names, METH_NOARGS, "Instruction sets that this processor runs, the best last."},
    {"level", level_name, METH_NOARGS, "The instruction set in use."},
    {"use_level", use_level, METH_O, "Choose the instruction set, for tests."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "libortho_native", nullptr, -1, METHODS};

}  // namespace

#define JOINED_(a, b) a##b
#define JOINED(a, b) JOINED_(a, b)
PyMODINIT_FUNC JOINED(PyInit_, TORCH_EXTENSION_NAME)() {
  return PyModule_Create(&MODULE);
}

#else  // ------------------------------------------------------------------------------ once for each instruction set

namespace ISA {

typedef float Vector __attribute__((vector_size(4 * LANES)));

#if LANES == 16
TARGET INLINE Vector from_int8(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
TARGET INLINE Vector from_bf16(const uint16_t* p) {
  return (Vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
TARGET INLINE void to_bf16(Vector v, uint16_t* p) {  // to the nearest, ties to even; NaN stays NaN
  const __m512i bits = (__m512i)v, one = _mm512_set1_epi32(1);
  const __m512i bias = _mm512_add_epi32(_mm512_set1_epi32(0x7fff), _mm512_and_si512(_mm512_srli_epi32(bits, 16), one));
  const __m512i near = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_mask_set1_epi32(near, nan, 0x7fc0)));
}
#elif LANES == 8
TARGET INLINE Vector from_int8(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
TARGET INLINE Vector from_bf16(const uint16_t* p) {
  return (Vector)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
TARGET INLINE void to_bf16(Vector v, uint16_t* p) {
  const __m256i bits = (__m256i)v, one = _mm256_set1_epi32(1);
  const __m256i bias = _mm256_add_epi32(_mm256_set1_epi32(0x7fff), _mm256_and_si256(_mm256_srli_epi32(bits, 16), one));
  const __m256i near = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
  const __m256i nan = (__m256i)_mm256_cmp_ps((__m256)v, (__m256)v, _CMP_UNORD_Q);
  const __m256i kept = _mm256_blendv_epi8(near, _mm256_set1_epi32(0x7fc0), nan);
  const __m128i low = _mm256_castsi256_si128(kept), high = _mm256_extracti128_si256(kept, 1);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(low, high));
}
#else
TARGET INLINE Vector from_int8(const int8_t* p) {
  typedef int8_t Bytes __attribute__((vector_size(LANES)));
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, Vector);
}
TARGET INLINE Vector from_bf16(const uint16_t* p) {
  Vector v;
  for (int i = 0; i < LANES; i++) v[i] = widened(p[i]);
  return v;
}
TARGET INLINE void to_bf16(Vector v, uint16_t* p) {
  for (int i = 0; i < LANES; i++) p[i] = rounded(v[i]);
}
#endif

TARGET INLINE Vector from_fp32(const float* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

TARGET INLINE float sum(Vector v) {
  float lanes[LANES];
  std::memcpy(lanes, &v, sizeof v);
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}

template <int T, int R>
TARGET INLINE void accumulate(const Product& p, const int8_t* codes, int64_t k, Vector (&sums)[R][T]) {
  Vector weights[R];
  for (int r = 0; r < R; r++) weights[r] = from_int8(codes + r * p.columns + k);
  for (int t = 0; t < T; t++) {
    const Vector inputs = from_fp32(p.x + t * p.width + k);
    for (int r = 0; r < R; r++) sums[r][t] += weights[r] * inputs;
  }
}

// R rows for T tokens: every weight is read and converted once, every input once for R rows. What is fetched ahead is
// the next R rows, in the order of memory: R streams at once would not run at its full rate.
template <int T, int R>
TARGET INLINE void some_rows(const Product& p, int64_t row) {
  const int8_t* codes = p.codes + row * p.columns;
  Vector sums[R][T] = {};
  int64_t k = 0;
  for (; k + 64 <= p.columns; k += 64) {
    for (int r = 0; r < R; r++) __builtin_prefetch(codes + R * (p.columns + k) + r * 64);
    for (int i = 0; i < 64; i += LANES) accumulate<T, R>(p, codes, k + i, sums);
  }
  for (; k + LANES <= p.columns; k += LANES) accumulate<T, R>(p, codes, k, sums);
  for (int r = 0; r < R; r++) {
    const int64_t n = row + r;
    const float scale = p.wide_scales ? ((const float*)p.scales)[n] : widened(((const uint16_t*)p.scales)[n]);
    for (int t = 0; t < T; t++) {
      float total = sum(sums[r][t]);
      for (int64_t i = k; i < p.columns; i++) total += float(codes[r * p.columns + i]) * p.x[t * p.width + i];
      p.y[t * p.rows + n] = rounded(scale * total);
    }
  }
}

constexpr int together(int tokens) {
  return std::max(1, std::min(4, SUMS / tokens));
}

template <int T>
TARGET void product_of(const Product& p, int64_t first, int64_t last) {
  constexpr int R = together(T);
  int64_t row = first;
  for (; row + R <= last; row += R) some_rows<T, R>(p, row);
  for (; row < last; row++) some_rows<T, 1>(p, row);
}

template <int T, int R>
TARGET INLINE void some_outputs(const Addition& a, int64_t n) {
  Vector sums[T][R] = {};
  for (int64_t j = 0; j < a.k; j++) {
    Vector values[R];
    for (int r = 0; r < R; r++) values[r] = from_bf16(a.values + j * a.rows + n + r * LANES);
    for (int t = 0; t < T; t++)
      for (int r = 0; r < R; r++) sums[t][r] += values[r] * a.x[t * a.k + j];
  }
  for (int t = 0; t < T; t++)
    for (int r = 0; r < R; r++) {
      uint16_t* y = a.y + t * a.rows + n + r * LANES;
      to_bf16(from_bf16(y) + sums[t][r], y);
    }
}

template <int T>
TARGET void addition_of(const Addition& a, int64_t first, int64_t last) {
  constexpr int R = together(T);
  int64_t n = first;
  for (; n + R * LANES <= last; n += R * LANES) some_outputs<T, R>(a, n);
  for (; n + LANES <= last; n += LANES) some_outputs<T, 1>(a, n);
  for (; n < last; n++)
    for (int t = 0; t < T; t++) {
      float total = 0;
      for (int64_t j = 0; j < a.k; j++) total += widened(a.values[j * a.rows + n]) * a.x[t * a.k + j];
      uint16_t& y = a.y[t * a.rows + n];
      y = rounded(widened(y) + total);
    }
}

using ProductOf = void (*)(const Product&, int64_t, int64_t);
using AdditionOf = void (*)(const Addition&, int64_t, int64_t);
const ProductOf PRODUCTS[] = {product_of<1>, product_of<2>, product_of<3>, product_of<4>,
                              product_of<5>, product_of<6>, product_of<7>, product_of<8>};
const AdditionOf ADDITIONS[] = {addition_of<1>, addition_of<2>, addition_of<3>, addition_of<4>,
                                addition_of<5>, addition_of<6>, addition_of<7>, addition_of<8>};

void product(const Product& p, int tokens, int64_t first, int64_t last) {
  PRODUCTS[tokens - 1](p, first, last);
}

void add(const Addition& a, int tokens, int64_t first, int64_t last) {
  ADDITIONS[tokens - 1](a, first, last);
}

}  // namespace ISA

#undef ISA
#undef TARGET
#undef LANES
#undef SUMS

#endif
