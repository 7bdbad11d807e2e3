"""What a search costs on vLLM and on transformers, by the length of the prompt: ``python -m bench.vllm_search``.

tokens      that the model runs: of the prompt once and of each branch on transformers; on vLLM also what is run anew
            since its prefix cache holds whole blocks only; without a cache each request would run all of its ids
seconds     of the processor, the least of three; on one thread, of a model so small that most of it is overhead

Each search runs on both first, and they must agree. It needs vLLM, and its engine in this process.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from leafkernels.lookahead import RewardChannel, RewardTransformer, Search, TransformersStepper, search
from leafkernels.lookahead.vllm import VLLMStepper, engine_arguments

CHUNK, TOKENS, BLOCK = 8, 48, 32


def save(folder: Path, positions: int) -> tuple[str, Path]:
    """A small Llama of random weights and a channel."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=positions,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder / "model")
    RewardTransformer(model, RewardChannel(2, 128, 16)).save_pretrained(folder / "channel")
    return str(folder / "model"), folder / "channel"


def timed(run: Callable[[], Search]) -> tuple[Search, float]:
    """The result, and the least processor time of three."""
    seconds = []
    for _ in range(3):
        start = time.process_time()
        found = run()
        seconds.append(time.process_time() - start)
    return found, min(seconds)


def anew(llm: Any, prompt: torch.Tensor, options: dict[str, int]) -> Search:
    """A search whose prompt no cache holds, as on transformers."""
    llm.reset_prefix_cache()
    return search(VLLMStepper(llm, ahead=CHUNK), prompt, **options)


def check(ours: Search, theirs: Search) -> None:
    assert ours.token_ids == theirs.token_ids, (ours.token_ids, theirs.token_ids)
    assert abs(ours.score - theirs.score) < 2e-5


def run(prompts: list[int], shapes: list[tuple[int, int]], console: Console) -> None:
    from vllm import LLM

    with tempfile.TemporaryDirectory() as name:
        longest = max(prompts) + TOKENS
        model, channel = save(Path(name), longest + 1)
        settings: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True}
        settings |= {"max_model_len": longest + 1, "max_num_seqs": 64, "block_size": BLOCK}
        llm = LLM(**engine_arguments(model, channel, **settings))
        theirs = TransformersStepper(RewardTransformer.from_pretrained(channel, model))
        table = Table(title=f"searches of {TOKENS} tokens, chunk {CHUNK}, blocks of {BLOCK}, one thread")
        for column in (
            "prompt",
            "width, depth",
            "branches",
            "tokens: transformers",
            "vLLM",
            "no cache",
            "s",
            "s, vLLM",
        ):
            table.add_column(column, justify="right", no_wrap=True)
        for count in prompts:
            for width, depth in shapes:
                torch.manual_seed(count)
                prompt = torch.randint(512, (count,))
                options = {"width": width, "chunk": CHUNK, "depth": depth, "max_new_tokens": TOKENS}
                wanted, seconds = timed(partial(search, theirs, prompt, **options))
                found, vllm_seconds = timed(partial(anew, llm, prompt, options))
                check(found, wanted)
                ours = VLLMStepper(llm, ahead=CHUNK)
                llm.reset_prefix_cache()
                search(ours, prompt, **options)
                numbers = [count + wanted.num_tokens, ours.num_computed, ours.num_asked]
                table.add_row(
                    str(count),
                    f"{width}, {depth}",
                    str(wanted.peak_branches),
                    *(f"{number:,}" for number in numbers),
                    f"{seconds:.2f}",
                    f"{vllm_seconds:.2f}",
                )
            table.add_section()
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small sizes: proves that it runs")
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    torch.set_num_threads(1)
    if args.tiny:
        run([40], [(2, 0)], Console())
    else:
        run([256, 1024, 4096], [(1, 0), (2, 1), (2, 3)], Console())


if __name__ == "__main__":
    main()
