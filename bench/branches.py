"""What a forward of many branches costs, by how they are held: ``python -m bench.branches`` (``--tiny``).

packed      all branches in one row: the cache holds the prefix once, and the tokens of each branch
rows        a row a branch: every row holds the prefix again
no cache    every branch is run anew from its first token

Each branch grows by ``STEPS`` tokens behind a prefix of P; the least processor time of a step of all branches is shown.
Before any time, the three must agree on the logits. Bytes are those of keys and values by formula: what the cache holds
at the last step (checked against the cache), and what attention reads of it in that step; without a cache, what it
computes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from leafkernels.lookahead import TransformersStepper

LAYERS, HEADS, KEY_HEADS, HEAD_SIZE, VOCABULARY = 2, 4, 1, 32, 64
STEPS = 6
# Beyond: minutes on a CPU.
MOST_TOKENS = 2**14


def build_model(positions: int) -> Any:
    """A small Llama of random weights, whose first logit is taken for its reward."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HEADS * HEAD_SIZE,
        intermediate_size=2 * HEADS * HEAD_SIZE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        head_dim=HEAD_SIZE,
        max_position_embeddings=positions,
    )
    model = transformers.LlamaForCausalLM(config).eval()

    class Scored:
        def __init__(self) -> None:
            self.config = config

        def __call__(self, **inputs: Any) -> Any:
            # Of a prompt only the last position is asked for.
            keep = 1 if inputs["input_ids"].shape[1] > 256 else 0
            output = model(**inputs, logits_to_keep=keep)
            return SimpleNamespace(logits=output.logits, rewards=output.logits[..., 0])

    return Scored()


@dataclass
class Case:
    prefix: Tensor  # (P,)
    tokens: Tensor  # (STEPS, branches)

    def parents(self, step: int) -> Tensor:
        count = self.tokens.shape[1]
        return torch.zeros(count, dtype=torch.int64) if step == 0 else torch.arange(count)


def with_cache(model: Any, case: Case, packed: bool) -> tuple[Tensor, float, int]:
    """Logits of the last step, the least time of a step, and columns of the cache at the end."""
    stepper = TransformersStepper(model, packed=packed)
    stepper.prefill(case.prefix)
    seconds = []  # of the processor: on a busy machine the clock measures others
    for step, token_ids in enumerate(case.tokens):
        start = time.process_time()
        logits, _ = stepper.extend(case.parents(step), token_ids)
        seconds.append(time.process_time() - start)
    # The first step copies the prefix to its rows, once for all.
    return logits, min(seconds[1:]), stepper.cache_columns


@torch.no_grad()
def without_cache(model: Any, case: Case) -> tuple[Tensor, float, int]:
    ids = torch.cat([case.prefix.expand(case.tokens.shape[1], -1), case.tokens.T], dim=1)
    start = time.process_time()
    output = model(input_ids=ids, use_cache=False)
    return output.logits[:, -1], time.process_time() - start, 0


def column_bytes() -> int:
    """Keys and values of a token, float32."""
    return 2 * LAYERS * KEY_HEADS * HEAD_SIZE * 4


def counted(way: str, prefix: int, branches: int) -> tuple[int, int]:
    """Columns that the cache holds at the last step, and that attention reads in it."""
    if way == "packed":
        held = prefix + branches * STEPS
        return held, held
    held = branches * (prefix + STEPS)
    return (held, held) if way == "rows" else (0, held)


def run(prefixes: list[int], counts: list[int], console: Console) -> None:
    model = build_model(max(prefixes) + STEPS)
    ways: dict[str, Callable[[Case], tuple[Tensor, float, int]]] = {
        "packed": lambda case: with_cache(model, case, True),
        "rows": lambda case: with_cache(model, case, False),
        "no cache": lambda case: without_cache(model, case),
    }
    table = Table(
        title=f"processor time of a step of all branches, {LAYERS} layers, {torch.get_num_threads()} thread(s)"
    )
    for column in ("prefix", "branches", "held", "ms", "ratio", "cache, kB", "reads, kB"):
        table.add_column(column, justify="right", no_wrap=True)
    for prefix in prefixes:
        for branches in counts:
            torch.manual_seed(prefix)
            case = Case(torch.randint(VOCABULARY, (prefix,)), torch.randint(VOCABULARY, (STEPS, branches)))
            first: tuple[Tensor, float] | None = None
            for way, measure in ways.items():
                if way == "no cache" and branches * prefix > MOST_TOKENS:
                    table.add_row(str(prefix), str(branches), way, "not run", "", "", "")
                    continue
                logits, seconds, columns = measure(case)
                first = first or (logits, seconds)
                torch.testing.assert_close(logits, first[0], rtol=1e-4, atol=1e-4)
                held, read = counted(way, prefix, branches)
                assert columns == held, (way, columns, held)
                kilobytes = [f"{columns * column_bytes() / 1000:,.0f}" for columns in (held, read)]
                ratio = f"{seconds / first[1]:.2f}"
                table.add_row(str(prefix), str(branches), way, f"{1000 * seconds:.1f}", ratio, *kilobytes)
            table.add_section()
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small sizes: proves that it runs")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (default 1)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.tiny:
        run([16], [2, 4], Console())
    else:
        run([256, 1024, 4096, 8192], [2, 8, 32, 64], Console())


if __name__ == "__main__":
    main()
