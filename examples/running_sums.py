"""The task, the vocabulary and the tiny model that the example scripts share.

A prompt such as ``4+9+7+5=`` asks for a sum, and the answer works it out in steps: ``4+9=13,13+7=20,20+5=25.``
A step may also add two terms at once (``4+9+7=20,20+5=25.``), which is shorter and easier to get wrong. So the
responses to one prompt share a prefix, part either at a choice of step or at a slip, and differ in length; and one
slip early on usually spoils everything after it. That is the shape of a reasoning trace, at a size that a laptop's
processor trains in seconds.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from leafkernels import surprisal_entropy
from leafkernels.models import tree_logprobs

PAD_TOKEN = "<pad>"
END_TOKEN = "."
TOKENS = [PAD_TOKEN, END_TOKEN, *"0123456789", "+", "=", ","]
TOKEN_TO_ID = {token: index for index, token in enumerate(TOKENS)}
PAD_ID, END_ID = TOKEN_TO_ID[PAD_TOKEN], TOKEN_TO_ID[END_TOKEN]


def encode(text: str) -> list[int]:
    """Return one id per character."""
    return [TOKEN_TO_ID[character] for character in text]


def decode(token_ids: Sequence[int]) -> str:
    """Return the text of the ids; padding shows up as ``<pad>``."""
    return "".join(TOKENS[index] for index in token_ids)


def is_held_out(prompt: str) -> bool:
    """Say whether a prompt belongs to the tenth that training never sees; a checksum keeps the split the same."""
    return zlib.crc32(prompt.encode()) % 10 == 0


def draw_prompt(rng: random.Random, num_terms: int, *, held_out: bool) -> str:
    """Draw a prompt of ``num_terms`` digits from 1 to 9 out of one side of the split."""
    while True:
        prompt = "+".join(str(rng.randint(1, 9)) for _ in range(num_terms)) + "="
        if is_held_out(prompt) == held_out:
            return prompt


def worked_answer(prompt: str, rng: random.Random, shortcut_rate: float = 0.4) -> str:
    """Write a correct answer; each step adds two terms instead of one with probability ``shortcut_rate``."""
    first, *rest = prompt.rstrip("=").split("+")
    total, steps = int(first), []
    while rest:
        size = 2 if rng.random() < shortcut_rate else 1
        taken, rest = rest[:size], rest[size:]
        result = total + sum(map(int, taken))
        steps.append(f"{total}+{'+'.join(taken)}={result}")
        total = result
    return ",".join(steps) + END_TOKEN


def score(prompt: str, response: str) -> float:
    """Return 1.0 if the response ends, and ends in the right number, else 0.0; the steps before it are not judged."""
    target = sum(map(int, prompt.rstrip("=").split("+")))
    return float(response.endswith(f"={target}{END_TOKEN}"))


def seed_everything(seed: int) -> random.Random:
    """Seed torch, hold it to one thread, and return the generator that draws the tasks."""
    # Matrices this small gain little from a second thread, and waiting for one on a busy machine costs minutes.
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    return random.Random(seed)


def build_model(hidden_size: int = 64, num_layers: int = 2) -> LlamaForCausalLM:
    """Build an untrained Llama of about 84,000 weights, in float32."""
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )
    return LlamaForCausalLM(config)


def supervised_batch(
    rng: random.Random, num_terms: Sequence[int], size: int, teacher: Callable[[str, random.Random], str]
) -> tuple[Tensor, Tensor]:
    """Draw worked examples, as ``labelled`` gives them."""
    prompts = (draw_prompt(rng, rng.choice(num_terms), held_out=False) for _ in range(size))
    return labelled((prompt, teacher(prompt, rng)) for prompt in prompts)


def labelled(examples: Iterable[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """Of prompts and answers, ids and labels, both (size, T); prompt and padding are left out of the loss by -100."""
    pairs = list(examples)
    rows = [torch.tensor(encode(prompt + answer)) for prompt, answer in pairs]
    token_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD_ID)
    is_prompt = torch.arange(token_ids.shape[1]) < torch.tensor([len(prompt) for prompt, _ in pairs])[:, None]
    return token_ids, token_ids.masked_fill(is_prompt | (token_ids == PAD_ID), -100)


def warm_up(
    model: LlamaForCausalLM,
    rng: random.Random,
    *,
    num_terms: Sequence[int],
    steps: int,
    batch_size: int = 64,
    teacher: Callable[[str, random.Random], str] = worked_answer,
) -> Iterator[tuple[int, float]]:
    """Train on worked examples and yield (step, loss) after each step, so that the caller may stop early."""
    return supervise(model, (supervised_batch(rng, num_terms, batch_size, teacher) for _ in range(steps)))


def supervise(model: LlamaForCausalLM, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[int, float]]:
    """Take a step on each batch of ids and labels, and yield (step, loss) after it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    # A one-cycle schedule would tie the rate to `steps`, which a caller that stops early never reaches.
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
    model.train()
    for step, (token_ids, labels) in enumerate(batches, 1):
        loss = model(input_ids=token_ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        yield step, loss.item()


@dataclass
class Rollouts:
    """Sampled responses to B prompts of equal length P, G for each; the G rows of one prompt are consecutive."""

    sequences: Tensor  # (B * G, P + T), prompt and response
    token_ids: Tensor  # (B * G, T), response alone, padded on the right
    response_mask: Tensor  # (B * G, T), True up to and including the end token
    texts: list[str]  # B * G responses
    rewards: Tensor  # (B * G,)


@torch.no_grad()
def sample(model: Any, prompts: Sequence[str], num_rollouts: int = 1, *, greedy: bool = False) -> Rollouts:
    """Answer each prompt ``num_rollouts`` times, at temperature 1 unless ``greedy``."""
    if len({len(prompt) for prompt in prompts}) != 1:
        raise ValueError("the prompts of one call must have the same length, so that none needs padding on the left")
    model.eval()
    prompt_ids = torch.tensor([encode(prompt) for prompt in prompts]).repeat_interleave(num_rollouts, dim=0)
    # top_k=0 and top_p=1 leave the distribution whole; otherwise the samples would not follow the model's logprobs.
    choice = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    # A step that adds one term takes at most 8 characters, and one prompt term takes 2.
    limit = 4 * prompt_ids.shape[1]
    sequences = model.generate(
        input_ids=prompt_ids, attention_mask=torch.ones_like(prompt_ids), max_new_tokens=limit, **choice
    )
    token_ids = sequences[:, prompt_ids.shape[1] :]
    ended_before = (token_ids == END_ID).cumsum(dim=1) - (token_ids == END_ID).long() > 0
    response_mask = ~ended_before
    texts = [decode(row[mask].tolist()) for row, mask in zip(token_ids, response_mask, strict=True)]
    asked = [prompt for prompt in prompts for _ in range(num_rollouts)]
    rewards = torch.tensor([score(prompt, text) for prompt, text in zip(asked, texts, strict=True)])
    return Rollouts(sequences, token_ids, response_mask, texts, rewards)


def token_logprobs(model: Any, rollouts: Rollouts, *, share_prefixes: bool = False) -> Tensor:
    """Return the log-probability of every response token under ``model``, (B * G, T), 0 on padding.

    With ``share_prefixes`` what the rollouts share runs through the model once, where that is fewer tokens.
    """
    length = rollouts.token_ids.shape[1]
    if share_prefixes:
        asked = torch.nn.functional.pad(rollouts.response_mask, (rollouts.sequences.shape[1] - length, 0))
        attention = asked | (torch.arange(asked.shape[1]) < asked.shape[1] - length)
        return tree_logprobs(model, rollouts.sequences, attention, response_mask=asked).logprobs[:, -length:]
    # The logits at one position score the token at the next, hence the window that ends one place early.
    logits = model(input_ids=rollouts.sequences).logits[:, -length - 1 : -1]
    return surprisal_entropy(logits, rollouts.token_ids, response_mask=rollouts.response_mask).logprobs


def greedy_accuracy(model: Any, prompts: Sequence[str]) -> float:
    """Return the share of prompts whose most likely answer is right."""
    return sample(model, prompts, greedy=True).rewards.mean().item()
