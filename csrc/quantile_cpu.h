// The bound of one sample on a CPU, included by cpu.cpp once per instruction set. See quantile.h for the formula.
//
// D is formed in blocks as the step forms it, from its operands in the same order and with the same instructions, and
// its keys are counted in L1. Where the keys that a pass is about fit a buffer of 1 MiB that each thread keeps (262,144
// float32: a 3 x 256 x 256 image has 196,608), the passes that follow read them there and nothing else is formed again;
// larger samples form D once more for each digit until what is left fits, as a rule twice in all. Each pass of a buffer
// compacts it: from the second digit on hardly any keys are left.
#pragma once
#include <stdlib.h>

#include "quantile.h"
#include "staging.h"

namespace pyguide {
namespace {

constexpr int64_t KEPT_BYTES = 1 << 20;  // a part of a core's L2

struct KeptKeys {
  void* data = nullptr;
  KeptKeys() = default;
  KeptKeys(const KeptKeys&) = delete;
  KeptKeys& operator=(const KeptKeys&) = delete;
  ~KeptKeys() { free(data); }
  // Null where there is no memory: then D is formed for every digit.
  void* get() {
    if (!data) data = malloc(size_t(KEPT_BYTES));
    return data;
  }
};
inline void* kept_keys() {
  static thread_local KeptKeys keys;
  return keys.get();
}

// D of n elements, a multiple of GRAIN.
template <int K, int S, bool PLAIN, class T>
__attribute__((noinline)) void form_denoised(const Program<T>& p, const Needs needs, const Pointers<T>& at,
                                             uint32_t reads_m, uint32_t reads_s, T* to, int64_t n) {
  typedef Wide<typename Native<T>::V, 2> V;
  constexpr int KA = K ? K : MAX_BRANCHES, SA = S ? S : MAX_SLOTS;
  for (int64_t i = 0; i < n; i += V::width) {
    V m[KA], s[SA];
    each<K>(p.branches, [&](auto k) PG_LAMBDA {
      if (reads_m >> k & 1) m[k] = V::load(static_cast<const T*>(at.m[k]) + i);
    });
    each<S>(p.slots, [&](auto c) PG_LAMBDA {
      if (reads_s >> c & 1) s[c] = V::load(at.s[c] + i);
    });
    unclipped(p, needs, s, guided_output<K, S, PLAIN, V>(p, needs, m, s)).store(to + i);
  }
}

template <class T>
struct QuantileSample {
  typedef typename Key<T>::Bits Bits;
  static constexpr int64_t CAPACITY = KEPT_BYTES / int64_t(sizeof(Bits));

  Range<T> range;
  Needs needs;  // for D
  uint32_t reads_m = 0, reads_s;
  alignas(64) T denoised[BLOCK];
  alignas(64) Bits keys[BLOCK];
  uint32_t counts[2][BINS];  // of every other key: one counter's next increment waits for its last one
  // The select: keys whose bits from `shift` on are `prefix` are what is left; it counts the `width` bits below.
  Bits prefix = 0, above = ~Bits(0);  // above: the least key beyond those that are left, of those seen
  int shift = Key<T>::bits, width = 0;
  Bits* const buffer = static_cast<Bits*>(kept_keys());
  int64_t kept = 0;
  bool keep = false;

  QuantileSample(const StepArgs& a, int64_t b) : range(a, b, false) {
    const Program<T>& p = range.p;
    needs = p.needs;
    if (!needs.reads_g()) needs.bits &= ~Needs::GUIDED;  // G is for other sums
    reads_s = needs.reads_x() ? 1 : 0;
    if (needs.guided()) {
      reads_m = p.w_mask;
      reads_s |= p.o_mask;
    }
  }

  // f(first element, elements) over blocks, in an order that does not matter: see Range::run.
  template <class F>
  PG_INLINE void blocks(const F& f) {
    const int64_t rows = range.interleaved ? range.a.channels : 1, length = range.N / rows;
    const int64_t stretch = rows < 16 ? BLOCK : GRAIN;
    for (int64_t i = 0; i < length; i += stretch) {
      for (int64_t r = 0; r < rows; ++r) f(r * length + i, length - i < stretch ? length - i : stretch);
    }
  }

  // The keys of elements [e, e + n).
  void form(int64_t e, int64_t n) {
    const Program<T>& p = range.p;
    const int64_t padded = (n + GRAIN - 1) / GRAIN * GRAIN;
    Pointers<T> at;
    T(*next)[BLOCK] = range.scratch.block;
    for (int k = 0; k < p.branches; ++k) {
      if (reads_m >> k & 1) at.m[k] = range.load(range.m[k], e, n, padded, *next++);
    }
    for (int c = 0; c < p.slots; ++c) {
      if (!(reads_s >> c & 1)) continue;
      at.s[c] = range.s[c] + e;
      if (n < padded) {
        for (int64_t i = 0; i < padded; ++i) (*next)[i] = i < n ? at.s[c][i] : T(0);
        at.s[c] = *next++;
      }
    }
    if (p.o_mask && needs.guided()) {
      form_denoised<0, 0, false>(p, needs, at, reads_m, reads_s, denoised, padded);
    } else if (p.branches == 1) {
      form_denoised<1, 1, true>(p, needs, at, reads_m, reads_s, denoised, padded);
    } else if (p.branches == 2) {
      form_denoised<2, 1, true>(p, needs, at, reads_m, reads_s, denoised, padded);
    } else {
      form_denoised<0, 1, true>(p, needs, at, reads_m, reads_s, denoised, padded);
    }
    memcpy(keys, denoised, size_t(n) * sizeof(T));
    for (int64_t i = 0; i < n; ++i) keys[i] &= ~Bits(0) >> 1;
  }

