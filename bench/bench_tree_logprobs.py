"""A training step on what rollouts share, beside a step on their rows: ``python -m bench.bench_tree_logprobs``.

A Llama of 6 layers of 512 numbers, random weights; forward, backward and AdamW, both ways in turns in one process. No
case is timed before its log-probabilities and gradients have been those of the rows. Token ratio: tokens of the rows,
which have no padding, over the nodes of their prefix tree: what the time ratio could be if nothing but tokens cost.
Saved bytes: of the tensors that autograd keeps for the backward pass, each storage once, weights left out.
"""

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import report
from bench.harness import DEVICE, describe_machine
from bench.rollouts import Shape
from leafkernels.models import tree_logprobs, tree_stats

VOCABULARY = 1000
ANSWER = 100
# Those that say most first, for a machine that has little time.
PROMPTS, KS = (256, 64, 16, 1024), (8, 4, 16)
# Of the answers: some leave late what another says; they agree for half of their length on the average; they do not.
INPUTS = ("sampled", "comb", "nothing")
# Besides: the weak spot of a mask over all nodes.
LONG_ANSWERS = (64, 8, 200, "nothing")
SLOWEST = 1.05


def build_model(tiny: bool) -> Any:
    import transformers

    torch.manual_seed(0)
    sizes = (32, 64, 2, 2) if tiny else (512, 1376, 6, 8)
    hidden, inner, layers, heads = sizes
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
        attn_implementation="sdpa",
    )
    return transformers.AutoModelForCausalLM.from_config(config).to(DEVICE)


def rollouts(prompt: int, k: int, answer: int, inputs: str) -> Tensor:
    """(K, prompt + answer) ids of one prompt."""
    shape = Shape("", 1, k, answer, 1, (inputs,), "answers of a prompt")
    generator = torch.Generator(DEVICE).manual_seed(prompt)
    if inputs == "nothing":
        answers = torch.randint(VOCABULARY, (k, answer), generator=generator, device=DEVICE)
    else:
        answers = shape.batches(inputs, DEVICE, 1)[0].token_ids[0] % VOCABULARY
    question = torch.randint(VOCABULARY, (1, prompt), generator=generator, device=DEVICE)
    return torch.cat([question.expand(k, -1), answers], 1)


def of_rows(model: Any, ids: Tensor, prompt: int) -> Tensor:
    """What a trainer does: a forward pass of all rows, shift, log-softmax, gather."""
    logits = model(input_ids=ids, logits_to_keep=ids.shape[1] - prompt + 1).logits[:, :-1]
    return logits.log_softmax(-1).gather(-1, ids[:, prompt:, None])[..., 0]


def of_tree(model: Any, ids: Tensor, prompt: int) -> Tensor:
    asked = (torch.arange(ids.shape[1], device=ids.device) >= prompt).expand(ids.shape)
    return tree_logprobs(model, ids, response_mask=asked, entropy=False).logprobs[:, prompt:]


Function = Callable[[Any, Tensor, int], Tensor]


def backward(function: Function, model: Any, ids: Tensor, prompt: int) -> tuple[Tensor, list[Tensor]]:
    """Log-probabilities, and the gradient of all weights for a loss that weighs them differently."""
    model.zero_grad(set_to_none=True)
    logprobs = function(model, ids, prompt)
    weights = torch.linspace(-1, 1, logprobs.numel(), device=ids.device).view_as(logprobs)
    (logprobs * weights).mean().backward()
    return logprobs.detach(), [weight.grad.clone() for weight in model.parameters()]


def errors(model: Any, ids: Tensor, prompt: int) -> tuple[float, float]:
    """The gate: the largest error of a log-probability, and of a gradient beside the largest of its tensor."""
    (ours, our_gradients), (theirs, gradients) = (backward(f, model, ids, prompt) for f in (of_tree, of_rows))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    worst = 0.0
    for found, expected in zip(our_gradients, gradients, strict=True):
        worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
    # Float32 sums of some hundred tokens in another order.
    assert worst < 1e-3, f"gradients differ by {worst:.1e} of their largest entry"
    return float((ours - theirs).abs().max()), worst


def saved_bytes(function: Function, model: Any, ids: Tensor, prompt: int) -> int:
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()  # the graph would hold itself by what it saved
        where = tensor.untyped_storage().data_ptr()
        if where not in weights:
            kept[where] = tensor  # so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function(model, ids, prompt)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def in_turns(calls: list[Callable[[], None]], seconds: float) -> list[float]:
    """The least time of each call, which is the process's own on a CPU, whoever else uses the machine."""

    def clock() -> float:
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if DEVICE == "cpu" else time.perf_counter()

    best, end, rounds = [math.inf] * len(calls), time.monotonic() + seconds, 0
    while rounds < 2 or time.monotonic() < end:
        for place, call in enumerate(calls):
            start = clock()
            call()
            best[place] = min(best[place], clock() - start)
        rounds += 1
    return best


