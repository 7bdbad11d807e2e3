"""How ``search`` runs a transformers model: one prefix, many branches."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from leafkernels.lookahead import trial
from leafkernels.models.asking import name_of_cache
from leafkernels.models.masks import attention_masks, attention_of


class TransformersStepper:
    """The two methods that ``search`` calls, ``prefill`` and ``extend``, on a transformers model with rewards.

    All live branches of a prompt are packed in one row. A forward holds one query for each branch, at the position that
    follows its own tokens, and a mask (prompts, 1, S, columns) lets each see the prefix and its own branch. The cache
    holds the prefix once and the branches after it; columns that no live branch sees are dropped before the next
    forward. Cache columns: prefix + tokens of all live branches, instead of branches x (prefix + tokens).

    What the model reads of its prompts, positions among it, is what its own ``generate`` would hand it. Before a model
    is first used, branches of a few tokens are run here and by its ``generate``, and compared; so are its prompts when
    they first come with ``inputs`` of those names.

    Args:
        model: a ``RewardTransformer``, or another causal language model whose output has ``rewards`` beside ``logits``.
        packed: False for a row a branch, each of which holds the prefix again: where a model's attention takes no mask
            of four dimensions (flash attention), or layers keep a state beside keys and values or in their place
            (Qwen3-Next, Falcon-H1, Mamba). None: packed where the model can be.
        inputs: what the model reads of the prompts beside their ids, by the names of its forward: the features of their
            audio or images, a row or rows for each prompt, in their order.
        suppress_tokens: ids that no branch takes: their logits are -inf.
        max_new_tokens: of the longest branch, where that is known: what is wrong at its length is said before it is
            reached.

    Raises:
        ValueError: packed branches are asked of layers that keep a state (linear attention, state spaces,
            convolutions), or of an attention that takes no such mask, or that counts positions in columns (ALiBi; the
            local layers of GPT-Neo); or the logits are not those of the model's ``generate`` for another reason.
    """

    def __init__(
        self,
        model: Any,
        *,
        packed: bool | None = None,
        inputs: Mapping[str, Tensor] | None = None,
        suppress_tokens: Sequence[int] = (),
        max_new_tokens: int = 0,
    ) -> None:
        config = model.config.get_text_config()
        self._model, self._inputs = model, dict(inputs or {})
        self._suppressed = torch.tensor(list(suppress_tokens), dtype=torch.int64)
        self._room = max_new_tokens
        self._config = config
        self._cache: Any = None
        self._base = trial.base_of(model)
        self._counts_itself, self._cache_name = False, "past_key_values"
        if self._base is not None:
            self._counts_itself = "position_ids" not in inspect.signature(self._base.forward).parameters
            self._cache_name = name_of_cache(self._base)
        cannot_pack = "" if packed is False else _cannot_pack(config, is_own=self._base is None)
        if packed and cannot_pack:
            raise ValueError(f"packed branches need {cannot_pack}, or ask for packed=False")
        self._packed = not cannot_pack and trial.packs(self) if packed is None else packed
        trial.check_model(self, self._packed)

    @property
    def cache_columns(self) -> int:
        """Columns of keys and values that the cache holds now, all rows together."""
        keys = self._cache.layers[0].keys
        return keys.shape[0] * keys.shape[2]

    @torch.no_grad()
    def prefill(self, prompt_ids: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Run a prompt (P,), or B of any lengths: logits (B, V) of the next tokens, rewards (B,) of the last of each.

        Their branches are counted through: those of the call before, or here 0 to B - 1.

        Raises:
            ValueError: the model keeps no keys and values of its prompt; it gives other tokens than its ``generate``
                beside padding or behind its ``inputs``; or its rotary frequencies change between the lengths.
        """
        prompts = [prompt_ids] if isinstance(prompt_ids, Tensor) else list(prompt_ids)
        lengths = {len(prompt) for prompt in prompts}
        self._shortest, self._longest = min(lengths), max(lengths)
        if len(lengths) > 1:
            trial.check_lengths(self)
        trial.check_turns(self, self._shortest, self._longest + self._room)
        trial.check_inputs(self, prompts)
        return self._prefill(prompts)

    def _prefill(self, prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        from transformers import DynamicCache

        # Packed, each layer keeps all columns, also where it sees a window of them only; in rows it is as in generate.
        is_packed = self._packed or self._base is None
        self._cache = DynamicCache() if is_packed else DynamicCache(config=self._base.config.get_text_config())
        input_ids, seen = self.padded(prompts)
        is_padded = not all(len(prompt) == input_ids.shape[1] for prompt in prompts)
        positions = self._positions_of(input_ids, seen)
        places: dict[str, Any] = {"attention_mask": seen.long()} if is_padded else {}
        if is_padded if self._base is None else not self._counts_itself:
            places["position_ids"] = positions
        own = {"input_ids": input_ids, self._cache_name: self._cache, "use_cache": True}
        output = self._model(**{**self._inputs, **places, **own})
        self._check_cache(input_ids.shape[1])
        # (S, columns): which columns of its prompt's row of the cache a branch sees; (S,): which row that is;
        # (rows, columns): which token of its row a column holds.
        self._seen = seen
        self._rows = torch.arange(len(prompts), device=input_ids.device)
        self._order = seen.cumsum(1) - 1
        # (..., rows): the positions of the last tokens of the prompts; and how many tokens follow them by now.
        self._last = positions[..., -1].expand(*positions.shape[:-2], len(prompts))
        self._grown = 0
        return self._allowed(output.logits[:, -1]), output.rewards[:, -1]

    @staticmethod
    def padded(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Prompts in rows (B, P), shorter ones padded on the left, and where they are (B, P), bool."""
        if len({len(prompt) for prompt in prompts}) == 1:
            input_ids = torch.stack(list(prompts))
            return input_ids, torch.ones_like(input_ids, dtype=torch.bool)
        # What stands left of a prompt is masked, and its columns are dropped before the first token.
        input_ids = nn.utils.rnn.pad_sequence(list(prompts), batch_first=True, padding_side="left")
        padding = torch.tensor([[input_ids.shape[1] - len(prompt)] for prompt in prompts], device=input_ids.device)
        return input_ids, torch.arange(input_ids.shape[1], device=input_ids.device) >= padding

    def _positions_of(self, input_ids: Tensor, seen: Tensor) -> Tensor:
        """(..., B, P), as ``generate`` prepares them: behind an image they are not those of the tokens."""
        given = self._inputs.get("position_ids")
        if given is not None:
            if given.shape[-1] != input_ids.shape[1]:
                raise ValueError(
                    f"position_ids of inputs must have one for each of {input_ids.shape[1]} tokens, got shape "
                    f"{tuple(given.shape)}"
                )
            return given
        ask = getattr(self._base, "_prepare_position_ids_for_generation", None)
        if ask is None or self._counts_itself:
            return (seen.cumsum(1) - 1).clamp_min(0)
        found: Tensor = ask(input_ids, {**self._inputs, "attention_mask": seen.long()})
        return found

    def _check_cache(self, count: int) -> None:
        """Raise ValueError unless the model has kept keys and values of so many tokens, or a state."""
        layers = self._cache.layers
        held = sorted({layer.get_seq_length() for layer in layers if hasattr(layer, "get_seq_length")})
        states = [all(layer.has_previous_state.values()) for layer in layers if hasattr(layer, "has_previous_state")]
        if held != [count] and (held or not states):
            raise ValueError(
                f"model must keep the keys and values of all {count} tokens of a prompt in the cache that it is given, "
                f"got {' and '.join(map(str, held)) or 'none'}"
            )
        if not all(states):
            raise ValueError(
                "model must keep the states of its layers in the cache that it is given, where branches are copied, "
                f"got {sum(states)} of {len(states)}"
            )

    @torch.no_grad()
    def extend(self, parents: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Append ``token_ids`` (S,) to branches ``parents`` (S,) of the call before: logits (S, V), rewards (S,).

        Branches of one prompt stand together, and prompts in their order.
        """
        trial.check_turns(self, self._shortest, self._longest + self._grown + 1)
        return self._extend(parents, token_ids)

    def _extend(self, parents: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        parents, token_ids = parents.to(self._seen.device), token_ids.to(self._seen.device)
        self._grown += 1
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
        self._last = self._last[..., rows]
        # Query (row, place) is a branch; rows with fewer branches end with queries that nothing reads.
        self._rows = torch.arange(len(rows), device=parents.device).repeat_interleave(counts)
        first = counts.cumsum(0) - counts
        places = torch.arange(len(parents), device=parents.device) - first[self._rows]
        size = len(rows), int(counts.max())
        at = self._rows, places
        itself = torch.eye(size[1], dtype=torch.bool, device=parents.device)
        self._seen = torch.cat([self._seen, itself[places]], dim=1)
        order = torch.zeros(size, dtype=torch.int64, device=parents.device)
        order[at] = self._seen.sum(1) - 1
        self._order = torch.cat([self._order, order], dim=1)
        input_ids = torch.zeros_like(order)
        input_ids[at] = token_ids
        seen = torch.zeros((*size, self._seen.shape[1]), dtype=torch.bool, device=parents.device)
        seen[at] = self._seen
        output = self._model(
            input_ids=input_ids,
            position_ids=(self._last + self._grown)[..., None].expand(*self._last.shape, size[1]),
            attention_mask=self._masks(seen, order),
            use_cache=True,
            **{self._cache_name: self._cache},
        )
        return output.logits[at], output.rewards[at]

    def _keep_seen(self, parents: Tensor, rows: Tensor) -> None:
        """Make ``self._seen`` that of the parents, and keep the prompts ``rows`` and the columns that a branch sees."""
        seen, of_parents = self._seen[parents], self._rows[parents]
        is_seen = torch.stack([seen[of_parents == row].any(0) for row in rows.tolist()])
        if is_seen.all() and len(rows) == len(self._order):
            self._seen = seen
            return
        # Of each row first the columns that it sees, in their order; a row that sees fewer than another keeps some
        # more, which none of its branches sees.
        most = int(is_seen.sum(1).max())
        columns = is_seen.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
        index_of_row = torch.searchsorted(rows, of_parents)
        self._seen = seen.gather(1, columns[index_of_row])
        self._order = self._order[rows].gather(1, columns)
        for layer in self._cache.layers:
            layer.keys, layer.values = (_take(part, rows, columns) for part in (layer.keys, layer.values))

    def _masks(self, seen: Tensor, order: Tensor) -> Any:
        """Of (rows, S, columns): the mask that the model's layers take."""
        dtype = self._cache.layers[0].keys.dtype
        return attention_masks(self._config, lambda *places: seen[places], order, self._order, dtype)

    def _extend_rows(self, parents: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        if not torch.equal(parents, torch.arange(len(self._seen), device=parents.device)):
            self._cache.reorder_cache(parents)  # a copy, of states too
        self._seen = nn.functional.pad(self._seen[parents], (0, 1), value=True)
        self._last = self._last[..., parents]
        places = {} if self._counts_itself else {"position_ids": (self._last + self._grown)[..., None]}
        output = self._model(
            input_ids=token_ids[:, None],
            # A mask of ones says nothing, and flash attention is quicker without.
            attention_mask=None if self._seen.all() else self._seen.long(),
            use_cache=True,
            **places,
            **{self._cache_name: self._cache},
        )
        return output.logits[:, -1], output.rewards[:, -1]


def _cannot_pack(config: Any, *, is_own: bool) -> str:
    """What packed branches would need of this model; empty: nothing that its config tells."""
    from transformers import DynamicCache

    # What a layer of the cache keeps beside keys and values it takes by another "update".
    layers = [] if is_own else DynamicCache(config=config).layers
    more = sorted({type(layer).__name__ for layer in layers if any(name.startswith("update_") for name in dir(layer))})
    if more:
        return f"layers that keep keys and values alone, got {', '.join(more)} in its cache: choose another model"
    attention = attention_of(config)
    if attention in ("eager", "sdpa"):
        return ""
    return (
        f"a mask of four dimensions, which the attention {attention!r} does not take: load the model with "
        "attn_implementation='sdpa'"
    )


def _take(part: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(rows, heads, columns, size) of keys or values, of each row other columns (len(rows), columns)."""
    if len(part) == 1:
        return part.index_select(2, columns[0])
    return part[rows].gather(2, columns[:, None, :, None].expand(-1, part.shape[1], -1, part.shape[3]))
