"""Whether a model's rotary frequencies hang on the length of what it is given, as dynamic and long rope do."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch

from leafkernels.models.asking import evaluating, plain_ids

# Of each model: the lengths between which the frequencies are known to be the same.
_same: "WeakKeyDictionary[Any, tuple[float, float]]" = WeakKeyDictionary()


def turns_change(base: Any, shortest: int, longest: int) -> bool:
    """Whether frequencies differ between these lengths, so that keys of one do not fit a query of the other."""
    least, most = _same.get(base, (float("inf"), 0))
    if least <= shortest and longest <= most:
        return False
    if not any("inv_freq" in name for name, _ in base.named_buffers()):
        _same[base] = 0, float("inf")
        return False
    # Twice as far where that makes no difference, so that few lengths are tried.
    for end in (2 * longest, longest):
        if _same_turns(base, shortest, end):
            meets = shortest <= most and least <= end
            _same[base] = (min(least, shortest), max(most, end)) if meets else (shortest, end)
            return False
    return True


def _same_turns(base: Any, shortest: int, longest: int) -> bool:
    device = next(base.parameters()).device
    with _as_it_was(base), evaluating(base), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        turns = []
        for length in (shortest, longest):
            base(
                input_ids=plain_ids(base)[None, :1].to(device),
                attention_mask=torch.ones((1, 1), dtype=torch.int64, device=device),
                position_ids=torch.tensor([[length - 1]], device=device),
            )
            turns.append([buffer.clone() for name, buffer in base.named_buffers() if "inv_freq" in name])
        return all(torch.equal(one, other) for one, other in zip(*turns, strict=True))


@contextmanager
def _as_it_was(base: Any) -> Iterator[None]:
    """Give rotary modules back as they came: some keep the longest length that they have seen."""
    kept = []
    for module in base.modules():
        if any("inv_freq" in name for name in module._buffers):
            values = {name: buffer.clone() for name, buffer in module._buffers.items() if buffer is not None}
            kept.append((module, dict(module.__dict__), dict(module._buffers), values))
    try:
        yield
    finally:
        for module, attributes, buffers, values in kept:
            module.__dict__.update(attributes)
            module._buffers.update(buffers)
            for name, value in values.items():
                module._buffers[name].copy_(value)
