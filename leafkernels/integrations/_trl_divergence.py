"""``fire_loss``: a divergence over the vocabulary in the place of TRL's clipped loss in ``FireOPDTrainer``.

A token's loss is its weight times the divergence of student and teacher before it, and its gradient goes through the
student's whole distribution, as in TRL's GKD: no ratio, no clip, no importance weight. TRL's own loss takes the mean
over tokens, and adds its KL, its entropy bonus and its logs: it is handed minus the weighted divergences as advantages,
at a ratio of exactly 1.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leafkernels.integrations._trl_scoring import TeacherScores
from leafkernels.integrations._trl_served import ServedTeacher, check_served
from leafkernels.integrations._trl_stored import StoredCompletions
from leafkernels.models.asking import evaluating
from leafkernels.models.heads import Head, known_head, scaled, score, states_of_head
from leafkernels.vocabulary.divergence import Divergence, TeacherTopK, divergence
from leafkernels.vocabulary.linear_divergence import linear_divergence

LOSSES = ("sampled", "reverse_kl", "forward_kl", "jsd")
# TRL's means of a token's loss; its others are formulas of a ratio.
MEANS = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")


@dataclass
class DivergenceConfig:
    """The options of a config."""

    fire_loss: str = field(
        default="sampled",
        metadata={
            "help": "What pulls at a token: 'sampled', the teacher's less the student's log-probability of it in TRL's "
            "clipped loss; or a divergence over the vocabulary before it: 'reverse_kl', KL(student || teacher); "
            "'forward_kl', KL(teacher || student); 'jsd', between them."
        },
    )
    fire_top_k: int | None = field(
        default=None,
        metadata={
            "help": "With a divergence: compare the teacher's most likely ids, so many, and all others as one; None: "
            "the whole vocabulary."
        },
    )
    fire_jsd_beta: float = field(
        default=0.5,
        metadata={"help": "With fire_loss='jsd': the teacher's share of the mixture, in (0, 1)."},
    )


def check_divergence(args: Any) -> None:
    """Refuse options that a divergence does not have.

    Raises:
        TypeError, ValueError: the message names the option.
    """
    if args.fire_loss not in LOSSES:
        raise ValueError(f"fire_loss must be one of {', '.join(map(repr, LOSSES))}, got {args.fire_loss!r}")
    if args.fire_jsd_beta != 0.5 and args.fire_loss != "jsd":
        raise ValueError(
            f"fire_jsd_beta must be left out with fire_loss={args.fire_loss!r}, got {args.fire_jsd_beta}: it is an "
            "option of 'jsd'"
        )
    if not isinstance(args.fire_jsd_beta, float) or not 0 < args.fire_jsd_beta < 1:
        raise ValueError(
            f"fire_jsd_beta must be in (0, 1), got {args.fire_jsd_beta!r}; at its ends stand 'forward_kl' and "
            "'reverse_kl'"
        )
    top_k = args.fire_top_k
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"fire_top_k must be None or an int of at least 1, got {top_k!r}")
    if args.fire_loss == "sampled":
        if top_k is not None:
            raise ValueError(f"fire_top_k must be None with fire_loss='sampled', which has one id, got {top_k}")
        return
    if args.loss_type not in MEANS:
        raise ValueError(
            f"loss_type must be one of {', '.join(map(repr, MEANS))} with fire_loss={args.fire_loss!r}, got "
            f"{args.loss_type!r}, which is a formula of the policy's ratio and no mean of a divergence"
        )
    neutral = {
        "importance_sampling_level": "token",
        "off_policy_mask_threshold": None,
        "top_entropy_quantile": 1.0,
        "delta": None,
        "use_liger_kernel": False,
        "cast_lm_head_to_fp32": False,
        "share_prefixes": False,
    }
    for name, value in neutral.items():
        if (given := getattr(args, name, value)) != value:
            raise ValueError(f"{name} must be {value!r} with fire_loss={args.fire_loss!r}, got {given!r}")


class _Side(NamedTuple):
    """What a model has before each token of rows: hidden states where it has a linear head, else logits."""

    states: Tensor  # (n, tokens, size or ids)
    head: Head | None
    weight: Tensor | None  # of the head
    bias: Tensor | None

    @classmethod
    def of(
        cls,
        model: Any,
        ids: Tensor,
        attention: Tensor,
        keep: int,
        hearing: AbstractContextManager[None],
        detached: bool = False,
    ) -> "_Side":
        known_head(model)  # before anything is heard: the trial that finds it would hear a recording of a row
        with hearing:
            head, states = states_of_head(model, ids, attention, keep)
        weights = [None, None] if head is None else [head.linear.weight, head.linear.bias]
        if detached:
            # Of a student that stands in for its teacher for a while: the weights that it has now.
            weights = [None if weight is None else weight.detach() for weight in weights]
        return cls(states, head, *weights)

    def logits(self) -> Tensor:
        if self.head is None or self.weight is None:
            return self.states
        return scaled(torch.nn.functional.linear(self.states, self.weight, self.bias), *self.head[1:])


class DivergenceLoss(TeacherScores, StoredCompletions):
    """``GRPOTrainer`` with teachers whose loss may be a divergence; ``advantages`` are then weights of tokens."""

    def _check_divergence(self) -> None:
        """What is known once model and teachers are."""
        served = [teacher.model for teacher in self._teachers.values() if isinstance(teacher.model, ServedTeacher)]
        if served:
            check_served(self.args, served, self.temperature)
            for teacher in served:
                teacher.check([0, 1, 2])
        kind = self.args.fire_loss
        self._list_size = 0
        if kind == "sampled":
            return
        # As many as a batch has, where they are stored.
        own = 1 if self._stored is not None else max((teacher.top_k for teacher in served), default=0)
        self._list_size = self.args.fire_top_k or own
        if self._is_zero3:
            raise ValueError(
                f"fire_loss must be 'sampled' under DeepSpeed ZeRO-3, got {kind!r}: DeepSpeed learns in which order "
                "the modules run, which must be that of TRL's own pass"
            )
        on_several = [
            of for of in self._teachers.values() if len({*getattr(of.model, "hf_device_map", {}).values()}) > 1
        ]
        if on_several and not self._list_size:
            raise ValueError(
                f"fire_top_k must be given with fire_loss={kind!r} and a teacher on several devices (device_map), "
                "whose head does not lie beside the student's, got None"
            )
        if getattr(self, "aux_loss_enabled", False):
            raise ValueError(
                f"router_aux_loss_coef must be 0 with fire_loss={kind!r}: a router's loss is what TRL's own function "
                "alone returns"
            )

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if self.args.fire_loss == "sampled":
            return super()._compute_loss(model, inputs)
        divergence, entropy, logprobs = self._divergences(model, inputs)
        mask = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
        counts = torch.where(mask, divergence.detach().double(), 0.0).sum(), mask.sum().double()
        total, count = self.accelerator.reduce(torch.stack(counts), "sum").tolist()
        if total == float("inf"):
            raise ValueError(
                f"fire_loss must be 'jsd' or 'forward_kl' with a teacher that bans ids (-inf) which the student does "
                f"not, got {self.args.fire_loss!r}, which is infinite there"
            )
        self._metrics["train" if self.model.training else "eval"]["fire/divergence"].append(total / max(count, 1))
        inputs = {**inputs, "advantages": -inputs["advantages"] * divergence, "old_per_token_logps": logprobs}
        if inputs.get("importance_sampling_ratio") is not None:
            inputs["importance_sampling_ratio"] = torch.ones_like(inputs["importance_sampling_ratio"])
        name = "_get_per_token_logps_and_entropies"
        is_called = False

        def found(*_: Any, **options: Any) -> Any:
            nonlocal is_called
            is_called = True
            return (logprobs, entropy, None)[: 3 if "compute_aux_loss" in options else 2]

        own = vars(self).get(name)
        setattr(self, name, found)
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            delattr(self, name)
            if own is not None:
                setattr(self, name, own)
        if not is_called:
            raise RuntimeError(
                f"fire_loss must be 'sampled' with {type(self).__name__} in this TRL, whose loss does not call {name}"
            )
        return loss

    def _divergences(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """(rows, tokens): the divergence and the student's entropy, both with a gradient, and log-probabilities.

        The last are 0 where nothing reads them.
        """
        ids, attention, keep = _rows(inputs)
        teachers = self._teachers_of(inputs)
        with self.accelerator.autocast():
            student = _Side.of(model, ids, attention, keep, self._hearing(model, inputs, None))
            mask = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
            parts = []
            for rows, side, num_ids in teachers:
                chosen = student if rows is None else student._replace(states=student.states[rows])
                teacher: Any = side
                if side is None:
                    names = ("teacher_top_ids", "teacher_top_logprobs")
                    teacher = TeacherTopK(*(inputs[name] if rows is None else inputs[name][rows] for name in names))
                options = {"kind": self.args.fire_loss, "beta": self.args.fire_jsd_beta, "num_ids": num_ids}
                options |= {"temperature": self.temperature, "response_mask": mask if rows is None else mask[rows]}
                parts.append(_compare(chosen, teacher, options)[:2])
            divergence, entropy = (torch.cat(of) for of in zip(*parts, strict=True))
            if len(parts) > 1:
                order = torch.cat([rows for rows, _, _ in teachers if rows is not None]).argsort()
                divergence, entropy = divergence[order], entropy[order]
            logprobs = torch.zeros_like(divergence.detach())
            if self.beta:
                logprobs = score(student.head, student.states, ids[:, -keep:], self.temperature, mask).logprobs
        return divergence, entropy, logprobs

    @torch.no_grad()
    def _teachers_of(self, inputs: dict[str, Any]) -> list[tuple[Tensor | None, _Side | None, int]]:
        """Of each teacher that rows have: which (None: all), what it has before their tokens, how many ids count.

        None for what was kept from the scoring: the most likely ids.
        """
        found: list[tuple[Tensor | None, _Side | None, int]] = []
        heard = inputs
        if "teacher_prompt_ids" in inputs:
            heard = inputs | {f"prompt_{name}": inputs[f"teacher_prompt_{name}"] for name in ("ids", "mask")}
        ids, attention, keep = _rows(heard)
        for number, teacher in enumerate(self._teachers.values()):
            rows = None
            if len(self._teachers) > 1:
                chosen = [row for row, of in enumerate(inputs["teacher_number"]) if of == number]
                if not chosen and not self._is_fsdp:
                    continue
                rows = torch.tensor(chosen, dtype=torch.int64, device=ids.device)
            side = None
            if not self._list_size:
                # Every rank calls a model that is spread over all of them, for a row that is then left out too.
                run = rows if rows is None or len(rows) else rows.new_zeros(1)
                part = (ids, attention) if run is None else (ids[run], attention[run])
                side = self._side_of(teacher, *part, keep, inputs, run)
            if rows is not None and not len(rows):
                continue
            found.append((rows, side, teacher.num_ids))
        return found

    def _side_of(
        self,
        teacher: Any,
        ids: Tensor,
        attention: Tensor,
        keep: int,
        inputs: dict[str, Any],
        rows: Tensor | None,
    ) -> _Side:
        model = self.model if teacher.borrowed is not None else teacher.model
        hearing = self._hearing(model, inputs, rows)
        if teacher.borrowed is not None:
            borrowed = teacher.borrowed(self.accelerator.unwrap_model(self.model))
            with borrowed, evaluating(model), self.accelerator.autocast():
                return _Side.of(model, ids, attention, keep, hearing, detached=True)
        if teacher.home is not None:
            model.to(ids.device)
        known = ids.masked_fill(ids >= teacher.num_ids, 0)  # rows with others have left the loss
        with torch.autocast(ids.device.type, enabled=False), evaluating(model):
            return _Side.of(model, known, attention, keep, hearing, detached=True)


def _compare(student: _Side, teacher: _Side | TeacherTopK, options: dict[str, Any]) -> Divergence:
    """From hidden states where both models have a linear head, else from logits."""
    sides = {"student": student} if isinstance(teacher, TeacherTopK) else {"student": student, "teacher": teacher}
    if any(side.head is None for side in sides.values()):
        said = teacher if isinstance(teacher, TeacherTopK) else teacher.logits()
        return divergence(student.logits(), said, **options)
    for name, side in sides.items():
        assert side.head is not None
        _, scale, softcap = side.head
        options |= {f"{name}_bias": side.bias, f"{name}_logit_scale": scale, f"{name}_logit_softcap": softcap}
    given: list[Any] = [part for side in sides.values() for part in (side.states, side.weight)]
    given += [teacher] if isinstance(teacher, TeacherTopK) else []
    # More would be counted, for which the device is waited for.
    return linear_divergence(*given, num_live=options["response_mask"].numel(), **options)


def _rows(inputs: dict[str, Any]) -> tuple[Tensor, Tensor, int]:
    """Ids and attention of whole rows, and how many tokens of them are the completions'."""
    ids, mask = (torch.cat([inputs[f"prompt_{of}"], inputs[f"completion_{of}"]], 1) for of in ("ids", "mask"))
    return ids, mask, inputs["completion_ids"].shape[1]
