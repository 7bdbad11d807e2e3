"""Log-probabilities of rows that share prefixes, with each shared prefix run through the model once.

The rollouts of a prompt repeat the prompt, with its audio or images, and often a part of the answer. What rows share
runs once, in one of two ways or both (``leafkernels.models.plan``): as a trunk, with the model's own cache of keys and
values, under autograd, behind which the rest runs; or as nodes of the prefix tree (``leafkernels.prefix_tree``) side
by side, under a mask by which each sees the nodes above it alone. Autograd adds up what the rows of a node send back.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leafkernels._core.checks import check_choice, check_positive
from leafkernels.models.asking import bare_model, check_ids, check_model, plain_ids
from leafkernels.models.batch import Rows, TreeBatch, as_batch
from leafkernels.models.choose import PLANS, Choice, choose
from leafkernels.models.kept import kept_of_tree
from leafkernels.models.plan import ROWS, TREE_BELOW, TRUNKS, Bin, Cluster, Piece, count_nodes
from leafkernels.models.ranks import placed, sends_buffers
from leafkernels.models.run import Read, Run, run_piece
from leafkernels.vocabulary.sampling_mask import SamplingMask


class TreeLogprobs(NamedTuple):
    """Both (N, T), 0 at the first token of a row and where nothing is asked for."""

    logprobs: Tensor
    """Of each token given those before it in its row."""
    entropy: Tensor | None
    """Of the distribution that it was drawn from, in nats; None with ``entropy=False``."""


class TreeStats(NamedTuple):
    """How a batch is run, and why."""

    plan: str
    """"rows", "trunks", "tree" or "tree below trunks"."""
    reason: str
    rows: int
    trunks: int
    tokens_of_rows: int
    """Tokens of a forward of all rows, padding included."""
    tokens_of_trunks: int
    """The same of trunks and tails."""
    tokens: int
    """The same of what is run."""
    nodes: int
    """Different prefixes of the rows: the fewest tokens that there are to run."""
    forwards: int
    """Forward passes of the model."""
    unions: int = 0
    """Prefixes behind which rows kept different ids, by ``sampling_mask``."""


class Prepared(NamedTuple):
    """A batch and the plan by which a model runs it; good until the model changes its mode or its wrapping."""

    model: Any
    batch: TreeBatch
    choice: Choice
    inputs: Mapping[str, Any]
    in_step: bool

    @property
    def stats(self) -> TreeStats:
        rows, choice = self.batch.rows, self.choice
        found = {kind: plan for kind, (plan, _) in choice.found.items()}
        has_trunks = choice.plan.kind in (TRUNKS, TREE_BELOW)
        of_trunks = choice.plan if has_trunks else found.get(TRUNKS)
        tokens = {kind: found[kind].tokens if kind in found else 0 for kind in (ROWS, TRUNKS)}
        return TreeStats(
            choice.plan.kind,
            choice.reason,
            len(rows.lengths),
            of_trunks.trunks if of_trunks else 0,
            tokens[ROWS] or len(rows.lengths) * max(rows.lengths, default=0),
            tokens[TRUNKS],
            choice.plan.tokens,
            count_nodes(rows.shared, rows.lengths),
            choice.pieces * (2 if has_trunks else 1),
        )

    def run(
        self, temperature: float = 1.0, read: Read | None = None, sampling_mask: SamplingMask | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probabilities and entropies (N, T), and what is read of each token, (N, T, ...)."""
        batch, choice, device = self.batch, self.choice, self.batch.rows.ids.device
        run = Run(self.model, choice.head, temperature, self.inputs, in_step=self.in_step, read=read)
        if sampling_mask is not None:
            kept = kept_of_tree(sampling_mask, batch)
            run, batch = run._replace(mask=kept.mask), batch._replace(rows=batch.rows._replace(cells=kept.cells))
        parts = []
        for piece in choice.plan.pieces:
            first, last = piece.bins[0].first, piece.bins[-1].last
            parts.append(run_piece(run, batch.rows.part(first, last), _shifted(piece, first)))
        tie: Any = torch.zeros((), device=device)
        for _ in range(choice.pieces - len(choice.plan.pieces)):
            of_idle = run_piece(run, *_idle(self.model, choice.plan.kind, device))
            tie = tie + sum(part.sum() for part in of_idle if part is not None)
        if not parts:
            nothing = tie.expand(batch.shape)
            return nothing, nothing, None if read is None else nothing
        logprobs, entropy, numbers = zip(*parts, strict=True)
        found = None if read is None else batch.spread(torch.cat(numbers)) + tie
        return batch.spread(torch.cat(logprobs)) + tie, batch.spread(torch.cat(entropy)) + tie, found


