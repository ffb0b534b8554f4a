"""Small untrained bases of the families that follow IDEFICS, built on the fly from a seed.

Every part is real: the model's own class, its processor, and a tokenizer that is trained on the
cards' captions. Nothing is downloaded, and the same seed gives the same base.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics2ImageProcessor,
    Idefics2Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from idefics_qlora.images.access import DEFAULT_ACCESS
from idefics_qlora.images.cache import cache_folder
from idefics_qlora.process import seeded
from idefics_qlora.tiny.cards import all_cards

SEED = 0

IMAGE_TOKENS = ["<fake_token_around_image>", "<image>"]
TILE_TOKENS = ["<global-img>", *(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7))]

TILE, LONGEST_EDGE = 64, 128
"""Pixels: of a tile's side, and of the longest side of a picture; of Idefics2's shortest and
longest."""

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}:{% else %}: {% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}<image>{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""How the published instruct bases write a dialogue, after their begin token."""


def built(family: str) -> Path:
    """The folder of a family's small base, in the cache folder; written if it is not there.

    Args:
        family: ``idefics2``, ``idefics3`` or ``smolvlm``.
    """
    folder = cache_folder(DEFAULT_ACCESS) / "tiny" / f"{family}-1"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    hidden = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
    try:
        for part in BUILDERS[family]():
            part.save_pretrained(hidden)
        os.replace(hidden, folder)
    except OSError:
        if not folder.is_dir():  # or else another process was faster
            raise
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    return folder


def smolvlm() -> tuple[Any, Any]:
    """As SmolVLM2: tokens for rows and columns, tied embeddings, no begin token but in chats."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_trained(
            [
                *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
                *(*IMAGE_TOKENS, "<end_of_utterance>", *TILE_TOKENS),
            ]
        ),
        unk_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_end|>",
    )
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(**_image_settings()),
        tokenizer,
        SmolVLMVideoProcessor(),
        image_seq_len=4,
        chat_template=f"<|im_start|>{TEMPLATE}",
    )
    config = SmolVLMConfig(**_settings(tokenizer), tie_word_embeddings=True)
    with seeded(SEED, torch.device("cpu")):
        return SmolVLMForConditionalGeneration(config), processor


def idefics3() -> tuple[Any, Any]:
    """As Idefics3-8B: rows and columns are ordinary text, each text has a begin token."""
    begin = "<|begin_of_text|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_begun(
            [begin, "<|end_of_text|>", *IMAGE_TOKENS, "<end_of_utterance>"], begin
        ),
        bos_token=begin,
        eos_token="<|end_of_text|>",
        pad_token="<|end_of_text|>",
    )
    processor = Idefics3Processor(
        Idefics3ImageProcessor(**_image_settings()),
        tokenizer,
        image_seq_len=4,
        chat_template=f"{begin}{TEMPLATE}",
    )
    config = Idefics3Config(**_settings(tokenizer), tie_word_embeddings=False)
    with seeded(SEED, torch.device("cpu")):
        return Idefics3ForConditionalGeneration(config), processor


def idefics2() -> tuple[Any, Any]:
    """As idefics2-8b: image splitting, a perceiver, each text has a begin token."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_begun(
            ["<unk>", "<s>", "</s>", *IMAGE_TOKENS, "<end_of_utterance>"], begin="<s>"
        ),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
    )
    size = {"shortest_edge": TILE, "longest_edge": LONGEST_EDGE}
    half = [0.5, 0.5, 0.5]
    images = Idefics2ImageProcessor(
        size=size, do_image_splitting=True, image_mean=half, image_std=half
    )
    processor = Idefics2Processor(images, tokenizer, image_seq_len=4, chat_template=TEMPLATE)
    settings = _settings(tokenizer)
    del settings["scale_factor"]
    settings["vision_config"]["image_size"] = LONGEST_EDGE
    settings["text_config"]["model_type"] = "mistral"
    config = Idefics2Config(
        **settings,
        perceiver_config={
            "hidden_size": settings["text_config"]["hidden_size"],
            "rms_norm_eps": 1e-5,
            "resampler_n_latents": 4,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 32,
            "num_key_value_heads": 2,
        },
    )
    with seeded(SEED, torch.device("cpu")):
        model = Idefics2ForConditionalGeneration(config)
        # Equal latents, as a fresh model has them, would give equal features.
        torch.nn.init.normal_(model.model.connector.perceiver_resampler.latents)
    return model, processor


BUILDERS = {"idefics2": idefics2, "idefics3": idefics3, "smolvlm": smolvlm}
"""By ``model_type``."""


def _trained(special_tokens: list[str]) -> Tokenizer:
    """A byte-level BPE tokenizer that has learnt the cards' words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=768,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [
        f"Question: What's on the picture? Answer: This is {card.name}. {card.sentence}\n\n"
        for card in all_cards("train")
    ]
    tokenizer.train_from_iterator([*texts, "System: User: Assistant:"], trainer)
    return tokenizer


def _begun(special_tokens: list[str], begin: str) -> Tokenizer:
    """Such a tokenizer that puts a token before each text."""
    tokenizer = _trained(special_tokens)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    return tokenizer


def _image_settings() -> dict[str, Any]:
    return {"size": {"longest_edge": LONGEST_EDGE}, "max_image_size": {"longest_edge": TILE}}


def _settings(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Of a model with 16 patches in a tile, four of which become one token."""
    return {
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
        "scale_factor": 2,
        "vision_config": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": TILE,
            "patch_size": TILE // 4,
            "initializer_range": 0.1,
        },
        "text_config": {
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "initializer_range": 0.1,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
    }
