// What the threads of a warp or of a block have, joined in an order that their numbers alone decide. THREAD as in
// control.cuh. X has join(thread, mask): with what the lane ^ mask has, which gets the same bits; and none().
#pragma once
#include "control.cuh"

namespace pyguide {
namespace {

// The lanes of a team of `width` neighbours, a power of two.
template <class X, class THREAD>
PG_DEVICE X over_team(const THREAD& thread, X x, int width) {
  PG_ROLLED
  for (int mask = width / 2; mask > 0; mask /= 2) x.join(thread, mask);
  return x;
}
template <class X, class THREAD>
PG_DEVICE X over_warp(const THREAD& thread, X x) {
  return over_team(thread, x, WARP);
}
// What all threads of the block have, joined, for each of them; `of_warp` is used once a launch.
template <class X, class THREAD>
PG_DEVICE X over_block(const THREAD& thread, X x, X* of_warp) {
  const int warp = thread.index() / WARP, lane = thread.index() % WARP;
  x = over_warp(thread, x);
  if (lane == 0) of_warp[warp] = x;
  thread.sync();
  return over_warp(thread, lane < thread.count() / WARP ? of_warp[lane] : X::none());
}

}  // namespace
}  // namespace pyguide
