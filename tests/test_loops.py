"""Every layout of a loop gives the advantages of the padded call, bit for bit."""

import importlib.machinery
import importlib.util
import math
import re
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pages
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import process_group
from rollouts import DEVICE, Rollouts, rollouts
from support import examples

import python_ref
from leafkernels import policy_loss, span_advantages
from leafkernels.integrations.layouts import next_tokens, pack, response_tokens, rolled_tokens, unpack

FILL = 5  # what no mask covers: prompts and padding, which must not matter


@st.composite
def with_prompts(draw: st.DrawFn) -> tuple[Rollouts, list[int]]:
    """Rollouts, and how many prompt tokens stand before each, at least one."""
    case = draw(rollouts())
    return case, [draw(st.integers(1, 3)) for _ in case.groups]


def expected(case: Rollouts) -> list[torch.Tensor]:
    padded = case.padded()
    advantages = span_advantages(**padded, **case.options)
    return [row[: len(ids)] for row, ids in zip(advantages, case.token_ids, strict=True)]


def sequences(case: Rollouts, prompts: list[int]) -> dict[str, torch.Tensor]:
    """(N, S) prompt, response, padding, as a model reads them; logprobs and mask of the token at the same place."""
    width = max(p + len(row) for p, row in zip(prompts, case.token_ids, strict=True)) + 1

    def table(rows: list[list], fill: Any, dtype: torch.dtype) -> torch.Tensor:
        full = [[fill] * p + row for p, row in zip(prompts, rows, strict=True)]
        return torch.tensor([row + [fill] * (width - len(row)) for row in full], dtype=dtype).to(DEVICE)

    return {
        "logprobs": table(case.logprobs, -9.0, torch.float32),
        "token_ids": table(case.token_ids, FILL, torch.int64),
        "response_mask": table(case.mask, False, torch.bool),
    }


def assert_same(case: Rollouts, prompts: list[int], advantages: torch.Tensor, shift: int) -> None:
    """Responses out of (N, S) advantages whose entry t speaks of token t + shift; 0 everywhere else."""
    for row, prompt, ids, padded in zip(advantages, prompts, case.token_ids, expected(case), strict=True):
        start = prompt - shift
        assert torch.equal(row[start : start + len(ids)], padded)
        assert not row[:start].any() and not row[start + len(ids) :].any()


def common(case: Rollouts) -> dict[str, Any]:
    padded = case.padded()
    return {"rewards": padded["rewards"], "groups": padded["groups"], **case.options}


@given(case=with_prompts())
@examples(torch=60)
def test_prompt_included(case: tuple[Rollouts, list[int]]) -> None:
    """NeMo-RL: nothing to do but to pass the mask."""
    rollouts, prompts = case
    assert_same(rollouts, prompts, span_advantages(**sequences(rollouts, prompts), **common(rollouts)), 0)


@given(case=with_prompts())
@examples(torch=60)
def test_next_token(case: tuple[Rollouts, list[int]]) -> None:
    """OpenRLHF: the log-probabilities that the logits of each place give to the token behind it."""
    rollouts, prompts = case
    held = sequences(rollouts, prompts)
    advantages = span_advantages(
        held["logprobs"][:, 1:],
        next_tokens(held["token_ids"]),
        response_mask=held["response_mask"][:, 1:],
        **common(rollouts),
    )
    assert_same(rollouts, prompts, advantages, 1)


@given(case=with_prompts())
@examples(torch=60)
def test_rolled(case: tuple[Rollouts, list[int]]) -> None:
    """AReaL: log-probabilities and mask rolled by -1."""
    rollouts, prompts = case
    held = sequences(rollouts, prompts)
    advantages = span_advantages(
        held["logprobs"].roll(-1, 1),
        rolled_tokens(held["token_ids"]),
        response_mask=held["response_mask"].roll(-1, 1),
        **common(rollouts),
    )
    assert_same(rollouts, prompts, advantages, 1)


