"""What Triton compiles for a GPU, executed on a CPU thread by thread: races, stray accesses and loops whose warps
disagree are seen without a GPU.

    reading      PTX text -> a kernel: parameters, registers, instructions
    arithmetic   what they compute, over numpy arrays with an entry for each thread
    meaning      an instruction -> a function of the threads that execute it
    memory       buffers, who touched what in which order, and how many sectors and banks that took
    machine      straight pieces, warps and programs in order or by a seed, barriers
    launcher     ``kernel[grid](...)`` on CPU tensors: Triton's own specialisation and compiler, this machine

docs/design.md says what it does not know. An instruction that our kernels do not use is refused by name.
"""

from ptx.launcher import Session, Settings, install, run_text
from ptx.reading import Refused

__all__ = ["Refused", "Session", "Settings", "install", "run_text"]
