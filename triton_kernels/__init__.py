"""Triton kernels: plain ``@triton.jit`` functions and their configurations. Installed as ``pyinf.triton_kernels``."""
