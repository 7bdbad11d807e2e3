"""Teachers of ``FireOPDTrainer``: which ids they share with the student, where they live, and how they score."""

import inspect
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from leafkernels import surprisal_entropy
from leafkernels.models import tree_batch
from leafkernels.models.asking import evaluating
from leafkernels.models.tree_logprobs import prepare

# Logits that one forward pass makes, 2 GiB in float32; a row alone may have more.
_LOGITS = 1 << 29


@dataclass
class Teacher:
    """A model that scores the student's tokens."""

    model: Any
    """None: the student itself, as ``borrowed`` makes it."""
    num_ids: int
    """Ids below this are the same tokens to both, and each is asked for its distribution over these."""
    home: torch.device | None = None
    """Where its owner keeps it, to be brought back there; None: it stays where it is."""
    keeps: bool = False
    """Whether it makes the last logits alone when asked to."""
    borrowed: Callable[[Any], AbstractContextManager[None]] | None = None
    """What makes a teacher of the student that it is given, for a while."""


def vocabulary_size(name: str, model: Any) -> int:
    """How many ids the head of a model has, also where its weight is spread over ranks."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        raise TypeError(f"{name} must be a causal language model, got {type(model).__name__} without a head")
    # A parameter that DeepSpeed has spread over the ranks has no shape of its own.
    return int(getattr(head.weight, "ds_shape", head.weight.shape)[0])


def load_teacher(name: str, trust_remote_code: bool) -> Any:
    """A model by its name, in the dtype it was saved in, whole on every rank (under ZeRO-3, spread over them)."""
    from transformers import AutoModelForCausalLM

    # With FSDP's saving of memory, ranks but the first would get weights that nobody has read.
    option = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    before = os.environ.pop(option, None)
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype="auto", trust_remote_code=trust_remote_code)
    finally:
        if before is not None:
            os.environ[option] = before


def known_tokenizer(name: str, model: Any, given: Any, trust_remote_code: bool) -> Any:
    """The tokenizer of a teacher: the one given, or the one beside its weights; None, with a warning, if neither."""
    given = getattr(given, "tokenizer", given)  # a processor has one
    if given is not None:
        if not hasattr(given, "get_vocab"):
            raise TypeError(f"teacher_processing_class must be a tokenizer, got {type(given).__name__}")
        return given
    from transformers import AutoTokenizer

    config = getattr(model, "config", None)
    path = model if isinstance(model, str) else getattr(config, "_name_or_path", "")
    reason = "none came with it" if model is None else "the model has no name"
    if path:
        try:
            return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        except Exception as error:  # whatever it is, there is none to compare
            if isinstance(model, str):
                raise
            reason = f"none is found at {path!r}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    warnings.warn(
        f"the tokenizer of {name} is not known ({reason}), so it is not compared with the student's, whose ids it must "
        "share: teacher_processing_class=... has it compared",
        stacklevel=5,
    )
    return None


def common_ids(name: str, teacher: Any, student: Any) -> int | None:
    """Below which id two tokenizers have the same tokens; None: in all they have. One may add special tokens only."""
    tokens = [{i: token for token, i in tokenizer.get_vocab().items()} for tokenizer in (teacher, student)]
    differing = sorted(i for i in {*tokens[0], *tokens[1]} if tokens[0].get(i) != tokens[1].get(i))
    if not differing:
        return None
    for own, other, tokenizer in ((*tokens, teacher), (*tokens[::-1], student)):
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        for i in differing:
            if i in own and (i in other or i not in special):
                raise ValueError(
                    f"{name} must have the student's tokenizer, got one with another vocabulary: id {i} is "
                    f"{tokens[0].get(i)!r}, to the student {tokens[1].get(i)!r} (special tokens may be added behind)"
                )
    beyond = [i for i in tokens[0] if i > differing[0] and i not in differing]
    if beyond:
        raise ValueError(
            f"{name} must have the student's tokenizer, got one with another vocabulary: id {differing[0]} is known to "
            f"one of them only, but {min(beyond)} to both (special tokens may be added behind)"
        )
    return differing[0]


@contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """A PEFT model as what is below its adapter; afterwards the same parameters learn as before."""
    learns = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, flag in learns:
            parameter.requires_grad_(flag)


def is_below_adapter(name: str, teacher: Any, student: Any) -> bool:
    """Whether the teacher is the model below the student's adapter; refuses one that changes as the student learns."""

    def key(parameter: Tensor) -> Any:
        # The same memory is the same weight; what is spread over ranks has none of its own here.
        return (parameter.device, parameter.data_ptr()) if parameter.data_ptr() else id(parameter)

    of_student = {key(parameter): (name, parameter) for name, parameter in student.named_parameters()}
    shared = [of_student[key(parameter)] for parameter in teacher.parameters() if key(parameter) in of_student]
    if not shared:
        return False
    is_below = hasattr(student, "disable_adapter") and teacher is student.get_base_model()
    if is_below:
        with without_adapter(student):
            learning = [of for of, parameter in teacher.named_parameters() if parameter.requires_grad]
    elif teacher is student:
        raise ValueError(
            f"{name} must not be the student itself, from which it has nothing to learn; below an adapter there is "
            "student.get_base_model()"
        )
    else:
        learning = [of for of, parameter in shared if parameter.requires_grad]
    if learning:
        raise ValueError(
            f"{name} must not change as the student learns, got one that shares {learning[0]} and "
            f"{len(learning) - 1} other parameters that are trained: give a copy"
        )
    return is_below


