// pyguide._C: the packed step object over raw addresses. The caller owns all memory and keeps it alive; no torch header here.
// Everything a launch needs is checked before the first byte is written.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "cpu.h"
#include "philox.h"

namespace py = pybind11;
using namespace pyguide;

namespace {

// Above this many elements the GIL is released during the kernel. Below, handing it over costs more than the kernel: a thread
// that wants it back may wait a whole switch interval (5 ms).
constexpr int64_t RELEASE_GIL = 1 << 18;

struct Range {
  uintptr_t lo = 0, hi = 0;  // bytes [lo, hi), empty if equal
  bool overlaps(const Range& other) const { return lo < other.hi && other.lo < hi; }
};

Type parse(const std::string& name, const char* argument, bool integer) {
  if (name == "float32") return F32;
  if (name == "float64") return F64;
  if (integer && name == "int64") return I64;
  if (!integer && name == "float16") return F16;
  if (!integer && name == "bfloat16") return BF16;
  throw py::value_error(std::string(argument) + ": got \"" + name + "\", expected " +
                        (integer ? "float32, float64 or int64" : "float32, float16, bfloat16 or float64"));
}
int64_t size_of(Type type) { return type == F32 ? 4 : type == F64 || type == I64 ? 8 : 2; }

struct Step {
  StepArgs args{};
  std::vector<int32_t> active;
  std::string error;

  Step(int64_t batch, int64_t channels, int64_t inner, int64_t branches, int64_t slots, int64_t guidance_slots,
       const std::string& state_type, const std::string& output_type, const std::string& input_type,
       const std::string& time_type) {
    require(batch, "batch", 0, INT32_MAX);
    require(channels, "channels", 1, INT64_MAX);
    require(inner, "inner", 1, INT64_MAX);
    require(branches, "branches", 1, MAX_BRANCHES);
    require(slots, "slots", 1, MAX_SLOTS);
    require(guidance_slots, "guidance_slots", 0, slots - 1);
    int64_t elements;
    if (__builtin_mul_overflow(channels, inner, &elements) || __builtin_mul_overflow(elements, slots * 8, &elements) ||
        (batch && __builtin_mul_overflow(elements, batch, &elements)))
      throw py::value_error("batch * channels * inner: too large");
    args.batch = batch;
    args.channels = channels;
    args.inner = inner;
    args.branches = int32_t(branches);
    args.slots = int32_t(slots);
    args.guidance_slots = int32_t(guidance_slots);
    args.state_type = parse(state_type, "state_type", false);
    if (args.state_type != F32 && args.state_type != F64)
      throw py::value_error("state_type: got \"" + state_type + "\", expected float32 or float64");
    args.output_type = parse(output_type, "output_type", false);
    args.input_type = parse(input_type, "input_type", false);
    args.time_type = parse(time_type, "time_type", true);
    active.reserve(size_t(batch));
  }

  static void require(int64_t value, const char* name, int64_t low, int64_t high) {
    if (value < low || value > high) {
      throw py::value_error(std::string(name) + ": got " + std::to_string(value) + ", expected at least " +
                            std::to_string(low) + (high < INT32_MAX ? ", at most " + std::to_string(high) : ""));
    }
  }
  int branch(int64_t k) const {
    require(k, "branch", 0, args.branches - 1);
    return int(k);
  }

  bool fail(const std::string& message) {
    error = message;
    return false;
  }
  static std::string indexed(const char* name, int64_t i) { return std::string(name) + "[" + std::to_string(i) + "]"; }

  // Bytes that an operand spans for batch indices first .. last.
  Range range(const Operand& o, Type type, int64_t first, int64_t last) const {
    int64_t lo = 0, hi = 0;
    const int64_t reach[2] = {(args.channels - 1) * o.channel_stride, (args.inner - 1) * o.inner_stride};
    for (int64_t r : reach) (r < 0 ? lo : hi) += r;
    const int64_t a = first * o.batch_stride, b = last * o.batch_stride;
    lo += a < b ? a : b;
    hi += a < b ? b : a;
    const uintptr_t base = reinterpret_cast<uintptr_t>(o.data);
    return {base + uintptr_t(lo * size_of(type)), base + uintptr_t((hi + 1) * size_of(type))};
  }

