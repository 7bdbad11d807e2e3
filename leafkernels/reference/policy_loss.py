"""Tensors to lists, ``python_ref``, and back."""

from typing import Any

import torch
from torch import Tensor

import python_ref
from leafkernels._core.precision import compute_dtype


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    ref_logprobs: Tensor | None,
    entropy: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    max_log_ratio: float,
    kl_coef: float,
    entropy_coef: float,
    of_sequence: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """See ``python_ref.policy_loss``; arguments and results as the PyTorch implementation."""
    dtype = compute_dtype(logprobs.dtype)
    policies = logprobs.tolist(), old_logprobs.tolist()
    options: dict[str, Any] = {
        "clip": (clip_low, clip_high),
        "dual_clip": dual_clip,
        "max_log_ratio": max_log_ratio,
        "ref_logprobs": None if ref_logprobs is None else ref_logprobs.tolist(),
        "kl_coef": kl_coef,
        "importance": "sequence" if of_sequence else "token",
    }
    tables = (*policies, advantages.tolist(), mask.tolist())
    entropies = None if entropy is None else entropy.tolist()
    sums = torch.zeros((7, logprobs.shape[0]), dtype=dtype)
    for i, live in enumerate(tables[-1]):
        row = {**options, "ref_logprobs": options["ref_logprobs"] and [options["ref_logprobs"][i]]}
        found = python_ref.policy_loss(
            *([table[i]] for table in tables),
            entropy=entropies and [entropies[i]],
            entropy_coef=entropy_coef,
            aggregate="sum",
            **row,
        )
        number = sum(live)
        of_row = [found["loss"], *(number * mean for mean in list(found.values())[1:]), number]
        sums[:, i] = torch.tensor(of_row, dtype=dtype)
    slopes = python_ref.policy_loss_slopes(*tables, **options) if with_gradient else []
    gradients = torch.tensor(slopes, dtype=dtype).reshape(logprobs.shape if with_gradient else (0,))
    return sums.to(logprobs.device), gradients.to(logprobs.device)