def measure(model: Any, prompt: int, k: int, answer: int, inputs: str, seconds: float) -> dict[str, Any]:
    ids = rollouts(prompt, k, answer, inputs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def step(function: Function) -> Callable[[], None]:
        def call() -> None:
            optimizer.zero_grad(set_to_none=True)
            function(model, ids, prompt).mean().backward()
            optimizer.step()

        return call

    stats = tree_stats(model, ids)
    error = errors(model, ids, prompt)
    saved = [saved_bytes(function, model, ids, prompt) for function in (of_rows, of_tree)]
    theirs, ours = in_turns([step(of_rows), step(of_tree)], seconds)
    return {
        "prompt": prompt,
        "k": k,
        "answer": answer,
        "inputs": inputs,
        "plan": stats.plan,
        "token_ratio": ids.numel() / stats.nodes,
        "rows_seconds": theirs,
        "tree_seconds": ours,
        "time_ratio": theirs / ours,
        "rows_saved_bytes": saved[0],
        "tree_saved_bytes": saved[1],
        "logprob_error": error[0],
        "gradient_error": error[1],
    }


def markdown(found: dict[str, Any]) -> str:
    machine = found["machine"]
    lines = [
        f"# A step on the prefix tree on {machine['device']}, {machine['date']}",
        "",
        f"python {machine['python']}, torch {machine['torch']}, transformers {found['transformers']}, "
        f"{machine['cpu_threads']} thread; load average when written: {machine['load_average']}. Forward, backward and "
        "AdamW of a Llama 6 x 512 of random weights, K rollouts of one prompt, rows and tree in turns, the least of "
        "their times, on a CPU the process's own. Gate: log-probabilities and gradients are those of the rows.",
        "",
    ]
    if machine["tiny"]:
        lines += ["**Tiny: these numbers say only that it runs.**", ""]
    header = ["prompt", "K", "answer", "shared", "plan", "token ratio", "time ratio", "rows", "tree"]
    header += ["saved bytes ratio", "error of log-probabilities", "of gradients"]
    rows = [
        [
            *(str(case[name]) for name in ("prompt", "k", "answer", "inputs", "plan")),
            f"{case['token_ratio']:.2f}",
            f"{case['time_ratio']:.2f}",
            report.as_time(case["rows_seconds"]),
            report.as_time(case["tree_seconds"]),
            f"{case['rows_saved_bytes'] / case['tree_saved_bytes']:.2f}",
            f"{case['logprob_error']:.0e}",
            f"{case['gradient_error']:.0e}",
        ]
        for case in found["cases"]
    ]
    lines += [*report.table(header, rows), ""]
    lines += [f"Slower than rows by more than {SLOWEST - 1:.0%}: {', '.join(found['slower']) or 'none'}.", ""]
    if found["left_out"]:
        lines += [f"Left out, for want of time: {', '.join(found['left_out'])}.", ""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Time a training step on the prefix tree beside one on rows.")
    parser.add_argument("--out", type=Path, default=report.ROOT / "bench" / "results", help="folder of the two files")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: proves that it runs")
    parser.add_argument("--seconds", type=float, default=2.0, help="about how long a case is timed")
    parser.add_argument("--limit", type=float, default=400.0, help="seconds after which cases are left out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    deadline = time.monotonic() + arguments.limit
    sizes = ((8,), (3,), 6) if arguments.tiny else (PROMPTS, KS, ANSWER)
    cases = [(prompt, k, sizes[2], inputs) for k, prompt, inputs in itertools.product(sizes[1], sizes[0], INPUTS)]
    cases.sort(key=lambda case: case[0] == max(PROMPTS))  # which take longest
    if not arguments.tiny:
        cases.insert(0, LONG_ANSWERS)
    model = build_model(arguments.tiny)
    done, left_out = [], []
    for case in cases:
        name = " x ".join(map(str, case))
        if time.monotonic() > deadline:
            left_out.append(name)
            continue
        done.append(measure(model, *case, 0.0 if arguments.tiny else arguments.seconds))
        print(name, f"{done[-1]['time_ratio']:.2f} of {done[-1]['token_ratio']:.2f}, {done[-1]['plan']}", flush=True)
    names = [f"{case['prompt']} x {case['k']} {case['inputs']}" for case in done if case["time_ratio"] < 1 / SLOWEST]
    found = {
        "machine": describe_machine(arguments.tiny),
        "transformers": version_of("transformers"),
        "cases": done,
        "slower": [] if arguments.tiny else names,
        "left_out": left_out,
    }
    report.write(found, markdown(found), arguments.out, "tree")
    return 1 if found["slower"] else 0


if __name__ == "__main__":
    sys.exit(main())
