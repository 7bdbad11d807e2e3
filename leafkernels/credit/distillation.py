"""FiRe-OPD: advantages of on-policy distillation, filtered by rollout and weighted by token (arXiv 2606.02684)."""

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from leafkernels._core.backend import resolve_backend
from leafkernels._core.checks import (
    check_choice,
    check_finite,
    check_kernel_dtype,
    check_like,
    check_mask,
    check_real,
    check_tensor,
)
from leafkernels._core.ops import register
from leafkernels._core.ranks import place
from leafkernels.rows.find import check_cu_seqlens
from leafkernels.rows.gather import gather_section
from leafkernels.rows.groups import read_names

SCOPES = ("batch", "trajectory", "kept")
# No entropy is above 0 that is not above this.
_LEAST_MAX = 1e-6


class FireStatistics(NamedTuple):
    """What the filter and the weights need of each row, and so of all rows together."""

    rows: Tensor
    """(N, 7) float64, over the tokens that count: their number, the sum of the teacher's log-probabilities, the largest
    teacher's and the largest student's entropy, the sums of the two, and the sum of their products. NaN where an
    entropy was not given."""

    @property
    def scores(self) -> Tensor:
        """(N,) float32, the mean log-probability of each row under the teacher; NaN for a row without a token.

        Rounded to float32, so that rows that are equal tie whatever their padding.
        """
        return (self.rows[:, 1] / self.rows[:, 0]).to(torch.float32)

    @property
    def teacher_entropy_max(self) -> Tensor:
        """Scalar float64, at least 1e-6: the entropy at which the teacher counts as not sure at all."""
        return _largest(self.rows[:, 2])

    @property
    def student_entropy_max(self) -> Tensor:
        """Scalar float64, at least 1e-6: the entropy at which the student counts as wholly unsure."""
        return _largest(self.rows[:, 3])

    @classmethod
    def concatenate(cls, parts: "Iterable[FireStatistics]") -> "FireStatistics":
        """Statistics of micro-batches, one at least, as those of the whole."""
        rows = [part.rows for part in parts]
        if not rows:
            raise ValueError("parts must hold the statistics of one micro-batch at least, got none")
        return cls(torch.cat(rows))

    def gather(self, process_group: "dist.ProcessGroup | None" = None) -> "FireStatistics":
        """The rows of all ranks of a group, in the order of the ranks, on each of them; every rank calls.

        Ranks may hold different numbers of rows. Those are exchanged first, which synchronises with the device.
        """
        _, world_size = place("process_group", process_group)
        counts = [torch.zeros(1, dtype=torch.int64, device=self.rows.device) for _ in range(world_size)]
        dist.all_gather(counts, counts[0].new_tensor([self.rows.shape[0]]), group=process_group)
        sizes = [7 * count for count in torch.cat(counts).tolist()]
        return FireStatistics(gather_section(self.rows.reshape(-1), sizes, process_group).view(-1, 7))


class FireOPD(NamedTuple):
    """Advantages and what they came from, without gradient. N rows; tokens shaped like ``old_logprobs``."""

    advantages: Tensor
    """float32 (float64 if an input is): weight times what the teacher gives the token more than the student; 0 where
    the mask is False and on dropped rows. For ``policy_loss``."""
    response_mask: Tensor
    """bool: the mask without the dropped rows, which ``policy_loss`` averages over."""
    weights: Tensor
    """Like ``advantages``: what each token that counts weighs, also on dropped rows."""
    keep: Tensor
    """(N,) bool: which rows have passed the filter; False for a row without a token."""
    scores: Tensor
    """(N,) float32: mean log-probability under the teacher; NaN for a row without a token."""
    threshold: Tensor
    """Scalar float32: the quantile of the scores that the filter drops below; NaN where no row has a token."""


_TOKENS = "Tensor? student_entropy, Tensor? teacher_entropy, Tensor mask, Tensor? cu_seqlens"


