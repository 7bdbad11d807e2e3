"""A training step on what rollouts share, beside a step on their rows: ``python -m bench.bench_tree_logprobs``.

A Llama of 6 layers of 512 numbers, and a Qwen2-Audio with such a text model; random weights; forward, backward and
AdamW, both ways in turns in one process. No case is timed before its log-probabilities and gradients have been those of
the rows. Token ratio: tokens of the rows,
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
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from bench import report
from bench.harness import DEVICE, describe_machine
from bench.rollouts import Shape
from leafkernels.models import tree_logprobs, tree_stats

# Ids of text; the next stands for a piece of a recording.
VOCABULARY = AUDIO = 1000
# A second of a recording is 100 frames, and the encoder makes a token of four.
MELS, FRAMES = 128, 3000
ANSWER = 100
# Those that say most first, for a machine that has little time.
PROMPTS, KS = (256, 64, 16, 1024), (8, 4, 16)
# Of the answers: some leave late what another says; they agree for half of their length on the average; they do not.
INPUTS = ("sampled", "comb", "nothing")
SLOWEST = 1.05


class Case(NamedTuple):
    prompt: int
    k: int
    answer: int
    inputs: str
    seconds: int = 0
    """Of a recording, which is the first part of the prompt."""
    prompts: int = 1
    """In a step; K rows each."""

    @property
    def name(self) -> str:
        audio = f", {self.seconds} s of audio" if self.seconds else ""
        several = f", {self.prompts} prompts" if self.prompts > 1 else ""
        return " x ".join(map(str, self[:4])) + audio + several


# Besides: the weak spot of a mask over all nodes; steps of several prompts, since the optimizer takes as long for one;
# recordings.
LONG_ANSWERS = Case(64, 8, 200, "nothing")
SEVERAL = [Case(256, 8, ANSWER, inputs, prompts=4) for inputs in INPUTS]
HEARD = [
    Case(25 * seconds + 16, 8, ANSWER, inputs, seconds) for seconds in (5, 30) for inputs in ("sampled", "nothing")
]


def build_model(tiny: bool) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**_decoder(tiny))
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(DEVICE)


def build_listener(tiny: bool) -> Any:
    """Qwen2-Audio: its encoder reads 30 seconds whatever a recording has, and makes 25 tokens a second of it."""
    torch.manual_seed(0)
    width, layers, heads = (32, 1, 2) if tiny else (256, 4, 4)
    audio = {"num_mel_bins": MELS, "d_model": width, "encoder_layers": layers, "encoder_attention_heads": heads}
    audio |= {"encoder_ffn_dim": 4 * width, "max_source_positions": FRAMES // 2}
    text = {"model_type": "qwen2", **_decoder(tiny)}
    config = transformers.Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=AUDIO)
    model: Any = transformers.Qwen2AudioForConditionalGeneration(config)
    return model.to(DEVICE)


def _decoder(tiny: bool) -> dict[str, Any]:
    hidden, inner, layers, heads = (32, 64, 2, 2) if tiny else (512, 1376, 6, 8)
    return {
        "vocab_size": AUDIO + 1,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 4096,
    }


class Rollouts(NamedTuple):
    """K answers to each prompt of a step."""

    ids: Tensor
    """(prompts x K, prompt + answer)."""
    prompt: int
    k: int
    inputs: dict[str, Tensor]
    """Features of the one prompt's recording; empty without one."""


def rollouts(case: Case) -> Rollouts:
    """Tokens of a recording are the first of its prompt."""
    prompt, k, answer, inputs, seconds, prompts = case
    shape = Shape("", prompts, k, answer, 1, (inputs,), "answers of some prompts")
    generator = torch.Generator(DEVICE).manual_seed(prompt)
    if inputs == "nothing":
        answers = torch.randint(VOCABULARY, (prompts * k, answer), generator=generator, device=DEVICE)
    else:
        answers = shape.batches(inputs, DEVICE, 1)[0].token_ids.view(-1, answer) % VOCABULARY
    question = torch.randint(VOCABULARY, (prompts, prompt), generator=generator, device=DEVICE)
    features = {}
    if seconds:
        question[:, : 25 * seconds] = AUDIO
        spectrum = torch.randn(1, MELS, FRAMES, generator=generator, device=DEVICE)
        heard = torch.arange(FRAMES, device=DEVICE) < 100 * seconds
        features = {"input_features": spectrum, "feature_attention_mask": heard[None].long()}
    return Rollouts(torch.cat([question.repeat_interleave(k, 0), answers], 1), prompt, k, features)