def check_ranks(name: str, model: Any, accelerator: Any) -> None:
    """Ranks that loaded different weights, or none, would teach different things."""
    parameters = [p.detach() for p in model.parameters() if not hasattr(p, "ds_id") and p.device.type != "meta"]
    if accelerator.num_processes == 1 or not parameters:
        return
    seen = torch.stack([p.flatten()[:64].float().sum().to(accelerator.device) for p in parameters])
    of_ranks = accelerator.gather(seen[None])
    if not bool((of_ranks == of_ranks[0]).all()):
        raise ValueError(
            f"{name} must have the same weights on every rank, got others on some: where only the first rank loads "
            "them (FSDP's cpu_ram_efficient_loading), give the teacher's name"
        )


def spread(model: Any, accelerator: Any) -> Any:
    """A teacher over the ranks of FSDP or ZeRO-3, as TRL spreads its reference model."""
    from trl.models import prepare_deepspeed, prepare_fsdp

    if accelerator.state.deepspeed_plugin is not None:
        return prepare_deepspeed(model, accelerator)
    plugin = accelerator.state.fsdp_plugin
    # The student's mixed precision is none of the teacher's.
    policy, plugin.mixed_precision_policy = plugin.mixed_precision_policy, None
    try:
        return prepare_fsdp(model, accelerator)
    finally:
        plugin.mixed_precision_policy = policy


def keeps_logits(model: Any) -> bool:
    """Whether its forward pass makes the last logits alone when asked to."""
    return takes("logits_to_keep", model)


