"""Prompts with recordings: each is heard once, and the rows of its prompt are what they are with a recording each."""

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.23", reason="needs transformers: the extra speech")
pytest.importorskip("soundfile", reason="needs the extra speech")

import tiny_listeners
import tiny_viewers
from test_tree_logprobs import gradients

from leafkernels.models import tree_logprobs, tree_stats
from leafkernels.rows.recordings import PromptReader, find_encoder, join_features

pytestmark = pytest.mark.slow
ROWS = 3  # of a prompt


@pytest.mark.parametrize("name", ["qwen2_audio", "granite_speech", "voxtral", "qwen2_5_omni"])
def test_a_recording_is_heard_once(name: str, run_as: Any) -> None:
    model, processor = getattr(tiny_listeners, name)()
    model.eval()
    reader = PromptReader(processor)
    tones = [{"array": tiny_listeners.tone(i, 0.3 + 0.5 * i), "sampling_rate": 16000} for i in range(2)]
    prompts = [reader.read(tiny_listeners.asked("ab"), tone) for tone in tones]
    rows = [[*prompt.token_ids, 6 + k, 7, 8 + k][: len(prompt.token_ids) + 2 + k % 2]
            for prompt in prompts for k in range(ROWS)]  # fmt: skip
    width = max(map(len, rows))
    lengths, columns = torch.tensor([[len(row)] for row in rows]), torch.arange(width)
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    begins = torch.tensor([[len(prompt.token_ids)] for prompt in prompts]).repeat_interleave(ROWS, 0)
    mask, asked = (columns < lengths).long(), (columns >= begins) & (columns < lengths)

    heard: list[int] = []
    handle = find_encoder(model).register_forward_hook(lambda *_: heard.append(1))
    options = {"response_mask": asked, "group_size": ROWS, "inputs": join_features(prompts)}
    tree_logprobs(model, ids, mask, **options)  # and twice more, for the comparison with rows
    assert len(heard) == 3
    ours = tree_logprobs(model, ids, mask, **options)
    assert len(heard) == 4
    stats = tree_stats(model, ids, mask, group_size=ROWS, inputs=options["inputs"])
    assert stats.plan in ("trunks", "tree below trunks") and stats.trunks == len(prompts) and stats.forwards == 2
    handle.remove()
    assert len(heard) == 4
    each = join_features([prompt for prompt in prompts for _ in range(ROWS)])
    chances = model(input_ids=ids, attention_mask=mask, **each).logits[:, :-1].log_softmax(-1)
    theirs = chances.gather(-1, ids[:, 1:, None])[..., 0]
    theirs = torch.nn.functional.pad(theirs, (1, 0)) * asked
    torch.testing.assert_close(ours.logprobs, theirs, rtol=1e-5, atol=1e-5)
    expected = gradients(model, theirs)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for kind in ("trunks", "tree below trunks"):
        found = gradients(model, run_as(kind, model, ids, mask, **options).logprobs)
        assert found.keys() == expected.keys()
        for weight, gradient in expected.items():
            # Float32 sums in another order, beside a loss whose largest gradient is that.
            torch.testing.assert_close(found[weight], gradient, rtol=1e-4, atol=1e-5 * largest, msg=weight)
    with pytest.raises(ValueError, match="^max_tokens must hold all rows of all prompts where inputs has features"):
        tree_logprobs(model, ids, mask, max_tokens=max(map(len, rows)), **options)


@pytest.mark.parametrize("name", tiny_viewers.MODELS)
def test_positions_behind_an_image_are_not_guessed(name: str) -> None:
    """Behind an image they are not those of the tokens, and the model needs to be told which tokens stand for one."""
    model = tiny_viewers.build_model(name)
    prompt = tiny_viewers.look(4, 8, [10, 11], [12, 13])
    ids = torch.cat([prompt.pop("input_ids").repeat(2, 1), torch.tensor([[20, 21], [22, 23]])], 1)
    del prompt["attention_mask"], prompt["mm_token_type_ids"]
    message = rf"^inputs must be None with {name}\w+, run each row with features of its own: its forward reads mm_token"
    with pytest.raises(RuntimeError, match=message):
        tree_logprobs(model, ids, group_size=2, inputs=prompt)
