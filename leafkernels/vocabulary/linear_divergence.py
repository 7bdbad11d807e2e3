"""Divergence of a student's distribution over the vocabulary from a teacher's, from the hidden states of both."""

import torch
import torch.distributed as dist
from torch import Tensor

from leafkernels._core.backend import resolve_backend
from leafkernels._core.checks import (
    check_count,
    check_device,
    check_kernel_dtype,
    check_mask,
)
from leafkernels._core.derivatives import refuse_forward_mode
from leafkernels.vocabulary.chunks import HeadOptions, HeadTensors, check_head, scaled_softcap
from leafkernels.vocabulary.divergence import (
    Divergence,
    TeacherTopK,
    check_options,
    check_same_precision,
    check_teacher,
)
from leafkernels.vocabulary.divergence_head_ids import LinearSplit, linear_split
from leafkernels.vocabulary.divergence_heads import LinearPairs
from leafkernels.vocabulary.divergence_ids import Split, divergence_of_splits, split_of_logprobs
from leafkernels.vocabulary.divergence_reference import heads_by_reference
from leafkernels.vocabulary.divergence_rows import Pair
from leafkernels.vocabulary.inputs import check_temperature
from leafkernels.vocabulary.slices import check_same_rows

# What a chunk's logits of both models, and the gradient of one, may take.
CHUNK_BYTES = 1920 << 20
# Where ranks share a vocabulary, chunks must be the same on all, whatever the sizes of their slices.
_CHUNK_OF_SLICES = 1024