def _statistics_fake(
    teacher_logprobs: Tensor,
    student: Tensor | None,
    teacher: Tensor | None,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    _: str,
) -> Tensor:
    num_rows = mask.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return mask.new_empty((num_rows, 7), dtype=torch.float64)


_fire_statistics = register(
    f"fire_statistics(Tensor teacher_logprobs, {_TOKENS}, str backend) -> Tensor", _statistics_fake
)


_fire_scope = register(
    "fire_scope(Tensor rows, Tensor scores, float drop, float alpha, float beta, bool of_kept, str backend) -> Tensor",
    lambda rows, *_: rows.new_empty(5),
)


def _weights_fake(old_logprobs: Tensor, *args: Any) -> tuple[Tensor, ...]:
    mask, rows, dtype = args[4], args[6], args[-2]
    tokens = (mask.new_empty(mask.shape, dtype=kind) for kind in (dtype, dtype, torch.bool))
    return *tokens, mask.new_empty(rows.shape[0])


_fire_weights = register(
    f"fire_weights(Tensor old_logprobs, Tensor teacher_logprobs, Tensor? base_logprobs, {_TOKENS}, Tensor rows, "
    "Tensor scores, Tensor numbers, float alpha, float beta, float extrapolation, bool per_row, ScalarType dtype, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _weights_fake,
)


