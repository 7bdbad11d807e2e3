"""The reward channel of all layers at a time; see ``leafkernels.kernels.reward_channel``."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from leafkernels._core.precision import compute_dtype


def channel_state(
    hidden: Tensor, norm_wide: Tensor, norm_narrow: Tensor, wide: Tensor, narrow: Tensor, eps: float
) -> Tensor:
    """u_{n-1} (M, R) of M tokens, in the dtype of the weights, from what their n layers read, (n, M, D).

    ``norm_wide`` (n, D) and ``wide`` (n, R, D) belong to the hidden states, ``norm_narrow`` (n - 1, R) and ``narrow``
    (n - 1, R, R) to the channel.
    """
    dtype = compute_dtype(wide.dtype)
    size, width = wide.shape[2], wide.shape[1]
    hidden = hidden.to(dtype)
    squares = hidden.square().sum(-1, keepdim=True)
    roots = (squares / size + eps).sqrt()
    normal = hidden / roots * norm_wide[:, None].to(dtype)
    projected = torch.bmm(normal.to(wide.dtype), wide.transpose(1, 2)).to(dtype)
    state = silu(projected[0])
    for layer in range(1, len(wide)):
        # The norm is over both parts; the wide one was divided by its own root.
        root = ((squares[layer] + state.square().sum(-1, keepdim=True)) / (size + width) + eps).sqrt()
        state_term = (state * norm_narrow[layer - 1].to(dtype) / root) @ narrow[layer - 1].to(dtype).T
        state = silu(projected[layer] * (roots[layer] / root) + state_term) + state
    return state.to(wide.dtype)