  // Which samples run, what they read and write: pointers present, indices in range, nothing written that is also read
  // elsewhere. False with `error` set.
  template <class T>
  bool check(bool refresh) {
    const StepArgs& a = args;
    const int K = a.branches;
    active.clear();
    if (a.batch == 0) return true;
    if (!a.samples) return fail("samples: no address is set");
    struct Use {
      bool used = false;
      int64_t first = INT64_MAX, last = -1;
      void add(int64_t i) {
        used = true;
        first = i < first ? i : first;
        last = i > last ? i : last;
      }
    } outputs[MAX_BRANCHES], inputs[MAX_BRANCHES], variance, noise, gradient, denoised;
    Program<T> p;
    for (int64_t b = 0; b < a.batch; ++b) {
      const Sample& s = a.samples[b];
      if (s.row == s.end || (refresh && s.row == 0)) continue;
      if (s.row < 0 || s.row > s.end)
        return fail(indexed("samples", b) + ".row: got " + std::to_string(s.row) + ", expected 0 to end = " +
                    std::to_string(s.end));
      if (s.slots < 1 || s.slots > a.slots - a.guidance_slots)
        return fail(indexed("samples", b) + ".slots: got " + std::to_string(s.slots) + ", expected 1 to " +
                    std::to_string(a.slots - a.guidance_slots));
      if (s.table < 0 || s.weights < 0) return fail(indexed("samples", b) + ": negative offset of table or weights");
      if (!a.tables) return fail("tables: no address is set");
      if (!a.state) return fail("state: no address is set");
      if (!a.weights && s.row > 0 && !refresh) return fail("weights: no address is set");
      build(p, a, b, refresh);
      active.push_back(int32_t(b));
      if ((p.reads_m || p.variance) && !a.source) return fail("source: route() was not called");
      for (int k = 0; k < K; ++k) {
        if (p.reads_m >> k & 1) {
          const int32_t index = a.source[b * K + k];
          if (index < 0) return fail(indexed("source", b) + indexed("", k) + ": a branch with non-zero weight is absent");
          outputs[k].add(index);
        }
        if (p.input) {
          if (!a.target) return fail("target: route() was not called");
          const int32_t index = a.target[b * K + k];
          if (index >= 0) inputs[k].add(index);
        }
      }
      if (p.variance) {
        const int32_t index = a.source[b * K + a.variance_branch];
        if (index < 0) return fail(indexed("source", b) + ": the variance branch is absent");
        variance.add(index);
      }
      if (p.noise && a.noise.data) noise.add(b);
      if (p.gradient) gradient.add(b);
      if (a.denoised.data && p.denoised) denoised.add(b);
    }
    if (active.empty()) return true;

    struct Named {
      const char* name;
      int index;
      Range range;
    } reads[MAX_BRANCHES + 3], writes[MAX_BRANCHES + 2];
    int read_count = 0, write_count = 0;
    for (int k = 0; k < K; ++k) {
      if (outputs[k].used) {
        if (!a.output[k].data) return fail(indexed("output", k) + ": no address is set, and a row reads it");
        reads[read_count++] = {"output", k, range(a.output[k], a.output_type, outputs[k].first, outputs[k].last)};
      }
      if (inputs[k].used) {
        if (!a.input[k].data) return fail(indexed("input", k) + ": no address is set, and a row writes it");
        writes[write_count++] = {"input", k, range(a.input[k], a.input_type, inputs[k].first, inputs[k].last)};
      }
    }
    const int input_count = write_count;
    struct {
      const char* name;
      const Use& use;
      const Operand& operand;
      Type type;
    } optional[] = {{"variance", variance, a.variance, a.output_type},
                    {"noise", noise, a.noise, a.state_type},
                    {"gradient", gradient, a.gradient, a.state_type}};
    for (const auto& o : optional) {
      if (!o.use.used) continue;
      if (!o.operand.data) return fail(std::string(o.name) + ": no address is set, and a row reads it");
      reads[read_count++] = {o.name, -1, range(o.operand, o.type, o.use.first, o.use.last)};
    }
    if (denoised.used) writes[write_count++] = {"denoised", -1, range(a.denoised, a.state_type, denoised.first, denoised.last)};
    const uintptr_t state = reinterpret_cast<uintptr_t>(a.state);
    const int64_t N = a.channels * a.inner;
    writes[write_count++] = {"state", -1, {state, state + uintptr_t(a.slots * a.batch * N * int64_t(sizeof(T)))}};
    for (int i = 0; i < write_count; ++i) {
      for (int j = 0; j < read_count; ++j) {
        if (writes[i].range.overlaps(reads[j].range)) return overlap(writes[i].name, writes[i].index, reads[j].name, reads[j].index);
      }
      for (int j = i < input_count ? input_count : i + 1; j < write_count; ++j) {  // inputs may share one tensor
        if (writes[i].range.overlaps(writes[j].range)) return overlap(writes[i].name, writes[i].index, writes[j].name, writes[j].index);
      }
    }
    return true;
  }
  bool overlap(const char* a, int i, const char* b, int j) {
    return fail((i < 0 ? std::string(a) : indexed(a, i)) + " overlaps " + (j < 0 ? std::string(b) : indexed(b, j)) +
                ": what a launch writes must not share memory with what it reads");
  }

