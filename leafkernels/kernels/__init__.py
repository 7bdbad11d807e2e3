"""Every operation as Triton kernels: what runs on CUDA tensors. Imports torch and triton only.

No launcher reads anything back to the host, no atomic is used but for minima, which do not depend on their order, and
no size is specialised on: a new length, number of rows or stride compiles nothing.
"""
