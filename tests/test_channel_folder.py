"""The folder of a reward channel: what is refused, in a sentence that names the file, and what is not."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_decoders import SIZES, build_model

from leafkernels.lookahead import RewardChannel, RewardTransformer

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[lookahead]'")
from safetensors.torch import load_file, save_file  # noqa: E402 - comes with transformers

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [0, 0, 0, 2, 7, 1, 8, 2]])


def edit_settings(path: Path, **changes: Any) -> None:
    settings = json.loads(path.read_text())
    for name, value in changes.items():
        part, _, inner = name.partition("__")
        within = settings[part] if inner else settings
        if value is None:
            del within[inner or part]
        else:
            within[inner or part] = value
    path.write_text(json.dumps(settings))


def edit_weights(path: Path, change: Any) -> None:
    state = load_file(path)
    change(state)
    save_file(state, path)


SETTINGS, WEIGHTS = "reward_channel.json", "reward_channel.safetensors"
DAMAGES: dict[str, tuple[Any, str]] = {
    "an empty folder": (lambda folder: [file.unlink() for file in folder.iterdir()], f"which has no {SETTINGS}"),
    "no settings": (lambda folder: (folder / SETTINGS).unlink(), f"which has no {SETTINGS}"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"{WEIGHTS} must be the file of weights .*, got none"),
    "a folder for weights": (
        lambda folder: ((folder / WEIGHTS).unlink(), (folder / WEIGHTS).mkdir()),
        f"{WEIGHTS} must be the file of weights .*, got none",
    ),
    **{
        f"weights cut to {share}": (
            lambda folder, share=share: (folder / WEIGHTS).write_bytes(
                (data := (folder / WEIGHTS).read_bytes())[: int(len(data) * share)]
            ),
            "must be a file of safetensors, got one that does not read",
        )
        for share in (0, 0.01, 0.5, 0.99)
    },
    "weights of another kind": (
        lambda folder: (folder / WEIGHTS).write_bytes(pickle.dumps({"wide": 1})),
        "must be a file of safetensors, got one that does not read",
    ),
    "a weight too few": (
        lambda folder: edit_weights(folder / WEIGHTS, lambda state: state.pop("narrow")),
        r"weights that reward_channel.json says, with narrow \(2, 4, 4\), got narrow absent",
    ),
    "a weight too many": (
        lambda folder: edit_weights(folder / WEIGHTS, lambda state: state.update(bias=torch.ones(3))),
        r"says, with bias absent, got bias \(3,\)",
    ),
    "a weight of another shape": (
        lambda folder: edit_weights(folder / WEIGHTS, lambda state: state.update(wide=torch.ones(3, 5, 16))),
        r"says, with wide \(3, 4, 16\), got wide \(3, 5, 16\)",
    ),
    "integers": (
        lambda folder: edit_weights(folder / WEIGHTS, lambda state: state.update(norm_wide=torch.ones(3, 16).int())),
        "must hold floating point, got norm_wide of torch.int32",
    ),
    "not a number": (
        lambda folder: edit_weights(folder / WEIGHTS, lambda state: state["narrow"][1, 0].fill_(torch.nan)),
        "must hold finite numbers, got narrow with others",
    ),
    "too large for float32": (
        lambda folder: edit_weights(folder / WEIGHTS, lambda s: s.update(wide=s["wide"].double().mul(1e300))),
        "must hold finite numbers, got wide with others",
    ),
    **{
        f"settings {text!r:.20}": (
            lambda folder, text=text: (folder / SETTINGS).write_bytes(text),
            f"{SETTINGS} must be JSON, got what does not read",
        )
        for text in (b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"channel": 1')
    },
    **{
        f"settings {text}": (
            lambda folder, text=text: (folder / SETTINGS).write_text(text),
            "must hold an object with the objects 'channel' and 'base', got",
        )
        for text in ("[]", "3", "null", '"channel"', "{}", '{"channel": {}}', '{"channel": 1, "base": {}}')
    },
    **{
        f"settings with {changes}": (
            lambda folder, changes=changes: edit_settings(folder / SETTINGS, **changes),
            message,
        )
        for changes, message in [
            (
                {"channel__width": None},
                "the arguments of a RewardChannel by the name 'channel', got .*: they",
            ),
            ({"channel__num_layers": None}, "arguments of a RewardChannel by .*: .*missing"),
            ({"channel__depth": 3}, "arguments of a RewardChannel by .*: .*unexpected"),
            ({"channel__width": "4"}, "arguments of a RewardChannel by .*: width must be an int, got str"),
            ({"channel__width": 4.5}, "arguments of a RewardChannel by .*: width must be an int, got float"),
            ({"channel__width": True}, "arguments of a RewardChannel by .*: width must be an int, got bool"),
            ({"channel__width": 0}, "arguments of a RewardChannel by .*: width must be at least 1, got 0"),
            ({"channel__width": 5}, r"says, with .*narrow \(2, 5, 5\).*, got .*narrow \(2, 4, 4\)"),
            ({"channel__width": 10**9}, r"says, with .*narrow \(2, 1000000000, 1000000000\)"),
            ({"channel__width": 10**30}, "arguments of a RewardChannel by "),
            ({"channel__head_layers": 10**9}, "arguments of a RewardChannel by .*: head_layers is more than the 5"),
            ({"channel__head_layers": [1]}, "arguments of a RewardChannel by "),
            ({"channel__num_layers": 10**9}, "says, with "),
            ({"channel__eps": float("nan")}, "arguments of a RewardChannel by .*: eps must be finite"),
            ({"channel__eps": "0"}, "arguments of a RewardChannel by .*: eps must be a number"),
            ({"base__name": None}, "must say name, model_type, num_hidden_layers, hidden_size, vocab_size of the base"),
            ({"base__name": 3}, "must say name, .* the name as a string, got"),
            ({"base__hidden_size": None}, "must say name, model_type, num_hidden_layers, hidden_size, vocab_size of"),
            ({"base__vocab_size": "29"}, "model must be the base of the channel in .* of vocab_size 29, got"),
            ({"base__model_type": ["llama"]}, "model must be the base of the channel in"),
        ]
    },
}


@pytest.fixture(scope="module")
def a_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "channel"
    RewardTransformer(build_model("llama"), RewardChannel(3, 16, width=4)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_in_a_sentence(damage: str, a_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(a_folder, tmp_path / "channel"))
    change, message = DAMAGES[damage]
    change(folder)
    with pytest.raises(ValueError, match=message) as caught:
        RewardTransformer.from_pretrained(folder, build_model("llama"))
    assert str(folder) in str(caught.value)


def test_a_folder_that_is_none(a_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="folder must be one that .*, got .*nowhere, which does not exist"):
        RewardTransformer.from_pretrained(tmp_path / "nowhere", build_model("llama"))
    with pytest.raises(ValueError, match="which is a file"):
        RewardTransformer.from_pretrained(a_folder / WEIGHTS, build_model("llama"))
    # Before a base is loaded.
    with pytest.raises(ValueError, match=f"which has no {SETTINGS}"):
        RewardTransformer.from_pretrained(tmp_path, "no/such model")
    with pytest.raises(ValueError, match="model must be given: the channel in .* beside a model without a name"):
        RewardTransformer.from_pretrained(a_folder)


def test_what_is_no_damage(a_folder: Path, tmp_path: Path) -> None:
    """A byte order mark, notes beside, weights of another precision; a channel of one layer, as it always was."""
    folder, base = Path(shutil.copytree(a_folder, tmp_path / "channel")), build_model("llama")
    expected = RewardTransformer.from_pretrained(a_folder, base).eval()(input_ids=IDS).rewards
    edit_settings(folder / SETTINGS, notes="ours")
    (folder / SETTINGS).write_bytes(b"\xef\xbb\xbf" + (folder / SETTINGS).read_bytes())
    edit_weights(folder / WEIGHTS, lambda s: s.update({name: tensor.double() for name, tensor in s.items()}))
    read = RewardTransformer.from_pretrained(folder, base).eval()
    assert all(parameter.dtype == torch.float32 and parameter.requires_grad for parameter in read.channel.parameters())
    assert torch.equal(read(input_ids=IDS).rewards, expected)
    read.save_pretrained(folder)  # over the file that it came from
    assert torch.equal(read(input_ids=IDS).rewards, expected)
    one = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, "num_hidden_layers": 1})).eval()
    wrapped = RewardTransformer(one, RewardChannel(1, 16, width=4))
    wrapped.save_pretrained(tmp_path / "one")
    assert load_file(tmp_path / "one" / WEIGHTS)["narrow"].shape == (0, 4, 4)
    read = RewardTransformer.from_pretrained(tmp_path / "one", one)
    assert torch.equal(read(input_ids=IDS).rewards, wrapped(input_ids=IDS).rewards)