def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | TeacherTopK,
    teacher_weight: Tensor | None = None,
    *,
    kind: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    top_k: int | None = None,
    tail: bool = True,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_logit_softcap: float | None = None,
    teacher_logit_softcap: float | None = None,
    response_mask: Tensor | None = None,
    num_live: int | None = None,
    num_ids: int | None = None,
    chunk_tokens: int | None = None,
    vocab_group: "dist.ProcessGroup | None" = None,
    backend: str = "auto",
) -> Divergence:
    """``divergence`` of ``hidden @ weight.T + bias`` of a student and a teacher, without ever holding those logits.

    Works on a chunk of tokens at a time: the logits of both go into one buffer each, in float32 where the states are of
    half precision (rounded to bfloat16, two models that are near to each other would differ by 1e-3 nats of noise), and
    are reduced; the backward pass recomputes them, makes the gradient of the student's, and adds it to the gradients
    of weight and bias, which are summed in float32. Masked tokens are left out before any product. Gradients flow to
    the student's hidden states, weight and bias, once and in reverse mode, where they are asked for.

    Memory beside the results: the buffers; with a gradient of a half-precision weight, also its float32 sum. Under
    autocast the products run in autocast's dtype, those of float64 in float64, as in ``torch.nn.functional.linear``.

    Args:
        student_hidden: (..., D) float32, bfloat16, float16 or float64 (not with Triton): what the head is given.
        student_weight: (V, D), of the dtype of ``student_hidden``; under autocast, of any but float64.
        teacher_hidden: (..., E), of any width and dtype, float64 only with float64; or a ``TeacherTopK``.
        teacher_weight: (V, E); None with a ``TeacherTopK``.
        kind, beta, temperature, top_k, tail: as in ``divergence``.
        student_bias: (V,) or None.
        teacher_bias: likewise.
        student_logit_scale: the logits are multiplied by it, before all else: Cohere's ``logit_scale``, 1 / Granite's
            ``logits_scaling``.
        teacher_logit_scale: likewise.
        student_logit_softcap: c: the logits are c tanh(logits / c) (Gemma 2), before the temperature.
        teacher_logit_softcap: likewise.
        response_mask: (...); tokens where it is False are not read, give 0, and get zero gradient.
        num_live: number of unmasked tokens, or an upper bound; with more, the results are NaN. None counts them, which
            on a GPU waits for the device once a pass.
        num_ids: only the first ``num_ids`` rows of both weights count, where vocabularies are padded; None: all, of
            which both must have as many. The others get zero gradient.
        chunk_tokens: tokens at a time; None: as many as take 1,920 MiB in all buffers, with ``vocab_group`` 1,024.
        vocab_group: the tensor-parallel ranks, if each has a slice of both heads' rows: as in
            ``linear_surprisal_entropy``, but that ``chunk_tokens`` must be the same on every rank. Not with ``top_k``,
            a ``TeacherTopK`` or ``num_ids``.
        backend: "auto", "triton", "torch" or "reference", for what follows the products.

    Example:
        >>> hidden, weight = torch.eye(2), torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 3.0]])
        >>> leafkernels.linear_divergence(hidden, weight, hidden, weight.flip(0), kind="forward_kl").divergence
        tensor([0.0000, 1.1504])

    Raises:
        TypeError, ValueError: an argument is not what it must be; the message says which, and what came.
    """
    dtype = check_head(student_hidden, student_weight, student_bias, "student_", "student_weight")
    student = HeadTensors(student_hidden, student_weight, student_bias)
    shape, device = student_hidden.shape[:-1], student_hidden.device
    is_served = isinstance(teacher_hidden, TeacherTopK)
    teacher, teacher_dtype = student, dtype
    if isinstance(teacher_hidden, TeacherTopK):
        if teacher_weight is not None or teacher_bias is not None:
            raise ValueError("teacher_weight and teacher_bias must be None with a TeacherTopK")
    else:
        teacher_dtype = check_head(teacher_hidden, teacher_weight, teacher_bias, "teacher_", "teacher_weight")
        teacher = HeadTensors(teacher_hidden, teacher_weight, teacher_bias)  # type: ignore[arg-type]
        if teacher_hidden.shape[:-1] != shape:
            raise ValueError(
                f"teacher_hidden must have one row for each of student_hidden, {tuple(shape)}, "
                f"got shape {tuple(teacher_hidden.shape)}"
            )
        check_device("teacher_hidden", teacher_hidden, "student_hidden", device)
        check_same_precision("teacher_hidden", teacher_dtype, "student_hidden", dtype)
        teacher = HeadTensors(*(None if tensor is None else tensor.detach() for tensor in teacher))  # type: ignore
    sizes = student.weight.shape[0], None if is_served else teacher.weight.shape[0]
    options = check_options(kind, beta, top_k, tail, num_ids, vocab_group, *sizes)
    mask = check_mask(response_mask, "the rows of student_hidden", shape, device)
    if num_live is not None:
        check_count("num_live", num_live, 0)
    backend = resolve_backend(backend, device)
    check_kernel_dtype("student_hidden", dtype, backend)
    refuse_forward_mode("linear_divergence", *student)
    if vocab_group is not None:
        check_same_rows("student_hidden", shape.numel(), device, vocab_group)
    if chunk_tokens is None:
        chunk_tokens = _CHUNK_OF_SLICES
        if vocab_group is None:
            # Two logits and a gradient, which is written over the logits where it has their size.
            bytes_of_pair = 8 + 2 if dtype.itemsize == 2 else 2 * dtype.itemsize
            chunk_tokens = max(1, CHUNK_BYTES // (options.num_ids * bytes_of_pair))
    check_count("chunk_tokens", chunk_tokens, 1)

    row_mask = None if mask is None else mask.reshape(-1).contiguous()
    like = torch.empty(shape, dtype=torch.bool, device=device)
    num_live = shape.numel() if mask is None else num_live

    def scaled(prefix: str, scale: float, softcap: float | None, dtype: torch.dtype) -> tuple[Tensor, HeadOptions]:
        softcap = scaled_softcap(scale, softcap, prefix)
        temperatures = check_temperature(temperature, like, mask, scale).reshape(-1).contiguous()
        return temperatures, HeadOptions(softcap, num_live, chunk_tokens, dtype)

    student_temperature, own = scaled("student_", student_logit_scale, student_logit_softcap, dtype)
    teacher_temperature, other = scaled("teacher_", teacher_logit_scale, teacher_logit_softcap, teacher_dtype)
    pair = Pair(student_temperature, teacher_temperature, row_mask)
    student, teacher = (HeadTensors(_in_rows(head.hidden), *head[1:]) for head in (student, teacher))
    served = None
    if isinstance(teacher_hidden, TeacherTopK):
        served = check_teacher(teacher_hidden, shape, options, row_mask, device)
    if backend == "reference":
        scales = (student_logit_scale, student_logit_softcap), (teacher_logit_scale, teacher_logit_softcap)
        plain = check_temperature(temperature, like, mask).reshape(-1)
        heads = student, None if is_served else teacher
        found = heads_by_reference(*heads, served, scales, plain, row_mask, options, vocab_group)
        return Divergence(*(numbers.view(shape) for numbers in found))
    if options.top_k is None and not is_served:
        found = LinearPairs.apply(
            *student, teacher, pair, options.kind, options.num_ids, (own, other), backend, vocab_group
        )
        return Divergence(*(numbers.view(shape) for numbers in found))
    if served is not None:
        ids = served[0]
        teacher_split = split_of_logprobs(*served, dtype)
    else:
        assert options.top_k is not None
        of_teacher = (options.top_k, teacher_temperature, row_mask, options.num_ids, other)
        ids, teacher_split = linear_split(backend, teacher, None, *of_teacher)
    split = LinearSplit.apply(*student, ids, student_temperature, row_mask, options.num_ids, own, backend)
    found = divergence_of_splits(
        Split._make(split), teacher_split, row_mask, options.kind, options.tail, not is_served, backend
    )
    return Divergence(*(numbers.view(shape) for numbers in found))


def _in_rows(hidden: Tensor) -> Tensor:
    return hidden.reshape(hidden.shape[:-1].numel(), hidden.shape[-1])
