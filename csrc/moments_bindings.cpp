// pyguide._C.Step: what a launch does before its step, from Python's addresses.
#include <string>

#include "step_bindings.h"

namespace pyguide {
namespace {

namespace py = pybind11;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// A run in another thread reads what these set.
void need_idle(const Step& s) {
  if (!s.idle()) throw py::error_already_set();
}

void set_moments(Step& s, const py::bytes& program, uintptr_t parameters, int64_t row_stride, int64_t sample_stride,
                 int64_t plain, int64_t plain_row_stride, int64_t plain_sample_stride, uintptr_t pattern,
                 uintptr_t partial, uintptr_t moments, int64_t outer, int64_t reduce, int64_t inner, uintptr_t guided,
                 uintptr_t guided_source) {
  need_idle(s);
  const std::string bytes = program;
  BeforeStep before = s.before;
  before.weighs = before.placed = false;
  if (!bytes.empty()) {
    MomentsArgs& m = before.host;
    m = MomentsArgs{};
    Step::require(reduce, "reduce", 0, INT64_MAX);
    m.program = BeforeStep::parse(bytes, s.args, reduce > 0);
    if (s.args.batch > 0 && !parameters) throw py::value_error("parameters: no address");
    if (!pattern) throw py::value_error("pattern: no address");
    Step::require(row_stride, "row_stride", 0, INT64_MAX);
    Step::require(sample_stride, "sample_stride", 0, INT64_MAX);
    Step::require(plain, "plain", 0, INT64_MAX);
    Step::require(plain_row_stride, "plain_row_stride", 0, INT64_MAX);
    Step::require(plain_sample_stride, "plain_sample_stride", 0, INT64_MAX);
    m.parameters = pointer<const double>(parameters);
    m.row_stride = row_stride;
    m.sample_stride = sample_stride;
    m.plain = plain;
    m.plain_row_stride = plain_row_stride;
    m.plain_sample_stride = plain_sample_stride;
    m.partial = pointer<double>(partial);
    m.moments = pointer<double>(moments);
    before.pattern = pointer<const void>(pattern);
    if (reduce > 0) {
      if (m.program.results == 0) throw py::value_error("program: no results, expected some for each group");
      before.set_groups(s.args, outer, reduce, inner, pointer<void>(guided), pointer<const int32_t>(guided_source));
    }
    before.weighs = true;
  }
  s.before = before;
}

void place_moments(Step& s, uintptr_t parameters, uintptr_t partial, uintptr_t moments, uintptr_t guided,
                   uintptr_t guided_source) {
  need_idle(s);
  if (!s.before.weighs) throw py::value_error("place_moments: set_moments() was not called");
  if (s.args.batch > 0) {
    if (!parameters) throw py::value_error("parameters: no address");
    if (!partial && !s.before.by_groups()) throw py::value_error("partial: no address");
    if (!guided && s.before.by_groups()) throw py::value_error("guided: no address");
    if (!guided_source && s.before.by_groups()) throw py::value_error("guided_source: no address");
  }
  MomentsArgs& d = s.before.device;
  d.parameters = pointer<const double>(parameters);
  d.partial = pointer<double>(partial);
  d.moments = pointer<double>(moments);
  d.guided = pointer<void>(guided);
  d.guided_source = pointer<const int32_t>(guided_source);
  s.before.placed = true;
}

void set_quantile(Step& s, double quantile, double least, double limit, uintptr_t bound) {
  need_idle(s);
  const bool wanted = !(quantile < 0);
  if (wanted) {
    if (!(quantile <= 1)) throw py::value_error("quantile: got " + std::to_string(quantile) + ", expected 0 to 1");
    if (!(least > 0)) throw py::value_error("least: got " + std::to_string(least) + ", expected more than 0");
    if (!(limit >= least)) {
      throw py::value_error("limit: got " + std::to_string(limit) + ", expected at least " + std::to_string(least));
    }
    const int64_t elements = s.args.channels * s.args.inner;
    if (elements > int64_t(UINT32_MAX)) {
      throw py::value_error("quantile: a sample of " + std::to_string(elements) + " elements, expected less than 2^32");
    }
    if (s.args.batch > 0 && !bound) throw py::value_error("bound: no address");
    s.before.quantile = {quantile, least, limit, pointer<void>(bound)};
  }
  s.before.thresholds = wanted;
}

}  // namespace

void bind_moments(py::class_<Step>& c) {
  c.def(
      "set_moments", set_moments, py::arg("program"), py::arg("parameters"), py::arg("row_stride"),
      py::arg("sample_stride"), py::arg("plain"), py::arg("plain_row_stride"), py::arg("plain_sample_stride"),
      py::arg("pattern"), py::arg("partial"), py::arg("moments") = 0, py::arg("outer") = 0, py::arg("reduce") = 0,
      py::arg("inner") = 0, py::arg("guided") = 0, py::arg("guided_source") = 0,
      "Each launch computes the weights block of every sample at samples[b].weights first: from the moments of its "
      "branches by `program` (csrc/moments.h) where parameters[row * row_stride + b * sample_stride] is not 0, else a "
      "copy of the block at plain + row * plain_row_stride + b * plain_sample_stride of the weights. pattern: one "
      "block with non-zeros where the program may write, for the checks. partial: float64 [batch][chunks][moments] of "
      "scratch; moments: None or float64 [batch][moments], where they are kept. reduce > 0: by groups, to guided "
      "[batch][N] of state_type, which the step reads at guided_source as its only branch. For a Step on a GPU too the "
      "checks read parameters, pattern and guided_source on the host. An empty program removes it");
  c.def("place_moments", place_moments, py::arg("parameters"), py::arg("partial"), py::arg("moments") = 0,
        py::arg("guided") = 0, py::arg("guided_source") = 0, "The addresses on the GPU of what set_moments() names");
  c.def(
      "clear_moments",
      [](Step& s) {
        need_idle(s);
        s.before.weighs = s.before.placed = false;
      },
      "No moments from now on");
  c.def("set_quantile", set_quantile, py::arg("quantile"), py::arg("least"), py::arg("limit"), py::arg("bound"),
        "Each launch first writes min(max(quantile of |D|, least), limit) of every sample to bound [batch] of "
        "state_type, where the step reads it. On a GPU an address there. A negative quantile removes it");
  c.def_property(
      "own", [](const Step& s) { return s.before.own; },
      [](Step& s, bool value) {
        need_idle(s);
        s.before.own = value;
      },
      "run() and enqueue() compute the moments; if not, only moments() does. With both, slots of a method by groups "
      "would "
      "advance twice");
}

}  // namespace pyguide
