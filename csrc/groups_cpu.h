// The guided output and the method's own slots by groups, of one sample on a CPU; included by cpu.cpp once per
// instruction set. See moments.h. A coefficient of a group that is exactly 0 is not read, as in the step; a slot that
// no group of a tile changes stays as it is.
#pragma once
#include "moments_cpu.h"

namespace pyguide {
namespace {

// run_program for GROUPS at once.
inline void run_programs(const WeightsProgram& p, double (*registers)[GROUPS]) {
  double (*to)[GROUPS] = registers + moments_count(p.vectors) + p.parameters;
  for (int i = 0; i < p.operations; ++i) {
    const Operation o = p.operation[i];
    const double *a = registers[o.a], *b = registers[o.b], *c = registers[o.c];
    double* __restrict result = to[i];  // a, b and c are earlier ones
    const auto each_group = [&](auto code) PG_LAMBDA {
      for (int64_t g = 0; g < GROUPS; ++g) result[g] = operation_result(uint8_t(int(code)), a[g], b[g], c[g]);
    };
    switch (o.code) {
      case OP_ADD:
        each_group(Int<OP_ADD>{});
        break;
      case OP_SUB:
        each_group(Int<OP_SUB>{});
        break;
      case OP_MUL:
        each_group(Int<OP_MUL>{});
        break;
      case OP_DIV:
        each_group(Int<OP_DIV>{});
        break;
      case OP_MINIMUM:
        each_group(Int<OP_MINIMUM>{});
        break;
      case OP_MAXIMUM:
        each_group(Int<OP_MAXIMUM>{});
        break;
      case OP_SQRT:
        each_group(Int<OP_SQRT>{});
        break;
      case OP_EXP:
        each_group(Int<OP_EXP>{});
        break;
      case OP_LESS:
        each_group(Int<OP_LESS>{});
        break;
      default:
        each_group(Int<OP_SELECT>{});
    }
  }
}

template <class T>
struct Guided {
  struct Term {
    int operand, value;  // row of `values`
  };
  struct Sum {
    Term term[MAX_BRANCHES + MAX_SLOTS];
    int terms = 0;
    void add(int operand, int value) { term[terms++] = {operand, value}; }
  };
  // A term whose coefficient is not 0, with its operand where it is now.
  struct Live {
    const T *x, *value, *present;  // present: null, or 1 where the coefficient is not 0
  };
  static constexpr int VALUES = MAX_RESULTS + MAX_VECTORS;

  const StepArgs& a;
  const MomentsArgs& m;
  const int64_t b;
  const int K = a.branches, S = a.slots, Sg = a.guidance_slots;
  MomentsOf<T> moments;
  Operands<T>& from = moments.from;
  Sum guided, own[MAX_VECTORS];
  uint32_t reads = 0;
  bool acts, direct;
  bool live[VALUES], everywhere[VALUES];  // not 0 in a group, in all of them
  alignas(64) T values[VALUES][GROUPS], present[VALUES][GROUPS], out[1 + MAX_VECTORS][BLOCK];
  alignas(64) double registers[MAX_REGISTERS][GROUPS];

  Guided(const StepArgs& a, const MomentsArgs& m, int64_t b) : a(a), m(m), b(b), moments(a, m, b) {
    const int64_t row = a.samples[b].row;
    acts = pyguide::acts(m, b, row);
    acts ? from_program() : from_block(static_cast<const T*>(a.weights) + plain_block(m, b, row));
    direct = from.open(reads);
  }
  void from_block(const T* block) {
    int next = 0;
    const auto add = [&](int operand, T value) {
      if (value == T(0)) return;
      guided.add(operand, next);
      reads |= 1u << operand;
      live[next] = everywhere[next] = true;
      for (int64_t g = 0; g < GROUPS; ++g) values[next][g] = value;
      ++next;
    };
    for (int k = 0; k < K; ++k) add(k, block[k]);
    for (int c = 0; c < S; ++c) add(K + c, block[2 * K + c]);
  }
  void from_program() {
    const WeightsProgram& p = m.program;
    const auto add = [&](Sum& sum, int place, int operand) {
      for (int i = 0; i < p.results; ++i) {
        if (p.result[i].place != place) continue;
        sum.add(operand, i);
        reads |= 1u << operand;
      }
    };
    for (int k = 0; k < K; ++k) add(guided, k, k);
    for (int c = 0; c < S; ++c) add(guided, 2 * K + c, K + c);
    for (int j = 0; j < Sg; ++j) {
      const int r = S - Sg + j;
      own[j].add(K + r, MAX_RESULTS + j);  // h_j s_j
      reads |= 1u << (K + r);
      for (int k = 0; k < K; ++k) add(own[j], 2 * K + S + r * K + k, k);
    }
    const double* parameters = parameters_of(m, b, a.samples[b].row);
    for (int i = 0; i < p.parameters; ++i) {
      for (int64_t g = 0; g < GROUPS; ++g) registers[moments.count + i][g] = parameters[i];
    }
  }
  int h_place(int j) const { return 2 * K + S + S * K + j; }