def fire_statistics(
    teacher_logprobs: Tensor,
    student_entropy: Tensor | None,
    teacher_entropy: Tensor | None,
    response_mask: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> FireStatistics:
    """Seven numbers of each row, from which ``fire_opd`` filters and weights: the first of its two steps.

    Whichever rows the statistics hold are the scope of the quantile, the maxima and the mean weight. Those of
    micro-batches are put together by ``FireStatistics.concatenate``, and those of data-parallel ranks by ``gather``:

        parts = [fire_statistics(*of_micro_batch) for of_micro_batch in micro_batches]
        statistics = FireStatistics.concatenate(parts).gather(process_group)

    Example:
        >>> teacher, entropy = torch.tensor([[-0.5, -2.5], [-3.0, -3.0]]), torch.tensor([[0.0, 2.0], [1.0, 1.0]])
        >>> found = leafkernels.fire_statistics(teacher, entropy, entropy, torch.ones(2, 2))
        >>> found.rows
        tensor([[ 2., -3.,  2.,  2.,  2.,  2.,  4.],
                [ 2., -6.,  1.,  1.,  2.,  2.,  2.]], dtype=torch.float64)
        >>> found.scores, found.teacher_entropy_max
        (tensor([-1.5000, -3.0000]), tensor(2., dtype=torch.float64))

    Args:
        teacher_logprobs: (N, T), or (total,) with ``cu_seqlens``: log-probabilities of the sampled tokens under the
            teacher, nats.
        student_entropy: the same shape, over the whole vocabulary, of the student that sampled; None where
            ``beta`` is 0.
        teacher_entropy: likewise of the teacher; None where ``alpha`` is 0.
        response_mask: the same shape, nonzero where a token counts. Nothing else is read, NaN neither.
        cu_seqlens: (N + 1,) int32, offsets of packed rows.
        backend: "auto", "triton", "torch" or "reference". Triton takes no float64, for which "auto" is "torch".

    Returns:
        Constants to autograd, on the device of ``teacher_logprobs``, where nothing waits for them.

    Raises:
        TypeError, ValueError: an argument is not what it must be; the message says which, and what came.
    """
    tokens = {"teacher_logprobs": teacher_logprobs, "student_entropy": student_entropy}
    tensors, mask, backend = _checked(tokens | {"teacher_entropy": teacher_entropy}, response_mask, cu_seqlens, backend)
    return FireStatistics(_fire_statistics(*tensors, mask, cu_seqlens, backend))


def fire_opd(
    old_logprobs: Tensor,
    teacher_logprobs: Tensor,
    student_entropy: Tensor | None,
    teacher_entropy: Tensor | None,
    response_mask: Tensor,
    *,
    drop: float = 0.2,
    alpha: float = 1.0,
    beta: float = 1.0,
    normalize: str = "batch",
    base_logprobs: Tensor | None = None,
    extrapolation: float = 1.0,
    statistics: FireStatistics | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> FireOPD:
    """Advantages of on-policy distillation: rollouts that the teacher finds least plausible dropped, tokens weighted.

    A row's score is its mean log-probability under the teacher; rows below the ``drop``-quantile of all scores (linear
    interpolation; rows without a token left out) are dropped. Of the others, a token's advantage is

        w (l_teacher - l_student),   w ~ (1 + alpha (1 - H_teacher / M_teacher)) (1 + beta H_student / M_student)

    with M the largest entropy of any token in scope, and w divided by its mean (FiRe-OPD, arXiv 2606.02684). With
    ``drop=0, alpha=0, beta=0`` it is plain on-policy distillation, w = 1. The advantages go into ``policy_loss``, with
    the mask that comes with them:

        fire = fire_opd(old_logprobs, teacher_logprobs, student_entropy, teacher_entropy, response_mask)
        loss = policy_loss(logprobs, old_logprobs, fire.advantages, fire.response_mask).loss

    Everything is a constant to autograd. What stands where the mask is False is never read into anything. NaN where it
    is True is not hidden: its row is kept, and the loss is NaN. No value is read back to the host.

    Example:
        >>> old, teacher = torch.tensor([[-1.0, -2.0], [-1.0, -1.0]]), torch.tensor([[-0.5, -2.5], [-3.0, -3.0]])
        >>> sure = torch.tensor([[0.0, 2.0], [1.0, 1.0]])
        >>> fire = leafkernels.fire_opd(old, teacher, sure, sure, torch.ones(2, 2))
        >>> fire.keep, fire.threshold
        (tensor([ True, False]), tensor(-2.7000))
        >>> fire.advantages
        tensor([[ 0.4706, -0.4706],
                [ 0.0000,  0.0000]])

    Args:
        old_logprobs: (N, T), or (total,) with ``cu_seqlens``: log-probabilities of the sampled tokens under the
            student that sampled, nats, at the temperature of sampling, as all others here.
        teacher_logprobs: the same shape, of the same tokens under the row's teacher.
        student_entropy: the same shape, over the whole vocabulary, in any unit; may be None where ``beta`` is 0.
        teacher_entropy: likewise of the teacher; may be None where ``alpha`` is 0.
        response_mask: the same shape, nonzero where a token counts.
        drop: in [0, 1], the share of rows to drop: of n rows with distinct scores, ceil(drop * (n - 1)). Rows of equal
            scores are kept or dropped together, and the best is kept.
        alpha: how much more a token weighs where the teacher is sure, not negative.
        beta: how much more a token weighs where the student is unsure, not negative.
        normalize: what the mean weight is 1 over: "batch", all tokens in scope, of dropped rows too (the released
            code); "kept", those of kept rows; "trajectory", each row's own (the paper's equation 8).
        base_logprobs: of the tokens under the model the student began as; needed where ``extrapolation`` is not 1.
        extrapolation: lambda of ExOPD: the teacher's log-probability is replaced by lambda * l_teacher +
            (1 - lambda) * l_base in the advantages (not in the scores). At 1 the base is not read.
        statistics: of all rows in scope, these among them, as from ``fire_statistics``; None: these rows are the scope.
        cu_seqlens: (N + 1,) int32, offsets of packed rows.
        backend: "auto", "triton", "torch" or "reference". Triton takes no float64, for which "auto" is "torch".

    Raises:
        TypeError, ValueError: an argument is not what it must be; the message says which, and what came.
    """
    check_real("old_logprobs", old_logprobs)
    _check_options(drop, alpha, beta, normalize, extrapolation)
    needed = (
        ("teacher_entropy", teacher_entropy, "alpha", alpha, 0),
        ("student_entropy", student_entropy, "beta", beta, 0),
        ("base_logprobs", base_logprobs, "extrapolation", extrapolation, 1),
    )
    for name, tensor, option, value, neutral in needed:
        if tensor is None and value != neutral:
            raise ValueError(f"{name} must be given where {option} is not {neutral}, got {option}={value}")
    tokens = {
        "old_logprobs": old_logprobs,
        "teacher_logprobs": teacher_logprobs,
        "base_logprobs": base_logprobs,
        "student_entropy": student_entropy,
        "teacher_entropy": teacher_entropy,
    }
    tensors, mask, backend = _checked(tokens, response_mask, cu_seqlens, backend)
    old, teacher, base, of_student, of_teacher = tensors
    # What has no weight is not read: 0 * NaN would be NaN.
    base = None if extrapolation == 1 else base
    of_student, of_teacher = (None if beta == 0 else of_student), (None if alpha == 0 else of_teacher)

    own = FireStatistics(_fire_statistics(teacher, of_student, of_teacher, mask, cu_seqlens, backend))
    scope = own if statistics is None else _check_statistics(statistics, own)
    scores = own.scores
    of_scope = scores if scope is own else scope.scores
    numbers = _fire_scope(scope.rows, of_scope, float(drop), float(alpha), float(beta), normalize == "kept", backend)
    dtype = torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
    advantages, weights, kept, keep = _fire_weights(
        old,
        teacher,
        base,
        of_student,
        of_teacher,
        mask,
        cu_seqlens,
        own.rows,
        scores,
        numbers,
        float(alpha),
        float(beta),
        float(extrapolation),
        normalize == "trajectory",
        dtype,
        backend,
    )
    return FireOPD(advantages, kept, weights, keep, scores, numbers[0].to(torch.float32))


def fire_teachers(
    labels: Iterable[Hashable] | Tensor,
    teachers: Mapping[Hashable, Callable[[Tensor], Any]],
    *,
    device: torch.device | str | None = None,
) -> Any:
    """Have each row scored by its own teacher, and no other, and put the results back in the order of the rows.

        models = {"math": math_model, "code": code_model}
        teachers = {label: lambda rows, model=model: score(model, ids[rows]) for label, model in models.items()}
        teacher_logprobs, teacher_entropy = fire_teachers(labels, teachers)

    Teachers are called without gradients, in the order of the mapping; one whose label no row has is not called (with
    models sharded over ranks, see to it that every rank calls).

    Example:
        >>> teachers = {"math": lambda rows: rows * 10.0, "code": lambda rows: -rows * 1.0}
        >>> leafkernels.fire_teachers(["math", "code", "math"], teachers)
        tensor([ 0., -1., 20.])

    Args:
        labels: one for each row: strings, ints, tuples, in a list, an array or a tensor; those of tensors are read.
        teachers: by label, what takes the indices (n,) int64 of its rows, ascending, and returns a tensor, or a tuple
            of them, whose first dimension is those rows. All return as many, of one shape and dtype.
        device: of the indices; None: the CPU.

    Returns:
        What the teachers return, for all rows: a tensor, or a tuple of them.

    Raises:
        TypeError, ValueError: a label is missing (None) or has no teacher, there is no row, or a teacher's result is
            not what it must be; the message names the label.
    """
    if not isinstance(teachers, Mapping) or not teachers:
        raise TypeError(f"teachers must be a mapping from labels to functions, not empty, got {teachers!r:.80}")
    names = read_names("labels", labels)
    rows_of: dict[Hashable, list[int]] = {label: [] for label in teachers}
    for row, name in enumerate(names):
        if name not in rows_of:
            known = ", ".join(map(repr, teachers))
            raise ValueError(f"labels must name a teacher of {known} for each row, got {name!r:.80} for row {row}")
        rows_of[name].append(row)
    if not names:
        raise ValueError("labels must name the teacher of at least one row, got none")
    results: list[Tensor] = []
    is_tensor = True
    first: Hashable = None
    for label, teacher in teachers.items():
        if not rows_of[label]:
            continue
        rows = torch.tensor(rows_of[label], dtype=torch.int64, device=device)
        with torch.no_grad():
            found = teacher(rows)
        parts = (found,) if isinstance(found, Tensor) else tuple(found)
        for part in parts:
            _check_part(label, part, rows)
        if not results:
            first, is_tensor = label, isinstance(found, Tensor)
            results = [part.new_empty((len(names), *part.shape[1:])) for part in parts]
        kinds, alike = ([(t.shape[1:], t.dtype, t.device) for t in of] for of in (parts, results))
        if kinds != alike:
            raise ValueError(
                f"teachers must return tensors of one shape, dtype and device for a row, got {_brief(parts)} from "
                f"{label!r:.80} and {_brief(results)} from {first!r:.80}"
            )
        for result, part in zip(results, parts, strict=True):
            result[rows.to(result.device)] = part.detach()
    return results[0] if is_tensor else tuple(results)


def _check_part(label: Hashable, part: Any, rows: Tensor) -> None:
    check_tensor(f"what teacher {label!r:.80} returns", part)
    if part.shape[:1] != rows.shape:
        raise ValueError(
            f"what teacher {label!r:.80} returns must have {rows.shape[0]} rows, got shape {tuple(part.shape)}"
        )


def _brief(parts: Iterable[Tensor]) -> str:
    return ", ".join(f"{tuple(part.shape[1:])} {part.dtype} on {part.device}" for part in parts)


def _checked(
    tokens: dict[str, Any], response_mask: Any, cu_seqlens: Tensor | None, backend: str
) -> tuple[list[Tensor | None], Tensor, str]:
    """The tensors without their graphs, the mask, and the backend; the first is given and has the shape of all."""
    name, first = next(iter(tokens.items()))
    check_real(name, first)
    shape, device = first.shape, first.device
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, name, first)
    elif first.dim() != 2:
        raise ValueError(
            f"{name} must have shape (rows, tokens), or (total,) together with cu_seqlens, got shape {tuple(shape)}"
        )
    optional = ("student_entropy", "teacher_entropy", "base_logprobs")
    given = {k: t for k, t in tokens.items() if t is not None or k not in optional}
    for other, tensor in given.items():
        check_real(other, tensor)
        check_like(other, tensor, name, shape, device)
    mask = cast(Tensor, check_mask(check_tensor("response_mask", response_mask), name, shape, device))
    if backend == "auto" and any(tensor.dtype == torch.float64 for tensor in given.values()):
        backend = "torch"
    backend = resolve_backend(backend, device)
    for other, tensor in given.items():
        check_kernel_dtype(other, tensor.dtype, backend)
    return [None if tensor is None else tensor.detach() for tensor in tokens.values()], mask, backend


def _check_options(drop: float, alpha: float, beta: float, normalize: str, extrapolation: float) -> None:
    check_finite("drop", drop)
    if not 0 <= drop <= 1:
        raise ValueError(f"drop must be in [0, 1], got {drop}")
    for name, value in (("alpha", alpha), ("beta", beta)):
        check_finite(name, value)
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    check_choice("normalize", normalize, SCOPES)
    check_finite("extrapolation", extrapolation)


def _check_statistics(statistics: Any, own: FireStatistics) -> FireStatistics:
    if not isinstance(statistics, FireStatistics):
        raise TypeError(f"statistics must be FireStatistics, as from fire_statistics, got {type(statistics).__name__}")
    if statistics.rows.dtype != torch.float64 or statistics.rows.shape[1:] != own.rows.shape[1:]:
        raise ValueError(
            "statistics must hold float64 rows of shape (rows, 7), got shape "
            f"{tuple(statistics.rows.shape)} of {statistics.rows.dtype}"
        )
    if statistics.rows.device != own.rows.device:
        raise ValueError(
            f"statistics must be on the device of old_logprobs, {own.rows.device}, got {statistics.rows.device}"
        )
    return statistics


def _largest(of_rows: Tensor) -> Tensor:
    # One more, so that there is a largest of no rows too.
    return pad(of_rows, (0, 1)).amax(0).clamp_min(_LEAST_MAX)
