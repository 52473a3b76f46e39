// Moments: weights of a guidance method that depend on the branches themselves, for sample b at its row. From the K
// branches m_k and the method's own Sg slots h_j (the last of the state) the n = K + Sg vectors
//
// clang-format off
//   y_0 = p_x s_0 + p_m m_0        the reference branch in the method's space (model: p_x = 0, p_m = 1)
//   y_k = m_k - m_0                the others, as differences: the space multiplies them by p_m afterwards
//   y_{K + j} = h_j
//
//   S_i = sum y_i,   Q_ij = sum y_i y_j     over the sample, or over each group of its elements
// clang-format on
//
// and from these numbers, by the method's program, the weights block of the step (step.h). Gram matrices of raw
// branches would cancel: at |c - u| = 1e-3 |c| they have 7 % of |c - u|^2 wrong, these 1e-7.
//
// Order: a sample is cut into chunks of CHUNK elements, whatever the batch; lanes of a chunk add at most LANE_TERMS
// products in the state's type before they add to a double, and everything beyond is double: the lanes of a chunk in
// a fixed tree, then the chunks in order. So a sample's bits depend on nothing but its own values.
//
// Accuracy: each moment within 1e-6 sum |terms| of its value in exact arithmetic. y_0 is formed with p_x and p_m in
// double and with the rounding of p_x s_0, which at sigma = 4096 is larger than what remains of the two terms.
//
// The program: registers 0 .. moments(n) - 1 hold S_0 .. S_{n-1}, Q_00, Q_01, .. Q_0{n-1}, Q_11, ..; the parameters of
// the row and sample follow, then one register for each operation's result. Arithmetic is double.
#pragma once
#include <math.h>

#include "step.h"

