"""What the rows of a prompt share, run through the model once in TRL's trainers: ``SharedPrefixes``.

TRL has one function from rows to log-probabilities, for the policy, the old policy and the reference. Where
``leafkernels.models.tree_logprobs`` runs fewer tokens than rows do, it takes the place of TRL's; else TRL's own runs.
"""

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import trl
from torch import Tensor
from torch.nn.functional import pad
from trl import GRPOTrainer

from leafkernels.models import TreeBatch, tree_batch
from leafkernels.models.asking import evaluating, normalises_by_batch
from leafkernels.models.tree_logprobs import Prepared, prepare

_logger = logging.getLogger(__name__)

_NAME = "_get_per_token_logps_and_entropies"


@dataclass
class SharedPrefixesConfig:
    """The option of a trainer's config."""

    share_prefixes: bool = field(
        default=False,
        metadata={
            "help": "Run what the rows of a micro-batch share, prompts above all, through the model once, where that "
            "is fewer tokens: log-probabilities and gradients are the same to rounding. Prompts, and not rows, are "
            "then shuffled over micro-batches."
        },
    )


class SharedPrefixes(GRPOTrainer):
    """``GRPOTrainer`` that runs what rows share once, where its config has ``share_prefixes=True``.

    - The rows of a prompt stay together when TRL deals a generation batch out to micro-batches.
    - ``leaf/tokens_per_node`` in the log is how many tokens of the rows one token that the loss runs through the model
      stands for, padding included; ``leaf/shared_share`` the share of its forward passes that shared. A reason to run
      rows one by one is told in a warning, once each.
    - Log-probabilities of the first rows that share are compared with TRL's own before anything is learnt from them.

    Raises:
        RuntimeError: the loss does not ask for log-probabilities where TRL's does.
        ValueError: an option of TRL's, or the model, cannot go with it; or TRL's log-probabilities are others.
    """

    _buffered_inputs: Any  # TRL's

    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, *more: Any, **kwargs: Any) -> None:
        self._shares = bool(getattr(args, "share_prefixes", False))
        if self._shares:
            _check_options(args)
            # A forward in which DDP broadcasts its buffers is a collective, and ranks run different numbers of them.
            args.ddp_broadcast_buffers = False
        super().__init__(model, reward_funcs, args, *more, **kwargs)
        self._compared: set[int] = set()
        self._told: set[str] = set()
        self._run: list[tuple[int, int, bool]] = []  # of the loss's forwards: tokens of rows, tokens run, shared or not
        # What was read of the rows that were asked for last: policy and reference are asked about the same ones.
        self._seen: tuple[Any, dict[Any, TreeBatch]] = None, {}
        if self._shares:
            _check_model(self.model, getattr(self, "aux_loss_enabled", False))

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        group_size = self.num_generations if self.model.training else self.num_generations_eval
        batch = super()._generate_and_score_completions(inputs)
        if self._shares:
            rows = len(batch["completion_ids"])
            first = self.accelerator.process_index * rows
            numbers = torch.arange(first, first + rows, device=batch["completion_ids"].device)
            batch["prompt_number"] = numbers // group_size
        return batch

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        parts = self._buffered_inputs
        if not self._shares or not self.model.training or parts is before or "pixel_values" in parts[0]:
            return inputs
        self._buffered_inputs = _with_groups_together(parts)
        return self._buffered_inputs[self._step % len(parts)]

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if not self._shares:
            return super()._compute_loss(model, inputs)
        mode = "train" if self.model.training else "eval"
        self._run = []
        loss = super()._compute_loss(model, inputs)
        if not self._run:
            raise RuntimeError(
                f"share_prefixes must be False with {type(self).__name__} in TRL {trl.__version__}: its loss does not "
                f"call {_NAME}"
            )
        of_rows, run, shared = (sum(numbers) for numbers in zip(*self._run, strict=True))
        self._metrics[mode]["leaf/tokens_per_node"].append(of_rows / max(run, 1))
        self._metrics[mode]["leaf/shared_share"].append(shared / len(self._run))
        return loss

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **others: Any,
    ) -> Any:
        compute = super()._get_per_token_logps_and_entropies
        call = (input_ids, attention_mask, logits_to_keep)
        others = {name: value for name, value in others.items() if value is not None and value is not False}
        if others and self._shares:
            self._tell(f"rows have {next(iter(others))}")
            self._run.append((input_ids.numel(), input_ids.numel(), False))
        if others or not self._shares:
            others |= {"batch_size": batch_size, "compute_entropy": compute_entropy}
            return self._alone(slice(None), compute, model, *call, **others)
        parts = []
        if self._seen[0] is not input_ids:
            self._seen = input_ids, {}
        for start in range(0, len(input_ids), batch_size or len(input_ids)):
            rows = slice(start, start + (batch_size or len(input_ids)))
            part = (input_ids[rows], attention_mask[rows], logits_to_keep, compute_entropy)
            parts.append(self._part(rows, compute, model, *part))
        logprobs, entropies = (None if of[0] is None else torch.cat(of) for of in zip(*parts, strict=True))
        has_aux_loss = "compute_aux_loss" in inspect.signature(compute).parameters
        return (logprobs, entropies, None)[: 3 if has_aux_loss else 2]

    def _part(
        self, rows: slice, compute: Any, model: Any, ids: Tensor, mask: Tensor, keep: int, has_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities and entropies, (rows, keep) each, of rows that are run together."""
        batches, part = self._seen[1], (rows.start, rows.stop, keep)
        if part not in batches:
            batches[part] = self._batch(rows, ids, mask, keep)
        prepared, reason = self._prepared(rows, model, batches[part])
        base = self.accelerator.unwrap_model(model)
        if prepared is not None and id(base) not in self._compared:
            self._compare(rows, compute, model, ids, mask, keep)
            self._compared.add(id(base))
        if prepared is not None:
            found = self._shared(rows, prepared)
            self._run.append((prepared.stats.tokens_of_rows, prepared.stats.tokens, True))
            return found[0][:, -keep:], found[1][:, -keep:] if has_entropy else None
        self._tell(reason)
        self._run.append((ids.numel(), ids.numel(), False))
        return self._alone(rows, compute, model, ids, mask, keep, compute_entropy=has_entropy)[:2]

    def _batch(self, rows: slice, ids: Tensor, mask: Tensor, keep: int) -> TreeBatch:
        asked = mask.clone()
        asked[:, : ids.shape[1] - keep] = 0
        return tree_batch(ids, mask, response_mask=asked, groups=self._groups(rows, ids.device))

    def _alone(self, rows: slice, compute: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
        """What TRL computes for ``rows`` of the batch."""
        return compute(model, *args, **kwargs)

    def _groups(self, rows: slice, device: torch.device) -> Tensor | None:
        """Which rows are a prompt, where equal tokens do not say it."""
        return None

    def _prepared(self, rows: slice, model: Any, batch: TreeBatch) -> tuple[Prepared | None, str]:
        """How what rows share is run once; None: the reason why they are run one by one."""
        with self.accelerator.autocast():
            prepared = prepare(model, batch)
        is_alone = prepared.choice.plan.kind == "rows"
        return None if is_alone else prepared, prepared.choice.reason

    def _shared(self, rows: slice, prepared: Prepared) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies (rows, tokens)."""
        with self.accelerator.autocast():
            return prepared.run(self.temperature)[:2]

    @torch.no_grad()
    def _compare(self, rows: slice, compute: Any, model: Any, ids: Tensor, mask: Tensor, keep: int) -> None:
        """Refuse a model of which TRL's function and ours say different things: a ratio would be of the two.

        With padding on the left, since TRL leaves it to the model from where positions are counted.
        """
        # What fills stands for no recording: models count the tokens that do.
        ids, mask = torch.cat([ids[:, -1:], ids], 1), pad(mask, (1, 0))
        with evaluating(model):
            prepared, _ = self._prepared(rows, model, self._batch(rows, ids, mask, keep))
            if prepared is None:
                return
            found = self._shared(rows, prepared)[0]
            expected = self._alone(rows, compute, model, ids, mask, keep)[0]
        is_token = mask[:, -keep:].bool()
        apart = torch.where(is_token, found[:, -keep:] - expected, 0.0).abs()
        is_exact = next(self.accelerator.unwrap_model(model).parameters()).dtype in (torch.float32, torch.float64)
        if is_exact and self.accelerator.mixed_precision == "no":
            most, bound = float(apart.max()), 1e-3
        else:
            most, bound = float(apart.sum() / is_token.sum()), 0.05
        if not most < bound:
            raise ValueError(
                f"share_prefixes must be False with {type(self.accelerator.unwrap_model(model)).__name__}: its "
                f"log-probabilities differ by {most:.2g} from those that TRL {trl.__version__} computes, which hands "
                "a model no positions"
            )

    def _tell(self, reason: str) -> None:
        if reason not in self._told and self.accelerator.is_main_process:
            self._told.add(reason)
            _logger.warning("share_prefixes=True, and some rows are run one by one: %s.", reason)


def _with_groups_together(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """TRL's micro-batches with prompts, and not rows, dealt out: in the order of the first row that TRL has of each."""
    numbers = torch.cat([part["prompt_number"] for part in parts])
    firsts = (numbers[:, None] == numbers).int().argmax(1)
    order = firsts.argsort(stable=True)
    places = order.tolist()
    size = len(places) // len(parts)
    dealt: list[dict[str, Any]] = [{} for _ in parts]
    for name, value in parts[0].items():
        if value is None or isinstance(value, Tensor) and not value.dim():
            cut: list[Any] = [value] * len(parts)
        elif isinstance(value, Tensor):
            cut = list(torch.cat([part[name] for part in parts])[order].split(size))
        else:
            joined = [row for part in parts for row in part[name]]
            rows = [joined[place] for place in places]
            cut = [rows[start : start + size] for start in range(0, len(rows), size)]
        for part, values in zip(dealt, cut, strict=True):
            part[name] = values
    return dealt


def _check_options(args: Any) -> None:
    if getattr(args, "cast_lm_head_to_fp32", False):
        raise ValueError(
            "share_prefixes must be False with cast_lm_head_to_fp32=True, whose head TRL feeds in float32 in its own "
            "function alone"
        )
    if args.ddp_broadcast_buffers:
        raise ValueError(
            "ddp_broadcast_buffers must be None or False with share_prefixes=True, got True: ranks run different "
            "numbers of forward passes, and cannot send each other buffers in each"
        )


def _check_model(model: Any, has_aux_loss: bool) -> None:
    if has_aux_loss:
        raise ValueError(
            "share_prefixes must be False with a router's loss (router_aux_loss_coef), which TRL's own function alone "
            "returns; or set router_aux_loss_coef to 0"
        )
    if name := normalises_by_batch(model):
        raise ValueError(
            f"share_prefixes must be False with a model that is trained and normalises by the batch, got {name}: "
            "it would see a prompt once, and not once for each of its rows"
        )
