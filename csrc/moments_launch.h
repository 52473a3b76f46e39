// What a launch does before its step, as the caller set it: a guidance method's program and its arguments, checked when
// they are set, and the quantile of dynamic thresholding. No Python here.
#pragma once
#include <string.h>

#include <stdexcept>
#include <string>

#include "moments.h"
#include "quantile.h"

namespace pyguide {

struct BeforeStep {
  bool weighs = false, thresholds = false;  // moments are set; a quantile is
  bool own = true;                          // run() computes the moments, not only moments()
  bool placed = false;                      // `device` has addresses
  MomentsArgs host{}, device{};             // the latter: what place_moments gives
  const void* pattern = nullptr;            // a weights block with non-zeros where the program may write
  QuantileArgs quantile{};

  bool by_groups() const { return weighs && host.reduce > 0; }
  // Whether a launch sees to sample b's weights at this row.
  bool sees_to(int64_t row, bool refresh) const { return weighs && !refresh && row > 0; }

  [[noreturn]] static void refuse(const std::string& message) { throw std::invalid_argument(message); }
  static int32_t within(int64_t value, const std::string& name, int64_t low, int64_t high) {
    if (value < low || value > high) {
      refuse(name + ": got " + std::to_string(value) + ", expected " + std::to_string(low) + " to " +
             std::to_string(high));
    }
    return int32_t(value);
  }

  // From what pyguide.guidance.program packs: int32 vectors, parameters, operations, results, sums; then the operations
  // and the results. `groups`: results are w, o, and b and h of the method's own slots.
  static WeightsProgram parse(const std::string& bytes, const StepArgs& a, bool groups) {
    WeightsProgram p{};
    int32_t head[5];
    const int K = a.branches, S = a.slots, Sg = a.guidance_slots;
    if (bytes.size() < sizeof(head))
      refuse("program: got " + std::to_string(bytes.size()) + " bytes, expected 20 or more");
    memcpy(head, bytes.data(), sizeof(head));
    if (K + Sg > MAX_VECTORS)
      refuse("program: " + std::to_string(K + Sg) + " branches and own slots, expected at most " +
             std::to_string(MAX_VECTORS));
    p.vectors = within(head[0], "program: vectors", K + Sg, K + Sg);
    p.parameters = within(head[1], "program: parameters", OWN, MAX_PARAMETERS);
    p.operations = within(head[2], "program: operations", 0, MAX_OPERATIONS);
    p.results = within(head[3], "program: results", 0, MAX_RESULTS);
    p.sums = within(head[4], "program: sums", 0, 1);
    const size_t operations = size_t(p.operations) * sizeof(Operation), results = size_t(p.results) * sizeof(Result);
    if (bytes.size() != sizeof(head) + operations + results)
      refuse("program: got " + std::to_string(bytes.size()) + " bytes, expected " +
             std::to_string(sizeof(head) + operations + results));
    memcpy(p.operation, bytes.data() + sizeof(head), operations);
    memcpy(p.result, bytes.data() + sizeof(head) + operations, results);

    const int first = moments_count(p.vectors) + p.parameters, last = first + p.operations;
    for (int i = 0; i < p.operations; ++i) {
      const Operation& o = p.operation[i];
      const std::string name = "program: operation " + std::to_string(i);
      within(o.code, name + ": code", OP_ADD, OP_SELECT);
      for (int r : {o.a, o.b, o.c}) within(r, name + ": register", 0, first + i - 1);
    }
    const int64_t width = weights_width(K, S, Sg);
    for (int i = 0; i < p.results; ++i) {
      const Result& r = p.result[i];
      const std::string name = "program: result " + std::to_string(i);
      within(r.place, name + ": place", 0, width - 1);
      within(r.from, name + ": register", 0, last - 1);
      for (int j = 0; j < i; ++j) {
        if (p.result[j].place == r.place) refuse(name + ": place " + std::to_string(r.place) + " has a result already");
      }
      const bool v = r.place >= K && r.place < 2 * K;
      const bool solver = r.place >= 2 * K + S && r.place < 2 * K + S + (S - Sg) * K;
      if (groups && (v || solver))
        refuse(name + ": place " + std::to_string(r.place) + " is of the step, which has one block for all groups");
    }
    return p;
  }

  void set_groups(const StepArgs& a, int64_t outer, int64_t reduce, int64_t inner, void* guided,
                  const int32_t* guided_source) {
    int64_t elements;
    if (outer < 1 || inner < 1 || __builtin_mul_overflow(outer, reduce, &elements) ||
        __builtin_mul_overflow(elements, inner, &elements) || elements != a.channels * a.inner)
      refuse("outer, reduce, inner: got " + std::to_string(outer) + ", " + std::to_string(reduce) + ", " +
             std::to_string(inner) + ", expected a product of " + std::to_string(a.channels * a.inner));
    if (a.batch > 0 && !guided) refuse("guided: no address");
    if (a.batch > 0 && !guided_source) refuse("guided_source: no address");
    host.outer = outer;
    host.reduce = reduce;
    host.inner = inner;
    host.guided = guided;
    host.guided_source = guided_source;
  }

  // What a device reads: the host's arguments with addresses there.
  MomentsArgs on_device() const {
    MomentsArgs d = host;
    d.parameters = device.parameters;
    d.partial = device.partial;
    d.moments = device.moments;
    d.guided = device.guided;
    d.guided_source = device.guided_source;
    return d;
  }
};

}  // namespace pyguide
