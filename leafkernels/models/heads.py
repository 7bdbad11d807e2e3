"""Hidden states instead of logits: what a model's head is given, and what the model makes of what the head gives."""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from leafkernels.models.asking import bare_model, evaluating, parameters_of, plain_ids, text_config
from leafkernels.models.ranks import placed
from leafkernels.vocabulary.linear_surprisal import linear_surprisal_entropy
from leafkernels.vocabulary.sampling_mask import SamplingMask
from leafkernels.vocabulary.surprisal import SurprisalEntropy, surprisal_entropy


class Head(NamedTuple):
    """Logits are ``linear`` of hidden states, times ``scale``, and then within ``softcap``."""

    linear: Any
    scale: float
    softcap: float | None

    def logits(self, states: Tensor) -> Tensor:
        return scaled(self.linear(states), self.scale, self.softcap)


# Of models that were asked: scale and softcap; None: their logits are not those of a linear head.
_known: "weakref.WeakKeyDictionary[Any, tuple[float, float | None] | None]" = weakref.WeakKeyDictionary()


def head_of(model: Any) -> Head | None:
    """The head, once a few tokens have shown that the logits are the head's; None: the model's logits are to be used.

    None also for a model that is compiled, which runs no hooks.
    """
    bare = bare_model(model)
    linear = bare.get_output_embeddings() if hasattr(bare, "get_output_embeddings") else None
    # A subclass, or a hook, may do more than the product.
    is_plain = type(linear) is nn.Linear and not linear._forward_hooks and not linear._forward_pre_hooks
    if not is_plain or "logits_to_keep" not in parameters_of(model) or _is_compiled(model):
        return None
    if bare not in _known:
        _known[bare] = _find(bare, linear)
    found = _known[bare]
    return None if found is None else Head(linear, *found)


def scaled(products: Tensor, scale: float, softcap: float | None) -> Tensor:
    logits = products * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _is_compiled(model: Any) -> bool:
    while model is not None:
        if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
            return True
        model = getattr(model, "module", None)
    return False


@torch.no_grad()
def _find(bare: Any, linear: Any) -> tuple[float, float | None] | None:
    ids = plain_ids(bare)[None].to(linear.weight.device)
    try:
        with evaluating(bare), hidden_states(bare) as hidden:
            logits = bare(input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=1).logits.float()
    except Exception:  # a model that cannot be asked so is used as it is
        return None
    states = hidden[-1] if hidden else None
    # A decoder may give the states of the kept columns alone, and another layer may lie between it and the head.
    if states is None or states.shape != (*ids.shape, linear.in_features) or logits.shape[:2] != (1, 1):
        return None
    if states.dtype != linear.weight.dtype and not torch.is_autocast_enabled(ids.device.type):
        return None
    config = text_config(bare)
    scale, scaling = (getattr(config, name, None) for name in ("logit_scale", "logits_scaling"))
    softcap = getattr(config, "final_logit_softcapping", None)
    raw = linear(states[:, -1:]).float()
    # Other products of the same numbers.
    bound = 1e-4 if linear.weight.dtype in (torch.float32, torch.float64) else 3e-2
    for factor in (scale, scaling and 1.0 / scaling, 1.0):
        for cap in (softcap, None):
            if factor and float((scaled(raw, factor, cap) - logits).norm()) <= bound * float(logits.norm()):
                return float(factor), cap
    return None


@contextmanager
def hidden_states(bare: Any) -> Iterator[list[Tensor]]:
    """What the decoder gives in this thread meanwhile, (rows, tokens, size) a forward."""
    found: list[Tensor] = []
    thread = threading.get_ident()

    def keep(_: Any, __: Any, output: Any) -> None:
        if threading.get_ident() == thread:
            found.append(output[0] if isinstance(output, tuple) else output.last_hidden_state)

    handle = bare.get_decoder().register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def score(
    head: Head | None,
    states: Tensor,
    token_ids: Tensor,
    temperature: float,
    mask: Tensor,
    sampling_mask: SamplingMask | None = None,
) -> SurprisalEntropy:
    """Of tokens, from hidden states before them where there is a head, else from logits."""
    if head is None:
        options: dict[str, Any] = {"response_mask": mask, "sampling_mask": sampling_mask}
        return surprisal_entropy(states, token_ids, temperature=temperature, **options)
    return linear_surprisal_entropy(
        states,
        head.linear.weight,
        token_ids,
        bias=head.linear.bias,
        temperature=temperature,
        logit_scale=head.scale,
        logit_softcap=head.softcap,
        response_mask=mask,
        num_live=token_ids.numel(),
        sampling_mask=sampling_mask,
    )


def known_head(model: Any) -> Head | None:
    """``head_of``, or None where weights are spread over ranks that step together: a trial would be one forward more.

    To be asked for before recordings are heard: the trial would hear one of a row.
    """
    return None if placed(bare_model(model)).in_step else head_of(model)


def states_of_head(model: Any, ids: Tensor, mask: Tensor, keep: int) -> tuple[Head | None, Tensor]:
    """(rows, keep, size): what the head is given before each of the last tokens, or without a head their logits."""
    bare = bare_model(model)
    head = known_head(model)
    more: dict[str, Any] = {name: value for name, value in (("use_cache", False),) if name in parameters_of(model)}
    if "logits_to_keep" in parameters_of(model):
        more["logits_to_keep"] = keep + 1 if head is None else 1
    if head is None:
        return None, model(input_ids=ids, attention_mask=mask, **more).logits[:, -keep - 1 : -1]
    with hidden_states(bare) as found:
        model(input_ids=ids, attention_mask=mask, **more)
    return head, found[-1][:, -keep - 1 : -1]
