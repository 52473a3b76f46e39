// kernels/launch.h on the host: the kernels of the .cuh files over simulated blocks and threads, in place of the .cu
// files. Blocks run one after another in an order that a seed shuffles, the threads of a block as fibers. "Device"
// memory is the host's. Shared memory is poisoned before each block; an asynchronous copy arrives at the wait.
#include <string.h>

#include <mutex>

#include "../../kernels/classifier_grad.cuh"
#include "../../kernels/geometry.h"
#include "../../kernels/quantile.cuh"
#include "fibers.h"

namespace pyguide {
namespace {

constexpr int64_t SHARED_BYTES = 99 << 10;  // that a block can have on every device of compute capability 8.0 and above
constexpr int64_t PROCESSOR_BYTES = 100 << 10, RESERVED_BYTES = 1 << 10;  // of a multiprocessor, of a block
constexpr unsigned char BEHIND = 0xa5;                                    // what lies behind a block's shared memory

enum Counter { BULK_LOADS, BULK_STORES, BULK_COPIES, SMALL_COPIES, LOADS, STORES, BLOCKS, LAUNCHES, COUNTERS };

struct Simulator {
  std::mutex mutex;
  simulated::Random random{0};
  simulated::Fibers fibers;
  int processors = 2;     // few, so that blocks have several tiles
  bool separate = false;  // moments and step are two launches even where one would do
  uint64_t counters[COUNTERS] = {};

  Processors device() const { return {processors, PROCESSOR_BYTES, RESERVED_BYTES}; }
  // body(thread, its block's shared memory of `bytes`) for every thread of every block.
  template <class F>
  void launch(int64_t blocks, int threads, int64_t bytes, const F& body);
};
Simulator& simulator() {
  static Simulator one;
  return one;
}

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

class HostThread {
 public:
  HostThread(int index, int count, int64_t block) : index_(index), count_(count), block_(block) {}
  int index() const { return index_; }
  int count() const { return count_; }
  uint32_t block() const { return uint32_t(block_); }
  void sync() const { meet(simulated::Fibers::BLOCK); }
  void warp_sync() const { meet(simulated::Fibers::WARP); }
  uint64_t warp_or(uint64_t x) const { return meet(simulated::Fibers::OR, x); }
  template <class X>
  X exchange(X x, int mask) const {
    uint64_t bits = 0;
    memcpy(&bits, &x, sizeof x);
    bits = meet(simulated::Fibers::EXCHANGE + __builtin_ctz(unsigned(mask)), bits);
    memcpy(&x, &bits, sizeof x);
    return x;
  }
  uint32_t neighbour(uint32_t x) const { return exchange(x, 1); }
  template <class X>
  X load(const X* p) const {
    simulator().counters[LOADS]++;
    X x;
    memcpy(&x, p, sizeof x);
    return x;
  }
  template <class X>
  void store(X* p, X x) const {
    simulator().counters[STORES]++;
    memcpy(p, &x, sizeof x);
  }
  Sample load_sample(const Sample* p) const { return load(p); }
  Words16 load16(const void* p) const {
    need(p, 16);
    simulator().counters[BULK_LOADS]++;
    Words16 w;
    memcpy(&w, p, 16);
    return w;
  }
  void store16(void* p, const Words16& w) const { store_bulk(p, w, 16); }
  void store8(void* p, const Words16& w) const { store_bulk(p, w, 8); }
  void copy16(void* to, const void* from) const { copy(to, from, 16, BULK_COPIES); }
  void copy8(void* to, const void* from) const { copy(to, from, 8, SMALL_COPIES); }
  void copy4(void* to, const void* from) const { copy(to, from, 4, SMALL_COPIES); }
  void wait() const {
    for (const Copy& c : copies_) memcpy(c.to, c.from, c.bytes);
    copies_.clear();
  }
  uint32_t arrive(int32_t* p, uint32_t last) const {
    const uint32_t old = uint32_t(*p);
    *p = old >= last ? 0 : int32_t(old + 1);
    return old;
  }
  void fence() const {}
  void set_bits(int32_t* p, int32_t mask) const { *p |= mask; }
  uint32_t add(uint32_t* p, uint32_t x) const {
    *p += x;
    return *p - x;
  }

