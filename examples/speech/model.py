"""A Qwen2-Audio model, small or real: prompts to embeddings, sampled answers, log-probabilities of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)
from transformers.masking_utils import create_bidirectional_mask

from leafkernels import surprisal_entropy

from .data import SAMPLING_RATE, Utterance

LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
AUDIO, AUDIO_BEGIN, AUDIO_END, PAD, END = "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", "<pad>", "<end>"
# 20 ms: half the frames of Whisper, which is enough for digits and halves the audio tokens.
SMALL_HOP, SMALL_MELS = 320, 40


@dataclass
class Prompts:
    """Embedded prompts, padded on the left."""

    embeddings: Tensor  # (N, P, hidden)
    mask: Tensor  # (N, P) int64

    def repeat(self, times: int) -> Prompts:
        return Prompts(self.embeddings.repeat_interleave(times, 0), self.mask.repeat_interleave(times, 0))


@dataclass
class Answers:
    token_ids: Tensor  # (N, T), padded on the right
    mask: Tensor  # (N, T), True up to and including the end token
    texts: list[str]


def build_small(alphabet: str, seconds: int, hidden: int = 64) -> tuple[Any, Qwen2AudioProcessor]:
    """Build a Qwen2-Audio model of random weights and a processor whose tokens are the characters of ``alphabet``."""
    specials = [PAD, END, AUDIO, AUDIO_BEGIN, AUDIO_END]
    vocabulary = {token: index for index, token in enumerate([*specials, *sorted(set(alphabet))])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token=PAD, eos_token=END, additional_special_tokens=specials[2:]
    )
    extractor = WhisperFeatureExtractor(
        feature_size=SMALL_MELS, sampling_rate=SAMPLING_RATE, hop_length=SMALL_HOP, chunk_length=seconds
    )
    # The default of 0.02 is meant for layers a hundred times as wide; with it, learning to hear takes several times as
    # long.
    spread = hidden**-0.5
    config = Qwen2AudioConfig(
        audio_config={
            "num_mel_bins": SMALL_MELS,
            "d_model": hidden,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 2 * hidden,
            "initializer_range": spread,
            "max_source_positions": extractor.nb_max_frames // 2,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(vocabulary),
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "initializer_range": spread,
            "max_position_embeddings": 4096,
            "pad_token_id": vocabulary[PAD],
            "bos_token_id": None,
            "eos_token_id": vocabulary[END],
        },
        audio_token_index=vocabulary[AUDIO],
        initializer_range=spread,
    )
    model = Qwen2AudioForConditionalGeneration(config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = vocabulary[END], vocabulary[PAD]
    return model, Qwen2AudioProcessor(extractor, tokenizer)


def add_adapter(model: Any, rank: int = 8) -> Any:
    """Freeze the model and add a trainable low-rank adapter to the linear layers of the language model."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=LORA_TARGETS)
    return get_peft_model(model, config)


