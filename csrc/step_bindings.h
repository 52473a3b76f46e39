// pyguide._C.Step, for the files that bind its methods.
#pragma once
#include <pybind11/pybind11.h>

#include "launch.h"

namespace pyguide {

// Above this many elements the GIL is released during the kernel. Below, handing it over costs more than the kernel: a
// thread that wants it back may wait a whole switch interval (5 ms).
constexpr int64_t RELEASE_GIL = 1 << 18;

struct __attribute__((visibility("hidden"))) Step : Launch {
  using Launch::Launch;
  bool running = false;  // with the GIL released

  // All: false with a Python exception set.
  bool idle() const {
    if (running) PyErr_SetString(PyExc_ValueError, "run: this Step is running in another thread");
    return !running;
  }
  bool launch(Work work) {
    if (!check(work)) {
      PyErr_SetString(PyExc_ValueError, error.c_str());
      return false;
    }
    if (active.empty()) return true;
    if (placement.placed()) {
      if (!enqueue(work)) return false;
    } else if (elements() >= RELEASE_GIL) {
      running = true;
      Py_BEGIN_ALLOW_THREADS;
      run(work);
      Py_END_ALLOW_THREADS;
      running = false;
    } else {
      run(work);
    }
    finish(work);
    return true;
  }
  bool enqueue(Work work) {
    try {
      run_on_device(work);
    } catch (const std::exception& e) {
      PyErr_SetString(PyExc_RuntimeError, e.what());
      return false;
    }
    return true;
  }
};

// set_moments, place_moments, clear_moments, set_quantile, own.
void bind_moments(pybind11::class_<Step>& c);

}  // namespace pyguide
