// Where one sample of an operand lies: rows of `inner` elements, merged where the strides allow it.
#pragma once
#include "step.h"

namespace pyguide {
namespace {

PG_INLINE int64_t size_of(Type type) { return type == F32 ? 4 : type == F64 || type == I64 ? 8 : 2; }

struct View {
  char* data;
  Type type;
  int64_t inner, row_stride, stride;
  bool whole;  // one row

  View() = default;
  PG_INLINE View(const Operand& o, Type type, int64_t index, const StepArgs& a) : type(type) {
    data = static_cast<char*>(o.data) + index * o.batch_stride * size_of(type);
    inner = a.inner;
    row_stride = o.channel_stride;
    stride = o.inner_stride;
    if (inner == 1) {
      stride = row_stride;
      inner = a.channels;
    } else if (a.channels == 1 || row_stride == inner * stride) {
      inner *= a.channels;
    }
    whole = inner == a.channels * a.inner;
  }
  PG_INLINE bool contiguous() const { return whole && stride == 1; }
  PG_INLINE bool dense(Type compute) const { return type == compute && contiguous(); }
  PG_INLINE bool interleaved() const { return !whole && stride != 1; }
  PG_INLINE char* at(int64_t element) const { return data + element * size_of(type); }
};

}  // namespace
}  // namespace pyguide
