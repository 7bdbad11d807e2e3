"""Train a reward channel on preferences, with ``transformers.Trainer``."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ProcessorMixin, Trainer, TrainingArguments

from leafkernels._core.checks import check_count, check_finite
from leafkernels.lookahead.transformers import RewardTransformer
from leafkernels.losses.preference import KINDS, simpo_loss, simpo_metrics, token_reward_loss, token_reward_metrics
from leafkernels.rows.recordings import Heard, PromptReader, find_encoder, join_features, text_of, undecoded
from leafkernels.vocabulary.surprisal import surprisal_entropy

_SIDES = ("chosen", "rejected")


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
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator reads the texts."})


class TokenRewardTrainer(Trainer):
    """Teaches the channel of a ``RewardTransformer`` which of two answers is better; the model itself is frozen.

    With ``train_model=True`` the model learns along (LoRA or whole), by the paper's total loss: reward_weight x loss of
    the rewards + simpo_weight x SimPO + sft_weight x mean cross entropy of the chosen answers' tokens. A checkpoint
    then holds adapter or model beside the channel.

    The dataset has TRL's columns ``prompt``, ``chosen`` and ``rejected``: texts, or lists of messages for the chat
    template of the tokenizer. Answers end with the tokenizer's end token.

    For a model that hears, ``processing_class`` is its processor, and rows have ``audio`` too: a recording or a list of
    them, each datasets' ``Audio``, the path or the bytes of a file that soundfile reads, or ``{"array": (samples,),
    "sampling_rate": int}``. The prompt has a ``{"type": "audio"}`` part for each (with none, they go before the first
    user message), or is text with the processor's audio token in it. The answer follows as text, also where it is given
    as messages, with the end token. Rows without ``audio`` may stand among them.

    A model that is frozen runs in eval mode, and so does a frozen audio encoder. Logging, saving, resuming, accelerate,
    DeepSpeed and FSDP are those of ``Trainer``; a checkpoint holds the channel alone, as
    ``RewardTransformer.save_pretrained`` writes it. Beside the loss it logs the metrics of ``token_reward_metrics``,
    and with SimPO those of ``simpo_metrics``.

    Args:
        model: a ``RewardTransformer``, or a causal language model, which gets a new channel.
        args: ``TokenRewardConfig``.
        processing_class: the tokenizer, with a padding token, or the processor of a model that hears.

    Raises:
        TypeError, ValueError: an argument is not what it must be, an answer has no token or is the same as the other,
            a recording is missing, or is silent, empty, not finite or too long for the encoder; the message names it.
    """

    args: TokenRewardConfig

    def __init__(self, model: Any, args: TokenRewardConfig, *, processing_class: Any, **kwargs: Any) -> None:
        if not isinstance(args, TokenRewardConfig):
            raise TypeError(f"args must be a TokenRewardConfig, got {type(args).__name__}")
        if args.max_length is not None:
            check_count("max_length", args.max_length, 2)
        hears = isinstance(processing_class, ProcessorMixin)
        self._reader = PromptReader(processing_class) if hears else None
        self._tokenizer: Any = processing_class.tokenizer if hears else processing_class
        if getattr(self._tokenizer, "pad_token_id", None) is None:
            raise ValueError(
                "processing_class must be a tokenizer with a padding token, or the processor around one, got "
                f"{type(processing_class).__name__}"
            )
        model = model if isinstance(model, RewardTransformer) else RewardTransformer(model)
        _check_weights(args, model.model)
        if not args.train_model:
            model.model.requires_grad_(False)
        parts = [model.model, find_encoder(model.model)] if hears else [model.model]
        # They run in eval mode: Granite-Speech's encoder would normalise by the batch, and keep its statistics.
        self._frozen = [part for part in parts if not any(weight.requires_grad for weight in part.parameters())]
        one = torch.zeros(1, 1)
        token_reward_loss(one, one, one + 1, one + 1, kind=args.kind, scale=args.scale, margin=args.margin)
        simpo_loss(one, one, one + 1, one + 1, **_simpo_options(args))
        kwargs.setdefault("data_collator", self._collate)
        if hears:
            kwargs |= {name: undecoded(kwargs.get(name)) for name in ("train_dataset", "eval_dataset")}
        super().__init__(model, args, processing_class=processing_class, **kwargs)

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Every prompt with both of its answers, (2 B, T) padded on the right: all chosen, then all rejected."""
        ids, starts = [], []
        for row in rows:
            missing = [name for name in ("prompt", *_SIDES) if name not in row]
            if missing:
                raise ValueError(f"the dataset must have the columns prompt, chosen and rejected, got {sorted(row)}")
            if row["chosen"] == row["rejected"]:
                raise ValueError(f"chosen and rejected must differ, got {row['chosen']!r:.80} twice")
        prompts = [self._hear(row) for row in rows]
        for side in _SIDES:
            for row, heard in zip(rows, prompts, strict=True):
                prompt, answer = self._tokens(row["prompt"], row[side], heard)
                whole = (prompt + answer)[: self.args.max_length]
                if len(whole) <= len(prompt):
                    raise ValueError(
                        f"{side} must have a token after its prompt of {len(prompt)} tokens (max_length is "
                        f"{self.args.max_length}), got {row[side]!r:.80}"
                    )
                ids.append(torch.tensor(whole))
                starts.append(len(prompt))
        for row, chosen, rejected in zip(rows, ids[: len(rows)], ids[len(rows) :], strict=True):
            if torch.equal(chosen, rejected):
                raise ValueError(
                    f"chosen and rejected must differ in their tokens (max_length is {self.args.max_length}), got "
                    f"{row['chosen']!r:.80} and {row['rejected']!r:.80}"
                )
        padding = self._tokenizer.pad_token_id
        input_ids = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=padding)
        at, lengths = torch.arange(input_ids.shape[1]), torch.tensor([len(row) for row in ids])[:, None]
        attention_mask = (at < lengths).long()
        answer_mask = attention_mask * (at >= torch.tensor(starts)[:, None])
        features = join_features([heard for heard in prompts if heard is not None] * 2)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "answer_mask": answer_mask, **features}

    def _hear(self, row: dict[str, Any]) -> Heard | None:
        """What a model that hears reads of the prompt of a row; None: the model does not hear."""
        prompt, audio = row["prompt"], row.get("audio")
        if self._reader is None:
            if audio is not None:
                raise TypeError(
                    "processing_class must be the processor of a model that hears where rows have audio, got "
                    f"{type(self._tokenizer).__name__}"
                )
            return None
        if audio is None and not self._reader.asks(prompt):
            return self._reader.read_text(prompt)
        return self._reader.read(prompt, audio)

    def _tokens(self, prompt: Any, answer: Any, heard: Heard | None) -> tuple[list[int], list[int]]:
        tokenizer = self._tokenizer
        if heard is not None or isinstance(prompt, str):
            end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
            first = tokenizer(prompt)["input_ids"] if heard is None else heard.token_ids
            return first, tokenizer(text_of(answer), add_special_tokens=False)["input_ids"] + end
        if isinstance(answer, str):
            raise TypeError(f"chosen and rejected must be messages where prompt is, got {answer!r:.80}")
        options = {"tokenize": True, "return_dict": False}
        first = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options)
        whole = tokenizer.apply_chat_template([*prompt, *answer], **options)
        if whole[: len(first)] != first:
            # Some templates open the answer with what they leave out of a finished one, as in "<think>".
            raise ValueError(
                "processing_class must have a chat template whose prompt with the generation prompt begins the whole "
                f"conversation, got {tokenizer.decode(first)!r:.160} and {tokenizer.decode(whole)!r:.160}; prompt, "
                "chosen and rejected may also be texts"
            )
        return first, whole[len(first) :]

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch of ``_collate``'s."""
        ids, mask, args = inputs["input_ids"], inputs["answer_mask"], self.args
        for part in self._frozen:
            part.eval()
        output = model(**{name: values for name, values in inputs.items() if name != "answer_mask"})
        pairs = *output.rewards.chunk(2), *mask.chunk(2)
        terms = {}
        if args.reward_weight:
            terms["reward_loss"] = token_reward_loss(*pairs, kind=args.kind, scale=args.scale, margin=args.margin)
        if args.simpo_weight or args.sft_weight:
            # A prompt has a token at least, so that the first one of an answer has a log-probability.
            logprobs = surprisal_entropy(output.logits[:, :-1], ids[:, 1:], response_mask=mask[:, 1:]).logprobs
            (chosen, rejected), masks = logprobs.chunk(2), mask[:, 1:].chunk(2)
            if args.simpo_weight:
                terms["simpo_loss"] = simpo_loss(chosen, rejected, *masks, **_simpo_options(args))
            if args.sft_weight:
                terms["sft_loss"] = -chosen.sum() / masks[0].sum()
        loss = sum(getattr(args, name.replace("loss", "weight")) * term for name, term in terms.items())
        if model.training and self.state.global_step % max(int(args.logging_steps), 1) == 0:
            self._noted = token_reward_metrics(*pairs) | {name: term.detach() for name, term in terms.items()}
            if args.simpo_weight:
                self._noted |= simpo_metrics(chosen, rejected, *masks, beta=args.simpo_beta)
        return (loss, {"rewards": output.rewards}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Also what the last batch that was looked at says of the rewards."""
        if "loss" in logs:
            noted = self.__dict__.pop("_noted", {})
            logs = logs | {name: float(value) for name, value in noted.items()}
        super().log(logs, *args, **kwargs)

    def prediction_step(
        self, model: Any, inputs: dict[str, Tensor], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """The loss alone: pairs of one length are not to be had."""
        with torch.no_grad():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir or ".")
        self.accelerator.unwrap_model(self.model).save_pretrained(folder)
        if self.args.train_model:
            self.accelerator.unwrap_model(self.model).model.save_pretrained(folder)
        processing_class: Any = self.processing_class
        processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        model = self.model if model is None else model
        wrapped = self.accelerator.unwrap_model(model)
        read = RewardTransformer.read_channel(resume_from_checkpoint, wrapped.model)
        wrapped.channel.load_state_dict(read.state_dict())
        if not self.args.train_model:
            return
        if hasattr(wrapped.model, "peft_config"):
            from peft import load_peft_weights, set_peft_model_state_dict

            set_peft_model_state_dict(wrapped.model, load_peft_weights(resume_from_checkpoint))
        else:
            wrapped.model.load_state_dict(type(wrapped.model).from_pretrained(resume_from_checkpoint).state_dict())


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
