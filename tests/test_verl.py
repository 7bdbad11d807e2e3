"""Our estimators: in verl itself where it is installed, and by the contract of its registry everywhere."""

import importlib.machinery
import math
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pages import ROOT
from rollouts import Rollouts, assert_rows_close, rollouts, unmasked
from support import examples

import leafkernels
import python_ref

MODULE = "leafkernels.integrations.verl"


THEIRS = ("grpo", "rloo", "opo", "gae")


def theirs(**_: Any) -> Any:
    raise AssertionError("an estimator of verl's own")


class Batch:
    """As much of a DataProto, and of a batch of the transfer queue, as estimators and trainers touch."""

    def __init__(self, batch: dict[str, Any], non_tensor_batch: dict[str, Any]) -> None:
        self.batch, self.non_tensor_batch = batch, non_tensor_batch
        self.keys, self.partition_id = [f"key {i}" for i in range(len(batch["response_mask"]))], "train"


def contract(passes_batch: bool) -> types.ModuleType:
    """The registry, and the call of an estimator: of 0.9, or of one that passes the batch to those that take it."""
    registry: dict[str, Callable] = dict.fromkeys(THEIRS, theirs)

    def register_adv_est(name: str) -> Callable:
        def decorator(function: Callable) -> Callable:
            if registry.setdefault(name, function) != function:
                raise ValueError(f"Adv estimator {name} has already been registered")
            return function

        return decorator

    def compute_advantage(data: Any, adv_estimator: str, config: Any = None) -> Any:
        more = {"batch": data.batch, "non_tensor_batch": data.non_tensor_batch} if passes_batch else {}
        data.batch["advantages"], data.batch["returns"] = registry[adv_estimator](
            token_level_rewards=data.batch["token_level_rewards"],
            response_mask=data.batch["response_mask"],
            config=config,
            index=data.non_tensor_batch["uid"],
            **more,
        )
        return data

    module = types.ModuleType("verl.trainer.ppo.core_algos")
    module.ADV_ESTIMATOR_REGISTRY = registry
    module.register_adv_est = register_adv_est
    module.compute_advantage = compute_advantage
    return module


@pytest.fixture(scope="module", params=["verl", "contract of 0.9", "contract with batch"])
def plug(request: pytest.FixtureRequest) -> Iterator[types.ModuleType]:
    """The module under test over verl itself or over its contract."""
    kept = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "verl" or name == MODULE}
    for name in kept:
        del sys.modules[name]
    if request.param == "verl":
        pytest.importorskip("verl.trainer.ppo.ray_trainer", reason="needs verl: pip install -e '.[verl]'")
    else:
        core = contract(request.param == "contract with batch")
        fakes = {name: types.ModuleType(name) for name in ("verl", "verl.trainer", "verl.trainer.ppo")}
        fakes["verl.trainer.ppo"].ray_trainer = core
        sys.modules.update({**fakes, "verl.trainer.ppo.core_algos": core, "verl.trainer.ppo.ray_trainer": core})
    yield importlib.import_module(MODULE)
    for name in [name for name in sys.modules if name.partition(".")[0] == "verl" or name == MODULE]:
        del sys.modules[name]
    sys.modules.update(kept)


def as_verl(case: Rollouts) -> Batch:
    """Rewards on the last token of the response, uids as strings, and the mask in verl's integers."""
    tensors = {name: tensor.cpu() for name, tensor in case.padded(extra=1).items()}
    rewards = torch.zeros_like(tensors["logprobs"])
    rewards[:, -1] = tensors["rewards"]
    batch = {
        "responses": tensors["token_ids"],
        "old_log_probs": tensors["logprobs"],
        "response_mask": tensors["response_mask"].long(),
        "token_level_rewards": rewards,
    }
    return Batch(batch, {"uid": np.array([f"prompt {group}" for group in case.groups], dtype=object)})


def expected(case: Rollouts) -> list[list[float]]:
    """The reference, with rows that begin in the first column."""
    mask = [[any(row), *row[1:]] if row else [] for row in case.mask]
    begun = Rollouts(case.token_ids, case.logprobs, mask, case.rewards, case.groups, case.options)
    values = begun.expected()
    return [[v * m for v, m in zip(*pair, strict=True)] for pair in zip(values, case.mask, strict=True)]


def data_of(plug: types.ModuleType, data: Batch) -> Any:
    """A real DataProto where verl is real."""
    protocol = sys.modules["verl"].__dict__.get("DataProto")
    return data if protocol is None else protocol.from_dict(tensors=data.batch, non_tensors=data.non_tensor_batch)