def prepare(
    model: Any,
    batch: TreeBatch,
    *,
    max_tokens: int | None = None,
    inputs: Mapping[str, Any] | None = None,
    plan: str = "auto",
    check: bool = True,
) -> Prepared:
    """Choose how a model runs a batch; the arguments of ``tree_logprobs``. One choice serves the log and the run."""
    check_choice("plan", plan, PLANS)
    bare, features = check_model(model), dict(inputs or {})
    if sends_buffers(model):
        raise ValueError(
            "model must be in DistributedDataParallel with forward_sync_buffers=False (before torch 2.13 "
            "broadcast_buffers=False), got True: ranks run different numbers of forward passes, and cannot send each "
            "other buffers in each"
        )
    device, in_step = placed(bare)
    if device not in (None, batch.rows.ids.device):
        raise ValueError(f"input_ids must be on the device of the model, {device}, got {batch.rows.ids.device}")
    if features and batch.prompts is None:
        raise ValueError(
            "groups or group_size must say which rows are a prompt where inputs has its features, got neither: rows "
            "of equal tokens may belong to different recordings"
        )
    if not features:  # ids that stand for them may lie outside of the embedding
        check_ids(bare, batch.rows.ids)
    choice = choose(model, batch, plan, check, max_tokens, features, in_step)
    return Prepared(model, batch, choice, features, bool(in_step))


def tree_logprobs(
    model: Any,
    input_ids: Tensor | TreeBatch,
    attention_mask: Tensor | None = None,
    *,
    response_mask: Tensor | None = None,
    temperature: float = 1.0,
    entropy: bool = True,
    groups: Tensor | None = None,
    group_size: int | None = None,
    max_tokens: int | None = None,
    inputs: Mapping[str, Any] | None = None,
    sampling_mask: SamplingMask | None = None,
    plan: str = "auto",
    check: bool = True,
) -> TreeLogprobs:
    """Log-probability and entropy of every token, as a forward pass of all rows gives them, for fewer tokens.

    Differentiable: gradients are those of the ordinary forward, to rounding. Dropout draws once for a token that rows
    share, and the balance loss of a router counts it once. The lengths of the rows and of what they share are read back
    from the device, once a call. No logits are kept where the model's head is one linear layer, which three tokens
    tell. Where weights are spread over ranks (FSDP2, ZeRO-3), every rank calls, one without a row too, and they agree
    on the plan and the number of forward passes; a gradient is then asked of the result on all of them or none.

    Args:
        model: a decoder of transformers, or one in PEFT, torch.compile or DistributedDataParallel (which must not send
            buffers in its forward pass), that takes ``position_ids``, and a cache of keys and values for each layer or
            a mask of four dimensions.
        input_ids: (N, T) integers, rows of any prompts in any order; or what ``tree_batch`` has read of them, and then
            masks and groups are its own.
        attention_mask: (N, T), nonzero on the tokens of a row, which are one stretch: padding left, right, or none.
            A hole is refused; what stands outside need be no id.
        response_mask: (N, T), nonzero at tokens whose log-probability is asked for; None: all. What stands before them
            needs no logits.
        temperature: positive; logits are divided by it.
        entropy: whether the entropy is asked for.
        groups, group_size: rows of each prompt, see ``leafkernels.span_advantages``; needed with ``inputs`` only, else
            rows that share a prefix are found.
        max_tokens: of a forward pass, or of two that share a trunk, padding included: more are run in pieces, which
            repeat what leads to them. Without a gradient a piece is forgotten before the next.
        inputs: features of audio or images, as the model's forward takes them, in the order of the prompts, once for
            each; their placeholder tokens are part of the rows, and of what the rows of a prompt share.
        sampling_mask: the ids that each token, of N T, could have been, as ``leafkernels.surprisal_entropy`` takes it.
            What rows sampled behind a prefix that they share comes from one distribution, so that they share the kept
            ids: the union, where an engine gave different ones, which ``tree_stats`` counts. How many ids there are is
            read back.
        plan: "auto", "rows" (each row alone), "trunks" (what rows begin with once, the rest a row each) or "tree" (each
            node once, in bins of several rows).
        check: compare a plan with rows on a few tokens, and rows with rows that go on otherwise, the first time that a
            model is seen.

    Raises:
        TypeError, ValueError: an argument is not what it must be; the message names it and what came.
        RuntimeError: a plan is named, or ``inputs`` given, and the model gives other log-probabilities that way, cannot
            run so, or (with ``inputs``) reads a number for each token beside its id, as models that see do; or the
            mask of a tree does not fit into memory.
    """
    check_positive("temperature", temperature)
    batch = as_batch(input_ids, attention_mask, response_mask=response_mask, groups=groups, group_size=group_size)
    prepared = prepare(model, batch, max_tokens=max_tokens, inputs=inputs, plan=plan, check=check)
    logprobs, entropies, _ = prepared.run(temperature, sampling_mask=sampling_mask)
    return TreeLogprobs(logprobs, entropies if entropy else None)


