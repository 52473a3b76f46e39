// A launch on the host side: sizes, addresses and overlaps are checked before the first byte is written, then the
// kernel runs, then timesteps and rows advance. A launch on a GPU is checked on host copies of what the kernel reads of
// samples, rows and routes; the kernel writes timesteps and advances its own rows. No Python here; errors are messages.
#pragma once
#include <math.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "../kernels/launch.h"
#include "cpu.h"
#include "moments_launch.h"
#include "view.h"

namespace pyguide {

struct Range {
  uintptr_t lo = 0, hi = 0;  // bytes [lo, hi), empty if equal
  bool overlaps(const Range& other) const { return lo < other.hi && other.lo < hi; }
};

inline Type parse(const std::string& name, const char* argument, bool integer) {
  if (name == "float32") return F32;
  if (name == "float64") return F64;
  if (integer && name == "int64") return I64;
  if (!integer && name == "float16") return F16;
  if (!integer && name == "bfloat16") return BF16;
  throw std::invalid_argument(std::string(argument) + ": got \"" + name + "\", expected " +
                              (integer ? "float32, float64 or int64" : "float32, float16, bfloat16 or float64"));
}

// What a launch does: a row of every sample, what comes before its step alone, or again the input that is due.
enum class Work { ROW, MOMENTS, REFRESH };

struct Launch {
  StepArgs args{};  // samples, tables, weights, bound, source and target on the host, whatever the device
  Placement placement;
  BeforeStep before;
  std::vector<int32_t> active, acting;  // samples that run; those of them whose weights come of moments
  std::string error;
  bool philox = false;  // a sample of this launch draws normals

  Launch(int64_t batch, int64_t channels, int64_t inner, int64_t branches, int64_t slots, int64_t guidance_slots,
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
      throw std::invalid_argument("batch * channels * inner: too large");
    args.batch = batch;
    args.channels = channels;
    args.inner = inner;
    args.branches = int32_t(branches);
    args.slots = int32_t(slots);
    args.guidance_slots = int32_t(guidance_slots);
    args.state_type = parse(state_type, "state_type", false);
    if (args.state_type != F32 && args.state_type != F64)
      throw std::invalid_argument("state_type: got \"" + state_type + "\", expected float32 or float64");
    args.output_type = parse(output_type, "output_type", false);
    args.input_type = parse(input_type, "input_type", false);
    args.time_type = parse(time_type, "time_type", true);
    active.reserve(size_t(batch));
    acting.reserve(size_t(batch));
  }

