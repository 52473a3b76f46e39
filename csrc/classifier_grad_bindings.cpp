// pyguide._C.classifier_grad: the classifier's gradient over raw addresses (classifier_grad.h). Arguments are parsed by
// hand: pybind11's dispatch of twenty of them would cost more than the kernel at 1,000 classes.
#include "classifier_grad_bindings.h"

#include <iterator>
#include <stdexcept>
#include <string>

#include "launch.h"

namespace pyguide {
namespace {

constexpr int64_t RELEASE_GIL = 1 << 18;  // elements, as in bindings.cpp

enum Argument {
  LOGITS,
  LOGITS_TYPE,
  BATCH,
  CLASSES,
  BATCH_STRIDE,
  CLASS_STRIDE,
  TARGET,
  DISTRIBUTION,
  WIDTH,
  TARGET_STRIDE,
  SCALE,
  SCALE_TYPE,
  SCALE_STRIDE,
  SAMPLES,
  FIRST,
  GRAD,
  LOG_PROB,
  CHECK,
  REQUIRED,
  THREADS = REQUIRED,
  DEVICE,
  STREAM,
  ARGUMENTS
};
const char* const NAMES[] = {"logits",       "logits_type",  "batch", "classes",       "batch_stride", "class_stride",
                             "target",       "distribution", "width", "target_stride", "scale",        "scale_type",
                             "scale_stride", "samples",      "first", "grad",          "log_prob",     "check",
                             "threads",      "device",       "stream"};
static_assert(std::size(NAMES) == ARGUMENTS);

struct PythonError {};  // an exception is set

// The arguments by position, then by name; absent optional ones are null.
struct Parsed {
  PyObject* given[ARGUMENTS] = {};

  Parsed(PyObject* const* values, Py_ssize_t count, PyObject* keywords) {
    const Py_ssize_t named = keywords ? PyTuple_GET_SIZE(keywords) : 0;
    if (count > ARGUMENTS) {
      PyErr_Format(PyExc_TypeError, "classifier_grad: got %zd arguments, expected at most %d", count, int(ARGUMENTS));
      throw PythonError();
    }
    for (Py_ssize_t i = 0; i < count; ++i) given[i] = values[i];
    for (Py_ssize_t i = 0; i < named; ++i) {
      PyObject* name = PyTuple_GET_ITEM(keywords, i);
      int at = 0;
      while (at < ARGUMENTS && PyUnicode_CompareWithASCIIString(name, NAMES[at])) ++at;
      if (at == ARGUMENTS || given[at]) {
        PyErr_Format(PyExc_TypeError, "classifier_grad: %s argument %R", at == ARGUMENTS ? "no such" : "twice the same",
                     name);
        throw PythonError();
      }
      given[at] = values[count + i];
    }
    for (int i = 0; i < REQUIRED; ++i) {
      if (given[i]) continue;
      PyErr_Format(PyExc_TypeError, "classifier_grad: argument %s is missing", NAMES[i]);
      throw PythonError();
    }
  }
  int64_t integer(Argument i, int64_t otherwise = 0) const {
    if (!given[i]) return otherwise;
    return number(i, &PyLong_AsLongLong, -1LL);
  }
  int64_t integer(Argument i, int64_t otherwise, int64_t low, int64_t high) const {
    const int64_t value = integer(i, otherwise);
    Launch::require(value, NAMES[i], low, high);
    return value;
  }
  template <class P>
  P* address(Argument i) const {
    return given[i] ? static_cast<P*>(number(i, &PyLong_AsVoidPtr, static_cast<void*>(nullptr))) : nullptr;
  }
  bool truth(Argument i) const {
    const int value = PyObject_IsTrue(given[i]);
    if (value < 0) throw PythonError();
    return value;
  }
  Type type(Argument i) const {
    if (!PyUnicode_Check(given[i])) {
      PyErr_Format(PyExc_TypeError, "%s: expected str, got %s", NAMES[i], Py_TYPE(given[i])->tp_name);
      throw PythonError();
    }
    const char* name = PyUnicode_AsUTF8(given[i]);
    if (!name) throw PythonError();
    return parse(name, NAMES[i], false);
  }

