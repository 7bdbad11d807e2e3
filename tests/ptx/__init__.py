"""What Triton compiles for a GPU, executed on a CPU thread by thread: races, stray accesses and loops whose warps
disagree are seen without a GPU.

    reading      PTX text -> a kernel: parameters, registers, instructions
    arithmetic   what they compute, over numpy arrays with an entry for each thread
    meaning      an instruction -> a function of the threads that execute it
    memory       buffers, who touched what in which order, and how many sectors and banks that took
    machine      straight pieces, warps and programs in order or by a seed, barriers
    launcher     ``kernel[grid](...)`` on CPU tensors: Triton's own specialisation and compiler, this machine

What it does not know: the weak order of memory (a race is reported, not played out), what ptxas makes of PTX (it may
contract ``mul`` and ``add``, and keep values in registers), and time. An instruction that our kernels do not use is
refused by name.
"""

from ptx.launcher import Session, install, run_text
from ptx.machine import Settings
from ptx.memory import Finding, Findings
from ptx.reading import Refused

__all__ = ["Finding", "Findings", "Refused", "Session", "Settings", "install", "run_text"]
