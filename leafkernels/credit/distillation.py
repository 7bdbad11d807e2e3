"""FiRe-OPD: advantages of on-policy distillation, filtered by rollout and weighted by token (arXiv 2606.02684)."""

import math
from collections.abc import Iterable
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
    place,
)
from leafkernels._core.operation import operation
from leafkernels.distributed import gather_section
from leafkernels.rows.find import check_cu_seqlens

SCOPES = ("batch", "trajectory", "kept")
# Floor of the largest entropy, which is a divisor.
_LEAST_MAX = 1e-6
# Only a score of -inf is below it: the teacher bans a token, and the row is never kept.
_LOWEST = torch.finfo(torch.float32).min
# A rank this near to an integer is one: 0.29 * 100 is not 29 in float64.
_RANK_ROUNDING = 1e-9


class FireStatistics(NamedTuple):
    """The numbers of each row that the filter and the weights are computed from."""

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
        """The rows of all ranks of a group, in the order of the ranks, on every rank; every rank calls.

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
    """bool: the mask without the dropped rows, which ``policy_loss`` averages over, and without tokens of probability 0
    under the student."""
    weights: Tensor
    """Like ``advantages``: the weight of each token that counts, also on dropped rows."""
    keep: Tensor
    """(N,) bool: rows that passed the filter; False for a row without a token, or with one that the teacher bans."""
    scores: Tensor
    """(N,) float32: mean log-probability under the teacher; NaN for a row without a token, -inf where it bans one."""
    threshold: Tensor
    """Scalar float32: the quantile of the scores that the filter drops below; NaN where no row has a token."""


class FireTokens(NamedTuple):
    """What a row's statistics are over: tokens (N, T), or (total,) with ``cu_seqlens``."""

    teacher_logprobs: Tensor
    student_entropy: Tensor | None
    teacher_entropy: Tensor | None
    mask: Tensor
    cu_seqlens: Tensor | None


class FireOptions(NamedTuple):
    """Options of ``fire_opd`` that say what a token weighs."""

    alpha: float
    beta: float
    extrapolation: float


@operation("distillation")
def _fire_statistics(tokens: FireTokens) -> Tensor:
    num_rows = tokens.mask.shape[0] if tokens.cu_seqlens is None else tokens.cu_seqlens.shape[0] - 1
    return tokens.mask.new_empty((num_rows, 7), dtype=torch.float64)


