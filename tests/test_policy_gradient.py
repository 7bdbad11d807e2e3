"""The Dr. GRPO identity, end to end through a small model and autograd (it follows from the law of conservation).

Global terms, no multiplicity factor, raw, ratio 1 and a loss that sums over tokens: whatever the boundaries, the
gradient is that of Dr. GRPO, A = r - mean. Members of a node share their tokens, so a span's credit only moves between
equal summands.
"""

import pytest
import torch
from rollouts import BACKENDS, DEVICE, random_group

import leafkernels


class TinyPolicy(torch.nn.Module):
    """A recurrent language model small enough to see every gradient."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(vocabulary + 1, 8)
        self.recurrent = torch.nn.GRU(8, 16, batch_first=True)
        self.head = torch.nn.Linear(16, vocabulary)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Log-probabilities (G, T) of the tokens, each given those before it."""
        begin = torch.full_like(token_ids[:, :1], self.embed.num_embeddings - 1)
        hidden, _ = self.recurrent(self.embed(torch.cat([begin, token_ids[:, :-1]], dim=1)))
        return self.head(hidden).log_softmax(-1).gather(-1, token_ids[..., None]).squeeze(-1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_boundaries", [1, 2, 5])
def test_global_terms_have_the_gradient_of_dr_grpo(backend: str, num_boundaries: int) -> None:
    torch.manual_seed(num_boundaries)
    group = random_group(8, 14, seed=num_boundaries, vocabulary=2)
    policy = TinyPolicy(vocabulary=2).to(DEVICE)
    mask = torch.ones(8, 14, dtype=torch.bool, device=DEVICE)
    mask[3, 9:], mask[5, 11:] = False, False
    group["token_ids"][7] = group["token_ids"][2]  # an identical pair shares every boundary
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.5, 0.0, 0.25, 1.0], device=DEVICE)

    def gradients(weights: torch.Tensor) -> list[torch.Tensor]:
        logprobs = policy(group["token_ids"])
        ratio = (logprobs - logprobs.detach()).exp()
        return list(torch.autograd.grad(-(ratio * weights * mask).sum(), list(policy.parameters())))

    old = policy(group["token_ids"]).detach()
    options = {"response_mask": mask, "num_boundaries": num_boundaries, "multiplicity_power": 0.0, "backend": backend}
    leaf = leafkernels.span_advantages(old, group["token_ids"], rewards, terms="global", normalize="none", **options)
    flat = (rewards - rewards.mean())[:, None].expand(leaf.shape)
    assert not torch.equal(leaf * mask, flat * mask), "nothing is shared: the test would test nothing"
    for actual, expected in zip(gradients(leaf), gradients(flat), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    # It is the global term that has this property, and the test can see that another has not.
    local = leafkernels.span_advantages(old, group["token_ids"], rewards, terms="local", normalize="none", **options)
    worst = max(float((a - b).abs().max()) for a, b in zip(gradients(local), gradients(flat), strict=True))
    assert worst > 1e-3
