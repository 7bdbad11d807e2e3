"""Every operation in vectorised PyTorch: what runs on the CPU, and what ``backend="torch"`` runs anywhere.

Memory stays proportional to the tokens plus, for each row, the number of boundaries; where a table of prefix lengths is
asked for, to the pairs. On CUDA tensors these functions read sizes back from the device; the Triton kernels never do.
"""
