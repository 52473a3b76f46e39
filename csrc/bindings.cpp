// pyguide._C: the packed step object over raw addresses. The caller owns all memory and keeps it alive; no torch header
// here. Everything a launch needs is checked before the first byte is written.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "classifier_grad_bindings.h"
#include "philox.h"
#include "step_bindings.h"

namespace py = pybind11;
using namespace pyguide;

namespace {

// The Step behind `self`; null with a Python exception set.
Step* step_of(PyObject* self, const char* name) {
  Step* step = static_cast<Step*>(reinterpret_cast<py::detail::instance*>(self)->simple_value_holder[0]);
  if (!step) PyErr_Format(PyExc_TypeError, "%s: the Step was not initialised", name);
  return step;
}
// The data of the outputs as called; false with a Python exception set.
bool set_outputs(Step& step, const char* name, PyObject* const* pointers, Py_ssize_t count) {
  StepArgs& args = step.args;
  if (count != 0 && count != 1 && count != args.branches) {
    PyErr_Format(PyExc_ValueError, "%s: got %zd addresses, expected 0, 1 or one for each of %d branches", name, count,
                 int(args.branches));
    return false;
  }
  void* data[MAX_BRANCHES];
  for (Py_ssize_t i = 0; i < count; ++i) {
    data[i] = PyLong_AsVoidPtr(pointers[i]);
    if (!data[i] && PyErr_Occurred()) return false;
  }
  if (!step.idle()) return false;
  for (int k = 0; count && k < args.branches; ++k) args.output[k].data = data[count == 1 ? 0 : k];
  return true;
}

// run(*ptrs) as METH_FASTCALL: pybind11's own dispatch would cost more than the rest of a small call.
PyObject* step_run(PyObject* self, PyObject* const* pointers, Py_ssize_t count) {
  Step* step = step_of(self, "run");
  if (!step || !set_outputs(*step, "run", pointers, count) || !step->launch(Work::ROW)) return nullptr;
  Py_RETURN_NONE;
}
bool has_moments(const Step& step, const char* name) {
  if (!step.before.weighs) PyErr_Format(PyExc_ValueError, "%s: set_moments() was not called", name);
  return step.before.weighs;
}
PyObject* step_moments(PyObject* self, PyObject* const* pointers, Py_ssize_t count) {
  Step* step = step_of(self, "moments");
  if (!step || !has_moments(*step, "moments") || !set_outputs(*step, "moments", pointers, count) ||
      !step->launch(Work::MOMENTS))
    return nullptr;
  Py_RETURN_NONE;
}
PyObject* enqueued(PyObject* self, const char* name, Work work, PyObject* const* pointers, Py_ssize_t count) {
  Step* step = step_of(self, name);
  if (!step || (work == Work::MOMENTS && !has_moments(*step, name))) return nullptr;
  if (!step->placement.placed()) {
    PyErr_Format(PyExc_ValueError, "%s: place() was not called: this Step runs on the CPU, where %s() is meant", name,
                 work == Work::MOMENTS ? "moments" : "run");
    return nullptr;
  }
  if (!set_outputs(*step, name, pointers, count) || !step->enqueue(work)) return nullptr;
  Py_RETURN_NONE;
}
PyObject* step_enqueue(PyObject* self, PyObject* const* pointers, Py_ssize_t count) {
  return enqueued(self, "enqueue", Work::ROW, pointers, count);
}
PyObject* step_enqueue_moments(PyObject* self, PyObject* const* pointers, Py_ssize_t count) {
  return enqueued(self, "enqueue_moments", Work::MOMENTS, pointers, count);
}
PyObject* step_refresh(PyObject* self, PyObject*) {
  Step* step = step_of(self, "refresh");
  if (!step || !step->idle() || !step->launch(Work::REFRESH)) return nullptr;
  Py_RETURN_NONE;
}
template <class F>
PyCFunction fastcall(F* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}
PyMethodDef step_methods[] = {
    {"run", fastcall(step_run), METH_FASTCALL,
     "run(*outputs): one row of every sample that is not at its end. No address: the outputs as set; one: the data of "
     "all outputs; K: the data of each. Raises ValueError before anything is written. On a GPU: one launch on "
     "`stream`, under the GIL: to hand it over costs more than the microseconds that a launch takes."},
    {"moments", fastcall(step_moments), METH_FASTCALL,
     "moments(*outputs): what run(*outputs) computes before the step, and no step: the moments and weights blocks of "
     "the samples, or their guided output. With own = False that is then not done again by run()."},
    {"enqueue", fastcall(step_enqueue), METH_FASTCALL,
     "enqueue(*outputs): one launch on a GPU, without a look at the host copies and without a change to them; the "
     "device's own rows decide what runs, and an absent output that a row reads is NaN. For captures. Under the GIL."},
    {"enqueue_moments", fastcall(step_enqueue_moments), METH_FASTCALL,
     "enqueue_moments(*outputs): moments(*outputs) as enqueue() has the rest: for captures."},
    {"refresh", step_refresh, METH_NOARGS,
     "refresh(): writes again the model input and timestep of the evaluation that is due, from the current s_0."},
};

template <class P, P StepArgs::* member>
void address(py::class_<Step>& c, const char* name, const char* doc) {
  c.def_property(
      name, [](const Step& s) { return reinterpret_cast<uintptr_t>(s.args.*member); },
      [](Step& s, uintptr_t value) { s.args.*member = reinterpret_cast<P>(value); }, doc);
}
template <Operand StepArgs::* member>
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