@given(case=rollouts())
@examples(torch=40)
def test_compute_advantage(plug: types.ModuleType, case: Rollouts) -> None:
    """Through verl's own dispatch by name: the reference's advantages, and returns."""
    data = plug.compute_advantage(data_of(plug, as_verl(case)), adv_estimator="leaf", config={"leaf": case.options})
    assert_rows_close(case.rows_of(data.batch["advantages"]), expected(case))
    assert torch.equal(data.batch["returns"], data.batch["advantages"])


def test_options(plug: types.ModuleType) -> None:
    case = Rollouts([[1, 2, 3], [1, 2, 4]], [[-1.0, -5.0, -2.0]] * 2, [[True] * 3] * 2, [1.0, 0.0], [0, 0])
    for config, options in [
        (None, {}),
        ({"norm_adv_by_std_in_grpo": False}, {"normalize": "none"}),
        ({"norm_adv_by_std_in_grpo": False, "leaf": {"normalize": "batch"}}, {"normalize": "batch"}),
        ({"leaf": {"num_boundaries": 0}}, {"num_boundaries": 0}),
    ]:
        data = plug.compute_advantage(data_of(plug, as_verl(case)), adv_estimator="leaf", config=config)
        assert_rows_close(case.rows_of(data.batch["advantages"]), case.expected(**options))


@pytest.mark.parametrize("name", ["tempo", "tree_td", "treerl"])
def test_other_estimators_by_name(plug: types.ModuleType, name: str) -> None:
    """By the reference; a mask without a hole, since rows begin in the first column here."""
    case = unmasked([[1, 2, 3], [1, 2, 4], [1], [2, 2]], [1.0, 0.0, 0.5, 0.25])
    reference = getattr(python_ref, name)

    def check(config: dict[str, Any] | None, **options: Any) -> None:
        data = plug.compute_advantage(data_of(plug, as_verl(case)), adv_estimator=name, config=config)
        expected = reference(case.logprobs, case.token_ids, case.rewards, groups=case.groups, **options)
        assert_rows_close(case.rows_of(data.batch["advantages"]), expected)

    if name == "tree_td":
        check(None, normalize="reward_std")
        check({"norm_adv_by_std_in_grpo": False, name: {"shrinkage": 1.0}}, shrinkage=1.0)
        check({name: {"normalize": "none", "group_weight": 0.5}}, group_weight=0.5)
    else:
        check({"norm_adv_by_std_in_grpo": False, "leaf": {"num_boundaries": 0}})


def registry_of_verl() -> dict[str, Callable]:
    return sys.modules["verl.trainer.ppo.core_algos"].ADV_ESTIMATOR_REGISTRY


def test_names_of_verl_stay_its_own(plug: types.ModuleType) -> None:
    registry = registry_of_verl()
    ours = {name for name, function in registry.items() if getattr(function, "func", None) is plug.compute_advantage_of}
    assert ours == set(leafkernels.ESTIMATORS) - {*THEIRS, "otb"}
    assert set(registry) >= set(THEIRS)


@pytest.mark.parametrize(
    ("name", "options"), [("qae", {}), ("qae", {"quantile": 1.0}), ("maxrl", {}), ("pass_at_k", {"k": 3})]
)
def test_schemes_of_whole_rows(plug: types.ModuleType, name: str, options: dict[str, Any]) -> None:
    case = unmasked([[1, 2, 3], [1, 2, 4], [1], [2, 2]], [1.0, 0.0, 0.5, 0.25])
    data = plug.compute_advantage(data_of(plug, as_verl(case)), adv_estimator=name, config={name: options})
    expected = getattr(python_ref, name)(case.logprobs, case.token_ids, case.rewards, groups=case.groups, **options)
    assert_rows_close(case.rows_of(data.batch["advantages"]), expected)


