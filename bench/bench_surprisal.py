"""surprisal_entropy: the logits are read once forward, and once more backward, where their gradient is written."""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

import leafkernels
import python_ref
from bench import memory, peers
from bench.harness import BACKENDS as OURS
from bench.harness import DEVICE, Bench, Call, Prepare, Session, compiled, interleaved


@dataclass(frozen=True)
class Logits:
    """One batch of logits (N, V), and for the gradient a weight for each of the two outputs."""

    logits: Tensor
    token_ids: Tensor
    weights: Tensor

    @cached_property
    def few(self) -> "Logits":
        """The first rows, as many as literal Python checks in a second."""
        return Logits(self.logits[:2], self.token_ids[:2], self.weights[:, :2])


@dataclass(frozen=True)
class Vocabulary:
    """Rows of logits, in a dtype, and why they are timed."""

    name: str
    num_rows: int
    vocab_size: int
    dtype: torch.dtype
    reason: str
    inputs: tuple[str, ...] = ("normal",)

    @property
    def num_tokens(self) -> int:
        """Numbers to work on, in the unit of the limits of the harness."""
        return self.num_rows * self.vocab_size

    @property
    def bytes_of_batch(self) -> int:
        return self.num_tokens * self.dtype.itemsize

    def batches(self, inputs: str, device: str, count: int) -> tuple[Logits, ...]:
        return _batches(self, device, count)


@lru_cache(maxsize=1)
def _batches(shape: Vocabulary, device: str, count: int) -> tuple[Logits, ...]:
    """Normal logits of deviation 3: a few likely ids, and a long tail, as a model gives them."""
    result = []
    for seed in range(count):
        generator = torch.Generator(device).manual_seed(seed)
        size = (shape.num_rows, shape.vocab_size)
        logits = torch.empty(size, dtype=shape.dtype, device=device).normal_(0, 3, generator=generator)
        ids = torch.randint(shape.vocab_size, size[:1], generator=generator, device=device)
        result.append(Logits(logits, ids, torch.rand(2, shape.num_rows, generator=generator, device=device)))
    return tuple(result)


INPUTS = ("normal",)
BACKENDS = ("python_ref", "torch", "usual", "compile", *peers.LOGITS, "triton")
SHAPES = (
    Vocabulary("4x151936", 4, 151_936, torch.float32, "a few rows, small enough for literal Python and a compiled CPU"),
    Vocabulary(
        "64x151936", 64, 151_936, torch.bfloat16, "one decoding step of a batch: fewer rows than multiprocessors"
    ),
    Vocabulary("8192x151936", 8192, 151_936, torch.bfloat16, "a training step's tokens, 2.5 GB of logits"),
    Vocabulary("32768x128256", 32768, 128_256, torch.bfloat16, "more than 2^31 logits"),
)
TINY = (Vocabulary("tiny-3x65", 3, 65, torch.float32, "for a run that only proves it runs"),)


def literal(batch: Logits) -> Call:
    rows, ids = batch.logits.tolist(), batch.token_ids.tolist()
    return lambda: python_ref.surprisal_entropy(rows, ids)


def backend_of_package(backend: str) -> Prepare:
    def prepare(batch: Any) -> Call:
        return lambda: tuple(leafkernels.surprisal_entropy(batch.logits, batch.token_ids, backend=backend))

    return prepare


def from_function(load: Any) -> Prepare:
    """Of what ``load`` returns: a function of logits and ids."""

    def prepare(batch: Any) -> Call:
        function = load()
        return lambda: function(batch.logits, batch.token_ids)

    return prepare


PREPARES = {
    "python_ref": literal,
    "torch": backend_of_package("torch"),
    "usual": from_function(lambda: peers.usual),
    "compile": from_function(lambda: compiled(peers.usual)),
    **{name: from_function(lambda peer=peer: peers.loaded(peer)) for name, peer in peers.LOGITS.items()},
    "triton": backend_of_package("triton"),
}

# What another's result may be off and still be the same thing; how far it is off stands beside its time.
PEERS_RTOL = 2e-2


def skip_absent(backend: str, of: dict[str, peers.Peer], op: str, session: Session, *, gradient: bool = False) -> None:
    """Skip, with the reason, a peer that does not run here."""
    peer = of.get(backend)
    if peer is None:
        return
    reason = peer.why_not(DEVICE)
    if reason is None and gradient and not peer.has_gradient:
        reason = f"{peer.package} {peer.version} has no gradient here"
    if reason:
        session.skipped[f"{op}, {backend}"] = reason
        pytest.skip(reason)


def gate(batch: Logits, result: Any) -> dict[str, Any]:
    """1e-4 is what is asked of peaked rows; these are not peaked."""
    return _gate(batch, result, 1e-4)


def gate_of_peers(batch: Logits, result: Any) -> dict[str, Any]:
    return _gate(batch, result, PEERS_RTOL)


def _gate(batch: Logits, result: Any, rtol: float) -> dict[str, Any]:
    expected = {
        name: torch.tensor(values, dtype=torch.float64)
        for name, values in zip(("surprisal", "entropy"), literal(batch.few)(), strict=True)
    }
    result = [None if found is None else torch.as_tensor(found, dtype=torch.float64) for found in result]
    errors = peers.worst(result, expected)
    for name, error in errors.items():
        assert error["relative"] is not None and error["relative"] <= rtol, (name, error)
    return errors


