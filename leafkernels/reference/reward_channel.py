"""Tensors to lists, ``python_ref``, and back."""

import torch
from torch import Tensor

import python_ref


def channel_state(
    hidden: Tensor, norm_wide: Tensor, norm_narrow: Tensor, wide: Tensor, narrow: Tensor, eps: float
) -> Tensor:
    """See ``python_ref.channel_states``; arguments and results as the PyTorch implementation."""
    norms, weights = norm_wide.tolist(), wide.tolist()
    for layer, (norm, weight) in enumerate(zip(norm_narrow.tolist(), narrow.tolist(), strict=True), start=1):
        norms[layer] += norm
        for row, of_state in zip(weights[layer], weight, strict=True):
            row += of_state
    states = python_ref.channel_states(hidden.tolist(), norms, weights, eps)
    return torch.tensor(states, dtype=wide.dtype, device=hidden.device).reshape(hidden.shape[1], wide.shape[1])
