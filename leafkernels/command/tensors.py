"""The report and the command's file of rollouts, from the tensors of a training loop or a notebook."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from leafkernels import ESTIMATORS
from leafkernels.command.credit import BOUNDARY_OPTIONS, DEFAULT, Credit, advantages_of, options_of, tree_of
from leafkernels.command.html import Report
from leafkernels.command.reading import Failure, Prompt
from leafkernels.command.text import Texts, Tokenizer
from leafkernels.command.writing import PACKED, line_of, writing
from leafkernels.rows.find import find_rows
from leafkernels.rows.rollouts import read_rollouts


def report(
    logprobs: Tensor,
    token_ids: Tensor,
    rewards: Tensor | None,
    *,
    response_mask: Tensor | None = None,
    groups: Tensor | None = None,
    group_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    step_rewards: Tensor | None = None,
    reward_weights: Sequence[float] | Tensor | None = None,
    tokenizer: Tokenizer | None = None,
    prompts: Sequence[str] | None = None,
    title: str = "Rollouts",
    note: str = "",
    max_prompts: int = 50,
    estimator: str = DEFAULT,
    **options: Any,
) -> Report:
    """The report of ``python -m leafkernels --html``, from what ``span_advantages`` takes.

    In a notebook the result shows itself, in a frame whose style and script reach nothing outside; ``.save(path)``
    writes the page. Tensors are copied to the CPU, so this is not for every step of a training loop. Needs jinja2.

    Args:
        logprobs, token_ids, rewards, response_mask, groups, cu_seqlens, step_rewards, reward_weights: as in
            ``span_advantages``.
        group_size: consecutive runs of that many rows are a prompt.
        tokenizer: its ``decode`` gives the text of a list of ids; None: the page shows ids.
        prompts: the text of every prompt, in the order of their groups.
        title: the heading of the page.
        note: a sentence below the heading.
        max_prompts: prompts whose trees are in the page; the page says how many it leaves out.
        estimator: the scheme of ``ESTIMATORS`` that the page shows first; it has all of them.
        options: those of the estimator. ``num_boundaries``, ``min_separation`` and ``boundary_scores`` are also those
            of the tree and of the other schemes.

    Raises:
        TypeError, ValueError: an argument is not what it must be; the message names it and what came.
        ImportError: jinja2 is missing.
    """
    if isinstance(max_prompts, bool) or not isinstance(max_prompts, int) or max_prompts < 1:
        raise ValueError(f"max_prompts must be an int of at least 1, got {max_prompts!r}")
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(map(repr, ESTIMATORS))}, got {estimator!r}")
    known = {*options_of(estimator), *BOUNDARY_OPTIONS}
    for name in options:
        if name not in known:
            raise TypeError(f"options must be some of {', '.join(sorted(known))}, got {name!r}")
    where = response_mask, groups, group_size, cu_seqlens
    call = _call(logprobs, token_ids, rewards, *where, step_rewards, reward_weights)
    options = {name: _on_cpu(value) for name, value in options.items()}
    tree = tree_of(call, estimator, options)
    page = Report(title, options, max_prompts, estimator, note)
    flat = {
        name: values.detach().reshape(-1)
        for name, values in advantages_of(call, page.schemes, estimator, options).items()
    }
    boundaries = tree.boundaries[None] if tree.boundaries.dim() == 1 else tree.boundaries
    nodes = tree.nodes.flatten(0, -2)
    for number, (prompt, members, places) in enumerate(_prompts_of(call, tokenizer, prompts)):
        if not members:
            continue
        advantages = {name: [values[place] for place in places] for name, values in flat.items()}
        credit = Credit(
            # A line for each row where a tensor names the prompts, else one for each prompt.
            boundaries=[p for p in boundaries[number if groups is None else members[0]].tolist() if p >= 0],
            nodes=nodes[members].tolist(),
            advantages=[row.tolist() for row in advantages[estimator]],
            has_spans="num_boundaries" in options_of(estimator),
        )
        page.add(prompt, credit, advantages)
    return page


def save_rollouts(
    path: str | os.PathLike[str],
    token_ids: Tensor,
    logprobs: Tensor,
    rewards: Tensor | None,
    *,
    response_mask: Tensor | None = None,
    groups: Tensor | None = None,
    group_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    step_rewards: Tensor | None = None,
    reward_weights: Sequence[float] | Tensor | None = None,
    tokenizer: Tokenizer | None = None,
    prompts: Sequence[str] | None = None,
    prompt_ids: Sequence[str | int] | None = None,
    append: bool = False,
) -> None:
    """Write rollouts as the file that ``python -m leafkernels`` and its ``compare`` read: one prompt a line, as JSON.

    The file is written whole or not at all, packed where its name ends in .gz. Tensors are copied to the CPU.

    Args:
        path: .jsonl or .jsonl.gz.
        token_ids, logprobs, rewards, response_mask, groups, group_size, cu_seqlens, step_rewards, reward_weights: as in
            ``span_advantages``; of several reward functions their weighed sum is written. What is
            written of a row are its tokens from the first to the last unmasked one. A token in a hole of the mask gets
            the log-probability null, as one whose log-probability is NaN does: neither is ever a boundary. A reward
            that is NaN becomes null.
        tokenizer: its ``decode`` gives the text of a list of ids; None: the file has ids only.
        prompts: the text of every prompt, in the order of their groups.
        prompt_ids: the name of every prompt, in the same order.
        append: add to the lines that ``path`` has. The file is copied each time; for many steps give each its own.

    Raises:
        TypeError, ValueError: an argument is not what it must be; the message names it and what came.
        OSError: the file cannot be written.
    """
    if not isinstance(append, bool):
        raise TypeError(f"append must be a bool, got {type(append).__name__}")
    if os.path.realpath(path).lower().endswith(PACKED):
        raise ValueError(f"path must be plain or end in .gz (.jsonl, .jsonl.gz), got {path}")
    where = response_mask, groups, group_size, cu_seqlens
    call = _call(logprobs, token_ids, rewards, *where, step_rewards, reward_weights)
    found = _prompts_of(call, tokenizer, prompts)
    if prompt_ids is not None and len(prompt_ids) != len(found):
        raise ValueError(f"prompt_ids must have one name for each of {len(found)} prompts, got {len(prompt_ids)}")
    # Nine digits bring a float32 back, and seventeen a float64.
    digits = 17 if call["logprobs"].element_size() == 8 else 9
    lines = []
    for number, (prompt, members, _) in enumerate(found):
        if not members:
            continue
        completions = []
        for row, token_list in enumerate(prompt.token_ids):
            counts = prompt.is_trained[row] if prompt.is_trained is not None else [True] * len(token_list)
            values = [x if count else math.nan for x, count in zip(prompt.logprobs[row], counts, strict=True)]
            completions.append(
                {
                    "token_ids": token_list,
                    "logprobs": [_json_number("logprobs", x, digits) for x in values],
                    "reward": _json_number("rewards", prompt.last[row], 17),
                }
                | ({} if prompt.step_rewards is None else {"step_rewards": _steps(prompt.step_rewards[row])})
                | ({} if prompt.tokens[row] is None else {"tokens": prompt.tokens[row]})
            )
        named = {} if prompt_ids is None else {"prompt_id": prompt_ids[number]}
        lines.append(line_of({**named, **({"prompt": prompt.text} if prompts else {}), "completions": completions}))
    try:
        with writing(Path(path), append) as file:
            file.write(b"".join(lines))
    except Failure as failure:
        raise OSError(str(failure)) from failure


def _json_number(name: str, value: float, digits: int) -> float | None:
    if math.isinf(value):
        raise ValueError(f"{name} must be finite, or NaN where it is not known, got {value}")
    return None if math.isnan(value) else float(f"{value:.{digits}g}")


def _steps(values: list[float]) -> list[float | None]:
    if any(map(math.isnan, values)):
        raise ValueError("step_rewards must be numbers, got NaN: a rollout that cannot be scored has a reward of NaN")
    return [_json_number("step_rewards", value, 17) for value in values]


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _call(*arguments: Any) -> dict[str, Any]:
    """The arguments that all schemes take, checked, on the CPU."""
    names = ("logprobs", "token_ids", "rewards", "response_mask", "groups", "group_size", "cu_seqlens")
    more = ("step_rewards", "reward_weights")
    call = {name: _on_cpu(value) for name, value in zip(names + more, arguments, strict=True)}
    found = read_rollouts(**call, backend="torch")
    rewards = found.one_reward
    call |= {"token_ids": found.token_ids, "rewards": rewards.reshape(found.rows.row_shape), "reward_weights": None}
    # Schemes of one's own need not know the last two.
    return {name: value for name, value in call.items() if name in names or value is not None}


def _prompts_of(
    call: dict[str, Any], tokenizer: Tokenizer | None, texts: Sequence[str] | None
) -> list[tuple[Prompt, list[int], list[slice]]]:
    """Each prompt of a call, the rows that are its rollouts, and where their tokens lie in the flattened tensors."""
    token_ids, mask = call["token_ids"], call["response_mask"]
    layout = find_rows("token_ids", token_ids, mask, call["groups"], call["group_size"], call["cu_seqlens"]).layout
    stride = token_ids.shape[-1] if call["cu_seqlens"] is None else 0
    starts, lengths, ends = layout.row_starts.tolist(), layout.row_lengths.tolist(), layout.group_starts.tolist()
    slices = [
        slice(row * stride + start, row * stride + start + length)
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True))
    ]
    if texts is not None and len(texts) != len(ends) - 1:
        raise ValueError(f"prompts must have one text for each of {len(ends) - 1} prompts, got {len(texts)}")
    pieces = Texts(tokenizer)
    ids, logprobs = token_ids.reshape(-1), call["logprobs"].reshape(-1)
    rewards = call["rewards"].reshape(-1).double().tolist()
    steps = call.get("step_rewards")
    found = []
    for number, (begin, end) in enumerate(zip(ends, ends[1:], strict=False)):
        members: list[int] = layout.rows_by_group[begin:end].tolist()
        places = [slices[row] for row in members]
        rows = [ids[place].tolist() for place in places]
        prompt = Prompt(
            where=f"prompt {number}",
            record={},
            name=f"prompt {number}",
            text="" if texts is None else texts[number],
            token_ids=rows,
            logprobs=[logprobs[place].double().tolist() for place in places],
            rewards=[],
            tokens=[pieces.of(row) for row in rows],
            is_trained=None if mask is None else [(mask.reshape(-1)[place] != 0).tolist() for place in places],
        )
        of_rows = None if steps is None else [steps.reshape(-1)[place].double().tolist() for place in places]
        prompt.earn([rewards[row] for row in members], of_rows)
        found.append((prompt, members, places))
    return found