def bytes_read(batch: Logits) -> int:
    """Every logit, and beside it per row an int64 id and four float32 results."""
    return batch.logits.numel() * batch.logits.element_size() + batch.logits.shape[0] * (8 + 16)


def test_surprisal_entropy(shape: Any, inputs: str, backend: str, bench: Bench) -> None:
    skip_absent(backend, peers.LOGITS, "surprisal_entropy", bench.session)
    check = gate if backend in OURS else gate_of_peers
    bench("surprisal_entropy", shape, inputs, backend, PREPARES, check, bytes_read, tolerance=1e-4)


def gradient_of(function: Any) -> Prepare:
    """Forward and backward, through autograd, of a weighted sum of both outputs."""

    def prepare(batch: Any) -> Call:
        logits = batch.logits.detach().requires_grad_()

        def call() -> Tensor:
            return torch.autograd.grad(peers.weighted(function, batch.weights, logits, batch.token_ids), logits)[0]

        return call

    return prepare


def literal_gradient(batch: Logits) -> Call:
    """The definition takes each id's own surprisal, V passes over V logits: float64 autograd stands for it here."""

    def call() -> Tensor:
        logits = batch.logits.double().requires_grad_()
        logprobs = logits.log_softmax(-1)
        surprisal = -logprobs.gather(1, batch.token_ids[:, None]).squeeze(1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return torch.autograd.grad((batch.weights[0] * surprisal + batch.weights[1] * entropy).sum(), logits)[0]

    return call


def from_package(backend: str) -> Any:
    return lambda logits, ids: leafkernels.surprisal_entropy(logits, ids, backend=backend)


GRADIENTS = {
    "torch": gradient_of(from_package("torch")),
    "usual": gradient_of(peers.usual),
    "compile": lambda batch: gradient_of(compiled(peers.usual))(batch),
    **{
        name: lambda batch, peer=peer: gradient_of(peers.loaded(peer))(batch)
        for name, peer in peers.LOGITS.items()
        if peer.has_gradient
    },
    "triton": gradient_of(from_package("triton")),
}


def gate_gradient(batch: Logits, result: Tensor) -> dict[str, Any]:
    """One rounding to the dtype of the logits, and float32 noise on sums of terms of order 1."""
    expected = literal_gradient(batch.few)()
    unit = torch.finfo(batch.logits.dtype).eps
    torch.testing.assert_close(result[: len(expected)].double(), expected, rtol=unit, atol=1e-5)
    return peers.worst([result], {"gradient": expected})


def gate_gradient_of_peers(batch: Logits, result: Tensor) -> dict[str, Any]:
    errors = peers.worst([result], {"gradient": literal_gradient(batch.few)()})
    relative = errors["gradient"]["relative"]
    assert relative is not None and relative <= PEERS_RTOL, errors
    return errors


def bytes_forward_and_backward(batch: Logits) -> int:
    """Three times the logits: read forward, read backward, gradient written."""
    return 3 * batch.logits.numel() * batch.logits.element_size() + batch.logits.shape[0] * (16 + 32)


def test_surprisal_entropy_with_gradient(shape: Any, inputs: str, backend: str, bench: Bench) -> None:
    if backend == "python_ref":
        pytest.skip("the definition takes V passes over V logits")
    skip_absent(backend, peers.LOGITS, "surprisal_entropy with gradient", bench.session, gradient=True)
    bench(
        "surprisal_entropy with gradient",
        shape,
        inputs,
        backend,
        GRADIENTS,
        gate_gradient if backend in OURS else gate_gradient_of_peers,
        bytes_forward_and_backward,
        tolerance=2e-2 if shape.dtype == torch.bfloat16 else 1e-4,
    )


# What the PyTorch backend reaches on any CPU, at least, against the usual way: times the speed, times less memory.
PROMISES = {"speed": 1.0, "peak memory": 3.0}
PROMISED = Vocabulary("2x512x151936", 1024, 151_936, torch.float32, "622 MB of logits: long responses, a small batch")


def ready(op: str, backend: str, num_rows: int, vocab_size: int) -> Call:
    """A call on float32 logits of this size, for a process that measures its memory."""
    prepare = (GRADIENTS if "gradient" in op else PREPARES)[backend]
    return prepare(Vocabulary("", num_rows, vocab_size, torch.float32, "").batches("", "cpu", 1)[0])


@pytest.mark.promise
@pytest.mark.parametrize("of", PROMISES)
@pytest.mark.parametrize("op", ["surprisal_entropy", "surprisal_entropy with gradient"])
def test_promise(op: str, of: str, session: Session) -> None:
    shape = TINY[0] if session.tiny else PROMISED
    prepares, check = (GRADIENTS, gate_gradient) if "gradient" in op else (PREPARES, gate)
    if of == "peak memory":
        if not memory.MEASURABLE:
            pytest.skip("reads the peak of a process from Linux's /proc")
        theirs, ours = (
            memory.peak_bytes(__name__, ready.__name__, op, backend, shape.num_rows, shape.vocab_size)
            for backend in ("usual", "torch")
        )
    else:
        batch = shape.batches("normal", "cpu", 1)[0]
        usual, torch_backend = (prepares[backend](batch) for backend in ("usual", "torch"))
        check(batch, torch_backend())
        theirs, ours = interleaved(usual, torch_backend, 0.0 if session.tiny else 10.0)
    session.promise(op, shape.name, f"{of}, usual way / ours", PROMISES[of], theirs, ours, "B" if "mem" in of else "s")
