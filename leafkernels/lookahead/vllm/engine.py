"""The arguments of a vLLM engine that has rewards, and what is read of its outputs."""

import os
from collections.abc import Collection, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from leafkernels.lookahead.folder import check_base, read_channel
from leafkernels.lookahead.vllm.branches import Output
from leafkernels.lookahead.vllm.model import PREFIX, SETTING, register_models, reward_class

# Beyond those asked for, so that of equal logits the lower id can come first; vLLM gives them in any order.
_MORE = 4
_PLUGIN = "leafkernels.lookahead.vllm:"


def engine_arguments(model: str | None, channel: str | Path, *, width: int = 16, **kwargs: Any) -> dict[str, Any]:
    """What ``vllm.LLM`` and ``AsyncEngineArgs`` take for a model with the channel in a folder.

    Args:
        model: folder or name; None: the one that the channel names.
        channel: the folder that ``RewardTransformer.save_pretrained`` wrote.
        width: the largest width of a search on this engine.
        kwargs: other arguments of the engine; ``hf_overrides`` is a dict.

    Raises:
        ValueError: the folder is damaged, the model is not the channel's base, its architecture has no hook, or vLLM's
            processes would not find the plugin.
    """
    _check_plugin()
    for name in ("logprobs_mode", "max_logprobs", "model"):
        if name in kwargs:
            raise ValueError(f"{name} must be left to the rewards' engine, got {kwargs[name]!r}")
    overrides = kwargs.pop("hf_overrides", None) or {}
    if not isinstance(overrides, dict):
        raise TypeError(f"hf_overrides must be a dict, got {overrides!r}")
    from vllm.transformers_utils.config import get_config

    said = read_channel(channel)[1]
    model = model or said["name"]
    if not model:
        raise ValueError(f"model must be given: the channel in {channel} was saved beside a model without a name")
    config = get_config(model, trust_remote_code=bool(kwargs.get("trust_remote_code")))
    check_base(channel, said, SimpleNamespace(config=config))
    (architecture, *_) = config.architectures or [""]
    reward_class(architecture)
    register_models()
    own = {"architectures": [PREFIX + architecture], SETTING: str(Path(channel).absolute())}
    most = min(width + _MORE, config.get_text_config().vocab_size)
    rest = {"model": model, "hf_overrides": {**overrides, **own}}
    return {**kwargs, **rest, "logprobs_mode": "raw_logits", "max_logprobs": most}


def _check_plugin() -> None:
    """Raise ValueError unless vLLM's own processes find the plugin."""
    names = {point.name for point in entry_points(group="vllm.general_plugins") if point.value.startswith(_PLUGIN)}
    if not names:
        raise ValueError("leafkernels must be installed (pip install -e .) for vLLM to find its plugin, got none")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and not names & set(allowed.split(",")):
        raise ValueError(f"VLLM_PLUGINS must name {' or '.join(names)} too, got {allowed!r}")


def check_engine(config: Any) -> None:
    """Raise ValueError unless an engine with this ``ModelConfig`` hands out rewards."""
    folder, mode = getattr(config.hf_config, SETTING, None), str(config.logprobs_mode)
    if folder is None or mode != "raw_logits":
        raise ValueError(
            "llm must be an engine of engine_arguments(model, channel), got one "
            + ("without a channel" if folder is None else f"with logprobs_mode={mode!r}")
        )


def sampling(config: Any, eos_token_ids: Sequence[int], suppressed: Sequence[int], **kwargs: Any) -> Any:
    """``SamplingParams`` of a request that takes the best tokens and hands out the rewards."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0.0,
        logprobs=config.max_logprobs,
        detokenize=False,
        ignore_eos=True,
        stop_token_ids=list(eos_token_ids),
        logit_bias=dict.fromkeys(suppressed, float("-inf")) or None,
        **kwargs,
    )


def outputs_of(token_ids: Sequence[int], logprobs: Sequence[Any], suppressed: Collection[int]) -> list[Output]:
    """Of the tokens of a request and their ``logprobs``."""
    found = []
    for token, row in zip(token_ids, logprobs, strict=True):
        values = sorted(((-one.logprob, id_) for id_, one in row.items()), key=lambda pair: pair)
        best = [(-value, id_) for value, id_ in values if id_ not in suppressed]
        found.append(Output(token, -values[0][0], [value for value, _ in best], [id_ for _, id_ in best]))
    return found