namespace pyguide {

constexpr int MAX_VECTORS = 8, MAX_PARAMETERS = 40, MAX_OPERATIONS = 160, MAX_RESULTS = 40;
constexpr int LANE_TERMS = 8;
constexpr int64_t CHUNK = 4096;  // elements

PG_INLINE constexpr int moments_count(int vectors) { return vectors * (vectors + 3) / 2; }
constexpr int MAX_MOMENTS = moments_count(MAX_VECTORS);
constexpr int MAX_REGISTERS = MAX_MOMENTS + MAX_PARAMETERS + MAX_OPERATIONS;
static_assert(MAX_REGISTERS <= 256, "a register is a byte");

enum Opcode : uint8_t {
  OP_ADD,      // a + b
  OP_SUB,      // a - b
  OP_MUL,      // a b
  OP_DIV,      // a / b
  OP_MINIMUM,  // of a and b; NaN if one is
  OP_MAXIMUM,
  OP_SQRT,    // of a
  OP_EXP,     // of a
  OP_LESS,    // 1 if a < b, else 0
  OP_SELECT,  // b if a is not 0, else c
};
struct Operation {
  uint8_t code, a, b, c;  // registers
};
struct Result {
  uint16_t place, from;  // in the weights block; register
};
// Parameters that every program has, in this order; the method's own follow.
enum Parameter { ACTING, P_X, P_M, OWN };

struct WeightsProgram {
  int32_t vectors;              // K + Sg
  int32_t parameters;           // those of every program among them
  int32_t operations, results;  // of the arrays below
  int32_t sums;                 // 0: no S_i is read, and all are 0
  Operation operation[MAX_OPERATIONS];
  Result result[MAX_RESULTS];  // all other places of the block are 0
};

struct MomentsArgs {
  WeightsProgram program;
  const double* parameters;  // of row r and sample b at r * row_stride + b * sample_stride
  int64_t row_stride, sample_stride;
  // Where ACTING is 0 nothing is read, and the weights block is copied from that of the row in StepArgs.weights, at
  // plain + r * plain_row_stride + b * plain_sample_stride. The block of sample b is written to samples[b].weights.
  int64_t plain, plain_row_stride, plain_sample_stride;
  double* partial;  // [batch][chunks][moments_count(n)]: scratch
  double* moments;  // [batch][moments_count(n)], or null: the moments of the samples that act are written here too
  // Groups: a sample is [outer][reduce][inner] in its logical order, a group has all `reduce` of an (outer, inner).
  // reduce = 0: the whole sample is one. With groups no weights block is written but the guided output itself, and the
  // guidance slots, in place: guided = sum_k w_k m_k + sum_c o_c s_c, h_j' = h_j s_j + sum_k b_jk m_k.
  int64_t outer, reduce, inner;
  void* guided;  // [batch][N] of the state's type
  const int32_t*
      guided_source;  // routes to it, as StepArgs.source: the sample's own index in branch 0, -1 in the others
};

PG_INLINE constexpr int64_t chunks_of(int64_t elements) { return (elements + CHUNK - 1) / CHUNK; }

namespace {

PG_INLINE const double* parameters_of(const MomentsArgs& m, int64_t b, int64_t row) {
  return m.parameters + row * m.row_stride + b * m.sample_stride;
}
PG_INLINE bool acts(const MomentsArgs& m, int64_t b, int64_t row) { return parameters_of(m, b, row)[ACTING] != 0.0; }
PG_INLINE int64_t plain_block(const MomentsArgs& m, int64_t b, int64_t row) {
  return m.plain + row * m.plain_row_stride + b * m.plain_sample_stride;
}

// The step after the groups: `guided` is its only branch.
PG_INLINE StepArgs step_of_guided(StepArgs a, const MomentsArgs& m) {
  a.output[0] = {m.guided, a.channels * a.inner, a.inner, 1};
  a.output_type = a.state_type;
  a.source = m.guided_source;
  return a;
}

PG_INLINE double operation_result(uint8_t code, double a, double b, double c) {
  switch (code) {
    case OP_ADD:
      return a + b;
    case OP_SUB:
      return a - b;
    case OP_MUL:
      return a * b;
    case OP_DIV:
      return a / b;
    case OP_MINIMUM:
      return a != a || a < b ? a : b;
    case OP_MAXIMUM:
      return a != a || a > b ? a : b;
    case OP_SQRT:
      return ::sqrt(a);
    case OP_EXP:
      return ::exp(a);
    case OP_LESS:
      return a < b ? 1.0 : 0.0;
    default:
      return a != 0.0 ? b : c;
  }
}
// Every operation in order; `registers` holds moments and parameters, and takes the results.
PG_INLINE void run_program(const WeightsProgram& p, double* registers) {
  double* to = registers + moments_count(p.vectors) + p.parameters;
  PG_ROLLED
  for (int i = 0; i < p.operations; ++i) {
    const Operation o = p.operation[i];
    to[i] = operation_result(o.code, registers[o.a], registers[o.b], registers[o.c]);
  }
}
template <class T>
PG_INLINE void write_block(const WeightsProgram& p, const double* registers, T* block, int64_t width) {
  PG_ROLLED
  for (int64_t i = 0; i < width; ++i) block[i] = T(0);
  PG_ROLLED
  for (int i = 0; i < p.results; ++i) block[p.result[i].place] = T(registers[p.result[i].from]);
}

// y_0: p_x s_0 + p_m m_0, the factors as pairs of the state's type and with the error of the first product.
template <class T>
struct Space {
  T x, x_low, m, m_low;
  bool model;  // y_0 = m_0: s_0 is not read
  Space() = default;
  PG_INLINE explicit Space(const double* parameters) {
    x = T(parameters[P_X]);
    x_low = T(parameters[P_X] - double(x));
    m = T(parameters[P_M]);
    m_low = T(parameters[P_M] - double(m));
    model = parameters[P_X] == 0.0 && parameters[P_M] == 1.0;
  }
  template <class V>
  PG_INLINE V reference(const V& s, const V& m_0) const {
    const V product = V::set(x) * s;
    const V low = fma(V::set(m_low), m_0, fma(V::set(x_low), s, product_error(V::set(x), s, product)));
    return fma(V::set(m), m_0, product) + low;
  }
};

}  // namespace
}  // namespace pyguide