  // Moves the keys that are left among n of them to the front; how many. `above` may become one of the others.
  int64_t compact(Bits* of, int64_t n) {
    constexpr int64_t GROUP = 16;  // most of them have none
    const Bits first = prefix << shift, size = Bits(1) << shift, end = first + size;
    Bits least = ~Bits(0);  // of the distances behind the last one, which below it are beyond all keys
    for (int64_t i = 0; i < n; ++i) least = of[i] - end < least ? of[i] - end : least;
    if (!(least >> Key<T>::bits) && end + least < above) above = end + least;
    int64_t left = 0;
    for (int64_t i = 0; i < n; i += GROUP) {
      const int64_t count = n - i < GROUP ? n - i : GROUP;
      bool any = count < GROUP;
      if (!any) {
        Bits found = 0;
        for (int64_t j = 0; j < GROUP; ++j) found |= Bits(of[i + j] - first < size);
        any = found;
      }
      for (int64_t j = 0; any && j < count; ++j) {
        const Bits key = of[i + j];
        of[left] = key;
        left += key - first < size;
      }
    }
    return left;
  }
  // Counts the keys that are left among n of them, and keeps those.
  void count(Bits* of, int64_t n) {
    const int64_t left = shift < Key<T>::bits ? compact(of, n) : n;
    const int low = shift - width;
    const Bits mask = (Bits(1) << width) - 1;
    for (int64_t i = 0; i + 1 < left; i += 2) {
      ++counts[0][of[i] >> low & mask];
      ++counts[1][of[i + 1] >> low & mask];
    }
    if (left & 1) ++counts[0][of[left - 1] >> low & mask];
    if (keep) {
      memmove(buffer + kept, of, size_t(left) * sizeof(Bits));
      kept += left;
    }
  }

  // |D|_(i) and |D|_(i+1); false if there is a NaN.
  bool select(int64_t index, T& low, T& high) {
    int64_t left = range.N, bin = 0;
    bool stored = false;  // what is left is in the buffer
    while (shift > 0) {
      width = shift < DIGIT ? shift : DIGIT;
      memset(counts, 0, sizeof counts);
      keep = buffer && left <= CAPACITY;
      if (stored) {
        const int64_t n = kept;
        kept = 0;
        for (int64_t e = 0; e < n; e += BLOCK) count(buffer + e, n - e < BLOCK ? n - e : BLOCK);
      } else {
        Bits most = 0;
        blocks([&](int64_t e, int64_t n) PG_LAMBDA {
          form(e, n);
          if (shift == Key<T>::bits) {
            for (int64_t i = 0; i < n; ++i) most = keys[i] > most ? keys[i] : most;
          }
          count(keys, n);
        });
        if (most > Key<T>::infinity) return false;
      }
      stored |= keep;
      for (bin = 0; index >= (left = int64_t(counts[0][bin]) + counts[1][bin]); ++bin) index -= left;
      shift -= width;
      prefix = prefix << width | Bits(bin);
    }
    Bits next = prefix;
    if (index + 1 == left) {  // the last of its value
      const int64_t bins = int64_t(1) << width;
      int64_t other = bin + 1;
      while (other < bins && !(counts[0][other] | counts[1][other])) ++other;
      next = other < bins ? prefix + Bits(other - bin) : above;
    }
    memcpy(&low, &prefix, sizeof low);
    memcpy(&high, &next, sizeof high);
    return true;
  }

  T bound(const QuantileArgs& q) {
    const Position at(q.quantile, range.N);
    T low, high;
    return select(at.index, low, high) ? bound_of(q, low, high, at.fraction) : T(NAN);
  }
};

template <class T>
void quantile_as(const StepArgs& a, const QuantileArgs& q, int64_t b) {
  const Sample& sample = a.samples[b];
  if (sample.row >= sample.end) return;
  T& bound = static_cast<T*>(q.bound)[b];
  bound = T(0);
  if (sample.row == 0) return;
  QuantileSample<T> of(a, b);
  if (of.range.p.needs.denoised()) bound = of.bound(q);
}
void quantile(const StepArgs& a, const QuantileArgs& q, int64_t b) {
  a.state_type == F64 ? quantile_as<double>(a, q, b) : quantile_as<float>(a, q, b);
}

}  // namespace
}  // namespace pyguide
