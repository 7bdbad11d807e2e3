"""What only a GPU can answer, what is worth most first: ``python bench/questions.py`` (``--tiny``, ``--limit S``).

Each answer is written down before the next question is asked, to one JSON and one page of ``bench/results``: whoever is
given twelve minutes of a device, or fewer, has what came until then. ``--tiny`` runs anywhere, under Triton's
interpreter, and only proves that the list runs.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the package need not be installed

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports a kernel

import leafkernels  # noqa: E402
from bench import report, tune  # noqa: E402
from bench.harness import DEVICE, best_of, copy_bandwidth, describe_machine, graph_of, median_of_events  # noqa: E402
from bench.rollouts import Shape  # noqa: E402

Row = dict[str, Any]


class Asked(NamedTuple):
    tiny: bool
    deadline: float
    """Of this question, in ``time.monotonic()``: what has not begun by then is left out."""


def why(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def rate(num_bytes: int, seconds: float) -> Row:
    found: Row = {"seconds": seconds, "bytes_per_second": num_bytes / seconds}
    if DEVICE == "cuda":
        found["share_of_copy"] = num_bytes / seconds / copy_bandwidth()
    return found


def kernels_are_right(asked: Asked) -> list[Row]:
    """The cases that tests execute as compiled, on the device, against the PyTorch backend there."""
    from compiled_kernels import CASES, tensors_of

    rows = []
    for name, (run, tolerance) in list(CASES.items())[:: 8 if asked.tiny else 1]:
        if time.monotonic() > asked.deadline:
            rows.append({"case": name, "answer": "left out"})
            continue
        try:
            with torch.device(DEVICE):
                found, expected = tensors_of(run("triton")), tensors_of(run("torch"))
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
            rows.append({"case": name, "answer": "right"})
        except Exception as error:  # an answer, too
            rows.append({"case": name, "answer": why(error)})
    return rows


def copy_rate(asked: Asked) -> list[Row]:
    """Bytes a second of a large copy, read and written."""
    if DEVICE == "cuda":
        return [{"bytes_per_second": copy_bandwidth()}]
    source = torch.zeros(1 << 20)
    return [rate(2 * source.numel() * 4, best_of(source.clone, 3))]


def vocabulary_kernels(asked: Asked) -> list[Row]:
    """Surprisal and entropy, their gradient, and the clipped loss with its gradient, of bfloat16 logits."""
    rows = []
    for num_rows, vocab_size in tune.TINY_SHAPES if asked.tiny else ((8192, 151_936), (64, 151_936), (8192, 128_256)):
        if time.monotonic() > asked.deadline:
            break
        case = tune.Case(num_rows, vocab_size)
        for kernel, call in case.kernels().items():
            moved = tune.Case.TIMES[kernel] * case.logits.numel() * case.logits.element_size()
            call()
            rows.append(
                {"rows": num_rows, "vocabulary": vocab_size, "kernel": kernel} | rate(moved, tune.seconds_of(call))
            )
        del case
    return rows


def shapes(asked: Asked) -> list[Shape]:
    sizes = [(1, 3, 20)] if asked.tiny else [(1, 64, 8192), (64, 16, 8192), (1, 1024, 512), (64, 8, 200)]
    return [Shape("x".join(map(str, size)), *size, 2, ("sampled", "comb"), "") for size in sizes]


def prefix_lengths(asked: Asked) -> list[Row]:
    """What rollouts share; the bytes are those of their ids, read once."""
    rows = []
    for shape in shapes(asked):
        for inputs in shape.inputs:
            if time.monotonic() > asked.deadline:
                return rows
            ids = shape.batches(inputs, DEVICE, 1)[0].token_ids

            def call(ids: torch.Tensor = ids) -> Any:
                return leafkernels.common_prefix_lengths(ids, backend="triton")

            torch.testing.assert_close(call(), leafkernels.common_prefix_lengths(ids, backend="torch"), rtol=0, atol=0)
            found = rate(ids.numel() * ids.element_size(), tune.seconds_of(call))
            rows.append({"shape": shape.name, "inputs": inputs} | found)
    return rows


def pipeline_in_a_graph(asked: Asked) -> list[Row]:
    """Span advantages: the time of a call, and of a replay of the graph that holds it, whose result is the same."""
    rows = []
    for shape in shapes(asked):
        if time.monotonic() > asked.deadline:
            break
        batch = shape.batches("sampled", DEVICE, 1)[0]

        def call(batch: Any = batch) -> Any:
            rows = batch.logprobs, batch.token_ids, batch.rewards
            return leafkernels.span_advantages(*rows, num_boundaries=2, backend="triton")

        expected = leafkernels.span_advantages(
            batch.logprobs, batch.token_ids, batch.rewards, num_boundaries=2, backend="torch"
        )
        torch.testing.assert_close(call(), expected, rtol=1e-5, atol=1e-6)
        found: Row = {"shape": shape.name, "tokens": shape.num_tokens}
        if DEVICE == "cuda":
            replay, count = graph_of([call])
            found |= {
                "call_seconds": median_of_events(call, 20),
                "replay_seconds": median_of_events(replay, 20) / count,
            }
        else:
            found["call_seconds"] = best_of(call, 1)
        rows.append(found)
    return rows


def sampling_masks(asked: Asked) -> list[Row]:
    """Log-probabilities over 64 kept ids a token, from hidden states, beside those over the whole vocabulary."""
    if not hasattr(leafkernels, "SamplingMask"):
        return [{"answer": "this version has no sampling masks"}]
    rows, width, vocab, kept = (5, 16, 90, 4) if asked.tiny else (4096, 2048, 151_936, 64)
    dtype = torch.float32 if asked.tiny else torch.bfloat16
    generator = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.empty((rows, width), dtype=dtype, device=DEVICE).normal_(generator=generator).requires_grad_()
    weight = torch.empty((vocab, width), dtype=dtype, device=DEVICE).normal_(0, width**-0.5, generator=generator)
    ids = torch.randint(vocab, (rows, kept), generator=generator, device=DEVICE)
    offsets = torch.arange(0, rows * kept + 1, kept, device=DEVICE)
    mask = leafkernels.SamplingMask(ids.flatten(), offsets)
    answers = []
    for name, options in {"kept ids": {"sampling_mask": mask}, "whole vocabulary": {}}.items():

        def call(options: dict[str, Any] = options) -> Any:
            found = leafkernels.linear_surprisal_entropy(hidden, weight, ids[:, 0], backend="triton", **options)
            return torch.autograd.grad(found.surprisal.sum(), hidden)

        call()
        seconds = median_of_events(call, 5) if DEVICE == "cuda" else best_of(call, 1)
        answers.append({"over": name, "rows": rows, "kept": kept, "seconds": seconds})
    return answers


def tree_forward(asked: Asked) -> list[Row]:
    """A forward of a Llama shaped as those of a billion weights, on the prefix tree and on its rows."""
    try:
        import transformers
    except ImportError:
        return [{"answer": "needs transformers"}]
    from bench import bench_tree_logprobs as tree

    hidden, inner, layers, heads, kv_heads, vocab = (
        (32, 64, 2, 2, 2, 1000) if asked.tiny else (2048, 8192, 16, 32, 8, 128_256)
    )
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = transformers.AutoModelForCausalLM.from_config(config).to(
            torch.float32 if asked.tiny else torch.bfloat16
        )
    rows = []
    for prompt, k, answer in [(8, 3, 6)] if asked.tiny else [(1024, 8, 256), (256, 16, 256), (64, 8, 512)]:
        for inputs in ("sampled", "nothing"):
            if time.monotonic() > asked.deadline:
                return rows
            batch = tree.rollouts(tree.Case(prompt, k, answer, inputs))
            with torch.no_grad():
                error = (tree.of_tree(model, batch) - tree.of_rows(model, batch)).abs().max()
                theirs, ours = tree.in_turns(
                    [lambda: tree.of_rows(model, batch), lambda: tree.of_tree(model, batch)],  # noqa: B023
                    0 if asked.tiny else 3,
                )
            nodes = tree.tree_stats(model, batch.ids).nodes
            ratio = batch.ids.numel() / nodes
            found = {"prompt": prompt, "k": k, "answer": answer, "inputs": inputs, "token_ratio": ratio}
            times = {"rows_seconds": theirs, "tree_seconds": ours, "time_ratio": theirs / ours}
            rows.append(found | times | {"largest_difference": float(error)})
    return rows


# With the seconds that each may take; all together fit twelve minutes, with what starting and compiling take.
QUESTIONS: dict[Callable[[Asked], list[Row]], int] = {
    kernels_are_right: 200,
    copy_rate: 10,
    vocabulary_kernels: 100,
    prefix_lengths: 80,
    pipeline_in_a_graph: 60,
    sampling_masks: 50,
    tree_forward: 120,
}
LIMIT = 690


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def page(found: dict[str, Any]) -> str:
    machine = found["machine"]
    lines = [f"# What only a GPU can answer: {machine['device']}, {machine['date']}", ""]
    lines += [
        f"python {machine['python']}, torch {machine['torch']}, triton {machine['triton']}, {machine['cuda']}.",
        "",
    ]
    if machine["tiny"]:
        lines += ["**Tiny: these numbers say only that it runs.**", ""]
    for answer in found["answers"]:
        lines += [f"## {answer['question'].replace('_', ' ')}", "", answer["about"], ""]
        if answer["why_not"]:
            lines += [f"No answer: {answer['why_not']}.", ""]
        header = list(dict.fromkeys(name for row in answer["rows"] for name in row))
        if header:
            rows = [[shown(row.get(name, "")) for name in header] for row in answer["rows"]]
            lines += [*report.table([name.replace("_", " ") for name in header], rows), ""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder of the two files")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: proves that the list runs")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for everything")
    arguments = parser.parse_args()
    if DEVICE == "cpu" and not arguments.tiny:
        parser.error("needs a CUDA device; --tiny runs without one")
    end = time.monotonic() + arguments.limit
    found: dict[str, Any] = {"machine": describe_machine(arguments.tiny), "answers": []}
    failed = False
    for question, seconds in QUESTIONS.items():
        begun = time.monotonic()
        rows, why_not = [], "the time is spent" if begun > end else None
        if not why_not:
            try:
                rows = question(Asked(arguments.tiny, min(end, begun + seconds)))
            except Exception as error:  # the others are to be asked still
                why_not = why(error)
        failed |= bool(why_not) or (question is kernels_are_right and any(row["answer"] != "right" for row in rows))
        about = (question.__doc__ or "").strip()
        took = round(time.monotonic() - begun, 1)
        found["answers"].append(
            {"question": question.__name__, "about": about, "seconds": took, "why_not": why_not, "rows": rows}
        )
        report.write(found, page(found), arguments.out, "questions")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