@pytest.mark.parametrize("name", ["dr_grpo", "qae", "maxrl", "pass_at_k", "leaf", "tempo", "tree_td", "treerl"])
def test_rewards_at_tokens(plug: types.ModuleType, name: str) -> None:
    """What is earned before a row's last token is earned there; at it and behind it, at the end of the row."""
    case = unmasked([[1, 2, 3], [1, 2, 4], [1], [2, 2], [1, 2]], [1.0, 0.0, 0.5, 0.25, math.nan])
    case.mask[1] = [True, False, True]
    steps = [[0.5, -1.0, 0.0], [0.0, 2.0, 0.0], [0.0], [0.25, 0.0], [1.0, 0.0]]
    batch = as_verl(case)
    for row, earned in enumerate(steps):
        for t, reward in enumerate(earned):
            batch.batch["token_level_rewards"][row, t] += reward
    # Of two places at or behind the last token that counts, neither is a step.
    batch.batch["token_level_rewards"][0, 2:] = 0.5
    none = {"normalize": "none"} if name in ("leaf", "tree_td") else {}
    data = plug.compute_advantage(data_of(plug, batch), adv_estimator=name, config={name: none})
    reference = python_ref.span_advantages if name == "leaf" else getattr(python_ref, name)
    rows = (case.logprobs, case.token_ids, case.rewards)
    want = reference(*rows, response_mask=case.mask, groups=case.groups, step_rewards=steps, **none)
    assert_rows_close(case.rows_of(data.batch["advantages"]), want)


@pytest.mark.parametrize("name", ["dr_grpo", "qae", "leaf", "tree_td"])
def test_rewards_at_the_last_token_are_those_of_rows(plug: types.ModuleType, name: str) -> None:
    """The bits of a call without step rewards, also where a row is not scored."""
    case = unmasked([[1, 2, 3], [1, 2], [1, 5, 5], [1]], [1.0, 0.3, math.nan, 0.25])
    ends = as_verl(case)
    for row, (ids, reward) in enumerate(zip(case.token_ids, case.rewards, strict=True)):
        ends.batch["token_level_rewards"][row] = 0.0
        ends.batch["token_level_rewards"][row, len(ids) - 1] = reward
    one, other = (
        plug.compute_advantage(data_of(plug, batch), adv_estimator=name).batch["advantages"]
        for batch in (ends, as_verl(case))
    )
    tensors = case.padded(extra=1)
    normalize = leafkernels.ESTIMATORS[name].normalization == "option"
    more = {"normalize": leafkernels.ESTIMATORS[name].normalized} if normalize else {}
    want = leafkernels.ESTIMATORS[name](**{key: value.cpu() for key, value in tensors.items()}, **more)
    assert torch.equal(one, other) and torch.equal(one, want)