 private:
  static uint64_t meet(int meeting, uint64_t value = 0) { return simulator().fibers.meet(meeting, value); }
  static void need(const void* p, int64_t bytes) {
    if (!aligned(p, bytes)) throw std::runtime_error("simulated: misaligned access of " + std::to_string(bytes));
  }
  static void store_bulk(void* p, const Words16& w, int bytes) {
    need(p, bytes);
    simulator().counters[BULK_STORES]++;
    memcpy(p, &w, size_t(bytes));
  }
  void copy(void* to, const void* from, int bytes, Counter counter) const {
    need(to, bytes);
    need(from, bytes);
    simulator().counters[counter]++;
    copies_.push_back({to, from, size_t(bytes)});
  }
  int index_, count_;
  int64_t block_;
  mutable std::vector<Copy> copies_;
};

template <class F>
void Simulator::launch(int64_t blocks, int threads, int64_t bytes, const F& body) {
  if (blocks < 1 || blocks > INT32_MAX) throw std::runtime_error("simulated: " + std::to_string(blocks) + " blocks");
  if (bytes > SHARED_BYTES) throw std::runtime_error("simulated: too much shared memory");
  counters[LAUNCHES]++;
  std::vector<int64_t> order;
  for (int64_t i = 0; i < blocks; ++i) order.push_back(i);
  random.shuffle(order);
  std::vector<Words16> memory(size_t(2 * SHARED_BYTES) / 16);
  unsigned char *shared = reinterpret_cast<unsigned char*>(memory.data()), *end = shared + 2 * SHARED_BYTES;
  for (int64_t block : order) {
    counters[BLOCKS]++;
    memset(shared, 0xff, size_t(bytes));
    memset(shared + bytes, BEHIND, size_t(end - shared - bytes));
    std::vector<HostThread> all;
    for (int i = 0; i < threads; ++i) all.emplace_back(i, threads, block);
    fibers.run(threads, random, [&](int i) { body(all[size_t(i)], reinterpret_cast<char*>(shared)); });
    for (const unsigned char* p = shared + bytes; p < end; ++p) {
      if (*p != BEHIND) throw std::runtime_error("simulated: a write behind the block's shared memory");
    }
  }
}

template <int S, bool HALF>
void dense(Simulator& s, const StepArgs& a, const Geometry& g, bool refresh) {
  struct Shared {  // the kernel's static shared memory
    DenseControl control;
    float raw[DenseControl::raw_width];
  };
  s.launch(a.batch * g.parts, g.threads, sizeof(Shared), [&](const HostThread& thread, char* bytes) {
    Shared* shared = reinterpret_cast<Shared*>(bytes);
    dense_step<S, HALF>(thread, a, g.parts, refresh, shared->control, shared->raw);
  });
}
template <int S>
void dense(Simulator& s, const StepArgs& a, const Geometry& g, bool refresh) {
  g.half ? dense<S, true>(s, a, g, refresh) : dense<S, false>(s, a, g, refresh);
}
template <class T>
void staged(Simulator& s, const StepArgs& a, const Geometry& g, bool refresh) {
  s.launch(a.batch * g.parts, g.threads, g.shared, [&](const HostThread& thread, char* shared) {
    staged_step<T>(thread, a, g.columns, g.parts, refresh, shared, g.threads);
  });
}

template <class T>
void quantile_of(Simulator& s, const StepArgs& a, const QuantileArgs& q) {
  const QuantileGeometry g = quantile_geometry<T>(a.channels * a.inner);
  s.launch(a.batch, g.threads, g.shared,
           [&](const HostThread& thread, char* shared) { quantile_sample<T>(thread, a, q, g.capacity, shared); });
}
void launch_quantile(Simulator& s, const StepArgs& on_device, const QuantileArgs& q) {
  const StepArgs a = quantile_args(on_device);
  a.state_type == F64 ? quantile_of<double>(s, a, q) : quantile_of<float>(s, a, q);
}

template <class T, int N>
void moments_of(Simulator& s, const StepArgs& a, const MomentsArgs& m) {
  typedef MomentsShared<T, N> Shared;
  const int64_t blocks = a.batch * chunks_of(a.channels * a.inner);
  s.launch(blocks, MOMENT_LANES, sizeof(Shared), [&](const HostThread& thread, char* bytes) {
    moments_chunk<T, N>(thread, a, m, *reinterpret_cast<Shared*>(bytes));
  });
}
template <class T, int N>
void guided_of(Simulator& s, const StepArgs& a, const MomentsArgs& m) {
  const GuidedGeometry g(a, m);
  constexpr int64_t fixed = (sizeof(GuidedShared<T>) + 15) / 16 * 16;
  s.launch(a.batch * g.parts, g.threads, fixed + g.shared, [&](const HostThread& thread, char* bytes) {
    guided_groups<T, N>(thread, a, m, g, *reinterpret_cast<GuidedShared<T>*>(bytes), bytes + fixed);
  });
}
template <class T>
void launch_moments(Simulator& s, const StepArgs& a, const MomentsArgs& m) {
  const int vectors = vectors_of(m.program.vectors);
  if (m.reduce > 0) return vectors <= 4 ? guided_of<T, 4>(s, a, m) : guided_of<T, 8>(s, a, m);
  if (vectors == 2) return moments_of<T, 2>(s, a, m);
  vectors == 4 ? moments_of<T, 4>(s, a, m) : moments_of<T, 8>(s, a, m);
}
void launch_moments(Simulator& s, const StepArgs& a, const MomentsArgs& m) {
  a.state_type == F64 ? launch_moments<double>(s, a, m) : launch_moments<float>(s, a, m);
}
template <int S, bool HALF>
void dense_moments(Simulator& s, const StepArgs& a, const MomentsArgs& m) {
  struct Shared {
    MomentsShared<float, S == 1 ? 2 : 4> moments;
    DenseControl control;
    float raw[DenseControl::raw_width];
  };
  s.launch(a.batch, MOMENT_LANES, sizeof(Shared), [&](const HostThread& thread, char* bytes) {
    Shared* shared = reinterpret_cast<Shared*>(bytes);
    dense_moments_step<S, HALF>(thread, a, m, shared->moments, shared->control, shared->raw);
  });
}
template <class T>
void staged_moments(Simulator& s, const StepArgs& a, const MomentsArgs& m, const Geometry& g, const FusedGeometry& f) {
  s.launch(a.batch, MOMENT_LANES, f.shared, [&](const HostThread& thread, char* bytes) {
    staged_moments_step<T, 4>(thread, a, m, g.columns, f.workers, bytes);
  });
}
template <bool HALF>
void dense_moments(Simulator& s, const StepArgs& a, const MomentsArgs& m, int slots) {
  if (slots == 1) return dense_moments<1, HALF>(s, a, m);
  slots == 2 ? dense_moments<2, HALF>(s, a, m) : dense_moments<4, HALF>(s, a, m);
}
void moments_step(Simulator& s, const StepArgs& a, const MomentsArgs& m, const Geometry& g, const FusedGeometry& f) {
  if (g.dense_slots && g.half) return dense_moments<true>(s, a, m, g.dense_slots);
  if (g.dense_slots) return dense_moments<false>(s, a, m, g.dense_slots);
  a.state_type == F64 ? staged_moments<double>(s, a, m, g, f) : staged_moments<float>(s, a, m, g, f);
}

void need_device(int device) {
  if (device != 0) throw std::runtime_error("cudaSetDevice: cudaErrorInvalidDevice: invalid device ordinal");
}

}  // namespace

void cuda_step(const StepArgs& args, const Placement& placement, bool refresh, const MomentsArgs* moments,
               const QuantileArgs* quantile, bool step) {
  if (args.batch == 0) return;
  need_device(placement.device);
  Simulator& s = simulator();
  const std::lock_guard<std::mutex> lock(s.mutex);
  StepArgs a = on_device(args, placement);
  Geometry g = geometry_of(a, s.device());
  if (moments && !refresh) {
    const FusedGeometry f = fused_of(a, *moments, g);
    if (f.fits && step && !quantile && !s.separate) return moments_step(s, a, *moments, g, f);
    launch_moments(s, a, *moments);
    if (moments->reduce > 0) {
      a = step_of_guided(a, *moments);
      g = geometry_of(a, s.device());
    }
  }
  if (!step) return;
  if (quantile && !refresh) {
    launch_quantile(s, a, *quantile);
    a.bound = quantile->bound;
  }
  if (g.dense_slots == 1) return dense<1>(s, a, g, refresh);
  if (g.dense_slots == 2) return dense<2>(s, a, g, refresh);
  if (g.dense_slots == 4) return dense<4>(s, a, g, refresh);
  a.state_type == F64 ? staged<double>(s, a, g, refresh) : staged<float>(s, a, g, refresh);
}

void cuda_normals(int device, void*, void* to, Type type, int64_t first, int64_t count, uint64_t seed, uint32_t ordinal,
                  uint32_t tag) {
  if (count == 0) return;
  need_device(device);
  Simulator& s = simulator();
  const std::lock_guard<std::mutex> lock(s.mutex);
  const int64_t blocks = normals_blocks(count, s.device()), threads = blocks * STAGED_THREADS;
  s.launch(blocks, STAGED_THREADS, 0, [&](const HostThread& thread, char*) {
    type == F64 ? normals_pairs<double>(thread, to, type, first, count, seed, ordinal, tag, threads)
                : normals_pairs<float>(thread, to, type, first, count, seed, ordinal, tag, threads);
  });
}

void cuda_classifier_grad(const ClassifierGradArgs& a, int device, void*) {
  need_device(device);
  if (a.batch == 0) return;
  const auto launch = [&](auto type) {
    constexpr Type TYPE = Type(int(type));
    typedef ClassShared<Real<TYPE>> Shared;
    Simulator& s = simulator();
    const std::lock_guard<std::mutex> lock(s.mutex);
    s.launch(a.batch, class_threads(TYPE, a.classes), sizeof(Shared), [&](const HostThread& thread, char* bytes) {
      classifier_grad_sample<TYPE>(thread, a, *reinterpret_cast<Shared*>(bytes));
    });
  };
  const Type type = a.logits_type;
  if (type == F32) launch(Int<F32>{});
  if (type == F16) launch(Int<F16>{});
  if (type == BF16) launch(Int<BF16>{});
  if (type == F64) launch(Int<F64>{});
}

std::string cuda_reason() { return ""; }
std::string cuda_build() { return "simulated"; }
std::vector<std::string> cuda_archs() { return {}; }

}  // namespace pyguide

// For the tests, through ctypes: the order of blocks and threads, the device's multiprocessors, and what was counted.
extern "C" __attribute__((visibility("default"))) void simulated_device(uint64_t seed, int processors) {
  pyguide::Simulator& s = pyguide::simulator();
  s.random.state = seed;
  s.processors = processors;
  for (uint64_t& counter : s.counters) counter = 0;
}
extern "C" __attribute__((visibility("default"))) void simulated_separate(int separate) {
  pyguide::simulator().separate = separate != 0;
}
extern "C" __attribute__((visibility("default"))) uint64_t simulated_count(int counter) {
  return pyguide::simulator().counters[counter];
}
extern "C" __attribute__((visibility("default"))) int64_t simulated_parts(int64_t batch, int64_t elements, int64_t tile,
                                                                          int64_t resident) {
  return pyguide::parts_of(batch, elements, tile, resident);
}