  // The coefficients of `n` groups from `group` on.
  void compute(int64_t group, int64_t n) {
    const WeightsProgram& p = m.program;
    moments.groups(group, n, registers[0]);
    run_programs(p, registers);
    for (int j = 0; j < Sg; ++j) memset(values[MAX_RESULTS + j], 0, sizeof(values[0]));
    for (int i = 0; i < p.results; ++i) {
      const int j = p.result[i].place - h_place(0);
      T* to = values[j >= 0 ? MAX_RESULTS + j : i];
      for (int64_t g = 0; g < GROUPS; ++g) to[g] = T(registers[p.result[i].from][g]);
    }
    for (int j = 0; j < Sg; ++j) {
      T* h = values[MAX_RESULTS + j];
      for (int64_t g = 0; g < n; ++g) {
        bool any = false;
        for (int i = 0; i < own[j].terms; ++i) any |= values[own[j].term[i].value][g] != T(0);
        if (!any) h[g] = T(1);  // the slot stays
      }
    }
    for (int i = 0; i < VALUES; ++i) {
      if (i < MAX_RESULTS ? i >= p.results || p.result[i].place >= h_place(0) : i >= MAX_RESULTS + Sg) continue;
      int64_t count = 0;
      for (int64_t g = 0; g < n; ++g) {
        const bool nonzero = values[i][g] != T(0);
        present[i][g] = T(nonzero);
        count += nonzero;
      }
      live[i] = count > 0;
      everywhere[i] = count == n;
      for (int64_t g = n; g < GROUPS; ++g) values[i][g] = present[i][g] = T(0);
    }
  }

  // ALONE: all elements are of one group, g; otherwise element i is of group i.
  template <bool ALONE>
  int gather_terms(const Sum& sum, int64_t g, Live* to) const {
    int count = 0;
    for (int i = 0; i < sum.terms; ++i) {
      const int v = sum.term[i].value;
      if (ALONE ? values[v][g] == T(0) : !live[v]) continue;
      to[count++] = {from.at[sum.term[i].operand], values[v] + (ALONE ? g : 0),
                     ALONE || everywhere[v] ? nullptr : present[v]};
    }
    return count;
  }
  template <bool ALONE>
  static PG_INLINE Lanes<T> total(const Live* term, int terms, int64_t i) {
    Lanes<T> sum = every(T(0));
    for (int j = 0; j < terms; ++j) {
      const Live& t = term[j];
      Lanes<T> x = Lanes<T>::load(t.x + i);
      if (!ALONE && t.present) x = weighed(Lanes<T>::load(t.present + i), x);
      sum = fma(ALONE ? every(*t.value) : Lanes<T>::load(t.value + i), x, sum);
    }
    return sum;
  }
  // Elements [e, e + n), all in place, or behind from.at and to `out` with what fills the last lanes.
  template <bool ALONE>
  void block(int64_t e, int64_t n, int64_t g, bool in_place) {
    Live term[OPERANDS], own_term[MAX_VECTORS][MAX_BRANCHES + 1];
    int own_terms[MAX_VECTORS], slots[MAX_VECTORS], written = 0;
    const int terms = gather_terms<ALONE>(guided, g, term);
    T *to = static_cast<T*>(m.guided) + b * from.N + e, *slot_to[MAX_VECTORS];
    T* const final = to;
    if (!in_place) to = out[0];
    for (int j = 0; acts && j < Sg; ++j) {
      own_terms[written] = gather_terms<ALONE>(own[j], g, own_term[written]);
      slot_to[written] = in_place ? from.slot(S - Sg + j) + e : out[1 + j];
      slots[written++] = j;
    }
    for (int64_t i = 0; i < n; i += LANES) {
      Lanes<T> slot[MAX_VECTORS];
      const Lanes<T> G = total<ALONE>(term, terms, i);
      for (int j = 0; j < written; ++j) slot[j] = total<ALONE>(own_term[j], own_terms[j], i);
      G.store(to + i);
      for (int j = 0; j < written; ++j) slot[j].store(slot_to[j] + i);
    }
    if (in_place) return;
    memcpy(final, to, size_t(n) * sizeof(T));
    for (int j = 0; j < written; ++j) {
      memcpy(from.slot(S - Sg + slots[j]) + e, slot_to[j], size_t(n) * sizeof(T));
    }
  }
  // A run of elements.
  template <bool ALONE>
  void apply(int64_t e, int64_t n, int64_t g) {
    const int64_t whole = !direct ? 0 : ALONE ? n / LANES * LANES : n % LANES ? 0 : n;
    if (whole) {
      from.point(reads, e);
      block<ALONE>(e, whole, g, true);
    }
    for (int64_t i = whole; i < n; i += BLOCK) {
      const int64_t left = n - i < BLOCK ? n - i : BLOCK;
      from.stage(reads, e + i, left, padded_to_lanes(left), 0);
      block<ALONE>(e + i, left, ALONE ? g : 0, false);
    }
  }
  void run(int64_t first, int64_t last) {
    for (int64_t n; first < last; first += n) {
      n = last - first < GROUPS ? last - first : GROUPS;
      if (m.inner > 1 && n > m.inner - first % m.inner) n = m.inner - first % m.inner;
      if (acts) compute(first, n);
      if (m.inner == 1) {
        for (int64_t g = 0; g < n; ++g) apply<true>((first + g) * m.reduce, m.reduce, g);
        continue;
      }
      const int64_t e = first / m.inner * m.reduce * m.inner + first % m.inner;
      for (int64_t r = 0; r < m.reduce; ++r) {
        acts ? apply<false>(e + r * m.inner, n, 0) : apply<true>(e + r * m.inner, n, 0);
      }
    }
  }
};

template <class T>
void guided_as(const StepArgs& a, const MomentsArgs& m, int64_t b, int64_t first, int64_t last) {
  Guided<T>(a, m, b).run(first, last);
}
void guided(const StepArgs& a, const MomentsArgs& m, int64_t b, int64_t first, int64_t last) {
  (a.state_type == F64 ? guided_as<double> : guided_as<float>)(a, m, b, first, last);
}

}  // namespace
}  // namespace pyguide
