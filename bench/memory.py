"""The memory that a call on the CPU takes beyond its inputs: ``python -m bench.memory OPERATION BACKEND ROWS VOCAB``.

In a process of its own, since a process does not give back all that it once had. What is read is what the process had
resident at its highest after the peak was reset, less what it had before the call: PyTorch's own counts know nothing of
the CPU. Linux only.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MEASURABLE = Path("/proc/self/clear_refs").exists()


def peak_bytes(op: str, backend: str, num_rows: int, vocab_size: int) -> int:
    """Of one call of ``backend`` on float32 logits of this size, the inputs left out."""
    arguments = [op, backend, str(num_rows), str(vocab_size)]
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {backend} failed: {done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    import torch

    from bench.bench_surprisal import GRADIENTS, PREPARES, Vocabulary

    op, backend, num_rows, vocab_size = sys.argv[1:]
    torch.set_num_threads(1)
    prepare = (GRADIENTS if "gradient" in op else PREPARES)[backend]
    # The first call loads what every call needs.
    first, shape = (Vocabulary("", *size, torch.float32, "") for size in ((2, 50), (int(num_rows), int(vocab_size))))
    prepare(first.batches("", "cpu", 1)[0])()
    call = prepare(shape.batches("", "cpu", 1)[0])
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    result = call()
    peak = _status("VmHWM") - before
    del result
    print(max(peak, 1))


if __name__ == "__main__":
    main()
