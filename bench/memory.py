"""The memory that a call on the CPU takes beyond its inputs: ``python -m bench.memory MODULE FUNCTION ARGUMENT...``.

The function makes the call ready, for a small size first, so that what every call loads is there.

In a process of its own, since a process does not give back all that it once had. What is read is what the process had
resident at its highest after the peak was reset, less what it had before the call: PyTorch's own counts know nothing of
the CPU. Linux only.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MEASURABLE = Path("/proc/self/clear_refs").exists()


def peak_bytes(module: str, function: str, *arguments: str | int) -> int:
    """Of one call that the function of a module makes ready from the arguments; its inputs are left out.

    Numbers at the end of the arguments are a size; the same call on a size of 2 each comes first.
    """
    command = [module, function, *map(str, arguments)]
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {' '.join(command)} failed: {done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    import torch

    module, function, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    prepare = getattr(importlib.import_module(module), function)
    size = [int(argument) for argument in arguments if argument.isdigit()]
    names = arguments[: len(arguments) - len(size)]
    # The first call loads what every call needs.
    prepare(*names, *[2] * len(size))()
    call = prepare(*names, *size)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    result = call()
    peak = _status("VmHWM") - before
    del result
    print(max(peak, 1))


if __name__ == "__main__":
    main()