@given(case=with_prompts())
@examples(torch=60)
def test_lists_of_responses(case: tuple[Rollouts, list[int]]) -> None:
    """slime: log-probabilities and masks of responses, token ids with the prompt, row by row."""
    rollouts, prompts = case
    logprobs = [torch.tensor(row, dtype=torch.float32, device=DEVICE) for row in rollouts.logprobs]
    masks = [torch.tensor(row, dtype=torch.bool, device=DEVICE) for row in rollouts.mask]
    whole = [torch.tensor([FILL] * p + row, device=DEVICE) for p, row in zip(prompts, rollouts.token_ids, strict=True)]
    token_ids = response_tokens(whole, [len(row) for row in logprobs])
    packed = pack(logprobs, token_ids, masks)
    advantages = span_advantages(*packed[:2], response_mask=packed[2], cu_seqlens=packed[3], **common(rollouts))
    for row, padded in zip(unpack(advantages, logprobs), expected(rollouts), strict=True):
        assert torch.equal(row, padded)


def test_shapes_and_dtypes() -> None:
    rows = [torch.tensor([1, 2]), torch.tensor([], dtype=torch.int64), torch.tensor([3])]
    packed, cu_seqlens = pack(rows)
    assert packed.tolist() == [1, 2, 3]
    assert (cu_seqlens.tolist(), cu_seqlens.dtype) == ([0, 2, 2, 3], torch.int32)
    assert [row.tolist() for row in unpack(packed, rows)] == [[1, 2], [], [3]]
    assert [row.tolist() for row in response_tokens(rows, [1, 0, 0])] == [[2], [], []]
    assert next_tokens(torch.arange(6).view(2, 3)).tolist() == [[1, 2], [4, 5]]
    assert rolled_tokens(torch.arange(6).view(2, 3)).tolist() == [[1, 2, 0], [4, 5, 3]]


def test_refusals() -> None:
    def refuses(message: str) -> Any:
        return pytest.raises(ValueError, match=f"^{re.escape(message)}$")

    rows = [torch.zeros(2), torch.zeros(1)]
    with refuses("columns must have rows of the same lengths, got [2, 1] in column 0 and [1, 2] in column 1"):
        pack(rows, rows[::-1])
    with refuses("columns must hold at least one row each, got none"):
        pack([])
    with refuses("response_lengths must lie between 0 and the length of the row, got 3 for row 0 of 2"):
        response_tokens(rows, [3, 1])


PAGE = pages.read("trainers.md")

# What real packages import and these tests do not need.
BESIDE = {"ray", "flash_attn", "deepspeed", "vllm", "pylatexenc", "aiohttp", "torchdata", "bitsandbytes", "einops",
          "uvloop", "numba"}  # fmt: skip


class Stub(types.ModuleType):
    """A module that has every name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


def import_without(
    patch: pytest.MonkeyPatch, module: str, stubbed: set[str] = frozenset(), bare: set[str] = frozenset()
) -> Any:
    """Import a module of a real package, stubs in place of heavy dependencies that are absent and of ``stubbed``.

    Of the packages in ``bare`` no ``__init__`` runs. Skips where the package is absent.
    """
    package = module.partition(".")[0]
    found = importlib.util.find_spec(package)
    if found is None or found.submodule_search_locations is None:
        pytest.skip(f"needs {package}: pip install --no-deps {package}")
    root = Path(found.submodule_search_locations[0]).parent
    absent = {name for name in BESIDE if importlib.util.find_spec(name) is None}

    class Finder:
        @staticmethod
        def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
            if name.partition(".")[0] in absent or any(f"{name}.".startswith(f"{stub}.") for stub in stubbed):
                return importlib.machinery.ModuleSpec(name, Finder, is_package=True)
            if name not in bare:
                return None
            spec = importlib.machinery.ModuleSpec(name, Finder, is_package=True)
            spec.submodule_search_locations = [str(root.joinpath(*name.split(".")))]
            return spec

        @staticmethod
        def create_module(spec: Any) -> Any:
            return None if spec.name in bare else Stub(spec.name)

        @staticmethod
        def exec_module(module: Any) -> None:
            pass

    for name in [name for name in sys.modules if name.partition(".")[0] in {package, *absent}]:
        patch.delitem(sys.modules, name)
    patch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    try:
        return importlib.import_module(module)
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] in {package, *absent}]:
            patch.setitem(sys.modules, name, sys.modules.pop(name))


class HeldTensor:
    """As much of Tinker's TensorData as the page touches."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    from_torch = classmethod(lambda cls, tensor: cls(tensor))

    def to_torch(self) -> torch.Tensor:
        return self.tensor


