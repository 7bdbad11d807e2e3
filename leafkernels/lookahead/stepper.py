"""How ``search`` runs a transformers model: one prefix, many branches."""

from typing import Any

import torch
from torch import Tensor

# Decoder layers of these kinds read and write keys and values alone.
_KINDS_OF_ATTENTION = {"full_attention", "sliding_attention"}


class TransformersStepper:
    """The two methods that ``search`` calls, ``prefill`` and ``extend``, on a transformers model with rewards.

    All live branches are packed in one row. A forward holds one query for each branch, at the position that follows its
    own tokens, and a mask (1, 1, S, columns) lets each see the prefix and its own branch. The cache holds the prefix
    once and the branches after it; columns that no live branch sees are dropped before the next forward. Cache columns:
    prefix + tokens of all live branches, instead of branches x (prefix + tokens).

    Args:
        model: a ``RewardTransformer``, or another causal language model whose output has ``rewards`` beside ``logits``.
        packed: False for a row a branch, where a model's attention takes no mask of four dimensions (flash attention).
            Every row then holds the prefix again.

    Raises:
        ValueError: the model has layers that are no attention (a state-space model, for instance), or packed branches
            are asked of an attention that takes no such mask.
    """

    def __init__(self, model: Any, *, packed: bool = True) -> None:
        config = model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ())
        if kinds - _KINDS_OF_ATTENTION:
            other = ", ".join(sorted(kinds - _KINDS_OF_ATTENTION))
            raise ValueError(f"model must have layers of attention only, got layers of the kind {other}")
        attention = getattr(config, "_attn_implementation", "eager") or "eager"
        if packed and attention not in ("eager", "sdpa"):
            raise ValueError(
                f"packed branches need a mask of four dimensions, which the attention {attention!r} does not take: "
                "load the model with attn_implementation='sdpa', or ask for packed=False"
            )
        self._model, self._packed = model, packed
        self._window = _window_of(config, kinds)
        self._has_kinds = bool(kinds)
        self._cache: Any = None

    @property
    def cache_columns(self) -> int:
        """Columns of keys and values that the cache holds now, all rows together."""
        keys = self._cache.layers[0].keys
        return keys.shape[0] * keys.shape[2]

    @torch.no_grad()
    def prefill(self, prompt_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Run the prompt (P,): logits (1, V) of the next token, and the reward (1,) of the last prompt token."""
        from transformers import DynamicCache

        # Without the config: each layer keeps all columns, also where it sees a window of them only.
        self._cache = DynamicCache()
        output = self._model(input_ids=prompt_ids[None], past_key_values=self._cache, use_cache=True)
        # (S, columns): which columns of the cache a branch sees; (columns,): at which position a column stands.
        self._seen = torch.ones((1, len(prompt_ids)), dtype=torch.bool, device=prompt_ids.device)
        self._positions = torch.arange(len(prompt_ids), device=prompt_ids.device)
        return output.logits[:, -1], output.rewards[:, -1]

    @torch.no_grad()
    def extend(self, parents: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Append ``token_ids`` (S,) to branches ``parents`` (S,) of the call before: logits (S, V), rewards (S,)."""
        parents, token_ids = parents.to(self._seen.device), token_ids.to(self._seen.device)
        return self._extend_packed(parents, token_ids) if self._packed else self._extend_rows(parents, token_ids)

    def _extend_packed(self, parents: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        self._drop_unseen(parents)
        itself = torch.eye(len(parents), dtype=torch.bool, device=parents.device)
        self._seen = torch.cat([self._seen[parents], itself], dim=1)
        positions = self._seen.sum(1) - 1
        self._positions = torch.cat([self._positions, positions])
        output = self._model(
            input_ids=token_ids[None],
            position_ids=positions[None],
            attention_mask=self._masks(positions),
            past_key_values=self._cache,
            use_cache=True,
        )
        return output.logits[0], output.rewards[0]

    def _drop_unseen(self, parents: Tensor) -> None:
        is_seen = self._seen[parents].any(0)
        if is_seen.all():
            return
        columns = is_seen.nonzero()[:, 0]
        self._seen, self._positions = self._seen[:, columns], self._positions[columns]
        for layer in self._cache.layers:
            layer.keys, layer.values = (part.index_select(2, columns) for part in (layer.keys, layer.values))

    def _masks(self, positions: Tensor) -> Any:
        full = self._as_mask(self._seen)
        if self._window is None:
            return full
        in_window = positions[:, None] - self._positions < self._window
        sliding = self._as_mask(self._seen & in_window)
        return {"full_attention": full, "sliding_attention": sliding} if self._has_kinds else sliding

    def _as_mask(self, is_seen: Tensor) -> Tensor:
        keys = self._cache.layers[0].keys
        mask = torch.zeros(is_seen.shape, dtype=keys.dtype, device=keys.device)
        return mask.masked_fill_(~is_seen, torch.finfo(keys.dtype).min)[None, None]

    def _extend_rows(self, parents: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        self._cache.batch_select_indices(parents)
        length = self._cache.layers[0].keys.shape[2]
        output = self._model(
            input_ids=token_ids[:, None],
            position_ids=torch.full_like(token_ids, length)[:, None],
            past_key_values=self._cache,
            use_cache=True,
        )
        return output.logits[:, -1], output.rewards[:, -1]


def _window_of(config: Any, kinds: set[str]) -> int | None:
    """How many tokens back the layers with a window see, themselves included; None where no layer has one."""
    window = getattr(config, "sliding_window", None)
    if not window or (kinds and "sliding_attention" not in kinds):
        return None
    return int(window)