class Speaker:
    """A model with its processor, and the few things that a training loop asks of them."""

    def __init__(self, model: Any, processor: Qwen2AudioProcessor, *, small: bool) -> None:
        self.model, self.processor, self.small = model, processor, small
        self.processor.tokenizer.padding_side = "left"
        self.audio_id: int = model.config.audio_token_id
        ends = model.generation_config.eos_token_id
        self.end_ids = torch.tensor(ends if isinstance(ends, list) else [ends])
        self.pad_id: int = processor.tokenizer.pad_token_id

    @classmethod
    def load(cls, name: str | None, alphabet: str, seconds: int) -> Speaker:
        """Load a checkpoint by name or path, or build a small model where ``name`` is None."""
        if name is None:
            return cls(*build_small(alphabet, seconds), small=True)
        model = Qwen2AudioForConditionalGeneration.from_pretrained(name, dtype="auto")
        return cls(model, Qwen2AudioProcessor.from_pretrained(name), small=False)

    @property
    def inner(self) -> Any:
        """The model itself, whose layers hold the adapter where there is one."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def features(self, utterance: Utterance) -> dict[str, Tensor]:
        """Turn an utterance into what the model reads: to be made once and kept."""
        if self.small:
            text = AUDIO_BEGIN + AUDIO + AUDIO_END + utterance.prompt
        else:
            content = [{"type": "audio", "audio_url": ""}, {"type": "text", "text": utterance.prompt}]
            text = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
        inputs = self.processor(text=text, audio=[utterance.audio], sampling_rate=SAMPLING_RATE, return_tensors="pt")
        # Cloned: the mask of the frames is a view of one of all samples, eight times as large as the features.
        return {name: tensor[0].clone() for name, tensor in inputs.items() if isinstance(tensor, Tensor)}

    def embed(self, features: Sequence[dict[str, Tensor]]) -> Prompts:
        """Encode the audio and put it in the places of the audio tokens.

        The frozen encoder then runs once for each prompt, not for each rollout in sampling and again in training.
        """
        inner = self.inner
        device = inner.device
        longest = max(len(one["input_ids"]) for one in features)

        def left_padded(name: str, value: int) -> Tensor:
            rows = [torch.nn.functional.pad(one[name], (longest - len(one[name]), 0), value=value) for one in features]
            return torch.stack(rows).to(device)

        token_ids, mask = left_padded("input_ids", self.pad_id), left_padded("attention_mask", 0)
        frames = torch.stack([one["input_features"] for one in features]).to(device)
        frames_mask = torch.stack([one["feature_attention_mask"] for one in features]).to(device)
        core = inner.model
        encoded_lengths, audio_lengths = core.audio_tower._get_feat_extract_output_lengths(frames_mask.sum(-1))
        positions = torch.arange((frames.shape[-1] - 2) // 2 + 1, device=device)
        attention = create_bidirectional_mask(
            config=core.audio_tower.config,
            inputs_embeds=frames.new_zeros((len(frames), len(positions), 1)),
            attention_mask=(positions < encoded_lengths[:, None]).long(),
        )
        encoded = core.audio_tower(frames, attention_mask=attention).last_hidden_state
        audio = core.multi_modal_projector(encoded)
        live = torch.arange(audio.shape[1], device=device) < audio_lengths[:, None]
        embeddings = inner.get_input_embeddings()(token_ids)
        places = (token_ids == self.audio_id)[..., None]
        return Prompts(embeddings.masked_scatter(places, audio[live].to(embeddings.dtype)), mask)

    @torch.no_grad()
    def sample(self, prompts: Prompts, limit: int, *, temperature: float | None = 1.0) -> Answers:
        """Answer each prompt with up to ``limit`` tokens; the most likely ones where ``temperature`` is None."""
        self.model.eval()
        # top_k=0 and top_p=1 leave the distribution whole: the samples must follow the model's log-probabilities.
        greedy = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        token_ids = self.model.generate(
            inputs_embeds=prompts.embeddings,
            attention_mask=prompts.mask,
            max_new_tokens=limit,
            suppress_tokens=[self.audio_id],
            **(greedy if temperature is None else drawn),
        )
        is_end = torch.isin(token_ids, self.end_ids.to(token_ids.device))
        mask = is_end.cumsum(1) - is_end.long() == 0
        rows = [row[keep & ~end].tolist() for row, keep, end in zip(token_ids, mask, is_end, strict=True)]
        return Answers(token_ids, mask, [self.spell(row) for row in rows])

    def spell(self, token_ids: list[int]) -> str:
        tokenizer = self.processor.tokenizer
        # A tokenizer of single characters would join them with blanks.
        return "".join(tokenizer.convert_ids_to_tokens(token_ids)) if self.small else tokenizer.decode(token_ids)

    def answer_ids(self, texts: Sequence[str]) -> Answers:
        """Turn right answers into tokens, with the end token."""
        end = int(self.end_ids[0])
        rows = [
            torch.tensor(self.processor.tokenizer(text, add_special_tokens=False).input_ids + [end]) for text in texts
        ]
        token_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad_id)
        lengths = torch.tensor([len(row) for row in rows])
        return Answers(token_ids, torch.arange(token_ids.shape[1]) < lengths[:, None], list(texts))

    def score(self, prompts: Prompts, answers: Answers, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return log-probability and entropy of every answer token, (N, T), 0 on padding."""
        length = answers.token_ids.shape[1]
        inner = self.inner
        spoken = inner.get_input_embeddings()(answers.token_ids[:, :-1])
        mask = torch.cat([prompts.mask, answers.mask[:, :-1].to(prompts.mask.dtype)], dim=1)
        hidden = inner.model.language_model(
            inputs_embeds=torch.cat([prompts.embeddings, spoken], dim=1),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp_min(0),
        ).last_hidden_state
        logits = inner.lm_head(hidden[:, -length:])
        # Sampling never takes the audio token; without this its probability would be missing from all others.
        ban = torch.zeros(logits.shape[-1], device=logits.device)
        ban[self.audio_id] = float("-inf")
        found = surprisal_entropy(logits + ban, answers.token_ids, temperature=temperature, response_mask=answers.mask)
        return found.logprobs, found.entropy