@operation("distillation")
def _fire_weights(
    old_logprobs: Tensor,
    base_logprobs: Tensor | None,
    tokens: FireTokens,
    keep: Tensor,
    means: Tensor,
    maxima: Tensor,
    options: FireOptions,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    mask = tokens.mask
    return tuple(mask.new_empty(mask.shape, dtype=kind) for kind in (dtype, dtype, torch.bool))  # type: ignore[return-value]


class _Scope(NamedTuple):
    """What is computed over all rows in scope, float64."""

    scores: Tensor  # (N,) float32
    threshold: Tensor
    least: Tensor  # score that a kept row may have
    maxima: Tensor  # (2,) the largest teacher's and student's entropy
    mean: Tensor  # weight


def _read_scope(statistics: FireStatistics, drop: float, options: FireOptions, only_kept: bool) -> _Scope:
    """Quantile, maxima and mean weight, without a synchronisation; the mean over all rows or over kept rows."""
    rows, scores = statistics.rows, statistics.scores
    # NaN goes last, and one NaN more so that there is an entry.
    ranked = pad(scores, (0, 1), value=math.nan).sort().values.to(torch.float64)
    rank = drop * (~scores.isnan()).sum().sub(1).clamp_min(0).to(torch.float64)
    low, high = rank.add(_RANK_ROUNDING).floor(), rank.sub(_RANK_ROUNDING).ceil()
    # Not by a scalar index, which would be read back.
    below, least = ranked.gather(0, torch.stack([low, high]).long()).unbind()
    share = (rank - low).clamp(0, 1)
    quantile = torch.where((below == least) | (high <= low), below, below * (1 - share) + least * share)
    least = least.clamp_min(_LOWEST)
    counting = rows.masked_fill((scores < least)[:, None], 0.0) if only_kept else rows
    maxima = _largest(rows[:, 2:4].T)
    return _Scope(scores, quantile, least, maxima, _mean_weight(counting.sum(0), maxima, options))


def _mean_weight(sums: Tensor, maxima: Tensor, options: FireOptions) -> Tensor:
    """Mean of (1 + alpha (1 - H_T / M_T)) (1 + beta H_S / M_S), from sums (..., 7) over rows; 1 for no token."""
    counts, _, _, _, teacher, student, products = sums.unbind(-1)
    teacher_max, student_max = maxima.unbind()
    alpha, beta, _ = options
    total = counts
    if alpha:
        total = total + alpha * (counts - teacher / teacher_max)
    if beta:
        total = total + beta * (student / student_max)
    if alpha and beta:
        total = total + alpha * beta * ((student - products / teacher_max) / student_max)
    return torch.where(counts > 0, total / counts, 1.0)


def fire_statistics(
    teacher_logprobs: Tensor | None,
    student_entropy: Tensor | None,
    teacher_entropy: Tensor | None,
    response_mask: Tensor,
    *,
    divergence: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> FireStatistics:
    """Seven numbers for each row, from which ``fire_opd`` filters and weights: the first of its two steps.

    Whichever rows the statistics hold are the scope of the quantile, the maxima and the mean weight. Those of
    micro-batches are put together by ``FireStatistics.concatenate``, and those of data-parallel ranks by ``gather``:

        parts = [fire_statistics(*micro_batch) for micro_batch in micro_batches]
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
            teacher, nats; None with ``divergence``.
        student_entropy: the same shape, over the whole vocabulary, of the student that sampled; None where
            ``beta`` is 0.
        teacher_entropy: likewise of the teacher; None where ``alpha`` is 0.
        response_mask: the same shape, nonzero where a token counts. Nothing else is read, NaN neither.
        divergence: likewise, the student's divergence from the teacher at each token, as in ``fire_opd``: minus that is
            what ``FireStatistics`` then holds in place of the teacher's log-probability.
        cu_seqlens: (N + 1,) int32, offsets of packed rows.
        backend: "auto", "triton", "torch" or "reference". Triton takes no float64, for which "auto" is "torch".

    Returns:
        Constants to autograd, on the device of ``teacher_logprobs``, where nothing waits for them.

    Raises:
        TypeError, ValueError: an argument is not what it must be; the message says which, and what came.
    """
    _, teacher_logprobs = _closeness(divergence, None, teacher_logprobs)
    name = "teacher_logprobs" if divergence is None else "divergence"
    tokens = {name: teacher_logprobs, "student_entropy": student_entropy}
    tensors, mask, backend = _checked(tokens | {"teacher_entropy": teacher_entropy}, response_mask, cu_seqlens, backend)
    return _statistics_of(FireTokens._make([*tensors, mask, cu_seqlens]), backend)


def fire_opd(
    old_logprobs: Tensor | None,
    teacher_logprobs: Tensor | None,
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
    divergence: Tensor | None = None,
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

    With a ``divergence`` over the vocabulary (``leafkernels.divergence``) in place of both log-probabilities, which are
    None, a row's score is minus its mean divergence, the weights are the same, and the advantage is minus weight times
    divergence. The loss is then the weighted divergence itself, which has a gradient:

        found = linear_divergence(hidden, weight, teacher_hidden, teacher_weight, response_mask=response_mask)
        fire = fire_opd(None, None, *found[1:3], response_mask, divergence=found.divergence)
        loss = (fire.weights * found.divergence)[fire.response_mask].sum() / fire.response_mask.sum()

    Everything is a constant to autograd. What stands where the mask is False is never read into anything. No value is
    read back to the host. Where the mask is True:

    - A teacher's -inf, a token that it bans, gives its row the score -inf: it ranks lowest and is never kept, in no
      scope and at no ``drop``.
    - -inf of the student, or of the base where that is read, takes the token out of the loss: no ratio compares it.
    - NaN and +inf, which no log-probability is, are not hidden: the row is kept, and so is the loss NaN or infinite.

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
        divergence: of the tokens, (N, T) or (total,), at least 0; an infinite one ranks its row lowest, as does a token
            that the teacher bans, and the row is never kept. Not with ``extrapolation``.
        extrapolation: lambda of ExOPD: the teacher's log-probability is replaced by lambda * l_teacher +
            (1 - lambda) * l_base in the advantages (not in the scores). At 1 the base is not read.
        statistics: of all rows in scope, these among them, as from ``fire_statistics``; None: these rows are the scope.
        cu_seqlens: (N + 1,) int32, offsets of packed rows.
        backend: "auto", "triton", "torch" or "reference". Triton takes no float64, for which "auto" is "torch".

    Raises:
        TypeError, ValueError: an argument is not what it must be; the message says which, and what came.
    """
    _check_options(drop, alpha, beta, normalize, extrapolation)
    if divergence is not None and extrapolation != 1:
        raise ValueError(f"extrapolation must be 1 with divergence, got {extrapolation}")
    old_logprobs, teacher_logprobs = _closeness(divergence, old_logprobs, teacher_logprobs)
    check_real("old_logprobs", old_logprobs)
    needed = (
        ("teacher_entropy", teacher_entropy, "alpha", alpha, 0),
        ("student_entropy", student_entropy, "beta", beta, 0),
        ("base_logprobs", base_logprobs, "extrapolation", extrapolation, 1),
    )
    for name, tensor, option, value, neutral in needed:
        if tensor is None and value != neutral:
            raise ValueError(f"{name} must be given where {option} is not {neutral}, got {option}={value}")
    tokens = {
        "old_logprobs" if divergence is None else "divergence": old_logprobs,
        "teacher_logprobs": teacher_logprobs,
        "base_logprobs": base_logprobs,
        "student_entropy": student_entropy,
        "teacher_entropy": teacher_entropy,
    }
    tensors, mask, backend = _checked(tokens, response_mask, cu_seqlens, backend)
    old, teacher, base, student_entropy, teacher_entropy = tensors
    # An entropy of weight 0 is not read: 0 * NaN would be NaN.
    base = None if extrapolation == 1 else base
    student_entropy = None if beta == 0 else student_entropy
    teacher_entropy = None if alpha == 0 else teacher_entropy

    fire_tokens = FireTokens(cast(Tensor, teacher), student_entropy, teacher_entropy, mask, cu_seqlens)
    own = _statistics_of(fire_tokens, backend)
    scope = own if statistics is None else _check_statistics(statistics, own)
    dtype = torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
    if backend == "reference":
        words = {"drop": drop, "alpha": alpha, "beta": beta, "normalize": normalize, "extrapolation": extrapolation}
        return _opd_by_reference(cast(Tensor, old), base, fire_tokens, scope, words, dtype)
    options = FireOptions(float(alpha), float(beta), float(extrapolation))
    scores, threshold, least, maxima, mean = _read_scope(scope, float(drop), options, normalize == "kept")
    if scope is not own:
        scores = own.scores
    keep = (own.rows[:, 0] > 0) & ~(scores < least)
    mean_per_row = _mean_weight(own.rows, maxima, options) if normalize == "trajectory" else mean.expand_as(keep)
    advantages, weights, kept = _fire_weights(
        backend, cast(Tensor, old), base, fire_tokens, keep, mean_per_row.contiguous(), maxima, options, dtype
    )
    return FireOPD(advantages, kept, weights, keep, scores, threshold.to(torch.float32))


def _closeness(
    divergence: Tensor | None, old_logprobs: Tensor | None, teacher_logprobs: Tensor | None
) -> tuple[Any, Any]:
    """What stands for the log-probabilities of student and teacher: their difference is minus the divergence."""
    if divergence is None:
        return old_logprobs, teacher_logprobs
    for name, given in (("old_logprobs", old_logprobs), ("teacher_logprobs", teacher_logprobs)):
        if given is not None:
            raise ValueError(f"{name} must be None with divergence, which takes their place")
    divergence = check_real("divergence", divergence).detach()
    return torch.zeros_like(divergence), -divergence


def _statistics_of(tokens: FireTokens, backend: str) -> FireStatistics:
    import python_ref

    if backend != "reference":
        return FireStatistics(_fire_statistics(backend, tokens))
    lists = [_rows(tensor, tokens.cu_seqlens) for tensor in tokens[:4]]
    rows = torch.tensor(python_ref.fire_statistics(*lists), dtype=torch.float64, device=tokens.mask.device)
    return FireStatistics(rows.reshape(len(lists[3]), 7))


def _opd_by_reference(
    old_logprobs: Tensor,
    base_logprobs: Tensor | None,
    tokens: FireTokens,
    scope: FireStatistics,
    words: dict[str, Any],
    dtype: torch.dtype,
) -> FireOPD:
    import python_ref

    mask, cu_seqlens = tokens.mask, tokens.cu_seqlens
    old, base, *others = (_rows(tensor, cu_seqlens) for tensor in (old_logprobs, base_logprobs, *tokens[:4]))
    found = python_ref.fire_opd(old, *others, base_logprobs=base, statistics=scope.rows.tolist(), **words)

    def token_tensor(name: str, kind: torch.dtype) -> Tensor:
        flat = [value for row in found[name] for value in row]
        return torch.tensor(flat, dtype=kind, device=mask.device).reshape(mask.shape)

    def row_tensor(name: str, kind: torch.dtype) -> Tensor:
        return torch.tensor(found[name], dtype=kind, device=mask.device)

    return FireOPD(
        token_tensor("advantages", dtype),
        token_tensor("response_mask", torch.bool),
        token_tensor("weights", dtype),
        row_tensor("keep", torch.bool),
        row_tensor("scores", torch.float32),
        row_tensor("threshold", torch.float32)[0],
    )


def _rows(tensor: Tensor | None, cu_seqlens: Tensor | None) -> Any:
    if tensor is None or cu_seqlens is None:
        return None if tensor is None else tensor.tolist()
    bounds = cu_seqlens.tolist()
    return [tensor[start:end].tolist() for start, end in zip(bounds, bounds[1:], strict=False)]


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


def _largest(per_row: Tensor) -> Tensor:
    # One entry more, so that no rows have a maximum too.
    return pad(per_row, (0, 1)).amax(-1).clamp_min(_LEAST_MAX)