def takes(name: str, model: Any) -> bool:
    """Whether its forward pass has a parameter of this name."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return name in inspect.signature(inner.forward).parameters


def pad_rows(rows: Tensor, count: int) -> Tensor:
    """At least so many: the first one stands for what is missing."""
    return torch.cat([rows, rows.new_zeros(max(count - len(rows), 0))])


def rows_at_once(most: int, tokens: int, vocab_size: int) -> int:
    """Rows of a forward pass, whose logits are bounded; the same on every rank."""
    return max(1, min(most, _LOGITS // max(tokens * vocab_size, 1)))


@torch.no_grad()
def score(
    model: Any,
    batch: dict[str, Tensor],
    rows: Tensor,
    *,
    num_ids: int,
    temperature: float,
    size: int,
    keeps: bool,
    calls: int = 0,
    shares: bool = False,
    top_k: int = 0,
) -> tuple[Tensor, ...]:
    """Log-probabilities of the completions' tokens under a model, and entropies of its choices, over ids < num_ids.

    Args:
        model: what takes ids and a mask and returns logits.
        batch: TRL's ``prompt_ids``, ``prompt_mask``, ``completion_ids``, ``completion_mask``.
        rows: (n,) int64, the rows to score.
        num_ids: a completion's token from there on has no log-probability: NaN.
        temperature: of sampling.
        size: rows of a forward pass.
        keeps: whether the model takes ``logits_to_keep``.
        calls: forward passes at least, where the model is spread over ranks, of which others have more rows.
        shares: whether what rows share runs once, where that is fewer tokens and ``num_ids`` are all that the head has.
        top_k: the most likely ids to return; no row is then run with another.

    Returns:
        (n, tokens) float32 each, 0 where there is no token; with ``top_k`` also (n, tokens, k) int64 ids and their
        log-probabilities, which mean nothing where there is no token.
    """
    prompt_ids, completion_ids = batch["prompt_ids"], batch["completion_ids"]
    ids = torch.cat([prompt_ids, completion_ids], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    width = completion_ids.shape[1]
    chosen = pad_rows(rows, size * calls)
    # What follows each position, and whether it is a completion's.
    following = pad(ids[:, 1:], (0, 1))
    scored = pad(batch["completion_mask"], (prompt_ids.shape[1] - 1, 1))
    options: dict[str, Any] = {"logits_to_keep": width + 1} if keeps else {}
    shares = shares and not top_k and num_ids == vocabulary_size("model", model)
    asked = pad(batch["completion_mask"], (prompt_ids.shape[1], 0))
    k = min(top_k, num_ids)
    logprobs, entropies = [ids.new_zeros((0, width), dtype=torch.float32)], [ids.new_zeros((0, width)).float()]
    top: list[tuple[Tensor, Tensor]] = [(ids.new_zeros((0, width, k)), ids.new_zeros((0, width, k)).float())]
    with evaluating(model):
        for start in range(0, len(chosen), size):
            chunk = chosen[start : start + size]
            if shares:
                prepared = prepare(model, tree_batch(ids[chunk], attention[chunk], response_mask=asked[chunk]))
                if prepared.choice.plan.kind != "rows":
                    shared = prepared.run(temperature)
                    logprobs.append(shared[0][:, -width:].float())
                    entropies.append(shared[1][:, -width:].float())
                    continue
            if shares and takes("position_ids", model):  # as what is shared is run
                options["position_ids"] = (attention[chunk].cumsum(1) - 1).clamp(min=0)
            logits = model(input_ids=ids[chunk], attention_mask=attention[chunk], use_cache=False, **options).logits
            kept = min(logits.shape[1], ids.shape[1])
            found = surprisal_entropy(
                logits[:, -kept:, :num_ids],
                following[chunk, -kept:],
                temperature=temperature,
                response_mask=scored[chunk, -kept:],
            )
            logprobs.append(found.logprobs[:, -width - 1 : -1].float())
            entropies.append(found.entropy[:, -width - 1 : -1].float())
            if top_k:
                top.append(most_likely(logits[:, -width - 1 : -1, :num_ids], temperature, k))
    parts = [logprobs, entropies, *(list(of) for of in zip(*top, strict=True))][: 4 if top_k else 2]
    return tuple(torch.cat(part)[: len(rows)] for part in parts)


def most_likely(logits: Tensor, temperature: float, k: int) -> tuple[Tensor, Tensor]:
    """(..., k) int64 ids, the most likely first, and their log-probabilities in float32."""
    scaled = logits.float() / temperature
    values, ids = scaled.topk(k)
    return ids, values - scaled.logsumexp(-1, keepdim=True)


def score_teacher(teacher: Teacher, batch: dict[str, Tensor], rows: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """``score`` in the teacher's own dtype; NaN throughout for a row with an id that the teacher does not know."""
    device = batch["completion_ids"].device
    if teacher.home is not None:
        teacher.model.to(device)
    known = dict(batch)
    unknown = torch.zeros(len(batch["completion_ids"]), dtype=torch.bool, device=device)
    for part in ("prompt", "completion"):
        beyond = batch[f"{part}_ids"] >= teacher.num_ids
        unknown |= (beyond & batch[f"{part}_mask"].bool()).any(1)
        known[f"{part}_ids"] = batch[f"{part}_ids"].masked_fill(beyond, 0)
    with torch.autocast(device.type, enabled=False):
        found = score(teacher.model, known, rows, num_ids=teacher.num_ids, keeps=teacher.keeps, **options)
    scores = (part.masked_fill(unknown[rows][:, None], torch.nan) for part in found[:2])
    return *scores, *found[2:]