  template <class T>
  void write_time(bool refresh) {
    const StepArgs& a = args;
    for (int32_t b : active) {
      const Sample& s = a.samples[b];
      if (!refresh && s.row + 1 >= s.end) continue;
      const int64_t row = s.row - (refresh ? 1 : 0);
      const double t = double(static_cast<const T*>(a.tables)[s.table + row * row_width(s.slots) + TIMESTEP]);
      for (int k = 0; k < a.branches; ++k) {
        const int32_t index = a.target[int64_t(b) * a.branches + k];
        if (index < 0 || !a.time[k]) continue;
        if (a.time_type == F32) static_cast<float*>(a.time[k])[index] = float(t);
        if (a.time_type == F64) static_cast<double*>(a.time[k])[index] = t;
        if (a.time_type == I64) static_cast<int64_t*>(a.time[k])[index] = llround(t);
      }
    }
  }

  bool launch(bool refresh) {
    const bool wide = args.state_type == F64;
    if (!(wide ? check<double>(refresh) : check<float>(refresh))) return false;
    if (active.empty()) return true;
    const int64_t count = int64_t(active.size());
    if (count * args.channels * args.inner >= RELEASE_GIL) {
      py::gil_scoped_release release;
      execute(args, active.data(), count, refresh);
    } else {
      execute(args, active.data(), count, refresh);
    }
    wide ? write_time<double>(refresh) : write_time<float>(refresh);
    if (!refresh) {
      for (int32_t b : active) args.samples[b].row += 1;
    }
    return true;
  }
};

// run(*ptrs) as METH_FASTCALL: pybind11's own dispatch would cost more than the rest of a small call.
PyObject* step_run(PyObject* self, PyObject* const* pointers, Py_ssize_t count) {
  Step* step = static_cast<Step*>(reinterpret_cast<py::detail::instance*>(self)->simple_value_holder[0]);
  if (!step) {
    PyErr_SetString(PyExc_TypeError, "run: the Step was not initialised");
    return nullptr;
  }
  StepArgs& args = step->args;
  if (count != 0 && count != 1 && count != args.branches) {
    return PyErr_Format(PyExc_ValueError, "run: got %zd addresses, expected 0, 1 or one for each of %d branches", count,
                        int(args.branches));
  }
  void* data[MAX_BRANCHES];
  for (Py_ssize_t i = 0; i < count; ++i) {
    data[i] = PyLong_AsVoidPtr(pointers[i]);
    if (!data[i] && PyErr_Occurred()) return nullptr;
  }
  for (int k = 0; count && k < args.branches; ++k) args.output[k].data = data[count == 1 ? 0 : k];
  if (!step->launch(false)) {
    PyErr_SetString(PyExc_ValueError, step->error.c_str());
    return nullptr;
  }
  Py_RETURN_NONE;
}
PyObject* step_refresh(PyObject* self, PyObject*) {
  Step* step = static_cast<Step*>(reinterpret_cast<py::detail::instance*>(self)->simple_value_holder[0]);
  if (!step) {
    PyErr_SetString(PyExc_TypeError, "refresh: the Step was not initialised");
    return nullptr;
  }
  if (!step->launch(true)) {
    PyErr_SetString(PyExc_ValueError, step->error.c_str());
    return nullptr;
  }
  Py_RETURN_NONE;
}
PyMethodDef step_methods[] = {
    {"run", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(step_run)), METH_FASTCALL,
     "run(*outputs): one row of every sample that is not at its end. No address: the outputs as set; one: the data of all "
     "outputs; K: the data of each. Raises ValueError before anything is written."},
    {"refresh", step_refresh, METH_NOARGS,
     "refresh(): writes again the model input and timestep of the evaluation that is due, from the current s_0."},
};

