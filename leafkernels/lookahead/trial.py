"""Whether a model's branches are what its own ``generate`` gives: a few tokens are run both ways, and compared.

Nothing here knows a model by its name. What is found is kept for as long as the model lives.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from leafkernels.models.asking import evaluating, plain_ids, turns_change

# For each model the results of trials, by their arguments.
_FOUND: "WeakKeyDictionary[Any, dict[Any, Any]]" = WeakKeyDictionary()


def base_of(model: Any) -> Any:
    """The model of transformers that can generate, in ``model`` or in its ``model``; None: there is none."""
    try:
        from transformers import GenerationMixin
    except ImportError:
        return None
    for outer in (model, getattr(model, "model", None)):
        if isinstance(outer, torch.nn.Module):
            return next((module for module in outer.modules() if isinstance(module, GenerationMixin)), None)
    return None


class UnfitLayersError(ValueError):
    """The layers of a model pass on something else than a channel reads."""


def check_layers(model: Any) -> None:
    """Run two plain tokens, which raise ``UnfitLayersError`` where a channel cannot read the layers of its model."""
    base = base_of(model)
    if base is None or next(base.parameters()).is_meta:
        return
    try:
        with _quietly(model):
            model(input_ids=plain_ids(base)[None, :2].to(next(base.parameters()).device))
    except UnfitLayersError:
        raise
    except Exception:  # of a model that is not ready yet, or that reads no ids alone: it says so when it is used
        return


def packs(stepper: Any) -> bool:
    """Whether packed branches of one prompt are what ``generate`` gives."""
    return stepper._base is None or not (stepper._counts_itself or _tried(stepper, True, False))


def check_model(stepper: Any, packed: bool) -> None:
    """Raise ValueError unless branches of one prompt are what ``generate`` gives."""
    base = stepper._base
    if base is None:
        return
    kind = base.config.get_text_config().model_type
    wrong = "" if packed and stepper._counts_itself else _tried(stepper, packed, False)
    if packed and (wrong or stepper._counts_itself) and not _tried(stepper, False, False):
        raise ValueError(
            "packed branches need a model that takes positions from position_ids and the mask, and the attention of "
            f"{kind!r} counts them in columns of the cache{f' ({wrong})' if wrong else ''}: ask for packed=False"
        )
    if wrong or packed and stepper._counts_itself:
        wrong = wrong or _tried(stepper, False, False)
        raise ValueError(
            f"model must give with a cache, token by token, what its own generate gives, and {type(base).__name__} "
            f"({kind!r}) does not: {wrong}"
        )


def check_lengths(stepper: Any) -> None:
    """Raise ValueError unless prompts of unequal lengths are what they are alone."""
    if stepper._base is None:
        return
    if wrong := _tried(stepper, stepper._packed, True):
        raise ValueError(
            f"prompts must have one length, since {type(stepper._base).__name__} gives other answers beside padding: "
            f"{wrong}"
        )


def check_inputs(stepper: Any, prompts: Sequence[Tensor]) -> None:
    """Raise ValueError unless prompts with ``inputs`` go on as in ``generate``; asked once for each set of names."""
    base, inputs = stepper._base, stepper._inputs
    names = sorted(name for name, value in inputs.items() if not isinstance(value, bool | int | None))
    if base is None or not names:
        return
    key = ("inputs", stepper._packed, *names)
    found = _FOUND.setdefault(stepper._model, {})
    if key in found:
        return
    # Errors raised here concern these prompts, and are the model's own.
    with _quietly(base):
        wrong = _compare_inputs(_plain(stepper), prompts)
    if wrong:
        raise ValueError(
            f"inputs must be what {type(base).__name__} reads of its prompts once, and behind {', '.join(names)} it "
            f"gives other tokens than its own generate: {wrong}"
        )
    found[key] = ""


def check_turns(stepper: Any, shortest: int, longest: int) -> None:
    """Raise ValueError where rotary frequencies hang on the length, and differ between these two.

    Keys in the cache then have frequencies of another length than their query, and prompts those of the longest.
    """
    base = stepper._base
    if base is None or stepper._counts_itself:
        return
    if not turns_change(base, shortest, longest):
        return
    raise ValueError(
        "prompts and answers must be all shorter or all longer than the length where the rotary frequencies of "
        f"{type(base).__name__} change (dynamic or long rope), got lengths from {shortest} to {longest}, and they "
        "change between: choose other prompts, or a smaller max_new_tokens"
    )


def _tried(stepper: Any, packed: bool, padded: bool) -> str:
    """What is wrong with branches of a few plain tokens; empty: nothing."""
    key = ("ids", packed, padded, getattr(stepper._base.config, "_attn_implementation", None))
    found = _FOUND.setdefault(stepper._model, {})
    if key not in found:
        found[key] = _wrong(_compare_branches, stepper, packed, padded)
    return str(found[key])


def _plain(stepper: Any) -> Any:
    """Another stepper on the same model, which suppresses nothing."""
    mine = copy.copy(stepper)
    mine._suppressed = stepper._suppressed[:0]
    return mine


def _wrong(compare: Any, stepper: Any, *args: Any) -> str:
    mine = _plain(stepper)
    try:
        with _quietly(stepper._base):
            wrong: str = compare(mine, *args)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as failure:  # whatever a model raises is the answer
        return f"{type(failure).__name__}: {failure}"
    finally:
        # _keep_apart leaves a reference cycle, which would hold the model until the cycle collector runs.
        vars(mine).clear()
    return wrong


@contextmanager
def _quietly(model: torch.nn.Module) -> Iterator[None]:
    """Without gradients, dropout and compilation; each module keeps its mode."""
    with evaluating(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield


def _compare_branches(mine: Any, packed: bool, padded: bool) -> str:
    mine._packed, mine._inputs = packed, {}
    base, steps = mine._base, 3
    ids = plain_ids(base).to(next(base.parameters()).device)
    # For each prompt its branches, the first of which continues as generate does with its cache.
    branches = [[ids], [ids[2:5]]] if padded else [[ids]]
    greedy = [_generate(base, prompt[None], steps + 1) for (prompt,) in branches]
    differences = _Differences(base)
    logits, _ = mine._prefill([prompt for (prompt,) in branches])
    differences.add(logits, torch.cat([found.logits[0] for found in greedy]))
    if packed:
        _keep_apart(mine)
    # Three branches, of which one ends and one forks.
    for step, parents in enumerate(([0, 0, 0], [0, 2, 2], [0, 1, 2])):
        grown, named, first = [], [], 0
        for number, prompt_branches in enumerate(branches):
            others = [ids[(step + 2 * place) % len(ids)] for place in (1, 2)]
            taken = [greedy[number].sequences[0, len(prompt_branches[0])], *others]
            grown.append(
                [torch.cat([prompt_branches[p], token[None]]) for p, token in zip(parents, taken, strict=True)]
            )
            named += [first + parent for parent in parents]
            first += len(prompt_branches)
        branches = grown
        tokens = torch.stack([branch[-1] for prompt_branches in branches for branch in prompt_branches])
        logits, _ = mine._extend(torch.tensor(named), tokens)
        for number in range(len(branches)):
            differences.add(logits[3 * number, None], greedy[number].logits[step + 1])
    for number, prompt_branches in enumerate(branches):
        alone = _generate(base, torch.stack(prompt_branches[1:]), 1).logits[0]
        differences.add(logits[3 * number + 1 : 3 * number + 3], alone)
    return differences.text()


def _keep_apart(mine: Any) -> None:
    """Have columns that no branch sees between a prefix and its branches, as those of other branches may stand there.

    So many that a model shows whether it counts positions, or a window, in columns.
    """
    count = max(8, min(512, getattr(mine._base.config.get_text_config(), "max_position_embeddings", 0) - 32))
    keep = mine._keep_seen

    def keep_and_add(*args: Any) -> None:
        keep(*args)
        pad = torch.nn.functional.pad
        mine._seen, mine._order = pad(mine._seen, (0, count)), pad(mine._order, (0, count))
        for layer in mine._cache.layers:
            layer.keys, layer.values = (pad(part, (0, 0, 0, count)) for part in (layer.keys, layer.values))

    mine._keep_seen = keep_and_add


def _compare_inputs(mine: Any, prompts: Sequence[Tensor]) -> str:
    input_ids, seen = mine.padded(prompts)
    found = _generate(mine._base, input_ids, 2, seen.long(), mine._inputs)
    differences = _Differences(mine._base)
    differences.add(mine._prefill(prompts)[0], found.logits[0])
    taken = found.sequences[:, input_ids.shape[1]]
    differences.add(mine._extend(torch.arange(len(prompts)), taken)[0], found.logits[1])
    return differences.text()


def _generate(
    base: Any, input_ids: Tensor, count: int, seen: Tensor | None = None, inputs: Mapping[str, Any] | None = None
) -> Any:
    from transformers import GenerationConfig

    # Without the sampling, processors and end tokens of the model's own config.
    known = vars(GenerationConfig())
    unasked = {name: None for name in base.generation_config.to_diff_dict() if name in known}
    unasked.pop("transformers_version", None)
    own = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids) if seen is None else seen,
        "do_sample": False,
        "num_beams": 1,
        "num_return_sequences": 1,
        "max_new_tokens": count,
        "pad_token_id": 0,
        "use_cache": True,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    return base.generate(**{**unasked, **(inputs or {}), **own})


class _Differences:
    """How far the logits of branches differ, by the size of the logits of each, both as root mean squares."""

    def __init__(self, base: Any) -> None:
        self.found: list[float] = []
        device = next(base.parameters()).device.type
        computed = {torch.float32} | {p.dtype for p in base.parameters() if p.is_floating_point() and p.itemsize > 1}
        if torch.is_autocast_enabled(device):
            computed.add(torch.get_autocast_dtype(device))
        precision = {"highest": 0.0, "high": 2**-10, "medium": 2**-7}[torch.get_float32_matmul_precision()]
        # Another order of summation changes less than this, in models of many layers too; a wrong position or a lost
        # token changes far more.
        self.bound = 4 * max(precision, *(torch.finfo(dtype).eps for dtype in computed)) ** (2 / 3)

    def add(self, found: Tensor, truth: Tensor) -> None:
        # NaN and infinity: a banned token, or a broken model, which the search itself reports.
        is_number = truth.isfinite()
        is_same = (found.isfinite() == is_number).all(-1)
        found, truth = (logits.double().where(is_number, 0.0) for logits in (found, truth))
        size = truth.var(-1, correction=0).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
        difference = (found - truth).square().mean(-1).sqrt().where(is_same, torch.inf)
        self.found += (difference / size).tolist()

    def text(self) -> str:
        return f"logits differ by {max(self.found):.1e} of their size" if max(self.found) > self.bound else ""
