// Python's pyguide._C.classifier_grad, for bindings.cpp to add to the module.
#pragma once
#include <Python.h>

namespace pyguide {

extern PyMethodDef classifier_grad_method;

}  // namespace pyguide
