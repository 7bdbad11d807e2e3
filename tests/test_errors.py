"""Every error by its text: the argument, what it must be, what came."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from rollouts import DEVICE
from support import run_python

import leafkernels

IDS = torch.zeros(4, 6, dtype=torch.int64, device=DEVICE)
LOGPROBS = torch.zeros(4, 6, device=DEVICE)
REWARDS = torch.zeros(4, device=DEVICE)
PACKED = {"token_ids": IDS.flatten(), "logprobs": LOGPROBS.flatten(), "rewards": REWARDS}


def bounds(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def check_refuses(
    error: type[Exception], message: str, function: Any = leafkernels.span_advantages, **changes: Any
) -> None:
    if function is leafkernels.span_advantages:
        changes = {"logprobs": LOGPROBS, "token_ids": IDS, "rewards": REWARDS, **changes}
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        function(**changes)


def test_types() -> None:
    check_refuses(TypeError, "token_ids must be a torch.Tensor, got list", token_ids=[[1]])
    layout = "torch.Tensor, got one of layout torch.sparse_coo"
    check_refuses(TypeError, f"token_ids must be a dense {layout}", token_ids=IDS.to_sparse())
    check_refuses(TypeError, f"rewards must be a dense {layout}", rewards=REWARDS.to_sparse())
    check_refuses(TypeError, f"response_mask must be a dense {layout}", response_mask=IDS.to_sparse())
    for kind in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor(list(LOGPROBS), layout=kind)
        check_refuses(TypeError, "logprobs must be a dense torch.Tensor, got a nested one", logprobs=nested)
    check_refuses(TypeError, "token_ids must hold integers, got torch.float32", token_ids=LOGPROBS)
    check_refuses(TypeError, "token_ids must hold integers, got torch.bool", token_ids=IDS.bool())
    floats = "must be floating point (float32, bfloat16, float16 or float64), got"
    check_refuses(TypeError, f"logprobs {floats} torch.bool", logprobs=LOGPROBS.bool())
    check_refuses(TypeError, f"logprobs {floats} torch.complex64", logprobs=LOGPROBS.to(torch.complex64))
    check_refuses(TypeError, f"boundary_scores {floats} torch.int64", boundary_scores=IDS)
    check_refuses(TypeError, "rewards must be a torch.Tensor, got list", rewards=[0.0] * 4)
    check_refuses(TypeError, "rewards must be floating point or integers, got torch.bool", rewards=REWARDS.bool())
    check_refuses(TypeError, "response_mask must be a torch.Tensor, got list", response_mask=[[1]])
    check_refuses(
        TypeError,
        "response_mask must be bool, integer or floating point, got torch.complex64",
        response_mask=LOGPROBS.to(torch.complex64),
    )
    check_refuses(TypeError, "groups must be a torch.Tensor, got str", groups="a")
    check_refuses(TypeError, "groups must be a torch.Tensor, got bool", groups=True)
    for kind in (list, tuple, np.array):
        made = "of names, one for each row, groups=leafkernels.group_index(names) makes one"
        named = kind(["a", "a", "b", "b"])
        message = f"groups must be a torch.Tensor, got {type(named).__name__}: {made}"
        for function in (*leafkernels.ESTIMATORS.values(), leafkernels.span_tree):
            given = {"logprobs": LOGPROBS, "token_ids": IDS, "rewards": REWARDS}
            check_refuses(TypeError, message, function, **given, groups=named)
        leafkernels.span_advantages(LOGPROBS, IDS, REWARDS, groups=leafkernels.group_index(named, DEVICE))
    check_refuses(TypeError, "groups must hold integers, got torch.float32", groups=REWARDS)
    check_refuses(TypeError, "num_boundaries must be an int, got float", num_boundaries=2.0)
    check_refuses(TypeError, "min_separation must be an int, got bool", min_separation=True)
    check_refuses(TypeError, "multiplicity_power must be a number, got str", multiplicity_power="0.5")
    check_refuses(TypeError, "leave_one_out must be a bool, got int", leave_one_out=1)
    check_refuses(TypeError, "cu_seqlens must be a torch.Tensor, got list", **PACKED, cu_seqlens=[0, 24])
    check_refuses(
        TypeError,
        "cu_seqlens must be int32 (or int64), got torch.float32",
        **PACKED,
        cu_seqlens=torch.zeros(5, device=DEVICE),
    )


def test_shapes() -> None:
    check_refuses(
        ValueError,
        "logprobs must have the shape of token_ids, (4, 6), got shape (4, 5)",
        logprobs=LOGPROBS[:, :5],
    )
    check_refuses(
        ValueError,
        "boundary_scores must have the shape of token_ids, (4, 6), got shape (24,)",
        boundary_scores=LOGPROBS.flatten(),
    )
    check_refuses(
        ValueError,
        "response_mask must have the shape of token_ids, (4, 6), got shape (6, 4)",
        response_mask=LOGPROBS.T,
    )
    check_refuses(
        ValueError,
        "token_ids must have shape (rows, tokens) or (prompts, rows, tokens), or (total,) together with cu_seqlens, "
        "got shape (24,)",
        **PACKED,
    )
    check_refuses(
        ValueError,
        "rewards must have one entry for each row of token_ids, shape (4,), got shape (4, 1)",
        rewards=REWARDS[:, None],
    )
    hint = ": those at tokens are step_rewards, those of several functions take reward_weights"
    for function in leafkernels.ESTIMATORS.values():
        for given, rows, shape in (
            ({"token_ids": IDS, "logprobs": LOGPROBS}, (4,), (4, 6)),
            ({"token_ids": IDS.reshape(2, 2, 6), "logprobs": LOGPROBS.reshape(2, 2, 6)}, (2, 2), (2, 2, 5)),
            ({**PACKED, "cu_seqlens": bounds(0, 6, 12, 18, 24)}, (4,), (24,)),
        ):
            message = f"rewards must have one entry for each row of token_ids, shape {rows}, got shape {shape}{hint}"
            check_refuses(ValueError, message, function, **{**given, "rewards": torch.zeros(shape, device=DEVICE)})
    check_refuses(
        ValueError,
        "rewards must have one entry for each row of token_ids, shape (2, 2), got shape (4,)",
        logprobs=LOGPROBS.reshape(2, 2, 6),
        token_ids=IDS.reshape(2, 2, 6),
    )
    check_refuses(
        ValueError,
        "group_size must be None where token_ids is (prompts, rows, tokens), each prompt being a group; "
        "got token_ids of shape (2, 2, 6) and group_size=2",
        logprobs=LOGPROBS.reshape(2, 2, 6),
        token_ids=IDS.reshape(2, 2, 6),
        group_size=2,
    )
    check_refuses(ValueError, "group_size must divide the number of rows, 4, got 3", group_size=3)
    check_refuses(ValueError, "group_size must be at least 1, got 0", group_size=0)
    names = bounds(0, 0, 1, 1)
    check_refuses(
        ValueError, "group_size must be None where groups names the prompts, got 2", groups=names, group_size=2
    )
    check_refuses(TypeError, "group_size must be an int, got Tensor", group_size=names)
    check_refuses(
        TypeError,
        "groups must be an integer tensor that names the prompt of each row, got an int: for prompts of 2 consecutive "
        "rows pass group_size=2",
        groups=2,
    )
    check_refuses(ValueError, "groups must name one prompt for each of 4 rows, got shape (3,)", groups=bounds(1, 2, 3))


def test_statistics_of_nothing() -> None:
    message = "parts must hold the statistics of one micro-batch at least, got none"
    check_refuses(ValueError, message, leafkernels.FireStatistics.concatenate, parts=[])


def test_cu_seqlens() -> None:
    def packed(message: str, cu_seqlens: torch.Tensor, error: type[Exception] = ValueError, **changes: Any) -> None:
        check_refuses(error, message, **{**PACKED, **changes}, cu_seqlens=cu_seqlens)

    packed("cu_seqlens must have shape (rows + 1,), got shape (1, 5)", bounds(0, 6, 12, 18, 24)[None])
    packed("cu_seqlens must have shape (rows + 1,), got shape (0,)", bounds())
    packed("rewards must have one entry for each row of token_ids, shape (3,), got shape (4,)", bounds(0, 9, 18, 24))
    check_refuses(
        ValueError,
        "token_ids must have shape (total,) together with cu_seqlens, got shape (4, 6)",
        cu_seqlens=bounds(0, 6, 12, 18, 24),
    )
    if DEVICE == "cpu":  # on a GPU nobody looks at the values
        packed("cu_seqlens must start at 0, got 1", bounds(1, 6, 12, 18, 24))
        packed("cu_seqlens must end at the number of tokens, 24, got 23", bounds(0, 6, 12, 18, 23))
        packed("cu_seqlens must not fall, got 12 followed by 9 at 3", bounds(0, 6, 12, 9, 24))


def test_options() -> None:
    check_refuses(ValueError, "terms must be one of 'both', 'global', 'local', got 'all'", terms="all")
    check_refuses(
        ValueError, "normalize must be one of 'span', 'batch', 'reward_std', 'none', got None", normalize=None
    )
    check_refuses(
        ValueError, "backend must be one of 'auto', 'triton', 'torch', 'reference', got 'cuda'", backend="cuda"
    )
    check_refuses(ValueError, "num_boundaries must be at least 0, got -1", num_boundaries=-1)
    check_refuses(ValueError, "multiplicity_power must be finite, got nan", multiplicity_power=float("nan"))
    check_refuses(ValueError, "min_separation must be at least 1, got 0", min_separation=0)
    most = 2**63 - 1
    check_refuses(ValueError, f"min_separation must be at most {most}, got {2**70}", min_separation=2**70)
    check_refuses(ValueError, f"num_boundaries must be at most {most}, got {2**70}", num_boundaries=2**70)
    for power in (float("nan"), float("inf"), 10**400):
        check_refuses(ValueError, f"multiplicity_power must be finite, got {power}", multiplicity_power=power)


def test_devices() -> None:
    elsewhere = torch.empty(4, 6, device="meta")
    check_refuses(
        ValueError, f"logprobs must be on the device of token_ids, {IDS.device}, got meta", logprobs=elsewhere
    )
    check_refuses(
        ValueError, f"rewards must be on the device of token_ids, {IDS.device}, got meta", rewards=elsewhere[:, 0]
    )
    check_refuses(
        ValueError, f"response_mask must be on the device of token_ids, {IDS.device}, got meta", response_mask=elsewhere
    )
    check_refuses(
        ValueError,
        f"groups must be on the device of token_ids, {IDS.device}, got meta",
        groups=elsewhere[:, 0].to(torch.int64),
    )
    check_refuses(
        ValueError,
        f"cu_seqlens must be on the device of token_ids, {IDS.device}, got meta",
        **PACKED,
        cu_seqlens=torch.empty(5, dtype=torch.int32, device="meta"),
    )


def test_steps() -> None:
    select, shared = leafkernels.select_boundaries, leafkernels.common_prefix_lengths
    values, scatter = leafkernels.span_values, leafkernels.scatter_spans
    check_refuses(
        TypeError,
        "scores must be floating point (float32, bfloat16, float16 or float64), got torch.int64",
        select,
        scores=IDS,
    )
    check_refuses(TypeError, "token_ids must hold integers, got torch.float32", shared, token_ids=LOGPROBS)
    table = torch.zeros(4, 4, dtype=torch.int32, device=DEVICE)
    good = {"prefix_lengths": table, "boundaries": bounds(1), "rewards": REWARDS, "lengths": IDS[:, 0]}
    check_refuses(
        ValueError,
        "prefix_lengths must have shape (rows, rows) or (prompts, rows, rows), got (4, 6)",
        values,
        **{**good, "prefix_lengths": IDS},
    )
    check_refuses(
        ValueError,
        "lengths must have one entry for each row of prefix_lengths, shape (4,), got shape (4, 6)",
        values,
        **{**good, "lengths": IDS},
    )
    check_refuses(
        ValueError,
        "boundaries must hold one list for each prompt of prefix_lengths, shape ('B',), got shape (1, 1)",
        values,
        **{**good, "boundaries": bounds(1)[None]},
    )
    check_refuses(
        ValueError,
        "rewards must have one entry for each row of prefix_lengths, shape (4,), got shape (3,)",
        values,
        **{**good, "rewards": REWARDS[:3]},
    )
    ends = IDS[:, :2]
    check_refuses(
        ValueError,
        "span_ends must have the shape of values, (4, 2), got shape (4, 3)",
        scatter,
        values=LOGPROBS[:, :2],
        span_ends=IDS[:, :3],
        num_tokens=6,
    )
    check_refuses(
        ValueError,
        "values must have shape (rows, spans) or (prompts, rows, spans), and (rows, spans) together with cu_seqlens, "
        "got shape (4,)",
        scatter,
        values=REWARDS,
        span_ends=IDS[:, 0],
        num_tokens=6,
    )
    check_refuses(
        ValueError,
        "values must have one row for each of the 2 rows of cu_seqlens, got shape (4, 2)",
        scatter,
        values=LOGPROBS[:, :2],
        span_ends=ends,
        num_tokens=6,
        cu_seqlens=bounds(0, 3, 6),
    )
    check_refuses(
        ValueError,
        "num_tokens must be at least 0, got -1",
        scatter,
        values=LOGPROBS[:, :2],
        span_ends=ends,
        num_tokens=-1,
    )


def test_a_mask_of_nan() -> None:
    """Refused where values are read; elsewhere (a GPU, a compiled graph) what is not known to count does not."""
    mask = torch.ones(4, 6, device=DEVICE)
    mask[1, 4], mask[2, 0] = torch.nan, -2.0
    if DEVICE == "cpu":
        check_refuses(ValueError, "response_mask must hold numbers, got NaN", response_mask=mask)
    rewards = torch.arange(4.0, device=DEVICE)

    def step(mask: torch.Tensor) -> torch.Tensor:
        return leafkernels.grpo(LOGPROBS, IDS, rewards, response_mask=mask)

    torch._dynamo.reset()
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(mask)
    torch.testing.assert_close(found, step(mask.nan_to_num(0.0)))
    assert found[1, 4] == 0
    assert found[2, 0] != 0


def test_limit_and_start() -> None:
    def refuses(error: type[Exception], message: str, **changes: Any) -> None:
        check_refuses(error, message, leafkernels.common_prefix_lengths, **{"token_ids": IDS, **changes})

    names = bounds(0, 1, 0, 1)
    for name in ("limit", "start"):
        refuses(TypeError, f"{name} must be an int, got float", **{name: 2.0})
        refuses(TypeError, f"{name} must be an int, got bool", **{name: True})
        refuses(TypeError, f"{name} must hold integers, got torch.float32", **{name: REWARDS})
        refuses(ValueError, f"{name} must be at least 0, got -1", **{name: -1})
        must = f"{name} must be an int or hold one integer for each"
        refuses(ValueError, f"{must} prompt, shape (), got shape (1,)", **{name: bounds(1)})
        refuses(ValueError, f"{must} prompt, shape (2,), got shape (4,)", **{name: names}, group_size=2)
        refuses(ValueError, f"{must} row, shape (4,), got shape (2,)", **{name: bounds(1, 2)}, groups=names)
        elsewhere = torch.zeros((), dtype=torch.int64, device="meta")
        refuses(
            ValueError,
            f"{name} must be on the device of token_ids, {IDS.device}, got meta",
            **{name: elsewhere},
        )
        if DEVICE == "cpu":  # on a GPU nobody looks at the values
            refuses(ValueError, f"{name} must be at least 0, got -3", **{name: bounds(2, -3)}, group_size=2)
            refuses(
                ValueError,
                f"{name} must be the same for all rows of a prompt, got 7 for row 3 and 5 for the first row of its "
                "prompt",
                **{name: bounds(4, 5, 4, 7)},
                groups=names,
            )


@pytest.mark.skipif(DEVICE == "cuda", reason="with a GPU the kernels run on its tensors")
def test_a_forced_backend_that_cannot_run_says_why() -> None:
    """In a process of its own: this one has the interpreter on."""
    code = """
import sys, torch, leafkernels
call = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2)
try:
    leafkernels.span_advantages(*call, backend="triton")
except RuntimeError as error:
    print(error)
"""
    run = run_python("-c", code)
    assert run.stdout.strip() == (
        "backend='triton' runs tensors on cpu only under Triton's interpreter: set TRITON_INTERPRET=1 before Python "
        "starts, or pass backend='torch'"
    )


def test_without_triton_the_package_imports_and_computes() -> None:
    """As on macOS and Windows: nothing but a forced (or a CUDA) call may want Triton."""
    code = """
import sys, importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
sys.modules["triton"] = None
import torch, leafkernels
call = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0.0, 1.0])
print(leafkernels.span_advantages(*call, num_boundaries=0).shape)
try:
    leafkernels.span_advantages(*call, backend="triton")
except RuntimeError as error:
    print(error)
"""
    run = run_python("-c", code)
    assert run.stdout.splitlines() == [
        "torch.Size([2, 3])",
        "backend='triton' (the default for cuda tensors, yours are on cpu) needs the package triton, which is not "
        "installed: install it, or pass backend='torch'",
    ]
