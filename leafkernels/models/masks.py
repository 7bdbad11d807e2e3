"""Attention masks of tokens that do not stand in a row: which token sees which, as the layers of a model take it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Attentions of transformers that take a mask of four dimensions.
TAKE_MASKS = ("eager", "sdpa", "flex_attention")
Sees = Callable[[Tensor, Tensor, Tensor], Tensor]
Reach = Callable[[Tensor, Tensor], Tensor]

_FULL, _SLIDING, _CHUNKED = "full_attention", "sliding_attention", "chunked_attention"


def attention_of(config: Any) -> str:
    """The name of the attention implementation that a model's config asks for."""
    return getattr(config, "_attn_implementation", None) or "eager"


def why_no_masks(config: Any) -> str | None:
    """Why no mask tells the layers of a model, by the config of its text, what a token sees; None: one does."""
    if other := sorted(set(getattr(config, "layer_types", None) or ()) - {_FULL, _SLIDING, _CHUNKED}):
        return f"it has layers of the kind {', '.join(other)}, which are no attention to tokens"
    if attention_of(config) not in TAKE_MASKS:
        return f"the attention {attention_of(config)!r} takes no mask of four dimensions"
    return None


def why_no_sharing(config: Any) -> str | None:
    """Why neither a cache nor a mask tells what a token sees: a window other than ``reaches`` knows, beyond which the
    few tokens of a comparison do not go; None: there is none."""
    for name, size in vars(config).items():
        if name.endswith(("_window", "_window_size")) and name != "sliding_window" and type(size) is int and size:
            return f"its config has a window of a kind that is not known, {name}={size}"
    return None


def reaches(config: Any) -> dict[str, Reach]:
    """Kinds of layers that do not see all that stands before: whether they see from a position (q) to one (k)."""
    kinds = set(getattr(config, "layer_types", None) or ())
    found: dict[str, Reach] = {}
    window = getattr(config, "sliding_window", None)
    if window and (not kinds or _SLIDING in kinds):
        found[_SLIDING] = lambda q, k: q - k < window
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk and (not kinds or _CHUNKED in kinds):
        found[_CHUNKED] = lambda q, k: q // chunk == k // chunk
    return found


def tree_sees(ends: Tensor, is_trunk: Tensor) -> Sees:
    """Trees, each in a row: a node sees those above it, itself, and all of the trunk before its row.

    Args:
        ends: (B, W) where the subtree of each node ends.
        is_trunk: (B, D) bool, the columns of the trunk that hold a token; keys are these, and then the nodes.
    """
    depth = is_trunk.shape[1]

    def is_above(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < ends[b, k])

    def sees(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        of_trunk = is_trunk[b, k.clamp(max=depth - 1)]
        return torch.where(k < depth, of_trunk, is_above(b, q, (k - depth).clamp(min=0)))

    return sees if depth else is_above


def attention_masks(config: Any, sees: Sees, queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Any:
    """The mask that a model is given as ``attention_mask``, one for each kind of its layers where they differ.

    Args:
        config: of the model's text.
        sees: of integer tensors row, query and key that broadcast: whether the query sees the key, nothing being out
            of reach.
        queries, keys: (B, Q) and (B, K) positions in their sequences, by which layers reach, not by columns.
        dtype: of the model's states.
    """

    def of_kind(reach: Reach | None) -> Any:
        def is_seen(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
            found = sees(b, q, k)
            return found if reach is None else found & reach(queries[b, q], keys[b, k])

        if attention_of(config) == "flex_attention":
            from torch.nn.attention.flex_attention import create_block_mask

            rows, width = queries.shape
            device = str(queries.device)
            return create_block_mask(
                lambda b, h, q, k: is_seen(b, q, k), rows, None, width, keys.shape[1], device=device
            )
        b, q, k = (torch.arange(size, device=queries.device) for size in (*queries.shape, keys.shape[1]))
        table = is_seen(b[:, None, None], q[:, None], k)
        # Not -inf: a query that sees nothing, as of padding, would be NaN.
        mask = torch.zeros(table.shape, dtype=dtype, device=table.device)
        return mask.masked_fill_(~table, torch.finfo(dtype).min)[:, None]

    others = reaches(config)
    if not getattr(config, "layer_types", None):
        return of_kind(next(iter(others.values()), None))
    if not others:
        return of_kind(None)
    return {_FULL: of_kind(None), **{kind: of_kind(reach) for kind, reach in others.items()}}
