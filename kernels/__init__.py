"""GPU kernels, packaged as `pyguide.kernels` (never as a top-level `kernels`: another project has that name).

One stem a noun, the same at every layer: `step.cu` and `step_triton.py` are the CUDA and Triton twins of `csrc/step.h`.
Launchers take raw pointers, strides, sizes and a stream; no framework header is included here. This version has none
yet: the CPU kernel is in `csrc/`, and `python -m pyguide.env` says so.
"""
