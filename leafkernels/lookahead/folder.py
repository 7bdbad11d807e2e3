"""The folder of a reward channel: its weights, the arguments that build it, and which base it belongs to."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leafkernels.lookahead.reward_channel import RewardChannel

WEIGHTS, SETTINGS = "reward_channel.safetensors", "reward_channel.json"
# What a base must share with the one that the channel was trained beside.
_SIZES = ("model_type", "num_hidden_layers", "hidden_size", "vocab_size")


def write_channel(
    folder: str | Path, settings: Mapping[str, Any], state_dict: Mapping[str, Tensor], model: Any
) -> None:
    """Write the arguments and the weights of a channel, and which base it belongs to."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    save_file(state, folder / WEIGHTS)
    said = {"channel": settings, "base": {"name": model.config.name_or_path} | _sizes(model)}
    (folder / SETTINGS).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


def read_channel(folder: str | Path) -> tuple[RewardChannel, dict[str, Any]]:
    """The channel, float32 on the CPU, and what is said of its base, for ``check_base``.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is none that ``write_channel`` has written, or was damaged since.
    """
    settings, base = _read_settings(Path(folder))
    path = Path(folder) / WEIGHTS
    state = _read_weights(path)
    try:
        if settings.get("head_layers", 0) > len(state):  # each would be made before it is missed
            raise ValueError(f"head_layers is more than the {len(state)} tensors in {WEIGHTS}")
        with torch.device("meta"):
            channel = RewardChannel(**settings)
        if channel.settings != settings:
            raise ValueError(f"they must be all of {', '.join(channel.settings)}, and numbers")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"{Path(folder) / SETTINGS} must hold the arguments of a RewardChannel by the name 'channel', got "
            f"{settings!r:.200}: {error}"
        ) from error
    wanted = {name: tuple(tensor.shape) for name, tensor in channel.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if shapes != wanted:
        names = sorted(name for name in {*shapes, *wanted} if shapes.get(name) != wanted.get(name))
        said, found = (", ".join(f"{name} {of.get(name, 'absent')}" for name in names) for of in (wanted, shapes))
        raise ValueError(f"{path} must hold the weights that {SETTINGS} says, with {said}, got {found}")
    for name, tensor in state.items():
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{path} must hold floating point, got {name} of {tensor.dtype}")
        # A copy: the file may be written again.
        state[name] = tensor.to(torch.float32, copy=True)
        if not state[name].isfinite().all():
            raise ValueError(f"{path} must hold finite numbers, got {name} with others")
    channel.load_state_dict(state, assign=True)
    return channel, base


def check_base(folder: str | Path, base: dict[str, Any], model: Any) -> None:
    """Raise ValueError where ``model`` is not of the kind and the sizes of the channel's base."""
    found = _sizes(model)
    differing = [name for name in _SIZES if base[name] != found[name]]
    if differing:
        raise ValueError(
            f"model must be the base of the channel in {folder}, {base['name']!r}, of "
            f"{', '.join(f'{name} {base[name]}' for name in differing)}, got "
            f"{', '.join(f'{name} {found[name]}' for name in differing)}"
        )


def load_base(name: str, **kwargs: Any) -> Any:
    """A model by name; ``AutoModelForCausalLM`` does not load audio models.

    Code that comes with a model runs where ``trust_remote_code=True`` says so; nobody is asked.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    # None is a question on standard input.
    kwargs["trust_remote_code"] = bool(kwargs.get("trust_remote_code"))
    kind: Any = transformers.AutoModelForCausalLM
    try:
        config, _ = transformers.PreTrainedConfig.get_config_dict(name, **{**kwargs, "trust_remote_code": False})
    except OSError:  # a folder that holds an adapter has no config
        config = {}
    has_code = kwargs["trust_remote_code"] and "AutoModelForCausalLM" in (config.get("auto_map") or {})
    if config.get("model_type") not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not has_code:
        own = getattr(transformers, (config.get("architectures") or [""])[0], None)
        kind = own if isinstance(own, type) and issubclass(own, transformers.PreTrainedModel) else kind
    return kind.from_pretrained(name, **kwargs)


def _sizes(model: Any) -> dict[str, Any]:
    config = model.config.get_text_config()
    return {name: getattr(config, name) for name in _SIZES}


def _read_settings(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of the channel, and what is said of its base."""
    path = folder / SETTINGS
    if not path.is_file():
        why = f"has no {SETTINGS}" if folder.is_dir() else "is a file" if folder.exists() else "does not exist"
        kind = ValueError if folder.exists() else FileNotFoundError
        raise kind(f"folder must be one that RewardTransformer.save_pretrained wrote, got {folder}, which {why}")
    try:
        settings = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON, got what does not read: {error}") from error
    parts: list[Any] = [settings.get(name) if isinstance(settings, dict) else None for name in ("channel", "base")]
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"{path} must hold an object with the objects 'channel' and 'base', got {settings!r:.200}")
    channel, base = parts
    if not isinstance(base.get("name"), str) or not all(name in base for name in _SIZES):
        raise ValueError(
            f"{path} must say name, {', '.join(_SIZES)} of the base, the name as a string, got {base!r:.200}"
        )
    return channel, base


def _read_weights(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    if not path.is_file():
        raise ValueError(f"{path} must be the file of weights that save_pretrained wrote, got none")
    try:
        return load_file(path)
    except OSError:
        raise
    except Exception as error:  # of many kinds: SafetensorError, KeyError of a dtype, ValueError
        raise ValueError(f"{path} must be a file of safetensors, got one that does not read: {error}") from error