  py::class_<Step> c(
      m, "Step", py::module_local(),  // another build of this module may be loaded beside it
      "A launch over fixed sizes. Addresses are integers, strides count elements; the caller owns the memory.");
  c.def(py::init<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, const std::string&, const std::string&,
                 const std::string&, const std::string&>(),
        py::arg("batch"), py::arg("channels"), py::arg("inner"), py::arg("branches"), py::arg("slots"),
        py::arg("guidance_slots") = 0, py::arg("state_type") = "float32", py::arg("output_type") = "float32",
        py::arg("input_type") = "float32", py::arg("time_type") = "float32");
  address<void*, &StepArgs::state>(c, "state", "[slots][batch][channels * inner] of state_type");
  address<const void*, &StepArgs::tables>(c, "tables", "rows of every plan, state_type");
  address<const void*, &StepArgs::weights>(c, "weights", "guidance blocks, state_type");
  address<const void*, &StepArgs::bound>(c, "bound", "[batch] of state_type, 0: the row's clip; no address: none");
  address<Sample*, &StepArgs::samples>(c, "samples", "[batch] of pyguide.layout.SAMPLE");
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
      py::arg("branch") = 0,
      "learned variance, output_type (state_type with moments by groups), at the batch index of `branch`");
  c.def(
      "set_time", [](Step& s, int64_t k, uintptr_t data) { s.args.time[s.branch(k)] = reinterpret_cast<void*>(data); },
      py::arg("k"), py::arg("ptr"), "timesteps of branch k, time_type; no address: not written");
  c.def(
      "route",
      [](Step& s, uintptr_t source, uintptr_t target, int64_t stride) {
        Step::require(stride, "stride", 0, INT64_MAX);
        s.args.source = reinterpret_cast<const int32_t*>(source);
        s.args.target = reinterpret_cast<const int32_t*>(target);
        s.args.route_stride = stride;
      },
      py::arg("source"), py::arg("target"), py::arg("stride") = 0,
      "int32 [row][batch][branches]: batch index of each branch's output and input, -1: absent; rows `stride` elements "
      "apart, 0: one for all rows. On the host, also for a Step on a GPU");
  c.def(
      "place",
      [](Step& s, int device, uintptr_t samples, uintptr_t tables, uintptr_t weights, uintptr_t bound, uintptr_t source,
         uintptr_t target) {
        Step::require(device, "device", 0, INT32_MAX);
        if (s.args.batch > 0) {  // an empty tensor has no address
          if (!samples) throw py::value_error("samples: no address");
          if (!tables) throw py::value_error("tables: no address");
        }
        Placement& p = s.placement;
        p.device = device;
        p.samples = reinterpret_cast<Sample*>(samples);
        p.tables = reinterpret_cast<const void*>(tables);
        p.weights = reinterpret_cast<const void*>(weights);
        p.bound = reinterpret_cast<const void*>(bound);
        p.source = reinterpret_cast<const int32_t*>(source);
        p.target = reinterpret_cast<const int32_t*>(target);
      },
      py::arg("device"), py::arg("samples"), py::arg("tables"), py::arg("weights"), py::arg("bound"), py::arg("source"),
      py::arg("target"),
      "This Step runs on GPU `device`. The addresses there of what samples, tables, weights, bound and route() name on "
      "the host, where the checks read it; every other address is one of the device from now on");
  bind_moments(c);
  c.def_property(
      "stream", [](const Step& s) { return reinterpret_cast<uintptr_t>(s.placement.stream); },
      [](Step& s, uintptr_t value) { s.placement.stream = reinterpret_cast<void*>(value); },
      "cudaStream_t of the launches, 0: the default stream");
  c.def_property(
      "dependent_launch", [](const Step& s) { return s.placement.dependent_launch; },
      [](Step& s, bool value) { s.placement.dependent_launch = value; },
      "programmatic dependent launch, on devices of compute capability 9.0 and above");
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
    auto descriptor =
        py::reinterpret_steal<py::object>(PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(c.ptr()), &method));
    if (!descriptor) throw py::error_already_set();
    c.attr(method.ml_name) = descriptor;
  }

  m.def(
      "normals",
      [](uintptr_t to, const std::string& type, int64_t count, uint64_t seed, uint32_t ordinal, uint32_t tag,
         int64_t first) {
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
      "cuda_normals",
      [](int device, uintptr_t stream, uintptr_t to, const std::string& type, int64_t count, uint64_t seed,
         uint32_t ordinal, uint32_t tag, int64_t first) {
        Step::require(device, "device", 0, INT32_MAX);
        Step::require(count, "count", 0, INT64_MAX);
        Step::require(first, "first_element", 0, INT64_MAX - count);
        if (!to && count) throw py::value_error("ptr: no address");
        const Type parsed = parse(type, "type", false);
        cuda_normals(device, reinterpret_cast<void*>(stream), reinterpret_cast<void*>(to), parsed, first, count, seed,
                     ordinal, tag);
      },
      py::arg("device"), py::arg("stream"), py::arg("ptr"), py::arg("type"), py::arg("count"), py::arg("seed"),
      py::arg("ordinal"), py::arg("tag"), py::arg("first_element") = 0,
      "normals() to a device address, enqueued on `stream`.");
  m.attr("classifier_grad") =
      py::reinterpret_steal<py::object>(PyCFunction_NewEx(&classifier_grad_method, nullptr, m.attr("__name__").ptr()));
  m.def("cuda_reason", cuda_reason, "\"\" if this build has kernels for a GPU of this machine, else why not.");
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
  m.def(
      "set_isa", [](const std::string& name) { choose_kernel(find(name)); }, py::arg("name"),
      "Force an instruction set.");
  py::dict build;
#ifdef __VERSION__
  build["compiler"] = __VERSION__;
#endif
  build["flags"] = PG_BUILD_FLAGS;
  build["openmp"] = has_openmp();
  build["version"] = PG_VERSION;
  build["cuda"] = cuda_build();
  build["cuda_archs"] = cuda_archs();
  m.attr("build") = build;
}