  static void require(int64_t value, const char* name, int64_t low, int64_t high) {
    if (value < low || value > high) {
      throw std::invalid_argument(std::string(name) + ": got " + std::to_string(value) + ", expected at least " +
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
    acting.clear();
    philox = false;
    if (a.batch == 0) return true;
    if (before.weighs && placement.placed() && !before.placed) return fail("moments: place_moments() was not called");
    if (!a.samples) return fail("samples: no address is set");
    struct Use {
      bool used = false;
      int64_t first = INT64_MAX, last = -1;
      void add(int64_t i) {
        used = true;
        first = i < first ? i : first;
        last = i > last ? i : last;
      }
    } outputs[MAX_BRANCHES], inputs[MAX_BRANCHES], variance, noise, gradient, denoised, guided;
    Program<T> p;
    for (int64_t b = 0; b < a.batch; ++b) {
      const Sample& s = a.samples[b];
      if (s.row == s.end || (refresh && s.row == 0)) continue;
      if (s.row < 0 || s.row > s.end)
        return fail(indexed("samples", b) + ".row: got " + std::to_string(s.row) +
                    ", expected 0 to end = " + std::to_string(s.end));
      if (s.slots < 1 || s.slots > a.slots - a.guidance_slots)
        return fail(indexed("samples", b) + ".slots: got " + std::to_string(s.slots) + ", expected 1 to " +
                    std::to_string(a.slots - a.guidance_slots));
      if (s.table < 0 || s.weights < 0) return fail(indexed("samples", b) + ": negative offset of table or weights");
      if (!a.tables) return fail("tables: no address is set");
      if (!a.state) return fail("state: no address is set");
      if (!a.weights && s.row > 0 && !refresh) return fail("weights: no address is set");
      const int64_t row = launch_row(s, refresh);
      const T* weights = weights_block<T>(a, s, row, refresh);
      uint32_t reads = 0;  // branches, besides those that the step reads
      const bool seen_to = before.sees_to(row, refresh), by_groups = seen_to && before.by_groups();
      if (seen_to) {
        if (s.method == 0)
          return fail(indexed("samples", b) +
                      ".method: got 0, expected 1: with moments a sample has one weights block");
        const bool acts = pyguide::acts(before.host, b, row);
        const T* block = static_cast<const T*>(acts ? before.pattern : a.weights);
        if (!acts) block += plain_block(before.host, b, row);
        for (int k = 0; k < K; ++k) reads |= uint32_t(acts || (by_groups && block[k] != T(0))) << k;
        if (acts) acting.push_back(int32_t(b));
        if (!by_groups) weights = block;
      }
      build(Alone{}, p, a, s, table_row<T>(a, s, row), weights,
            a.bound && !before.thresholds ? static_cast<const T*>(a.bound) + b : nullptr, refresh);
      active.push_back(int32_t(b));
      if (by_groups) {
        guided.add(b);
        const int32_t index = route(a, before.host.guided_source, b, row)[0];
        if (p.reads_m > 1 || (p.reads_m && index != b))
          return fail(indexed("guided_source", b) +
                      ": expected the sample's own index in branch 0, the only one with a weight");
      } else {
        reads |= p.reads_m;
      }
      if ((reads || p.needs.variance()) && !a.source) return fail("source: route() was not called");
      for (int k = 0; k < K; ++k) {
        if (reads >> k & 1) {
          const int32_t index = route(a, a.source, b, row)[k];
          if (index < 0)
            return fail(indexed("source", b) + indexed("", k) + ": a branch with non-zero weight is absent");
          outputs[k].add(index);
        }
        if (p.needs.input()) {
          if (!a.target) return fail("target: route() was not called");
          const int32_t index = route(a, a.target, b, row)[k];
          if (index >= 0) inputs[k].add(index);
        }
      }
      if (p.needs.variance()) {
        const int32_t* routes = by_groups ? before.host.guided_source : a.source;
        const int32_t index = route(a, routes, b, row)[a.variance_branch];
        if (index < 0) return fail(indexed("source", b) + ": the variance branch is absent");
        variance.add(index);
      }
      if (p.needs.noise() && a.noise.data) noise.add(b);
      philox |= p.needs.noise() && !a.noise.data;
      if (p.needs.gradient()) gradient.add(b);
      if (a.denoised.data && p.needs.denoised()) denoised.add(b);
    }
    if (active.empty()) return true;
    if (!acting.empty() && !before.by_groups() && !before.host.partial && !placement.placed())
      return fail("partial: no address is set");

    struct Named {
      const char* name;
      int index;
      Range range;
    } reads[MAX_BRANCHES + 3], writes[MAX_BRANCHES + 3];
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
    } optional[] = {{"variance", variance, a.variance, before.by_groups() ? a.state_type : a.output_type},
                    {"noise", noise, a.noise, a.state_type},
                    {"gradient", gradient, a.gradient, a.state_type}};
    for (const auto& o : optional) {
      if (!o.use.used) continue;
      if (!o.operand.data) return fail(std::string(o.name) + ": no address is set, and a row reads it");
      reads[read_count++] = {o.name, -1, range(o.operand, o.type, o.use.first, o.use.last)};
    }
    if (denoised.used)
      writes[write_count++] = {"denoised", -1, range(a.denoised, a.state_type, denoised.first, denoised.last)};
    if (guided.used) {
      void* data = placement.placed() ? before.device.guided : before.host.guided;
      const Operand o{data, a.channels * a.inner, a.inner, 1};
      writes[write_count++] = {"guided", -1, range(o, a.state_type, guided.first, guided.last)};
    }
    const uintptr_t state = reinterpret_cast<uintptr_t>(a.state);
    const int64_t N = a.channels * a.inner;
    writes[write_count++] = {"state", -1, {state, state + uintptr_t(a.slots * a.batch * N * int64_t(sizeof(T)))}};
    for (int i = 0; i < write_count; ++i) {
      for (int j = 0; j < read_count; ++j) {
        if (writes[i].range.overlaps(reads[j].range))
          return overlap(writes[i].name, writes[i].index, reads[j].name, reads[j].index);
      }
      for (int j = i < input_count ? input_count : i + 1; j < write_count; ++j) {  // inputs may share one tensor
        if (writes[i].range.overlaps(writes[j].range))
          return overlap(writes[i].name, writes[i].index, writes[j].name, writes[j].index);
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
      const int64_t row = launch_row(s, refresh);
      const double t = double(table_row<T>(a, s, row)[TIMESTEP]);
      for (int k = 0; k < a.branches; ++k) {
        const int32_t index = route(a, a.target, b, row)[k];
        if (index < 0 || !a.time[k]) continue;
        if (a.time_type == F32) static_cast<float*>(a.time[k])[index] = float(t);
        if (a.time_type == F64) static_cast<double*>(a.time[k])[index] = t;
        if (a.time_type == I64) static_cast<int64_t*>(a.time[k])[index] = llround(t);
      }
    }
  }

  // After check: the kernel, then what the host writes (timesteps, rows).
  void run(Work work) {
    const int64_t count = int64_t(active.size());
    if (work == Work::REFRESH || !(before.weighs || before.thresholds)) {
      execute(args, active.data(), count, work == Work::REFRESH, philox);
      return;
    }
    if (before.weighs && (before.own || work == Work::MOMENTS))
      execute(args, before.host, active.data(), count, acting.data(), int64_t(acting.size()));
    if (work == Work::MOMENTS) return;
    StepArgs a = before.by_groups() ? step_of_guided(args, before.host) : args;
    if (before.thresholds) {
      a.bound = before.quantile.bound;
      execute(a, before.quantile, active.data(), count);
    }
    execute(a, active.data(), count, false, philox);
  }
  void run_on_device(Work work) {
    const bool refresh = work == Work::REFRESH;
    if (refresh || !(before.weighs || before.thresholds)) {
      cuda_step(args, placement, refresh, nullptr, nullptr);
      return;
    }
    if (before.weighs && !before.placed) throw std::runtime_error("moments: place_moments() was not called");
    const bool weigh = before.weighs && (before.own || work == Work::MOMENTS);
    const MomentsArgs moments = before.on_device();
    Placement there = placement;
    if (before.thresholds) there.bound = before.quantile.bound;
    StepArgs a = args;
    if (before.by_groups() && !weigh) {  // the guided output is there already
      a = step_of_guided(args, moments);
      there.source = moments.guided_source;
    }
    const bool step = work == Work::ROW;
    cuda_step(a, there, false, weigh ? &moments : nullptr, step && before.thresholds ? &before.quantile : nullptr,
              step);
  }
  void finish(Work work) {
    const bool refresh = work == Work::REFRESH;
    if (work == Work::MOMENTS) return;
    if (!placement.placed()) args.state_type == F64 ? write_time<double>(refresh) : write_time<float>(refresh);
    if (refresh) return;
    for (int32_t b : active) args.samples[b].row += 1;
  }
  bool check(Work work) {
    const bool refresh = work == Work::REFRESH;
    return args.state_type == F64 ? check<double>(refresh) : check<float>(refresh);
  }
  int64_t elements() const { return int64_t(active.size()) * args.channels * args.inner; }
};

}  // namespace pyguide