template <class P, P StepArgs::*member>
void address(py::class_<Step>& c, const char* name, const char* doc) {
  c.def_property(
      name, [](const Step& s) { return reinterpret_cast<uintptr_t>(s.args.*member); },
      [](Step& s, uintptr_t value) { s.args.*member = reinterpret_cast<P>(value); }, doc);
}
template <Operand StepArgs::*member>
void operand(py::class_<Step>& c, const char* name, const char* doc) {
  c.def(
      name,
      [](Step& s, uintptr_t data, int64_t batch_stride, int64_t channel_stride, int64_t inner_stride) {
        s.args.*member = {reinterpret_cast<void*>(data), batch_stride, channel_stride, inner_stride};
      },
      py::arg("ptr"), py::arg("batch_stride") = 0, py::arg("channel_stride") = 0, py::arg("inner_stride") = 0, doc);
}
template <Operand (StepArgs::*member)[MAX_BRANCHES]>
void branch_operand(py::class_<Step>& c, const char* name, const char* doc) {
  c.def(
      name,
      [](Step& s, int64_t k, uintptr_t data, int64_t batch_stride, int64_t channel_stride, int64_t inner_stride) {
        (s.args.*member)[s.branch(k)] = {reinterpret_cast<void*>(data), batch_stride, channel_stride, inner_stride};
      },
      py::arg("k"), py::arg("ptr"), py::arg("batch_stride"), py::arg("channel_stride"), py::arg("inner_stride"), doc);
}

const Kernel* find(const std::string& name) {
  std::string known;
  for (int i = 0; i < kernel_count(); ++i) {
    if (name == kernel_at(i)->name) return kernel_at(i);
    known += (i ? ", " : "") + std::string(kernel_at(i)->name);
  }
  throw py::value_error("isa: got \"" + name + "\", expected one of " + known);
}