 private:
  // What `convert`, which returns `failed` with an exception set, makes of an int or of what has __index__: numpy's.
  template <class V>
  V number(Argument i, V (*convert)(PyObject*), V failed) const {
    PyObject* index = PyNumber_Index(given[i]);
    const V value = index ? convert(index) : failed;
    Py_XDECREF(index);
    if (value != failed || !PyErr_Occurred()) return value;
    if (PyErr_ExceptionMatches(PyExc_TypeError)) {
      PyErr_Format(PyExc_TypeError, "%s: expected int, got %s", NAMES[i], Py_TYPE(given[i])->tp_name);
    } else if (PyErr_ExceptionMatches(PyExc_OverflowError)) {
      PyErr_Format(PyExc_ValueError, "%s: expected an integer of 64 bits", NAMES[i]);
    }
    throw PythonError();
  }
};

// What an argument names in memory.
struct Extent {
  Argument name;
  Range range;

  // The bytes of `rows` by `columns` elements, none without an address; ValueError if no address could reach them.
  Extent(Argument name, const void* data, int64_t size, int64_t rows, int64_t row_stride, int64_t columns,
         int64_t column_stride)
      : name(name) {
    if (!data) return;
    const uintptr_t base = reinterpret_cast<uintptr_t>(data);
    const int64_t steps[] = {rows - 1, columns - 1}, strides[] = {row_stride, column_stride};
    int64_t lo = 0, hi = 1;
    bool far = false;
    for (int i = 0; i < 2; ++i) {
      int64_t reach, &end = (strides[i] < 0) ? lo : hi;
      far |= __builtin_mul_overflow(steps[i], strides[i], &reach) || __builtin_add_overflow(end, reach, &end);
    }
    far |= __builtin_mul_overflow(lo, size, &lo) || __builtin_mul_overflow(hi, size, &hi);
    far |= __builtin_add_overflow(base, lo, &range.lo) || __builtin_add_overflow(base, hi, &range.hi);
    if (far) throw std::invalid_argument(std::string(NAMES[name]) + ": reaches beyond what 64 bits can address");
  }
};

void check_overlaps(const ClassifierGradArgs& a) {
  const int64_t end = a.first + a.batch, columns = a.distribution ? a.classes : a.width;
  const int64_t logit = size_of(a.logits_type), real = size_of(a.scale_type), wanted = a.distribution ? real : 8;
  const Extent grad(GRAD, a.grad, logit, a.batch, a.classes, a.classes, 1);
  const Extent log_prob(LOG_PROB, a.log_prob, real, 1, 0, end, 1);
  const Extent written[] = {grad, log_prob};
  const Extent read[] = {{LOGITS, a.logits, logit, a.batch, a.batch_stride, a.classes, a.class_stride},
                         {TARGET, a.target, wanted, end, a.target_stride, columns, 1},
                         {SCALE, a.scale, real, 1, 0, end, 1},  // of row 0: how many there are is not known here
                         {SAMPLES, a.samples, int64_t(sizeof(Sample)), 1, 0, end, 1},
                         grad};
  for (const auto& w : written) {
    for (const auto& r : read) {
      if (w.name != r.name && w.range.overlaps(r.range))
        throw std::invalid_argument(std::string(NAMES[w.name]) + " overlaps " + NAMES[r.name] +
                                    ": what a launch writes must not share memory with what it reads");
    }
  }
}

ClassifierGradArgs arguments_of(const Parsed& p) {
  ClassifierGradArgs a{};
  a.batch = p.integer(BATCH, 0, 0, INT32_MAX);
  a.classes = p.integer(CLASSES, 0, 1, INT64_MAX);
  a.width = p.integer(WIDTH, 0, 1, INT64_MAX);
  a.first = p.integer(FIRST, 0, 0, INT64_MAX - INT32_MAX);
  a.threads = int32_t(p.integer(THREADS, 0, 0, 4096));
  a.logits_type = p.type(LOGITS_TYPE);
  a.scale_type = p.type(SCALE_TYPE);
  if (a.scale_type != F32 && a.scale_type != F64) {
    throw std::invalid_argument(std::string("scale_type: got \"") + PyUnicode_AsUTF8(p.given[SCALE_TYPE]) +
                                "\", expected float32 or float64");
  }
  a.batch_stride = p.integer(BATCH_STRIDE);
  a.class_stride = p.integer(CLASS_STRIDE);
  a.target_stride = p.integer(TARGET_STRIDE);
  a.scale_stride = p.integer(SCALE_STRIDE);
  a.distribution = p.truth(DISTRIBUTION);
  a.check = p.truth(CHECK);
  a.logits = p.address<const void>(LOGITS);
  a.target = p.address<const void>(TARGET);
  a.scale = p.address<const void>(SCALE);
  a.samples = p.address<Sample>(SAMPLES);
  a.grad = p.address<void>(GRAD);
  a.log_prob = p.address<void>(LOG_PROB);
  int64_t bytes;
  if (__builtin_mul_overflow(a.classes, 8 * (a.batch ? a.batch : 1), &bytes))
    throw std::invalid_argument("batch * classes: too large");
  if (a.distribution && a.width != a.classes)
    throw std::invalid_argument("width: got " + std::to_string(a.width) + ", expected " + std::to_string(a.classes) +
                                ": a distribution is one over all classes");
  if (a.batch == 0) return a;  // an empty tensor has no address
  const std::pair<Argument, const void*> needed[] = {
      {LOGITS, a.logits}, {TARGET, a.target}, {SCALE, a.scale}, {GRAD, a.grad}};
  for (const auto& [name, data] : needed) {
    if (!data) throw std::invalid_argument(std::string(NAMES[name]) + ": no address");
  }
  if (a.check && !a.samples) throw std::invalid_argument("samples: no address, and with check their flags are written");
  check_overlaps(a);
  return a;
}

// Other Python threads run while it lives; whatever ends it, the caller has the GIL again.
struct WithoutGil {
  PyThreadState* const thread = PyEval_SaveThread();
  WithoutGil() = default;
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;
  ~WithoutGil() { PyEval_RestoreThread(thread); }
};

PyObject* classifier_grad(PyObject*, PyObject* const* values, Py_ssize_t count, PyObject* keywords) {
  try {
    const Parsed parsed(values, count, keywords);
    const ClassifierGradArgs args = arguments_of(parsed);
    const int device = int(parsed.integer(DEVICE, -1, -1, INT32_MAX));
    void* stream = parsed.address<void>(STREAM);
    if (args.batch == 0) Py_RETURN_NONE;
    if (device >= 0) {
      cuda_classifier_grad(args, device, stream);
    } else if (args.batch * args.classes >= RELEASE_GIL) {
      const WithoutGil others;
      execute(args);
    } else {
      execute(args);
    }
    Py_RETURN_NONE;
  } catch (const PythonError&) {
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

}  // namespace

PyMethodDef classifier_grad_method = {
    "classifier_grad", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&classifier_grad)),
    METH_FASTCALL | METH_KEYWORDS,
    "classifier_grad(logits, logits_type, batch, classes, batch_stride, class_stride, target, distribution, width, "
    "target_stride, scale, scale_type, scale_stride, samples, first, grad, log_prob, check, threads=0, device=-1, "
    "stream=0): scale * d log p(y | x) / d logits and log p(y | x) of a batch, the formula of csrc/classifier_grad.h. "
    "Addresses are integers, strides count elements; logits and grad are of logits_type, scale, log_prob (0: none) and "
    "a distribution of scale_type, labels int64. Sample b of the batch is sample first + b in target, scale, log_prob "
    "and samples (0: all at row 0). device: -1, the CPU, or a GPU, on whose `stream` it is enqueued. ValueError names "
    "an argument that is not valid, before anything is written."};

}  // namespace pyguide