def test_a_scheme_of_one_s_own_without_step_rewards(plug: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets their sum."""

    def mine(
        logprobs: torch.Tensor, token_ids: torch.Tensor, rewards: torch.Tensor, *, cu_seqlens: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        return rewards.float().repeat_interleave(cu_seqlens.diff().long())

    monkeypatch.setitem(leafkernels.ESTIMATORS, "mine", mine)
    batch = as_verl(unmasked([[1, 2], [1]], [1.0, 0.5])).batch
    batch["token_level_rewards"][0, 0] = 2.0
    scores, mask = batch["token_level_rewards"], batch["response_mask"]
    found = plug.compute_advantage_of("mine", scores, mask, index=["a", "a"], batch=batch)[0]
    assert found.tolist() == [[3.0, 3.0, 0.0], [0.5, 0.0, 0.0]]


def test_steps_of_a_session_are_those_of_its_last_row(plug: types.ModuleType) -> None:
    case = unmasked([[1, 2], [3, 4, 5], [6, 7], [8, 9]], [0.0, 1.0, 3.0, 0.0])
    batch = as_verl(case)
    batch.batch["token_level_rewards"][1, 1] = 0.5
    batch.batch["token_level_rewards"][2, 0] = 7.0
    batch.keys = ["u_1_0", "u_0_1", "u_0_0", "u_2_0"]
    actual = case.rows_of(through_the_mixin(plug, batch, None, "dr_grpo"))
    assert_rows_close(actual, [[-0.5] * 2, [1.0, 1.0, 0.5], [1.0] * 2, [-0.5] * 2])


def test_the_sampler_s_log_probabilities_serve_too(plug: types.ModuleType) -> None:
    case = Rollouts([[1, 2, 3], [1, 2, 4]], [[-1.0, -5.0, -2.0]] * 2, [[True] * 3] * 2, [1.0, 0.0], [0, 0])
    data = as_verl(case)
    data.batch["rollout_log_probs"] = data.batch.pop("old_log_probs")
    data = plug.compute_advantage(data_of(plug, data), adv_estimator="leaf")
    assert_rows_close(case.rows_of(data.batch["advantages"]), case.expected())


def through_the_mixin(plug: types.ModuleType, whole: Batch, config: Any = None, estimator: str = "leaf") -> Any:
    """Advantages from a trainer that reads all but the responses from the queue, as that of 0.9 does."""

    class Fields(dict):
        def to_padded_tensor(self) -> dict[str, torch.Tensor]:
            return dict(self)

    def kv_batch_get(keys: list[str], partition_id: str, select_fields: list[str]) -> Fields:
        assert (keys, partition_id) == (whole.keys, "train")
        return Fields({name: whole.batch[name] for name in select_fields if name in whole.batch})

    queue = types.ModuleType("transfer_queue")
    queue.kv_batch_get = kv_batch_get

    class Theirs:
        def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
            tensors = {name: value for name, value in whole.batch.items() if name != "responses"}
            data = data_of(plug, Batch(tensors, whole.non_tensor_batch))
            metrics["seen"] = True
            return sys.modules["verl.trainer.ppo.ray_trainer"].compute_advantage(data, estimator, config=config)

    class Mine(plug.LeafAdvantage, Theirs):
        pass

    metrics: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "transfer_queue", queue)
        data = Mine()._compute_advantage(whole, metrics)
    assert metrics == {"seen": True}
    with pytest.raises(RuntimeError, match=f"^the estimator '{estimator}' needs 'responses' and 'old_log_probs'"):
        Theirs()._compute_advantage(whole, metrics)
    return data.batch["advantages"]


def test_the_mixin_brings_what_the_trainer_left_out(plug: types.ModuleType) -> None:
    case = Rollouts([[1, 2, 3], [1, 2, 4], [1]], [[-1.0, -5.0, -2.0]] * 2 + [[-1.0]], [[True] * 3] * 2 + [[True]],
                    [1.0, 0.0, 0.5], [0, 0, 0])  # fmt: skip
    assert_rows_close(case.rows_of(through_the_mixin(plug, as_verl(case))), case.expected())


@st.composite
def sessions(draw: st.DrawFn) -> tuple[Rollouts, list[int], list[list[int]]]:
    """Rollouts, and rows cut out of them: how many each gives, and their order in the batch."""
    case = draw(rollouts(longest=9))
    cuts = [sorted(draw(st.lists(st.integers(0, len(row)), max_size=2))) for row in case.token_ids]
    rows = [(i, *ends) for i, (row, cut) in enumerate(zip(case.token_ids, cuts, strict=True))
            for ends in zip([0, *cut], [*cut, len(row)], strict=True)]  # fmt: skip
    return case, draw(st.permutations(range(len(rows)))), rows


@given(case=sessions())
@examples(torch=25)
def test_a_session_of_several_rows_is_one_rollout(plug: types.ModuleType, case: Any) -> None:
    """The reference on their tokens end to end, with a token between them that no other session has."""
    whole, order, parts = case
    rows = [parts[i] for i in order]
    cut = Rollouts(*([column[i][begin:end] for i, begin, end in rows]
                     for column in (whole.token_ids, whole.logprobs, whole.mask)),
                   [whole.rewards[i] for i, *_ in rows], [whole.groups[i] for i, *_ in rows])  # fmt: skip
    batch = as_verl(cut)
    numbers = [sum(part[0] == i for part in parts[:place]) for place, (i, *_) in zip(order, rows, strict=True)]
    batch.keys = [f"prompt_{i}_{number}" for (i, *_), number in zip(rows, numbers, strict=True)]
    # Of other rows than the last the reward does not count.
    for place, (i, *_) in enumerate(rows):
        if numbers[place] != sum(part[0] == i for part in parts) - 1:
            batch.batch["token_level_rewards"][place] = 3.0
    actual = through_the_mixin(plug, batch, {"leaf": whole.options})

    joined = Rollouts([], [], [], [], [], whole.options)
    places: dict[tuple[int, int], tuple[int, int]] = {}  # of a part: its session, and where it begins there
    for session, i in enumerate(dict.fromkeys(i for i, *_ in rows)):  # ties go to the session that comes first
        ids: list[int] = []
        logprobs: list[float] = []
        mask: list[bool] = []
        for number, (_, begin, end) in enumerate(part for part in parts if part[0] == i):
            places[i, number] = session, len(ids)
            end = begin + max((t + 1 for t in range(end - begin) if whole.mask[i][begin + t]), default=0)
            ids += [*whole.token_ids[i][begin:end], -1 - i]
            logprobs += [*whole.logprobs[i][begin:end], 0.0]
            mask += [*whole.mask[i][begin:end], False]
        for column, value in zip(("token_ids", "logprobs", "mask", "rewards", "groups"),
                                 (ids, logprobs, mask, whole.rewards[i], whole.groups[i]), strict=True):  # fmt: skip
            getattr(joined, column).append(value)
    session_advantages = expected(joined)
    for row, (i, begin, end), number in zip(cut.rows_of(actual), rows, numbers, strict=True):
        session, start = places[i, number]
        padded = session_advantages[session][start:] + [0.0] * (end - begin)
        mask = whole.mask[i][begin:end]
        assert_rows_close([row], [[v if m else 0.0 for v, m in zip(padded, mask, strict=False)]])


@pytest.mark.parametrize("name", ["leaf", "tempo", "tree_td", "treerl"])
def test_the_reward_of_a_session_counts_once(plug: types.ModuleType, name: str) -> None:
    """Rewards 1, 0, 0, the first in two rows: a mean of 1/3, by the reference."""
    case = unmasked([[1, 2], [3, 4, 5], [6, 7], [8, 9]], [0.0, 1.0, 1.0, 0.0])
    batch = as_verl(case)
    batch.keys = ["u_1_0", "u_0_1", "u_0_0", "u_2_0"]
    options = {"num_boundaries": 0, "terms": "global"} if name == "leaf" else {}
    config = {"norm_adv_by_std_in_grpo": False, name: options}
    actual = case.rows_of(through_the_mixin(plug, batch, config, name))
    joined = unmasked([[1, 2], [6, 7, -1, 3, 4, 5], [8, 9]], [0.0, 1.0, 0.0])
    joined.mask[1][2] = False
    joined.logprobs = [[-0.0, -0.5], [-0.0, -0.5, 0.0, -0.0, -0.5, -1.0], [-0.0, -0.5]]
    reference = python_ref.span_advantages if name == "leaf" else getattr(python_ref, name)
    none = {"normalize": "none"} if name in ("leaf", "tree_td") else {}
    rows = reference(joined.logprobs, joined.token_ids, joined.rewards, response_mask=joined.mask, **none, **options)
    assert_rows_close(actual, [rows[0], rows[1][3:], rows[1][:2], rows[2]])
    if name == "leaf":
        assert_rows_close(actual, [[-1 / 3] * 2, [2 / 3] * 3, [2 / 3] * 2, [-1 / 3] * 2])


def test_sessions_as_in_the_grpo_of_verl(plug: types.ModuleType) -> None:
    if sys.modules["verl"].__dict__.get("DataProto") is None:
        pytest.skip("the contract has no trainer")
    theirs = pytest.importorskip("verl.trainer.ppo.v1.utils", reason="needs verl with its TransferQueue")
    case = unmasked([[1, 2], [3, 4, 5], [6, 7], [8, 9], [1, 1], [2]], [0.0, 1.0, 1.0, 0.0, 0.25, 0.5])
    case.groups[4:] = [1, 1]
    batch = as_verl(case)
    batch.keys = ["u_1_0", "u_0_1", "u_0_0", "u_2_0", "v_0_0", "v_1_0"]
    options = {"num_boundaries": 0, "terms": "global", "normalize": "reward_std"}
    actual = through_the_mixin(plug, batch, {"leaf": options})
    compute = theirs.compute_advantage_for_multi_trajectories
    data = compute(data_of(plug, batch), batch_keys=batch.keys, adv_estimator="grpo", config={})
    torch.testing.assert_close(actual, data.batch["advantages"], rtol=1e-5, atol=1e-5)


def test_no_rows(plug: types.ModuleType) -> None:
    batch = {"responses": torch.zeros(0, 3, dtype=torch.int64), "old_log_probs": torch.zeros(0, 3)}
    none = torch.zeros(0, 3)
    assert plug.compute_advantage_of("leaf", none, none, index=[], batch=batch)[0].shape == (0, 3)


def test_rows_that_are_not_those_at_hand(plug: types.ModuleType) -> None:
    one = torch.zeros(1, 1)
    batch = {"responses": torch.zeros(2, 1, dtype=torch.int64), "old_log_probs": torch.zeros(2, 1)}
    with pytest.raises(ValueError, match="^response_mask must be shaped like the responses that the estimator 'leaf' "):
        plug.compute_advantage_of("leaf", one, one, index=["a"], batch=batch)


@pytest.mark.parametrize("kind", [ImportError, RuntimeError])
def test_what_to_install(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lazy imports turn what is missing into a RuntimeError of several lines."""

    class Finder:
        @staticmethod
        def find_spec(name: str, path: Any = None, target: Any = None) -> None:
            if name == "verl":
                raise kind("Failed to import it\n because of the following error:\nNo module named 'requests'")

    for name in [name for name in sys.modules if name.partition(".")[0] == "verl" or name == MODULE]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    with pytest.raises(ImportError) as caught:
        importlib.import_module(MODULE)
    assert str(caught.value) == (
        "leafkernels.integrations.verl needs verl, which cannot be imported here (Failed to import it because of the "
        "following error: No module named 'requests'); pip install 'leafkernels[verl]'"
    )


def test_without_uids(plug: types.ModuleType) -> None:
    one = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="^index must hold the uid of each row's prompt for the estimator 'leaf', got"):
        plug.compute_advantage_of("leaf", one, one)