#ifndef PG_BUILD_FLAGS
#define PG_BUILD_FLAGS ""
#endif
#ifndef PG_VERSION
#define PG_VERSION "unknown"
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "pyguide's native core: one row of the sampler over raw addresses. pyguide.native is its Python side.";
  m.attr("ABI") = pyguide::ABI;
  m.attr("MAX_BRANCHES") = MAX_BRANCHES;
  m.attr("MAX_SLOTS") = MAX_SLOTS;

  py::class_<Step> c(m, "Step", "A launch over fixed sizes. Addresses are integers, strides count elements; the caller owns the memory.");
  c.def(py::init<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, const std::string&, const std::string&,
                 const std::string&, const std::string&>(),
        py::arg("batch"), py::arg("channels"), py::arg("inner"), py::arg("branches"), py::arg("slots"),
        py::arg("guidance_slots") = 0, py::arg("state_type") = "float32", py::arg("output_type") = "float32",
        py::arg("input_type") = "float32", py::arg("time_type") = "float32");
  address<void*, &StepArgs::state>(c, "state", "[slots][batch][channels * inner] of state_type");
  address<const void*, &StepArgs::tables>(c, "tables", "rows of every plan, state_type");
  address<const void*, &StepArgs::weights>(c, "weights", "guidance blocks, state_type");
  address<const void*, &StepArgs::bound>(c, "bound", "[batch] of state_type, 0: the row's clip; no address: none");
  address<Sample*, &StepArgs::samples>(c, "samples", "[batch] of pyguide.native.SAMPLE");
  branch_operand<&StepArgs::output>(c, "set_output", "model output of branch k, output_type");
  branch_operand<&StepArgs::input>(c, "set_input", "model input of branch k, input_type");
  operand<&StepArgs::gradient>(c, "set_gradient", "classifier gradient, state_type");
  operand<&StepArgs::noise>(c, "set_noise", "noise instead of Philox, state_type");
  operand<&StepArgs::denoised>(c, "set_denoised", "where D goes, state_type; no address: nowhere");
  c.def(
      "set_variance",
      [](Step& s, uintptr_t data, int64_t batch_stride, int64_t channel_stride, int64_t inner_stride, int64_t k) {
        s.args.variance_branch = s.branch(k);
        s.args.variance = {reinterpret_cast<void*>(data), batch_stride, channel_stride, inner_stride};
      },
      py::arg("ptr"), py::arg("batch_stride") = 0, py::arg("channel_stride") = 0, py::arg("inner_stride") = 0,
      py::arg("branch") = 0, "learned variance, output_type, at the batch index of `branch`");
  c.def(
      "set_time", [](Step& s, int64_t k, uintptr_t data) { s.args.time[s.branch(k)] = reinterpret_cast<void*>(data); },
      py::arg("k"), py::arg("ptr"), "timesteps of branch k, time_type; no address: not written");
  c.def(
      "route",
      [](Step& s, uintptr_t source, uintptr_t target) {
        s.args.source = reinterpret_cast<const int32_t*>(source);
        s.args.target = reinterpret_cast<const int32_t*>(target);
      },
      py::arg("source"), py::arg("target"), "int32 [batch][branches]: batch index of each branch's output and input, -1: absent");
  c.def_property(
      "check", [](const Step& s) { return s.args.check != 0; }, [](Step& s, bool value) { s.args.check = value; },
      "set NONFINITE in a sample's flags when a written s_0 is not finite");
  c.def_property(
      "threads", [](const Step& s) { return s.args.threads; },
      [](Step& s, int64_t value) {
        Step::require(value, "threads", 0, 4096);
        s.args.threads = int32_t(value);
      },
      "0: as many as OpenMP allows and the size pays for");
  for (PyMethodDef& method : step_methods) {
    auto descriptor = py::reinterpret_steal<py::object>(PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(c.ptr()), &method));
    if (!descriptor) throw py::error_already_set();
    c.attr(method.ml_name) = descriptor;
  }

  m.def(
      "normals",
      [](uintptr_t to, const std::string& type, int64_t count, uint64_t seed, uint32_t ordinal, uint32_t tag, int64_t first) {
        Step::require(count, "count", 0, INT64_MAX);
        Step::require(first, "first_element", 0, INT64_MAX);
        if (!to && count) throw py::value_error("ptr: no address");
        const Type parsed = parse(type, "type", false);
        py::gil_scoped_release release;
        current_kernel()->normals(reinterpret_cast<void*>(to), parsed, first, count, seed, ordinal, tag);
      },
      py::arg("ptr"), py::arg("type"), py::arg("count"), py::arg("seed"), py::arg("ordinal"), py::arg("tag"),
      py::arg("first_element") = 0, "Standard normals of elements first_element .. of one sample's stream.");
  m.def(
      "philox",
      [](std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key, int rounds) {
        Step::require(rounds, "rounds", 0, 64);
        philox4x32(counter.data(), key[0], key[1], rounds);
        return py::make_tuple(counter[0], counter[1], counter[2], counter[3]);
      },
      py::arg("counter"), py::arg("key"), py::arg("rounds") = 10, "Philox4x32.");
  m.def("isa", [] { return std::string(current_kernel()->name); }, "The instruction set in use.");
  m.def(
      "isas",
      [] {
        std::vector<std::string> names;
        for (int i = 0; i < kernel_count(); ++i) names.push_back(kernel_at(i)->name);
        return names;
      },
      "The instruction sets that this build has and this machine runs, slowest first.");
  m.def("set_isa", [](const std::string& name) { choose_kernel(find(name)); }, py::arg("name"), "Force an instruction set.");
  py::dict build;
#ifdef __VERSION__
  build["compiler"] = __VERSION__;
#endif
  build["flags"] = PG_BUILD_FLAGS;
  build["openmp"] = has_openmp();
  build["version"] = PG_VERSION;
  m.attr("build") = build;
}
