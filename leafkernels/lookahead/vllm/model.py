"""A model of vLLM that runs a reward channel along.

vLLM hands out a token's logits and no other number, so the reward travels in them: a row of logits is shifted so that
its largest is the reward. Probabilities do not change by that, so every request samples as it does without a channel,
and no id of the vocabulary is given up. The engine runs with ``logprobs_mode="raw_logits"``, in which the largest value
of a request's ``logprobs`` is the reward.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from leafkernels.lookahead.folder import check_base, read_channel

PREFIX = "Reward"
SETTING = "reward_channel"  # of the model's config: the folder of the channel

_CLASSES: dict[str, type[nn.Module]] = {}


def register_models() -> None:
    """See ``leafkernels.lookahead.vllm.register``."""
    import vllm
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    for name in [*ModelRegistry.get_supported_archs()]:
        if name.startswith(PREFIX):
            continue
        # vLLM keeps on the disk what it has found of a class, by this name: with its version it is never an old one.
        ModelRegistry.register_model(PREFIX + name, f"{__name__}:{PREFIX}{name}@{vllm.__version__}")
        # What vLLM mends in a configuration by the architecture's name.
        if name in MODELS_CONFIG_MAP:
            MODELS_CONFIG_MAP[PREFIX + name] = MODELS_CONFIG_MAP[name]


def __getattr__(name: str) -> type[nn.Module]:
    if name.startswith(PREFIX):
        return reward_class(name.removeprefix(PREFIX).partition("@")[0])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def reward_class(architecture: str) -> type[nn.Module]:
    """vLLM's class of that architecture, which computes rewards too.

    Raises:
        ValueError: vLLM has no such architecture, or its class has no hook for EAGLE-3, from which the hidden states of
            the layers come.
    """
    from vllm import ModelRegistry
    from vllm.model_executor.models.interfaces import supports_eagle3

    if architecture not in _CLASSES:
        if architecture not in ModelRegistry.get_supported_archs():
            raise ValueError(f"model must be of an architecture that this vLLM has, got {architecture}")
        base = ModelRegistry.models[architecture].load_model_cls()
        if not supports_eagle3(base):
            raise ValueError(
                "model must be of an architecture that hands out the hidden states of its layers in vLLM "
                f"(SupportsEagle3), got {architecture}, which does not"
            )
        _CLASSES[architecture] = _with_rewards(base)
    return _CLASSES[architecture]


def _with_rewards(base: Any) -> type[nn.Module]:
    class WithRewards(base):
        def __init__(self, *, vllm_config: Any, prefix: str = "", **kwargs: Any) -> None:
            check_config(vllm_config)
            super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
            config = vllm_config.model_config.hf_config
            self._channel_folder = getattr(config, SETTING)
            channel, said = read_channel(self._channel_folder)
            check_base(self._channel_folder, said, SimpleNamespace(config=config))
            self.reward_channel = channel.requires_grad_(False).to(vllm_config.device_config.device)
            try:
                self.set_aux_hidden_state_layers(tuple(range(channel.num_layers)))
            except (AssertionError, LookupError) as error:
                raise ValueError(f"model must hand out the inputs of all its layers, got {base.__name__}") from error

        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            output = super().forward(*args, **kwargs)
            if not isinstance(output, tuple) or len(output[1]) != self.reward_channel.num_layers:
                raise ValueError(
                    f"model must hand out the inputs of its {self.reward_channel.num_layers} layers, got "
                    f"{len(output[1]) if isinstance(output, tuple) else 'none'}"
                )
            hidden, inputs = output
            rewards = self.reward_channel([*inputs, hidden])
            # The runner picks the tokens whose logits it wants out of these; float32 is two columns of 16 bits.
            return torch.cat([hidden, rewards.float().unsqueeze(-1).view(hidden.dtype)], dim=-1)

        def compute_logits(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
            size = self.reward_channel.hidden_size
            logits = super().compute_logits(hidden_states[..., :size].contiguous(), *args, **kwargs)
            if logits is None:  # of a rank that samples nothing
                return None
            logits = logits.float()
            rewards = hidden_states[..., size:].contiguous().view(torch.float32)
            return logits - logits.amax(-1, keepdim=True) + rewards

        def load_weights(self, weights: Any) -> Any:
            # Anew each time: weights may have been dropped since (sleep mode).
            self.reward_channel.load_state_dict(read_channel(self._channel_folder)[0].state_dict())
            loaded = super().load_weights(weights)
            own = {f"reward_channel.{name}" for name, _ in self.reward_channel.named_parameters()}
            return loaded if loaded is None else loaded | own

    WithRewards.__name__ = WithRewards.__qualname__ = PREFIX + base.__name__
    return WithRewards


def check_config(config: Any) -> None:
    """Raise ValueError for what would give other rewards, or none."""
    if not getattr(config.model_config.hf_config, SETTING, None):
        raise ValueError(f"hf_overrides must name the folder of a channel as {SETTING!r}, got none")
    if config.parallel_config.pipeline_parallel_size > 1:
        raise ValueError(
            "pipeline_parallel_size must be 1, since the channel reads all layers, got "
            f"{config.parallel_config.pipeline_parallel_size}"
        )
    if config.speculative_config is not None:
        raise ValueError("speculative_config must be None, since drafts read hidden states that the channel widens")
    if str(getattr(config.load_config.load_format, "value", config.load_config.load_format)) == "dummy":
        raise ValueError("load_format must be one that loads weights, got 'dummy'")