def tree_hidden_states(
    model: Any,
    input_ids: Tensor | TreeBatch,
    attention_mask: Tensor | None = None,
    *,
    groups: Tensor | None = None,
    group_size: int | None = None,
    max_tokens: int | None = None,
    inputs: Mapping[str, Any] | None = None,
    plan: str = "auto",
    check: bool = True,
) -> Tensor:
    """(N, T, size) what the model's decoder gives for each token, 0 outside of the rows: for a head of one's own.

    A value or a reward of each token, say. The arguments and what is raised are those of ``tree_logprobs``.

    Raises:
        RuntimeError: also where the model is compiled, which runs no hooks.
    """
    nothing = torch.zeros_like(input_ids) if isinstance(input_ids, Tensor) else None
    batch = as_batch(input_ids, attention_mask, response_mask=nothing, groups=groups, group_size=group_size)
    prepared = prepare(model, batch, max_tokens=max_tokens, inputs=inputs, plan=plan, check=check)
    found = prepared.run(read=_states)[2]
    assert found is not None
    return found


def _states(_: Any, states: Tensor | None) -> Tensor:
    if states is None:
        raise RuntimeError("model must not be compiled where its hidden states are asked for: it runs no hooks")
    return states


def tree_stats(
    model: Any,
    input_ids: Tensor | TreeBatch,
    attention_mask: Tensor | None = None,
    *,
    groups: Tensor | None = None,
    group_size: int | None = None,
    max_tokens: int | None = None,
    inputs: Mapping[str, Any] | None = None,
    sampling_mask: SamplingMask | None = None,
    plan: str = "auto",
) -> TreeStats:
    """How ``tree_logprobs`` runs a batch, why, and how many tokens that is; the arguments are its own.

    Where weights are spread over ranks, every rank calls.
    """
    batch = as_batch(input_ids, attention_mask, groups=groups, group_size=group_size)
    stats = prepare(model, batch, max_tokens=max_tokens, inputs=inputs, plan=plan).stats
    return stats if sampling_mask is None else stats._replace(unions=int(kept_of_tree(sampling_mask, batch).num_unions))


def _shifted(piece: Piece, first: int) -> Piece:
    """A piece by the rows from ``first`` on."""
    trunks = [Cluster(trunk.first - first, trunk.last - first, trunk.depth) for trunk in piece.trunks]
    return Piece(trunks, [Bin(held.first - first, held.last - first, held.nodes) for held in piece.bins])


def _idle(model: Any, kind: str, device: torch.device) -> tuple[Rows, Piece]:
    """What a rank runs where another has a piece more: as many forward passes, of three tokens."""
    ids = plain_ids(bare_model(model))[None, :3].to(device)
    rows = Rows(ids, torch.zeros_like(ids, dtype=torch.bool), [3], [0], [3])
    if kind in (TRUNKS, TREE_BELOW):
        return rows, Piece([Cluster(0, 1, 1)], [Bin(0, 1, 2)])
    return rows, Piece([], [Bin(0, 1, 3)])