def snippets(title: str) -> dict[str, Any]:
    """What the sections of the page up to this one define, but for those of other packages."""
    sections = re.split(r"^## ", PAGE, flags=re.M)[1:]
    names = [section.split("\n", 1)[0] for section in sections]
    scope: dict[str, Any] = {"torch": torch}
    for name, section in zip(names, sections, strict=True):
        if name == title or name not in ("TRL", "verl"):
            pages.run(section, scope)
        if name == title:
            return scope
    raise AssertionError(f"no section {title} among {names}")


PROMPTS = [2, 3, 1, 2, 2, 1]


def example() -> Rollouts:
    """Two prompts of three rollouts, in runs; masks with a hole, and distinct rewards."""
    rows = [[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 6], [7, 8, 9], [7, 8, 1, 1], [7, 2]]
    logprobs = [[-0.1, -0.2, -3.0 - i, -0.5 - i][: len(row)] for i, row in enumerate(rows)]
    mask = [[t != 1 or i != 2 for t in range(len(row))] for i, row in enumerate(rows)]
    return Rollouts(rows, logprobs, mask, [1.0, 0.0, 0.5, 0.0, 2.0, 1.0], [0, 0, 0, 1, 1, 1])


def as_experiences(case: Rollouts, kind: Any) -> list[Any]:
    """Two micro-batches of unequal width."""
    held = sequences(case, PROMPTS)
    experiences = []
    for rows, width in ((slice(0, 2), None), (slice(2, 6), -1)):
        mask = held["response_mask"][rows, 1:width]
        experiences.append(
            kind(
                sequences=held["token_ids"][rows, :width],
                action_log_probs=held["logprobs"][rows, 1:width],
                action_mask=mask,
                rewards=torch.tensor(case.rewards, device=DEVICE)[rows],
                index=list(range(6))[rows],
                kl=torch.zeros(mask.shape, device=DEVICE),
                info={},
            )
        )
    return experiences


def check_experiences(case: Rollouts, experiences: list[Any]) -> None:
    rows = [row for e in experiences for row in e.advantages]
    assert [e.advantages.shape for e in experiences] == [e.action_log_probs.shape for e in experiences]
    for row, prompt, ids, padded in zip(rows, PROMPTS, case.token_ids, expected(case), strict=True):
        assert torch.equal(row[prompt - 1 : prompt - 1 + len(ids)], padded)


def test_page_openrlhf() -> None:
    case = example()
    experiences = as_experiences(case, SimpleNamespace)
    snippets("OpenRLHF")["openrlhf"](experiences, 3)
    check_experiences(case, experiences)


