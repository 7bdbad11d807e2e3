"""Train a reward channel on preferences, with ``transformers.Trainer``."""

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.functional import pad
from transformers import Trainer, TrainingArguments

from leafkernels._core.checks import check_choice, check_count, check_finite
from leafkernels.lookahead.folder import write_channel
from leafkernels.lookahead.pairs import PairReader
from leafkernels.lookahead.transformers import RewardTransformer
from leafkernels.losses.preference import (
    KINDS,
    answer_counts,
    simpo_loss,
    token_reward_loss,
    token_reward_sums,
)
from leafkernels.losses.preference_metrics import simpo_metrics, token_reward_metrics
from leafkernels.models import tree_batch
from leafkernels.models.asking import normalises_by_batch
from leafkernels.models.tree_logprobs import Prepared, prepare
from leafkernels.rows.recordings import find_encoder, join_features, undecoded
from leafkernels.vocabulary.surprisal import surprisal_entropy

_logger = logging.getLogger(__name__)

_TERMS = ("reward_loss", "simpo_loss", "sft_loss")


@dataclass
class TokenRewardConfig(TrainingArguments):
    """``TrainingArguments`` with the options of ``token_reward_loss``."""

    kind: str = field(default="sequence_bt", metadata={"help": f"The loss: {', '.join(map(repr, KINDS))}."})
    scale: float = field(default=1.0, metadata={"help": "A factor, for the two Bradley-Terry kinds."})
    margin: float = field(default=0.0, metadata={"help": "By how much the better answer should be better, likewise."})
    reward_weight: float = field(default=1.0, metadata={"help": "Of the loss of the rewards; 0 leaves it out."})
    simpo_weight: float = field(default=0.0, metadata={"help": "Of SimPO, for a model that is trained along."})
    sft_weight: float = field(default=0.0, metadata={"help": "Of the chosen answers' cross entropy, likewise."})
    simpo_kind: str = field(default="sigmoid", metadata={"help": "'sigmoid' or 'hinge'."})
    simpo_beta: float = field(default=2.0, metadata={"help": "A factor."})
    simpo_margin: float = field(default=0.5, metadata={"help": "The paper's gamma / beta."})
    simpo_label_smoothing: float = field(default=0.0, metadata={"help": "Share of pairs taken to be the wrong way."})
    train_model: bool = field(
        default=False,
        metadata={"help": "Train the model along: those of its parameters that require a gradient, as PEFT sets them."},
    )
    max_length: int | None = field(default=None, metadata={"help": "Tokens of prompt and answer; the end is cut off."})
    bad_rows: str = field(
        default="raise",
        metadata={
            "help": "Rows that cannot be trained on: 'raise' names them before training, 'drop' leaves them out."
        },
    )
    share_prefixes: bool = field(
        default=False,
        metadata={
            "help": "Run the prompt of a pair, and what its answers begin with, through the model once, where that is "
            "fewer tokens: rewards and gradients are the same to rounding."
        },
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator reads the texts."})


class TokenRewardTrainer(Trainer):
    """Teaches the channel of a ``RewardTransformer`` which of two answers is better; the model itself is frozen.

    With ``train_model=True`` the model learns along (LoRA or whole), by the paper's total loss: reward_weight x loss of
    the rewards + simpo_weight x SimPO + sft_weight x mean cross entropy of the chosen answers' tokens. A checkpoint
    then holds adapter or model beside the channel.

    With ``share_prefixes=True`` the prompt of a pair runs once, its recording with it, where that is fewer tokens
    (``leafkernels.models.tree_logprobs``), and ``tokens_per_node`` in the log is how many tokens of the rows one token
    that runs stands for, padding included. A reason to run rows one by one is told in a warning, once each.

    The dataset has TRL's columns ``prompt``, ``chosen`` and ``rejected``: texts, or lists of messages for the chat
    template of the tokenizer. A prompt begins with what the tokenizer puts before a text, and answers of text end with
    its end token; a text that has these already gets no second one.

    For a model that hears, ``processing_class`` is its processor, and rows have ``audio`` too: a recording or a list of
    them, each datasets' ``Audio``, the path or the bytes of a file that soundfile reads, or ``{"array": ...,
    "sampling_rate": int}`` with an array (samples,), (samples, channels) or (channels, samples). The prompt has a
    ``{"type": "audio"}`` part for each (with none, they go before the first user message), or is text with the
    processor's audio token in it. The answer follows as text, also where it is given as messages, with the end token.
    Rows without ``audio`` may stand among them.

    ``train`` reads all rows of a dataset with a length once at first, each process its share: what cannot be trained on
    (too long, equal after ``max_length``, an answer without a token, a recording that cannot be heard) is told with the
    numbers of its rows, or left out and counted with ``bad_rows="drop"``. Rows of a stream are read as they come.

    A step's loss is that of all its pairs, whatever ``gradient_accumulation_steps`` and the number of processes
    (``average_tokens_across_devices=False``: of those of a process, averaged over the processes). A model that is
    frozen runs in eval mode, and so does a frozen audio encoder. Logging, saving, resuming, accelerate, DeepSpeed
    (ZeRO-2 and 3) and FSDP2 are those of ``Trainer``; a checkpoint holds the channel alone, as
    ``RewardTransformer.save_pretrained`` writes it (DeepSpeed and FSDP2 put what they resume from beside it). Beside
    the loss it logs its terms, the metrics of ``token_reward_metrics``, and with SimPO those of ``simpo_metrics``, each
    the mean since the last time over all processes.

    Args:
        model: a ``RewardTransformer``, or a causal language model, which gets a new channel.
        args: ``TokenRewardConfig``.
        processing_class: the tokenizer, with a padding token, or the processor of a model that hears.

    Raises:
        TypeError, ValueError: an argument is not what it must be; an answer has no token, is the same as the other or
            is longer than the model's positions; a recording is missing, or is silent, empty, not finite, too short or
            too long for the encoder; the message names it.
    """

    args: TokenRewardConfig

    def __init__(self, model: Any, args: TokenRewardConfig, *, processing_class: Any, **kwargs: Any) -> None:
        if not isinstance(args, TokenRewardConfig):
            raise TypeError(f"args must be a TokenRewardConfig, got {type(args).__name__}")
        if args.max_length is not None:
            check_count("max_length", args.max_length, 2)
        check_choice("bad_rows", args.bad_rows, ("raise", "drop"))
        model = model if isinstance(model, RewardTransformer) else RewardTransformer(model)
        _check_weights(args, model.model)
        _check_options(args, kwargs)
        _choose_trained(args, model)
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._pairs = PairReader(processing_class, args.max_length, positions)
        self._reader, hears = self._pairs.prompts, self._pairs.prompts is not None
        parts = [model.model, find_encoder(model.model)] if hears else [model.model]
        # They run in eval mode: Granite-Speech's encoder would normalise by the batch, and keep its statistics.
        self._frozen = [part for part in parts if not any(weight.requires_grad for weight in part.parameters())]
        if args.share_prefixes:
            _check_sharing(args, model)
        one = torch.zeros(1, 1)
        token_reward_loss(one, one, one + 1, one + 1, kind=args.kind, scale=args.scale, margin=args.margin)
        simpo_loss(one, one, one + 1, one + 1, **_simpo_options(args))
        self._collates = kwargs.get("data_collator") is None
        if self._collates:
            kwargs["data_collator"] = self._collate
        if hears:
            kwargs |= {name: undecoded(kwargs.get(name)) for name in ("train_dataset", "eval_dataset")}
        super().__init__(model, args, processing_class=processing_class, **kwargs)
        self._check_processes()
        self.model_accepts_loss_kwargs = True  # compute_loss divides by what get_batch_samples counts
        self._noted: dict[str, Tensor] = {}
        self._noted_steps = 0
        self._read_through: set[str] = set()
        self._told: set[str] = set()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer``'s; both datasets are read through before it."""
        self._read_all("train_dataset", "eval_dataset")
        return super().train(*args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As ``Trainer``'s; the dataset is read through before its first batch."""
        if eval_dataset is None or isinstance(eval_dataset, str):
            self._read_all("eval_dataset")
        else:
            eval_dataset = self._readable(undecoded(eval_dataset) if self._reader else eval_dataset, "eval_dataset")
        return super().get_eval_dataloader(eval_dataset)

    def _readable(self, dataset: Any, name: str) -> Any:
        if not self._collates:  # rows are whatever the collator that was given reads
            return dataset
        return self._pairs.readable(dataset, name, self.args.bad_rows == "drop", self.accelerator)

    def _read_all(self, *names: str) -> None:
        for name in names:
            if name not in self._read_through:
                setattr(self, name, self._readable(getattr(self, name), name))
                self._read_through.add(name)

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Every prompt with both of its answers, (2 B, T) padded on the right: all chosen, then all rejected."""
        pairs = [self._pairs.read(row) for row in rows]
        sides = [pair.answers[side] for side in range(2) for pair in pairs]
        ids = [torch.tensor(prompt + answer) for prompt, answer in sides]
        padding = self._pairs.tokenizer.pad_token_id
        input_ids = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=padding)
        at, lengths = torch.arange(input_ids.shape[1]), torch.tensor([len(row) for row in ids])[:, None]
        attention_mask = (at < lengths).long()
        answer_mask = attention_mask * (at >= torch.tensor([len(prompt) for prompt, _ in sides])[:, None])
        features = join_features([pair.heard for pair in pairs if pair.heard is not None] * 2)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "answer_mask": answer_mask, **features}

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Tensor | None]:
        """The micro-batches of a step, and by what its sums are divided: ``answer_counts``, of all processes."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        if not batches:
            return batches, None
        # Trainer's own sum of losses begins anew there.
        if self.state.global_step == self._globalstep_last_logged:
            self._noted, self._noted_steps = {}, 0
        self._noted_steps += 1
        of_step = torch.stack([answer_counts(*batch["answer_mask"].chunk(2)) for batch in batches]).sum(0)
        of_step = of_step.to(self.args.device)
        if self.args.average_tokens_across_devices:
            of_step = self.accelerator.reduce(of_step, "sum")
        return batches, of_step

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch of ``_collate``'s, or the share of it in that of a step of ``num_items_in_batch``."""
        ids, mask, args = inputs["input_ids"], inputs["answer_mask"], self.args
        for part in self._frozen:
            part.eval()
        rewards, logprobs, tokens_per_node = self._run(model, inputs)
        pairs = *rewards.chunk(2), *mask.chunk(2)
        own = answer_counts(*pairs[2:])
        sums = {}  # over the pairs, the chosen tokens and the rejected ones
        if args.reward_weight:
            sums["reward_loss"] = token_reward_sums(*pairs, kind=args.kind, scale=args.scale, margin=args.margin)
        if logprobs is not None:
            (chosen, rejected), masks = logprobs.chunk(2), mask[:, 1:].chunk(2)
            if args.simpo_weight:
                of_pairs = simpo_loss(chosen, rejected, *masks, **_simpo_options(args)) * len(chosen)
                sums["simpo_loss"] = pad(of_pairs[None], (0, 2))
            if args.sft_weight:
                sums["sft_loss"] = pad(-chosen.sum()[None], (1, 1))
        of_step = own if num_items_in_batch is None else num_items_in_batch
        terms = {name: (parts / of_step).sum() for name, parts in sums.items()}
        if num_items_in_batch is not None and args.average_tokens_across_devices:
            # The processes' gradients are averaged.
            terms = {name: term * self.accelerator.num_processes for name, term in terms.items()}
        loss = sum(getattr(args, name.replace("loss", "weight")) * term for name, term in terms.items())
        if model.training and num_items_in_batch is not None and args.logging_strategy != "no":
            found = token_reward_metrics(*pairs)
            if args.simpo_weight:
                found |= simpo_metrics(chosen, rejected, *masks, beta=args.simpo_beta)
            if args.share_prefixes:
                found["tokens_per_node"] = loss.new_tensor(tokens_per_node)
            self._note({name: term.detach() for name, term in terms.items()}, found, len(ids) // 2)
        return (loss, {"rewards": rewards}) if return_outputs else loss

    def _run(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor | None, float]:
        """Rewards (2 B, T), log-probabilities (2 B, T - 1) where a loss reads them, and tokens for each that runs."""
        ids, mask = inputs["input_ids"], inputs["answer_mask"]
        reads_logits = bool(self.args.simpo_weight or self.args.sft_weight)
        prepared = self._prepared(model, inputs, mask if reads_logits else torch.zeros_like(mask))
        if prepared is None:
            output = model(**{name: values for name, values in inputs.items() if name != "answer_mask"})
            if not reads_logits:
                return output.rewards, None, 1.0
            # A prompt has a token at least, so that the first one of an answer has a log-probability.
            found = surprisal_entropy(output.logits[:, :-1], ids[:, 1:], response_mask=mask[:, 1:])
            return output.rewards, found.logprobs, 1.0
        with self.accelerator.autocast():
            logprobs, _, rewards = prepared.run(read=_rewards)
        assert rewards is not None
        stats = prepared.stats
        return rewards, logprobs[:, 1:] if reads_logits else None, stats.tokens_of_rows / max(stats.tokens, 1)

    def _prepared(self, model: Any, inputs: dict[str, Tensor], asked: Tensor) -> Prepared | None:
        """How what chosen and rejected share runs once; None: rows are run one by one."""
        if not self.args.share_prefixes:
            return None
        ids, own = inputs["input_ids"], ("input_ids", "attention_mask", "answer_mask")
        of_pairs = torch.arange(len(ids) // 2, device=ids.device).repeat(2)
        batch = tree_batch(ids, inputs.get("attention_mask"), response_mask=asked, groups=of_pairs)
        # Those of the chosen answers, and the same again of the rejected ones.
        features = {name: values.chunk(2)[0] for name, values in inputs.items() if name not in own}
        try:
            with self.accelerator.autocast():
                prepared = prepare(model, batch)
                if prepared.choice.plan.kind != "rows":
                    return prepare(model, batch, inputs=features) if features else prepared
            reason = prepared.choice.reason
        except RuntimeError as error:
            # Of a model that cannot hear once for several rows.
            if not str(error).startswith("inputs must be None"):
                raise
            reason = str(error)
        if reason not in self._told and self.accelerator.is_main_process:
            self._told.add(reason)
            _logger.warning("share_prefixes=True, and some rows are run one by one: %s.", reason)
        return None

    def _note(self, terms: dict[str, Tensor], of_pairs: dict[str, Tensor], pairs: int) -> None:
        """Add up on the device what is logged: the terms of steps, the sums of pairs, and the pairs."""
        found = terms | {name: pairs * value for name, value in of_pairs.items()}
        found["pairs"] = torch.full_like(next(iter(found.values())), pairs)
        for name, value in found.items():
            self._noted[name] = self._noted[name] + value if name in self._noted else value

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Also the means over the steps that ``loss`` is of, of all processes."""
        if "loss" in logs and self._noted:
            sums = self.accelerator.reduce(torch.stack(list(self._noted.values())), "sum").tolist()
            noted = dict(zip(self._noted, sums, strict=True))
            pairs, steps = noted.pop("pairs"), self._noted_steps * self.accelerator.num_processes
            logs = logs | {name: total / (steps if name in _TERMS else pairs) for name, total in noted.items()}
            self._noted = {}
        super().log(logs, *args, **kwargs)

    def prediction_step(
        self, model: Any, inputs: dict[str, Tensor], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """The loss alone: pairs of one length are not to be had."""
        with torch.no_grad():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the channel, with ``train_model`` adapter or model too, and the tokenizer; every process calls."""
        folder, scored = Path(output_dir or self.args.output_dir or "."), self.accelerator.unwrap_model(self.model)
        channel = _whole(scored.channel, self.args.should_save)
        model = _whole(scored.model, self.args.should_save) if self.args.train_model else None
        if self.args.should_save:
            write_channel(folder, scored.channel.settings, channel, scored.model)
            if model is not None:
                scored.model.save_pretrained(folder, state_dict=model)
            processing_class: Any = self.processing_class
            processing_class.save_pretrained(folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        scored = self.accelerator.unwrap_model(self.model if model is None else model)
        _restore(scored.channel, RewardTransformer.read_channel(resume_from_checkpoint, scored.model).state_dict())
        if not self.args.train_model:
            return
        if hasattr(scored.model, "peft_config"):
            from peft import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

            read = load_peft_weights(resume_from_checkpoint, device="cpu")
            set_peft_model_state_dict(scored.model, _spread(read, get_peft_model_state_dict(scored.model)))
        else:
            _restore(scored.model, type(scored.model).from_pretrained(resume_from_checkpoint).state_dict())

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:  # whose engine reads its own files
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _check_processes(self) -> None:
        scored: Any = self.model
        if getattr(scored.model, "is_distributed_loading_by_transformers", False):
            raise ValueError(
                "model must be whole when it is given to TokenRewardTrainer, got one that is sharded at load"
            )
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None) if self.is_fsdp_enabled else None
        if plugin is not None and getattr(plugin, "fsdp_version", 1) != 2:
            raise ValueError(
                f"fsdp_version must be 2 with TokenRewardTrainer, got {getattr(plugin, 'fsdp_version', 1)}"
            )
        if self.get_tp_size() * self.get_cp_size() * self.get_sp_size() > 1:
            raise ValueError(
                "TokenRewardTrainer divides rows among processes (DDP, FSDP2, ZeRO), and no row or layer, got sizes "
                f"{self.get_tp_size()}, {self.get_cp_size()}, {self.get_sp_size()} of tensor, context and sequence "
                "parallelism"
            )


def _whole(module: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The state of a module in one piece on the CPU, empty unless ``keep``; every process calls.

    Of a model that is spread over the processes, PEFT writes the adapter alone: what is frozen is not gathered for it.
    """
    found: dict[str, Tensor] = {}
    names: dict[int, str] = {}  # of weights by their id: those that are tied stay so
    for name, tensor in module.state_dict(keep_vars=True).items():
        first = names.setdefault(id(tensor), name)
        if first != name:
            found |= {name: found[first]} if first in found else {}
            continue
        is_spread = isinstance(tensor, DTensor) or hasattr(tensor, "ds_id")
        if is_spread and hasattr(module, "peft_config") and not tensor.requires_grad:
            continue
        with _gathered(tensor):
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if keep:
                found[name] = whole.detach().cpu().clone() if is_spread else whole.detach()
    return found


def _gathered(tensor: Tensor) -> Any:
    """Within, a weight that ZeRO-3 has spread over the processes is in one piece."""
    if not hasattr(tensor, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([tensor])


def _restore(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    module.load_state_dict(_spread(state, module.state_dict()))


def _spread(state: Mapping[str, Tensor], own: Mapping[str, Any]) -> dict[str, Tensor]:
    """Whole tensors, as those of the same names in ``own`` lie over the processes."""
    found = {}
    for name, tensor in state.items():
        like = own.get(name)
        if isinstance(like, DTensor):
            # Where transformers loads weights on the first process alone, those of the others are not read.
            whole = torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor
            tensor = distribute_tensor(whole.to(like.device, like.dtype), like.device_mesh, like.placements)
        found[name] = tensor
    return found


def _rewards(output: Any, _: Any) -> Tensor:
    found: Tensor = output.rewards
    return found


def _check_sharing(args: TokenRewardConfig, model: RewardTransformer) -> None:
    if args.ddp_broadcast_buffers:
        raise ValueError(
            "ddp_broadcast_buffers must be None or False with share_prefixes=True, got True: ranks run different "
            "numbers of forward passes, and cannot send each other buffers in each"
        )
    # A forward pass in which DDP broadcasts its buffers is a collective.
    args.ddp_broadcast_buffers = False
    if args.train_model and (name := normalises_by_batch(model)):
        raise ValueError(
            f"share_prefixes must be False with a model that is trained and normalises by the batch, got {name}: it "
            "would see a prompt once, and not once for each of its rows"
        )


def _simpo_options(args: TokenRewardConfig) -> dict[str, Any]:
    return {name: getattr(args, f"simpo_{name}") for name in ("kind", "beta", "margin", "label_smoothing")}


def _check_weights(args: TokenRewardConfig, model: nn.Module) -> None:
    weights = {name: getattr(args, name) for name in ("reward_weight", "simpo_weight", "sft_weight")}
    for name, weight in weights.items():
        check_finite(name, weight)
        if weight < 0:
            raise ValueError(f"{name} must be at least 0, got {weight}")
    if not any(weights.values()):
        raise ValueError(f"one of {', '.join(weights)} must be positive, got 0 for all")
    if args.train_model and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("train_model=True needs a model of which some parameter requires a gradient, got none")
    if not args.train_model and (args.simpo_weight or args.sft_weight):
        raise ValueError(
            f"simpo_weight and sft_weight must be 0 where the model is frozen (train_model=False), got "
            f"{args.simpo_weight} and {args.sft_weight}"
        )


def _choose_trained(args: TokenRewardConfig, model: RewardTransformer) -> None:
    """Freeze the model unless it is trained, and what no gradient reaches: DDP would wait for it."""
    if not args.train_model:
        model.model.requires_grad_(False)
    unused = [] if args.reward_weight else list(model.channel.parameters())
    head = model.model.get_output_embeddings()
    if head is not None and not (args.simpo_weight or args.sft_weight):
        used = {id(weight) for weight in model.model.get_decoder().parameters()}
        unused += [weight for weight in head.parameters() if id(weight) not in used]
    for weight in unused:
        weight.requires_grad_(False)


def _check_options(args: TokenRewardConfig, kwargs: dict[str, Any]) -> None:
    for name in ("compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{name} must be None with TokenRewardTrainer, which has a loss and metrics of its own, got "
                f"{kwargs[name]!r:.80}"
            )
    if args.label_smoothing_factor:
        raise ValueError(
            "label_smoothing_factor must be 0 with TokenRewardTrainer, which has simpo_label_smoothing, got "
            f"{args.label_smoothing_factor}"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"TokenRewardTrainer must have a process for each GPU, got one for {args.n_gpu}: start it with torchrun or "
            "accelerate launch, or set CUDA_VISIBLE_DEVICES to one"
        )
    # A dispatcher cuts batches in two by rows, and these hold all chosen answers before all rejected ones.
    config: Any = args.accelerator_config
    if config.dispatch_batches:
        raise ValueError("accelerator_config must have dispatch_batches=False with TokenRewardTrainer, got True")
    config.dispatch_batches = False
