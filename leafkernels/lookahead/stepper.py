"""How ``search`` runs a transformers model: one prefix, many branches."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Decoder layers of these kinds read and write keys and values alone.
_KINDS_OF_ATTENTION = {"full_attention", "sliding_attention"}


class TransformersStepper:
    """The two methods that ``search`` calls, ``prefill`` and ``extend``, on a transformers model with rewards.

    All live branches of a prompt are packed in one row. A forward holds one query for each branch, at the position that
    follows its own tokens, and a mask (prompts, 1, S, columns) lets each see the prefix and its own branch. The cache
    holds the prefix once and the branches after it; columns that no live branch sees are dropped before the next
    forward. Cache columns: prefix + tokens of all live branches, instead of branches x (prefix + tokens).

    Args:
        model: a ``RewardTransformer``, or another causal language model whose output has ``rewards`` beside ``logits``.
        packed: False for a row a branch, where a model's attention takes no mask of four dimensions (flash attention).
            Every row then holds the prefix again.
        inputs: what the model reads of the prompts beside their ids, by the names of its forward: the features of their
            audio or images, a row or rows for each prompt, in their order.
        suppress_tokens: ids that no branch takes: their logits are -inf.

    Raises:
        ValueError: the model has layers that are no attention (a state-space model, for instance), or packed branches
            are asked of an attention that takes no such mask, or that counts positions in columns (ALiBi; the local
            layers of GPT-Neo).
    """

    def __init__(
        self,
        model: Any,
        *,
        packed: bool = True,
        inputs: Mapping[str, Tensor] | None = None,
        suppress_tokens: Sequence[int] = (),
    ) -> None:
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
        if packed and _counts_columns(config):
            raise ValueError(
                "packed branches need a model that takes positions from position_ids and the mask, and the attention "
                f"of {config.model_type!r} counts them in columns of the cache: ask for packed=False"
            )
        self._model, self._packed, self._inputs = model, packed, dict(inputs or {})
        self._suppressed = torch.tensor(list(suppress_tokens), dtype=torch.int64)
        self._window = _window_of(config, kinds)
        self._has_kinds = bool(kinds)
        self._cache: Any = None

    @property
    def cache_columns(self) -> int:
        """Columns of keys and values that the cache holds now, all rows together."""
        keys = self._cache.layers[0].keys
        return keys.shape[0] * keys.shape[2]

    @torch.no_grad()
    def prefill(self, prompt_ids: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Run a prompt (P,), or B of any lengths: logits (B, V) of the next tokens, rewards (B,) of the last of each.

        Their branches are counted through: those of the call before, or here 0 to B - 1.
        """
        from transformers import DynamicCache

        prompts = [prompt_ids] if isinstance(prompt_ids, Tensor) else list(prompt_ids)
        # Without the config: each layer keeps all columns, also where it sees a window of them only.
        self._cache = DynamicCache()
        inputs = self._inputs
        if len({len(prompt) for prompt in prompts}) == 1:
            input_ids = torch.stack(prompts)
            seen = torch.ones_like(input_ids, dtype=torch.bool)
        else:
            # What stands left of a prompt is masked, and its columns are dropped before the first token.
            input_ids = nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_side="left")
            lengths = torch.tensor([len(prompt) for prompt in prompts], device=input_ids.device)
            at = torch.arange(input_ids.shape[1], device=input_ids.device)
            seen = at >= input_ids.shape[1] - lengths[:, None]
            places = {"attention_mask": seen.long(), "position_ids": (seen.cumsum(1) - 1).clamp_min(0)}
            inputs = {**inputs, **places}
        output = self._model(input_ids=input_ids, past_key_values=self._cache, use_cache=True, **inputs)
        # (S, columns): which columns of its prompt's row of the cache a branch sees; (S,): which row that is;
        # (rows, columns): at which position a column stands.
        self._seen = seen
        self._rows = torch.arange(len(prompts), device=input_ids.device)
        self._positions = seen.cumsum(1) - 1
        return self._allowed(output.logits[:, -1]), output.rewards[:, -1]

    @torch.no_grad()
    def extend(self, parents: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Append ``token_ids`` (S,) to branches ``parents`` (S,) of the call before: logits (S, V), rewards (S,).

        Branches of one prompt stand together, and prompts in their order.
        """
        parents, token_ids = parents.to(self._seen.device), token_ids.to(self._seen.device)
        extend = self._extend_packed if self._packed else self._extend_rows
        logits, rewards = extend(parents, token_ids)
        return self._allowed(logits), rewards

    def _allowed(self, logits: Tensor) -> Tensor:
        if not len(self._suppressed):
            return logits
        return logits.index_fill(-1, self._suppressed.to(logits.device), float("-inf"))

    def _extend_packed(self, parents: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        rows, counts = self._rows[parents].unique_consecutive(return_counts=True)
        self._keep_seen(parents, rows)
        # Query (row, place) is a branch; rows with fewer branches end with queries that nothing reads.
        self._rows = torch.arange(len(rows), device=parents.device).repeat_interleave(counts)
        first = counts.cumsum(0) - counts
        places = torch.arange(len(parents), device=parents.device) - first[self._rows]
        size = len(rows), int(counts.max())
        at = self._rows, places
        itself = torch.eye(size[1], dtype=torch.bool, device=parents.device)
        self._seen = torch.cat([self._seen, itself[places]], dim=1)
        positions = torch.zeros(size, dtype=torch.int64, device=parents.device)
        positions[at] = self._seen.sum(1) - 1
        self._positions = torch.cat([self._positions, positions], dim=1)
        input_ids = torch.zeros_like(positions)
        input_ids[at] = token_ids
        seen = torch.zeros((*size, self._seen.shape[1]), dtype=torch.bool, device=parents.device)
        seen[at] = self._seen
        output = self._model(
            input_ids=input_ids,
            position_ids=positions,
            attention_mask=self._masks(seen, positions),
            past_key_values=self._cache,
            use_cache=True,
        )
        return output.logits[at], output.rewards[at]

    def _keep_seen(self, parents: Tensor, rows: Tensor) -> None:
        """Make ``self._seen`` that of the parents, and keep the prompts ``rows`` and the columns that a branch sees."""
        seen, of_parents = self._seen[parents], self._rows[parents]
        is_seen = torch.stack([seen[of_parents == row].any(0) for row in rows.tolist()])
        if is_seen.all() and len(rows) == len(self._positions):
            self._seen = seen
            return
        # Of each row first the columns that it sees, in their order; a row that sees fewer than another keeps some
        # more, which none of its branches sees.
        most = int(is_seen.sum(1).max())
        columns = is_seen.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
        index_of_row = torch.searchsorted(rows, of_parents)
        self._seen = seen.gather(1, columns[index_of_row])
        self._positions = self._positions[rows].gather(1, columns)
        for layer in self._cache.layers:
            layer.keys, layer.values = (_take(part, rows, columns) for part in (layer.keys, layer.values))

    def _masks(self, seen: Tensor, positions: Tensor) -> Any:
        """Of (rows, S, columns): the mask that the model's layers take."""
        full = self._as_mask(seen)
        if self._window is None:
            return full
        in_window = positions[:, :, None] - self._positions[:, None] < self._window
        sliding = self._as_mask(seen & in_window)
        return {"full_attention": full, "sliding_attention": sliding} if self._has_kinds else sliding

    def _as_mask(self, is_seen: Tensor) -> Tensor:
        keys = self._cache.layers[0].keys
        mask = torch.zeros(is_seen.shape, dtype=keys.dtype, device=keys.device)
        return mask.masked_fill_(~is_seen, torch.finfo(keys.dtype).min)[:, None]

    def _extend_rows(self, parents: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        if not torch.equal(parents, torch.arange(len(self._seen), device=parents.device)):
            self._cache.batch_select_indices(parents)  # a copy
        self._seen = nn.functional.pad(self._seen[parents], (0, 1), value=True)
        output = self._model(
            input_ids=token_ids[:, None],
            # A mask of ones says nothing, and flash attention is quicker without.
            attention_mask=None if self._seen.all() else self._seen.long(),
            position_ids=self._seen.sum(1, keepdim=True) - 1,
            past_key_values=self._cache,
            use_cache=True,
        )
        return output.logits[:, -1], output.rewards[:, -1]


def _take(part: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(rows, heads, columns, size) of keys or values, of each row other columns (len(rows), columns)."""
    if len(part) == 1:
        return part.index_select(2, columns[0])
    return part[rows].gather(2, columns[:, None, :, None].expand(-1, part.shape[1], -1, part.shape[3]))


def _counts_columns(config: Any) -> bool:
    """Whether biases or windows of the attention go by the columns of the cache, where branches stand mixed."""
    has_alibi = getattr(config, "alibi", False) or config.model_type in ("mpt", "bloom")
    return bool(has_alibi) or "local" in (getattr(config, "attention_layers", None) or ())


def _window_of(config: Any, kinds: set[str]) -> int | None:
    """How many tokens back the layers with a window see, themselves included; None where no layer has one."""
    window = getattr(config, "sliding_window", None)
    if not window or (kinds and "sliding_attention" not in kinds):
        return None
    return int(window)