def test_the_mixin_over_the_trainer_of_verl(plug: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """verl's own ``_compute_advantage``, over a transfer queue that is a dict of nested tensors."""
    if sys.modules["verl"].__dict__.get("DataProto") is None:
        pytest.skip("the contract has no trainer")
    base = pytest.importorskip("verl.trainer.ppo.v1.trainer_base", reason="needs verl with its TransferQueue")
    from omegaconf import OmegaConf
    from tensordict import TensorDict

    rows = [[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 6], [7, 8], [7, 9, 1]]
    logprobs = [[-0.1, -0.2, -3.0 - i, -0.5 - i][: len(row)] for i, row in enumerate(rows)]
    mask = [[t != 1 or i != 2 for t in range(len(row))] for i, row in enumerate(rows)]
    case = Rollouts(rows, logprobs, mask, [1.0, 0.0, 0.5, 0.0, 2.0], [0, 0, 0, 1, 1])

    def nested(values: list[list], dtype: torch.dtype) -> torch.Tensor:
        return torch.nested.as_nested_tensor([torch.tensor(row, dtype=dtype) for row in values], layout=torch.jagged)

    scores = [[0.0] * (len(row) - 1) + [reward] for row, reward in zip(rows, case.rewards, strict=True)]
    store = {
        "responses": nested(rows, torch.int64),
        "old_log_probs": nested(logprobs, torch.float32),
        "response_mask": nested(mask, torch.int64),
        "rm_scores": nested(scores, torch.float32),
        "uid": np.array([f"prompt {group}" for group in case.groups], dtype=object),
    }

    def get(keys: list[str], partition_id: str, select_fields: list[str]) -> TensorDict:
        from verl.utils import tensordict_utils

        fields = {name: store[name] for name in select_fields if name in store}
        return tensordict_utils.get_tensordict(
            {name: list(field) if name == "uid" else field for name, field in fields.items()}
        )

    def put(keys: list[str], partition_id: str, fields: TensorDict) -> str:
        store.update(fields.items())
        return "written"

    import transfer_queue

    monkeypatch.setattr(transfer_queue, "kv_batch_get", get)
    monkeypatch.setattr(transfer_queue, "kv_batch_put", put)

    mine = type("Mine", (plug.LeafAdvantage, base.PPOTrainer), {})
    mine.__abstractmethods__ = frozenset()
    trainer = object.__new__(mine)
    algorithm = {"use_kl_in_reward": False, "adv_estimator": "leaf", "gamma": 1.0, "lam": 1.0}
    trainer.config = OmegaConf.create({"algorithm": algorithm, "actor_rollout_ref": {"rollout": {"n": 3}}})

    class Meta:
        keys, partition_id = [f"key {i}" for i in range(5)], "train"

        def __len__(self) -> int:
            return 5

    assert trainer._compute_advantage(Meta(), {}) == "written"
    for row, want in zip(store["advantages"].unbind(), case.expected(), strict=True):
        assert_rows_close([row.tolist()], [want])


@pytest.mark.slow
def test_main_ppo_trains(tmp_path: Path) -> None:
    """The whole of verl on a CPU: two steps, with weights that reach the sampler in between."""
    if not all(
        map(importlib.machinery.PathFinder.find_spec, ("verl", "transfer_queue"))
    ):  # whatever stands in for them
        pytest.skip("needs verl with its TransferQueue: pip install -e '.[verl]' TransferQueue")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "examples" / "verl_leaf" / "run.py", tmp_path / "run", "steps=2"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    numbers = re.findall(r"training/rollout_actor_probs_pearson_corr:([0-9.]+)", run.stdout)
    assert len(numbers) == 2 and min(map(float, numbers)) > 0.95, numbers  # the sampler has the trainer's weights
    assert len(re.findall(r"actor/grad_norm:(?!0\.0\b)[0-9.]+", run.stdout)) == 2
