"""What verl's own losses are of a few tensors, value and gradient: `python tests/verl_losses.py > verl_losses.json`.

It needs verl; the tests read the file. Numbers are float64. Every case has rows of different lengths, ratios on both
sides of each bound, and advantages that differ by token ("rows": by row).
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

FILE = Path(__file__).with_suffix(".json")

# Our kind and options; verl's name, its configuration, and what it is given.
CASES: list[tuple[dict[str, Any], str, dict[str, Any], str]] = [
    ({"kind": "clip", "dual_clip": 1.3, "max_log_ratio": 20.0}, "vanilla", {"clip_ratio_c": 1.3}, "tokens"),
    ({"kind": "clip", "clip": (0.1, 0.3), "dual_clip": 3.0}, "vanilla", {"low": 0.1, "high": 0.3}, "weights"),
    ({"kind": "clip", "importance": "sequence"}, "gspo", {}, "tokens"),
    ({"kind": "cispo", "clip": (0.1, 0.2)}, "cispo", {"low": 0.1, "high": 0.2}, "weights"),
    ({"kind": "sapo", "tau": (1.0, 1.05)}, "sapo", {}, "weights"),
    ({"kind": "gmpo", "clip": (0.2, 0.4)}, "geo_mean", {"low": 0.2, "high": 0.4}, "rows"),
    ({"kind": "dppo_tv", "clip": (0.02, 0.03), "max_ratio": 1.2}, "dppo_tv", {"low": 0.02, "high": 0.03}, "weights"),
    (
        {"kind": "dppo_kl", "clip": (0.002, 0.003), "max_ratio": 1.2},
        "dppo_kl",
        {"low": 0.002, "high": 0.003},
        "weights",
    ),
    ({"kind": "dro", "beta": 0.3}, "dro", {"dro_beta": 0.3}, "weights"),
    ({"kind": "reinforce"}, "gpg", {}, "weights"),
    ({"kind": "kl_cov", "share": 0.3, "penalty": 0.7}, "kl_cov", {"kl_cov_ratio": 0.3, "ppo_kl_coef": 0.7}, "tokens"),
    # All candidates are dropped, whichever are drawn.
    (
        {"kind": "clip_cov", "share": 1.0, "covariance": (0.1, 0.8)},
        "clip_cov",
        {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.1, "clip_cov_ub": 0.8},
        "tokens",
    ),
]
KL_KINDS = ("k1", "k2", "k3", "abs", "k3+")
AGGREGATES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


def tensors(given: str) -> dict[str, Tensor]:
    """Of three rows, and a fourth without a token."""
    generator = torch.Generator().manual_seed(11)
    size = (4, 6)
    noise = [torch.randn(size, dtype=torch.float64, generator=generator) for _ in range(4)]
    old = -torch.rand(size, dtype=torch.float64, generator=generator) * 2 - 0.05
    mask = torch.arange(6) < torch.tensor([6, 3, 4, 0])[:, None]
    mask[2, 1] = False
    advantages = noise[1][:, :1].expand(size) if given == "rows" else noise[1]
    found = {"logprobs": (old + 0.3 * noise[0]).clamp_max(-0.01), "old_logprobs": old, "advantages": advantages}
    found |= {"response_mask": mask, "ref_logprobs": old + 0.3 * noise[2]}
    return found | ({"token_weights": noise[3].abs()} if given == "weights" else {})


def verl_loss(name: str, options: dict[str, Any], given: str) -> dict[str, Any]:
    """Value, and gradient in the log-probabilities, of verl's function."""
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.config import ActorConfig

    class Config(ActorConfig):
        def __init__(self) -> None:
            fields = {"clip_ratio": 0.2, "clip_ratio_low": options.get("low"), "clip_ratio_high": options.get("high")}
            fields |= {"tau_pos": 1.0, "tau_neg": 1.05, "clip_ratio_c": options.get("clip_ratio_c", 3.0)}
            if name.startswith("dppo"):
                fields["clip_ratio_c"] = 1.2
            policy = {"clip_cov_ratio": None, "clip_cov_lb": None, "clip_cov_ub": None, "dro_beta": None}
            policy |= {"kl_cov_ratio": None, "ppo_kl_coef": None}
            fields |= {"policy_loss": SimpleNamespace(**policy | options), "global_batch_info": {}}
            for field, value in fields.items():
                object.__setattr__(self, field, value)

        def get(self, field: str, default: Any = None) -> Any:
            return getattr(self, field, default)

    x = tensors(given)
    leaf = x["logprobs"].clone().requires_grad_()
    loss, _ = get_policy_loss_fn(name)(
        x["old_logprobs"],
        leaf,
        x["advantages"],
        x["response_mask"].double(),
        "token-mean",  # but "sapo" and "geo_mean", which have one of their own
        Config(),
        x.get("token_weights"),
    )
    (gradient,) = torch.autograd.grad(loss, leaf)
    return {"loss": loss.item(), "gradient": gradient.tolist()}