def of_rows(model: Any, batch: Rollouts) -> Tensor:
    """What a trainer does: a forward pass of all rows, shift, log-softmax, gather."""
    ids, prompt, _, inputs = batch
    options: dict[str, Any] = {name: values.repeat(len(ids), 1, 1) for name, values in inputs.items()}
    if inputs:
        options["feature_attention_mask"] = inputs["feature_attention_mask"].repeat(len(ids), 1)
    else:
        options["logits_to_keep"] = ids.shape[1] - prompt + 1
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **options).logits
    return logits[:, prompt - ids.shape[1] - 1 : -1].log_softmax(-1).gather(-1, ids[:, prompt:, None])[..., 0]


def of_tree(model: Any, batch: Rollouts) -> Tensor:
    ids, prompt, k, inputs = batch
    asked = (torch.arange(ids.shape[1], device=ids.device) >= prompt).expand(ids.shape)
    found = tree_logprobs(model, ids, response_mask=asked, group_size=k, inputs=inputs, entropy=False)
    return found.logprobs[:, prompt:]


Function = Callable[[Any, Rollouts], Tensor]


def backward(function: Function, model: Any, batch: Rollouts) -> tuple[Tensor, list[Tensor]]:
    """Log-probabilities, and the gradient of all weights for a loss that weighs them differently."""
    model.zero_grad(set_to_none=True)
    logprobs = function(model, batch)
    weights = torch.linspace(-1, 1, logprobs.numel(), device=logprobs.device).view_as(logprobs)
    (logprobs * weights).mean().backward()
    return logprobs.detach(), [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]


def errors(model: Any, batch: Rollouts) -> tuple[float, float]:
    """The gate: the largest error of a log-probability, and of a gradient beside the largest of its tensor."""
    (ours, our_gradients), (theirs, gradients) = (backward(f, model, batch) for f in (of_tree, of_rows))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    worst = 0.0
    for found, expected in zip(our_gradients, gradients, strict=True):
        worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
    # Float32 sums of some hundred tokens in another order.
    assert worst < 1e-3, f"gradients differ by {worst:.1e} of their largest entry"
    return float((ours - theirs).abs().max()), worst


def saved_bytes(function: Function, model: Any, batch: Rollouts) -> int:
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()  # the graph would hold itself by what it saved
        where = tensor.untyped_storage().data_ptr()
        if where not in weights:
            kept[where] = tensor  # so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function(model, batch)
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


def measure(model: Any, case: Case, seconds: float) -> dict[str, Any]:
    batch = rollouts(case)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def step(function: Function) -> Callable[[], None]:
        def call() -> None:
            optimizer.zero_grad(set_to_none=True)
            function(model, batch).mean().backward()
            optimizer.step()

        return call

    stats = tree_stats(model, batch.ids, group_size=case.k, inputs=batch.inputs)
    error = errors(model, batch)
    saved = [saved_bytes(function, model, batch) for function in (of_rows, of_tree)]
    theirs, ours = in_turns([step(of_rows), step(of_tree)], seconds)
    return {
        "name": case.name,
        **case._asdict(),
        "plan": stats.plan,
        "token_ratio": batch.ids.numel() / stats.nodes,
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
        "AdamW of a Llama 6 x 512 of random weights (with audio: of a Qwen2-Audio with an encoder of 4 x 256, which "
        "reads a recording once on the tree and K times in rows), K rollouts of a prompt, rows and tree in turns, the "
        "least of their times, on a CPU the process's own. Gate: log-probabilities and gradients are those of "
        "the rows.",
        "",
    ]
    if machine["tiny"]:
        lines += ["**Tiny: these numbers say only that it runs.**", ""]
    header = [
        "prompts",
        "audio",
        "prompt",
        "K",
        "answer",
        "shared",
        "plan",
        "token ratio",
        "time ratio",
        "rows",
        "tree",
    ]
    header += ["saved bytes ratio", "error of log-probabilities", "of gradients"]
    rows = [
        [
            str(case["prompts"]),
            f"{case['seconds']} s" if case["seconds"] else "",
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
    cases = [Case(prompt, k, sizes[2], inputs) for k, prompt, inputs in itertools.product(sizes[1], sizes[0], INPUTS)]
    cases.sort(key=lambda case: case.prompt == max(PROMPTS))  # which take longest
    cases = [*cases, Case(29, 3, 6, "sampled", 1)] if arguments.tiny else [LONG_ANSWERS, *SEVERAL, *HEARD, *cases]
    models = {False: build_model(arguments.tiny), True: build_listener(arguments.tiny)}
    done, left_out = [], []
    for case in cases:
        if time.monotonic() > deadline:
            left_out.append(case.name)
            continue
        measured = measure(models[case.seconds > 0], case, 0.0 if arguments.tiny else arguments.seconds)
        ratios = f"{measured['time_ratio']:.2f} of {measured['token_ratio']:.2f}"
        print(f"{case.name}: {ratios}, {measured['plan']}", flush=True)
        done.append(measured)
    names = [case["name"] for case in done if case["time_ratio"] < 1 / SLOWEST]
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
