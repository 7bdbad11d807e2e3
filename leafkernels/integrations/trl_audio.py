"""GRPO on speech in TRL: ``AudioGRPOTrainer``, and ``LeafAudioGRPOTrainer`` with credit for each token.

TRL's ``GRPOTrainer`` takes images and no audio. Here a row of the batch carries a reference to its prompt's features
through TRL's shuffling and splitting, and every forward (sampling, policy, old, reference) hears them. Which inputs a
model reads is what its processor returns; no model is named. A prompt is read once, however many rollouts it has, and
a frozen audio encoder hears it once.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from packaging.version import Version
from torch import Tensor

try:
    import trl
    from transformers import AutoProcessor, PreTrainedModel
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer.utils import create_model_from_path, get_config_model_id
except (ImportError, RuntimeError) as error:  # the latter from TRL's lazy import, in several lines
    raise ImportError(
        "leafkernels.integrations.trl_audio needs TRL 1.14 or newer, which cannot be imported here "
        f"({' '.join(str(error).split())}); pip install 'leafkernels[trl]'"
    ) from error

from leafkernels.integrations._trl_ear import Ear, HeardPrompt
from leafkernels.integrations._trl_options import MendedGRPOTrainer
from leafkernels.integrations.trl import LeafGRPOTrainer
from leafkernels.models import TreeBatch
from leafkernels.models.asking import bare_model, evaluating
from leafkernels.models.tree_logprobs import Prepared, prepare
from leafkernels.rows.recordings import PromptReader, find_encoder, join_features, undecoded

_logger = logging.getLogger(__name__)


class AudioGRPOTrainer(MendedGRPOTrainer, GRPOTrainer):
    """``GRPOTrainer`` for models that hear; same arguments, and a mixin for trainers derived from ``GRPOTrainer``.

    The dataset has ``prompt`` and ``audio``; all other columns go to the reward functions, as TRL has it.

    - ``prompt``: messages with a ``{"type": "audio"}`` part for each recording (with none, the recordings go before the
      first user message), or text with the processor's audio token in it.
    - ``audio``: a recording, or a list of them: datasets' ``Audio`` (undecoded or decoded), the path or the bytes of a
      file that soundfile reads, or ``{"array": ..., "sampling_rate": int}``, the array (samples,), (samples, channels)
      or (channels, samples). Integers are scaled by the range of their dtype. Of several channels the mean is taken;
      other rates than the feature extractor's are resampled.

    A frozen encoder (no parameter of it wants a gradient) runs in eval mode, once for a prompt of a generation batch,
    alone, so that what it gives depends on no other clip. One that is trained runs in every forward, over clips padded
    to the longest. The audio token is never sampled. A LoRA that the checkpoint itself brings (Granite-Speech) is
    merged into its weights, and a warning says so; the reference of the KL term then has it.

    Raises:
        RuntimeError: TRL is older than 1.14.
        ValueError: vLLM, tools, environments or a ``rollout_func``; a dataset without audio; recordings and audio parts
            that differ in number; a recording that is silent, empty, not finite, too short for one audio token, longer
            than the encoder takes, or of a sampling rate, a shape or a dtype that cannot be.
        TypeError: the model or the processor takes no audio.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *more: Any,
        **kwargs: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = GRPOConfig(f"{name.split('/')[-1]}-GRPO")
        _check_options(args, kwargs)
        _check_columns(train_dataset, "train_dataset")
        _check_columns(eval_dataset, "eval_dataset")
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        revision = (args.model_init_kwargs or {}).get("revision") if isinstance(model, str) else None
        if isinstance(model, str):
            model = _load(model, args, kwargs.pop("quantization_config", None))
        if processing_class is None:
            processing_class = AutoProcessor.from_pretrained(
                name, revision=revision, padding_side="left", trust_remote_code=args.trust_remote_code
            )
        base = bare_model(model)
        self._reader = PromptReader(processing_class, args.chat_template_kwargs)
        find_encoder(base)
        _merge_own_adapter(base)
        if args.gradient_checkpointing and not base.supports_gradient_checkpointing:
            _logger.warning("%s cannot recompute its activations: gradient_checkpointing is off.", type(base).__name__)
            for option in ("gradient_checkpointing", "activation_checkpointing"):
                if hasattr(args, option):
                    setattr(args, option, False)
        if args.ddp_find_unused_parameters is None and not (args.gradient_checkpointing_kwargs or {}).get(
            "use_reentrant"
        ):
            # What is not heard with has no gradient: the vision tower of a model that also sees.
            args.ddp_find_unused_parameters = True
        # TRL takes whatever has a processor for a model that sees; the tokenizer alone keeps it to text.
        datasets = undecoded(train_dataset), undecoded(eval_dataset)
        super().__init__(model, reward_funcs, args, *datasets, processing_class.tokenizer, *more, **kwargs)
        self.processing_class = self.callback_handler.processing_class = processing_class
        # Its features would be missing.
        banned = self._tokenizer.convert_tokens_to_ids(self._reader.audio_token)
        self.generation_kwargs.setdefault("suppress_tokens", [banned])
        self.generation_config.suppress_tokens = self.generation_kwargs["suppress_tokens"]
        self._ears: dict[int, Ear] = {}
        for listener in (self.model, self.ref_model):
            if listener is not None:
                base = bare_model(self.accelerator.unwrap_model(listener))
                self._ears[id(base)] = Ear(base, is_trained=listener is self.model)
        # Whose audio the next forward hears: TRL calls it with tensors only.
        self._rows: Sequence[HeardPrompt] = ()

    @torch.no_grad()
    def answer(self, rows: Sequence[Any], *, batch_size: int | None = None, max_tokens: int | None = None) -> list[str]:
        """The most likely answers (greedy, in eval mode) to rows with ``prompt`` and ``audio``.

        Args:
            rows: dicts, or a dataset; of a dataset that decodes its recordings, each is decoded.
            batch_size: rows at a time; ``per_device_eval_batch_size`` where None.
            max_tokens: of an answer; ``max_completion_length`` where None.

        Each process answers the rows that it is given; models in one piece only (no ZeRO-3, no FSDP).
        """
        size = batch_size or self.args.per_device_eval_batch_size
        model = self.accelerator.unwrap_model(self.model)
        answers: list[str] = []
        with evaluating(model):
            for start in range(0, len(rows), size):
                taken = [rows[i] for i in range(start, min(start + size, len(rows)))]
                prompts = [self._read(row["prompt"], row["audio"]) for row in taken]
                self._ear(self.model).listen(model, prompts, self._most)
                longest = max(len(prompt.token_ids) for prompt in prompts)
                gaps = [longest - len(prompt.token_ids) for prompt in prompts]
                pad = self._tokenizer.pad_token_id
                token_ids = [[pad] * gap + prompt.token_ids for gap, prompt in zip(gaps, prompts, strict=True)]
                mask = [[0] * gap + [1] * (longest - gap) for gap in gaps]
                device = self.accelerator.device
                with self._ear(self.model).hearing(prompts):
                    found = model.generate(
                        input_ids=torch.tensor(token_ids, device=device),
                        attention_mask=torch.tensor(mask, device=device),
                        **join_features(prompts),
                        max_new_tokens=max_tokens or self.max_completion_length,
                        do_sample=False,
                        pad_token_id=pad,
                        eos_token_id=self.eos_token_ids,
                        suppress_tokens=self.generation_kwargs["suppress_tokens"],
                    )
                answers += self._tokenizer.batch_decode(found[:, longest:], skip_special_tokens=True)
        return answers

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "audio" not in self._signature_columns:
            self._signature_columns.append("audio")

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        read: dict[Any, HeardPrompt] = {}
        rows = []
        for row in inputs:
            key = (repr(row["prompt"]), _key(row.get("audio")))
            if key not in read:
                read[key] = self._read(row["prompt"], row.get("audio"))
            rows.append(read[key])
        self._rows = rows
        for listener in (self.model, self.ref_model):
            if listener is not None:
                self._ear(listener).listen(listener, rows, self._most)
        batch = super()._generate_and_score_completions(inputs)
        batch["audio"] = rows
        return batch

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Tensor]]:
        return [row.token_ids for row in self._rows], None, join_features(self._rows)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        with self._ear(self.model).hearing(self._rows):
            return super()._generate_single_turn(*args, **kwargs)

    def _alone(self, rows: slice, compute: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
        with self._ear(model).hearing(self._rows[rows]):
            return super()._alone(rows, compute, model, *args, **kwargs)

    def _groups(self, rows: slice, device: torch.device) -> Tensor:
        numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(self._rows[rows]))}
        return torch.tensor([numbers[prompt] for prompt in self._rows[rows]], device=device)

    def _prepared(self, rows: slice, model: Any, batch: TreeBatch) -> tuple[Prepared | None, str]:
        prepared, reason = super()._prepared(rows, model, batch)
        if prepared is None:
            return prepared, reason
        counts = Counter(self._rows[rows])
        if 1 in counts.values():
            return None, "a prompt has one row in a micro-batch"
        try:
            with self._ear(model).hearing_once(list(counts)), self.accelerator.autocast():
                return prepare(model, batch, inputs=join_features(list(counts))), ""
        except RuntimeError as error:
            # Of a model that cannot hear once for several rows.
            if not str(error).startswith("inputs must be None"):
                raise
            return None, str(error)

    def _shared(self, rows: slice, prepared: Prepared) -> tuple[Tensor, Tensor]:
        with self._ear(prepared.model).hearing_once(list(dict.fromkeys(self._rows[rows]))):
            return super()._shared(rows, prepared)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self._rows = inputs["audio"]
        return super()._compute_loss(model, inputs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled or not isinstance(self.model, PreTrainedModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        # Some models (Qwen2-Audio) are saved under the names of their published weights, and a Trainer that reads them
        # back by the names they have here would train on from the weights it began with, with no more than a warning.
        saved = type(self.model).from_pretrained(resume_from_checkpoint, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or not isinstance(self.model, PreTrainedModel):
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _most(self, count: int) -> int:
        """The largest of all ranks' numbers, where each holds a part of the weights, and forwards are made together."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3):
            return int(self.accelerator.gather(torch.tensor([count], device=self.accelerator.device)).max())
        return count

    def _ear(self, model: Any) -> "Ear":
        return self._ears[id(bare_model(self.accelerator.unwrap_model(model)))]

    def _read(self, prompt: Any, audio: Any) -> HeardPrompt:
        heard = self._reader.read(prompt, audio)
        features = {name: values.to(self.accelerator.device) for name, values in heard.features.items()}
        return HeardPrompt(heard.token_ids, features)


class LeafAudioGRPOTrainer(LeafGRPOTrainer, AudioGRPOTrainer):
    """``AudioGRPOTrainer`` whose advantages are one for each token: ``LeafGRPOTrainer`` and ``LeafGRPOConfig``.

    Groups are rollouts of one row of the dataset, so equal texts about different recordings are different prompts. With
    ``share_prefixes=True`` a micro-batch runs each prompt once, its recording with it, and a trained encoder hears it
    once.
    """


def _load(name: str, args: Any, quantization_config: Any) -> Any:
    """Load a model as TRL does, which would do it too late to look at the model."""
    options = dict(args.model_init_kwargs or {})
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        options["device_map"] = None
    options.setdefault("trust_remote_code", args.trust_remote_code)
    return create_model_from_path(name, **options)


def _check_options(args: Any, kwargs: dict[str, Any]) -> None:
    if Version(trl.__version__).release < (1, 14):
        raise RuntimeError(f"AudioGRPOTrainer needs TRL 1.14 or newer, got {trl.__version__}; pip install 'trl>=1.14'")
    if args.use_vllm:
        raise ValueError(
            f"use_vllm must be False with AudioGRPOTrainer: vLLM is handed token ids and images by TRL "
            f"{trl.__version__}, and no audio"
        )
    if args.use_transformers_continuous_batching:
        raise ValueError("use_transformers_continuous_batching must be False with AudioGRPOTrainer: it takes text only")
    for name in ("tools", "rollout_func", "environment_factory"):
        if kwargs.get(name):
            raise ValueError(f"{name} must be None with AudioGRPOTrainer, whose prompts are one turn of audio and text")


def _check_columns(dataset: Any, name: str) -> None:
    if dataset is None:
        return
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            _check_columns(part, f"{name}[{key!r}]")
        return
    columns = dataset.column_names
    if columns is not None and "audio" not in columns:
        raise ValueError(
            f"{name} must have a column 'audio' with the recording of each prompt, got {', '.join(columns)}"
        )


def _merge_own_adapter(base: Any) -> None:
    """Merge the LoRA that transformers has put into a checkpoint's model, so that it is there with any adapter."""
    if not getattr(base, "_hf_peft_config_loaded", False):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(base.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            owner, _, attribute = name.rpartition(".")
            setattr(base.get_submodule(owner), attribute, module.get_base_layer())
    base._hf_peft_config_loaded = False
    del base.peft_config
    if getattr(base.config, "has_lora_adapter", False):
        base.config.has_lora_adapter = False
    _logger.warning(
        "The LoRA adapter of the checkpoint is merged into the weights of %s; what is trained comes on top of it.",
        type(base).__name__,
    )


def _key(audio: Any) -> Any:
    """Something that is equal for equal recordings."""
    if isinstance(audio, dict):
        return tuple((name, _key(value)) for name, value in sorted(audio.items()))
    if isinstance(audio, Tensor):
        audio = audio.detach().cpu().double().numpy()  # numpy has no bfloat16
    if isinstance(audio, np.ndarray):
        return audio.shape, audio.dtype.str, audio.tobytes()
    if isinstance(audio, list | tuple):
        return tuple(_key(value) for value in audio)
    if isinstance(audio, str | bytes | int | float | None):
        return audio
    return id(audio)