@pytest.mark.slow
def test_page_openrlhf_in_openrlhf(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own trainer makes its own experience maker, on its own experiences; what they import beside is stubbed."""
    trainer = import_without(monkeypatch, "openrlhf.trainer.ppo_trainer")
    kind = sys.modules["openrlhf.trainer.ppo_utils.experience"].Experience
    monkeypatch.setattr(trainer, "RemoteExperienceMaker", trainer.RemoteExperienceMaker)  # put back afterwards
    snippets("OpenRLHF")["plug"]()

    def name_space(**values: Any) -> SimpleNamespace:
        return SimpleNamespace(**{n: name_space(**v) if isinstance(v, dict) else v for n, v in values.items()})

    advantage = {"estimator": "group_norm", "gamma": 1.0}
    args = name_space(
        algo={"advantage": advantage, "kl": {"target": None, "init_coef": 0.0, "use_loss": False}},
        rollout={"n_samples_per_prompt": 3},
        reward={"clip_range": (-10, 10), "overlong_buffer_len": None, "stop_properly_penalty_coef": None},
        logger={"wandb": {"key": None}, "tensorboard_dir": None},
        ckpt={"best_metric_key": ""},
    )
    maker = trainer.BasePPOTrainer(name_space(args=args), *[None] * 6).experience_maker
    assert type(maker).__name__ == "LeafExperienceMaker"
    case = example()
    found = maker.compute_advantages_and_returns(as_experiences(case, kind))
    check_experiences(case, found)
    assert all(e.info["group_reward_std"].shape == e.rewards.shape for e in found)
    maker.initial_model_group = object()
    with pytest.raises(ValueError, match="^--algo.kl.use_loss must be set with LEAF"):
        maker.compute_advantages_and_returns(as_experiences(case, kind))


def as_nemo_rl(case: Rollouts) -> dict[str, Any]:
    held = {name: tensor.cpu() for name, tensor in sequences(case, PROMPTS).items()}
    logs = [
        [
            {"token_ids": torch.tensor([FILL] * p), "generation_logprobs": torch.zeros(p)},
            {"token_ids": torch.tensor(ids), "generation_logprobs": torch.tensor(logprobs)},
        ]
        for p, ids, logprobs in zip(PROMPTS, case.token_ids, case.logprobs, strict=True)
    ]
    return {
        "prompt_ids": torch.tensor([[group, 0] for group in case.groups]),
        "rewards": torch.tensor(case.rewards),
        "mask": held["response_mask"].float(),
        "repeated_batch": {"message_log": logs},
        "logprobs_policy": held["logprobs"],
        "logprobs_reference": None,
    }


@pytest.mark.parametrize("skipped", [False, True])
def test_page_nemo_rl(skipped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under force_on_policy_ratio the policy's log-probabilities are zeros, and the sampler's serve."""
    case = example()
    package, algorithms, grpo = (
        types.ModuleType(n) for n in ("nemo_rl", "nemo_rl.algorithms", "nemo_rl.algorithms.grpo")
    )
    algorithms.grpo = grpo
    for module in (package, algorithms, grpo):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    snippets("NeMo-RL")["plug_nemo_rl"]()
    estimator = grpo._create_advantage_estimator(None)
    handed = as_nemo_rl(case)
    if skipped:
        handed["logprobs_policy"] = torch.zeros_like(handed["logprobs_policy"])
    assert_same(case, PROMPTS, estimator.compute_advantage(**handed).to(DEVICE), 0)

    # A row that takes no part is an unscorable one.
    valid = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    without = estimator.compute_advantage(**handed, valid_mask=valid)
    unscored = Rollouts(case.token_ids, case.logprobs, case.mask, [*case.rewards], case.groups)
    unscored.rewards[1] = math.nan
    assert_same(unscored, PROMPTS, without.to(DEVICE), 0)


def test_page_nemo_rl_refuses_what_would_be_wrong() -> None:
    estimator = snippets("NeMo-RL")["LeafEstimator"]()
    handed = as_nemo_rl(example())
    with pytest.raises(ValueError, match="^repeated_batch must hold the message_log"):
        estimator.compute_advantage(**{**handed, "repeated_batch": {"total_reward": handed["rewards"]}})
    for log in handed["repeated_batch"]["message_log"]:
        for message in log:
            message["generation_logprobs"].zero_()
    handed["logprobs_policy"].zero_()
    with pytest.raises(ValueError, match="^logprobs_policy must hold the tokens' log-probabilities, got zeros"):
        estimator.compute_advantage(**handed)


def as_slime(case: Rollouts, rows: list[int]) -> dict[str, Any]:
    """Those rows of the batch as slime hands them to a rank; the samples of a prompt are numbered in runs of three."""
    seen: list[int] = []
    for group in case.groups:
        seen.append(3 * (2 - group) + sum(number // 3 == 2 - group for number in seen))
    return {
        "log_probs": [torch.tensor(case.logprobs[i], device=DEVICE) for i in rows],
        "tokens": [torch.tensor([FILL] * PROMPTS[i] + case.token_ids[i], device=DEVICE) for i in rows],
        "response_lengths": [len(case.token_ids[i]) for i in rows],
        "loss_masks": [torch.tensor(case.mask[i], device=DEVICE).int() for i in rows],
        "rewards": [case.rewards[i] for i in rows],
        "sample_indices": [seen[i] for i in rows],
    }


class SlimeArgs:
    n_samples_per_prompt = 3


@pytest.mark.parametrize("name", ["log_probs", "rollout_log_probs"])
def test_page_slime(name: str) -> None:
    """On policy only the sampler's log-probabilities are there."""
    case = example()
    data = as_slime(case, [*range(6)])
    data[name] = data.pop("log_probs")
    snippets("slime")["slime"](SlimeArgs, data)
    for row, padded in zip(data["advantages"], expected(case), strict=True):
        assert torch.equal(row, padded)


def slime_of_rank(rows: list[int]) -> list[torch.Tensor]:
    """On one of two ranks, for ``test_distributed.py``, whose processes are there already."""
    data = as_slime(example(), rows)
    snippets("slime")["slime"](SlimeArgs, data, process_group(2))
    return [row.cpu() for row in data["advantages"]]


def a_row_lost() -> tuple[Rollouts, list[int], list[dict[str, Any]]]:
    """The example without a row of its first prompt, and AReaL's list of prompts."""
    whole = example()
    kept = [0, 2, 3, 4, 5]
    case = Rollouts(*([column[i] for i in kept] for column in
                      (whole.token_ids, whole.logprobs, whole.mask, whole.rewards, whole.groups)))  # fmt: skip
    prompts = [PROMPTS[i] for i in kept]
    held = sequences(case, prompts)
    batch = [
        {
            "input_ids": held["token_ids"][rows],
            "logprobs": held["logprobs"][rows],
            "loss_mask": held["response_mask"][rows].int(),
            "attention_mask": torch.ones_like(held["token_ids"][rows], dtype=torch.bool),
            "rewards": torch.tensor(case.rewards, device=DEVICE)[rows],
        }
        for rows in (slice(0, 2), slice(2, 5))
    ]
    return case, prompts, batch


def test_page_areal() -> None:
    """Runs of a group size would mix the prompts."""
    case, prompts, batch = a_row_lost()

    class Actor:
        def compute_advantages(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
            rolled = ("logprobs", "loss_mask")
            return [{n: t.roll(-1, 1) if n in rolled else t for n, t in data.items()} for data in batch]

    found = snippets("AReaL")["leaf_actor"](Actor)().compute_advantages(batch)
    assert_same(case, prompts, torch.cat([data["advantages"] for data in found]), 1)

    data = {name: torch.cat([part[name] for part in Actor().compute_advantages(batch)]) for name in batch[0]}
    snippets("AReaL")["areal"](data, ["a", "a", "b", "b", "b"])
    assert_same(case, prompts, data["advantages"], 1)


@pytest.mark.slow
def test_page_areal_in_areal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own actor, over no engine; what it imports beside is stubbed."""
    names = ["api", "infra", "experimental", "engine", "trainer.ppo.stats"]
    stubbed = {f"areal.{n}" for n in (*names, "utils.logging", "utils.stats_tracker", "utils.perf_tracer")}
    # A decorator: a mock in its place would take the function away.
    monkeypatch.setattr(Stub, "trace_perf", staticmethod(lambda *_, **__: lambda function: function), raising=False)
    module = import_without(
        monkeypatch, "areal.trainer.ppo.actor", stubbed, {"areal", "areal.trainer", "areal.trainer.ppo"}
    )
    actor = object.__new__(snippets("AReaL")["leaf_actor"](module.PPOActor))
    settings = {"reward_bias": 0.0, "reward_scaling": 1.0, "reward_clip": 20.0, "reward_norm": None, "adv_norm": None}
    more = {"kl_ctl": 0.0, "kl_estimator": module.KLEstimator("k1"), "mask_no_eos_with_zero": False}
    actor.__dict__.update(settings | more | {"discount": 1.0, "gae_lambda": 1.0})
    off = ("overlong_reward_penalty", "use_decoupled_loss", "recompute_logprob")
    actor.config = SimpleNamespace(**dict.fromkeys(off, False))
    case, prompts, batch = a_row_lost()
    found = actor.compute_advantages(batch)
    assert_same(case, prompts, torch.cat([data["advantages"] for data in found]), 1)


@pytest.mark.parametrize(
    "prompt_ids", [["b", "b", "b", "a", "a", "a"], torch.tensor(example().groups), list(torch.tensor(example().groups))]
)
def test_page_ms_swift(prompt_ids: Any) -> None:
    case = example()
    padded = case.padded()
    rows = (padded["logprobs"], padded["token_ids"], padded["response_mask"], padded["rewards"])
    advantages = snippets("ms-swift")["ms_swift"](*rows, prompt_ids)
    for row, ids, want in zip(advantages, case.token_ids, expected(case), strict=True):
        assert torch.equal(row[: len(ids)], want)


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_page_tinker(real: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own Datum, and one that holds its tensors in the same way."""
    if real:
        client = pytest.importorskip("tinker", reason="needs Tinker's client: pip install tinker")
    else:
        client = types.ModuleType("tinker")
        client.TensorData = HeldTensor
        monkeypatch.setitem(sys.modules, "tinker", client)

    def datum(ids: list[int], logprobs: list[float]) -> Any:
        held = {"target_tokens": ids, "logprobs": logprobs}
        if not real:
            dtypes = {"target_tokens": torch.int64, "logprobs": torch.float32}
            return SimpleNamespace(
                loss_fn_inputs={n: HeldTensor(torch.tensor(v, dtype=dtypes[n])) for n, v in held.items()}
            )
        return client.types.Datum(model_input=client.types.ModelInput.from_ints(ids), loss_fn_inputs=held)

    case = example()
    shifted = [([FILL] * p + row)[1:] for p, row in zip(PROMPTS, case.token_ids, strict=True)]
    datums = [datum(ids, [0.0] * (len(ids) - len(row)) + row) for ids, row in zip(shifted, case.logprobs, strict=True)]
    masks = [
        torch.tensor([0] * (len(ids) - len(row)) + row, dtype=torch.int32)
        for ids, row in zip(shifted, case.mask, strict=True)
    ]
    empty = datum([], [])
    datums.append(empty)
    masks.append(torch.tensor([]))
    rewards = torch.tensor([*case.rewards, 1.0])
    snippets("Tinker")["tinker"](datums, masks, rewards, ["x"] * 3 + ["y"] * 3 + ["z"])
    assert datums.pop() is empty and not len(empty.loss_fn_inputs["advantages"].to_torch())
    for held, ids, padded in zip(datums, case.token_ids, expected(case), strict=True):
        advantages = held.loss_fn_inputs["advantages"]
        assert isinstance(advantages, client.TensorData)
        advantages = advantages.to_torch()
        assert torch.equal(advantages[len(advantages) - len(ids) :], padded.cpu())
        assert len(advantages) == len(held.loss_fn_inputs["target_tokens"].to_torch())
        assert not advantages[: -len(ids)].any()


def test_page_fire_opd() -> None:
    """Rows of unequal length, one of which is dropped, with numbers in the padding that must not matter."""
    generator = torch.Generator().manual_seed(3)
    mask = (torch.arange(6) < torch.tensor([6, 3, 4, 5])[:, None]).to(DEVICE)
    numbers = [torch.rand(4, 6, generator=generator).to(DEVICE) for _ in range(4)]
    numbers[0], numbers[1] = -numbers[0], -numbers[1]
    names = ("old_log_probs", "ref_log_prob", "entropy", "ref_entropy")
    padded = (tensor.masked_fill(~mask, torch.nan) for tensor in numbers)
    batch = dict(zip(names, padded, strict=True)) | {"response_mask": mask.long()}
    snippets("FiRe-OPD")["fire"](batch, drop=0.3, normalize="trajectory")
    dropped = batch["response_mask"].sum(1) == 0
    assert dropped.sum() == 1
    assert batch["response_mask"].dtype == torch.int64
    lists = (tensor.tolist() for tensor in (*numbers, mask))
    expected = python_ref.fire_opd(*lists, drop=0.3, normalize="trajectory")
    torch.testing.assert_close(batch["advantages"], torch.tensor(expected["advantages"], device=DEVICE))
    assert batch["response_mask"].bool().tolist() == expected["response_mask"]


@pytest.mark.slow
def test_page_shared_prefixes() -> None:
    """A step is that of an ordinary forward pass."""
    pytest.importorskip("transformers", minversion="5.23")
    from tiny_decoders import build_model

    step = snippets("Shared prefixes")["shared_step"]
    torch.manual_seed(0)
    ids = torch.randint(1, 20, (4, 14), device=DEVICE)
    ids[1:, :9] = ids[0, :9].clone()
    asked = (torch.arange(14, device=DEVICE) >= 9).expand(4, 14)
    advantages = torch.randn(4, 14, device=DEVICE)
    weights = []
    for is_shared in (True, False):
        model = build_model("llama").to(DEVICE)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        logits = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        logprobs = torch.nn.functional.pad(logits.gather(-1, ids[:, 1:, None])[..., 0], (1, 0))
        if is_shared:
            step(model, optimizer, ids, torch.ones_like(ids), asked, logprobs.detach(), advantages)
        else:
            policy_loss(logprobs, logprobs.detach(), advantages, asked).loss.backward()
            optimizer.step()
        weights.append(list(model.parameters()))
    for found, expected in zip(*weights, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(weights[0][0], next(build_model("llama").to(DEVICE).parameters()))


def test_page_sampling_masks() -> None:
    """Log-probabilities are those of logits where all but the kept ids are -inf; TRL's line is in its own tests."""
    logprobs_of = snippets("Sampling masks")["masked_logprobs"]
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 3, 4, device=DEVICE), torch.randn(7, 4, device=DEVICE)
    ids = torch.tensor([[0, 1, 2], [3, 4, 0]], device=DEVICE)
    live = torch.tensor([[1, 1, 1], [1, 1, 0]], dtype=torch.bool, device=DEVICE)
    kept = [[0, 5], [1, 2, 6], [2], [3, 0], [4, 6]]
    logits = (hidden @ weight.T)[live] / 0.8
    is_kept = torch.tensor([[i in row for i in range(7)] for row in kept], device=DEVICE)
    expected = logits.masked_fill(~is_kept, -torch.inf).log_softmax(-1).gather(-1, ids[live][:, None])[:, 0]
    found = logprobs_of(hidden, weight, ids, live, kept, 0.8)
    torch.testing.assert_close(found[live], expected, rtol=1e-5, atol=1e-5)


def test_page_verl() -> None:
    pytest.importorskip("verl.trainer.ppo.v1", reason="needs verl: pip install -e '.[verl]'")
    assert snippets("verl")["LeafTrainer"].__mro__[1].__name__ == "LeafAdvantage"


@pytest.mark.slow
def test_page_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl", reason="needs TRL: pip install -e '.[trl]'")
    monkeypatch.chdir(tmp_path)
    trainer = snippets("TRL")["trainer"]
    assert trainer.state.global_step == 3
    assert "leaf/span_credit_share" in trainer.state.log_history[-2]


def test_every_section_of_the_page_is_run() -> None:
    titles = {re.sub(r"\W", "_", title.lower()) for title in re.findall(r"^## (.+)$", PAGE, re.M)}
    assert {f"test_page_{title}" for title in titles} <= set(globals())