def verl_divergence(kind: str) -> dict[str, Any]:
    """The sum over the tokens that count, and its gradient."""
    from verl.trainer.ppo.core_algos import kl_penalty

    x = tensors("tokens")
    leaf = x["logprobs"].clone().requires_grad_()
    loss = (kl_penalty(leaf, x["ref_logprobs"], kind) * x["response_mask"]).sum()
    (gradient,) = torch.autograd.grad(loss, leaf)
    return {"loss": loss.item(), "gradient": gradient.tolist()}


def verl_aggregate(name: str) -> dict[str, Any]:
    """Of -A log p as the loss of each token."""
    from verl.trainer.ppo.core_algos import agg_loss

    x = tensors("tokens")
    leaf = x["logprobs"].clone().requires_grad_()
    loss = agg_loss(-x["advantages"] * leaf, x["response_mask"].double(), name)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return {"loss": loss.item(), "gradient": gradient.tolist()}


# Our options, and verl's level, threshold and normalisation.
WEIGHTS: list[tuple[dict[str, Any], str, str | float, bool]] = [
    ({"high": 1.3}, "token", 1.3, False),
    ({"high": 1.3, "normalize": True}, "token", 1.3, True),
    ({"mode": "mask", "low": 0.8, "high": 1.3}, "token", "0.8_1.3", False),
    ({"level": "sequence", "high": 1.1}, "sequence", 1.1, False),
    ({"level": "sequence", "mode": "mask", "low": 0.7, "high": 1.3}, "sequence", "0.7_1.3", False),
    ({"level": "sequence", "high": 1.1, "normalize": True}, "sequence", 1.1, True),
]
# verl's eleven, with a threshold that keeps some and rejects some; of k1 a pair of ratios.
REJECTIONS = {
    "token_k1": (0.8, 1.2),
    "token_k2": 0.03,
    "token_k3": 0.03,
    "seq_sum_k1": (0.9, 1.5),
    "seq_sum_k2": 0.2,
    "seq_sum_k3": 0.2,
    "seq_mean_k1": (0.95, 1.15),
    "seq_mean_k2": 0.04,
    "seq_mean_k3": 0.04,
    "seq_max_k2": 0.1,
    "seq_max_k3": 0.1,
}


def verl_weights(level: str, threshold: str | float, normalize: bool) -> dict[str, Any]:
    """The weights, where ``logprobs`` are those of the sampler, and their mean and effective sample size."""
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights

    x = tensors("tokens")
    weights, metrics = compute_rollout_correction_weights(
        x["old_logprobs"] - x["logprobs"], x["response_mask"].double(), level, threshold, normalize
    )
    numbers = {name: metrics[f"rollout_is_{name}"] for name in ("mean", "eff_sample_size")}
    return {"weights": weights.tolist(), **numbers}


def verl_rejection(name: str, threshold: Any) -> list[list[float]]:
    """The mask that is left."""
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_rejection_mask

    x = tensors("tokens")
    bound = "_".join(map(str, threshold)) if isinstance(threshold, tuple) else str(threshold)
    log_ratio, mask = x["old_logprobs"] - x["logprobs"], x["response_mask"].double()
    return compute_rollout_rejection_mask(log_ratio, mask, name, bound)[0].tolist()


def all_of_verl() -> dict[str, Any]:
    """What the file holds."""
    return {
        "losses": [verl_loss(name, options, given) for _, name, options, given in CASES],
        "divergences": {kind: verl_divergence(kind) for kind in KL_KINDS},
        "aggregates": {name: verl_aggregate(name) for name in AGGREGATES},
        "weights": [verl_weights(*case[1:]) for case in WEIGHTS],
        "rejections": {name: verl_rejection(name, threshold) for name, threshold in REJECTIONS.items()},
    }


if __name__ == "__main__":
    json.dump(all_of_verl(), sys.stdout)
