"""What goes with which base: adapters, processors, sizes of pictures."""

import copy
import re

import pytest
import torch
from helpers import config_of
from peft import LoraConfig
from published import PUBLISHED
from torch.autograd.graph import saved_tensors_hooks

import idefics_qlora as iq
from idefics_qlora.checkpoint import load_checkpoint
from idefics_qlora.data.batches import Collator
from idefics_qlora.families import FAMILIES, family_of, family_of_config
from idefics_qlora.model.precision import set_compute_dtype

TWO_PARTS = {"vision tower", "text layers"}
WITH_ADAPTERS = {
    "idefics": [{*FAMILIES["idefics"].parts}],
    "idefics2": [{*TWO_PARTS, "perceiver"}, {"projection", "perceiver", "text layers"}],
    "idefics3": [TWO_PARTS, TWO_PARTS],
    "smolvlm": [TWO_PARTS, TWO_PARTS],
}
"""The parts that the default adapter reaches, and the makers'."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_bases_have_the_known_parameters(name):
    """Of the base, of the default adapter, and of that which the makers published."""
    published = PUBLISHED[name]
    family = family_of_config(published.configuration())
    loras = [None, *["makers"] * (published.makers_lora is not None)]
    trainable = []
    for lora in loras:
        with torch.device("meta"):
            base = family.model_class()(published.configuration())
            total = sum(p.numel() for p in base.parameters())
            model = iq.add_lora(base, lora)
        trainable.append(model.get_nb_trainable_parameters()[0])
        parts = {family.part_of(n) for n, p in model.named_parameters() if p.requires_grad}
        assert parts == WITH_ADAPTERS[family.model_type][lora == "makers"]
        assert {family.part_of(n) for n, _ in model.named_parameters()} == set(family.parts)
    known = [published.default_lora, published.makers_lora]
    assert [total, *trainable] == [published.parameters, *known[: len(loras)]]


def test_the_makers_recipe(base):
    """r=8, alpha=8, dropout 0.1, gaussian; IDEFICS has none."""
    model = iq.add_lora(base, "makers")
    config, names = model.active_peft_config, dict(model.named_parameters())
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 8, 0.1)
    assert config.init_lora_weights == "gaussian"
    for kind in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert any(re.search(rf"text_model\.layers\.0\..*{kind}\.lora_A", name) for name in names)


def test_there_is_no_makers_recipe_for_idefics(loaded):
    """The message says what there is instead."""
    with pytest.raises(ValueError, match="'idefics' models published no recipe"):
        iq.add_lora(copy.deepcopy(loaded[0]), "makers")
    with pytest.raises(ValueError, match="config='maker': expected 'makers' or"):
        iq.add_lora(copy.deepcopy(loaded[0]), "maker")


def test_linear_layers_are_quantised_but_the_head(base):
    """In NF4 as IDEFICS is; head, embeddings and norms are not."""
    quantised = {n for n, m in base.named_modules() if type(m).__name__ == "Linear4bit"}
    linear = {n for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)}
    assert linear - quantised == {"lm_head"}
    assert {family_of(base).part_of(name) for name in quantised} == set(family_of(base).parts)


@pytest.mark.parametrize(
    ("name", "patches"),
    [
        ("HuggingFaceTB/SmolVLM2-500M-Video-Instruct", 32**2),
        ("HuggingFaceM4/idefics2-8b", 70**2),
    ],
)
def test_flops_follow_the_parameters(name, patches):
    """4 operations per weight and token; per tile, those of its patches, and the connector's."""
    config = PUBLISHED[name].configuration()
    family = family_of_config(config)
    with torch.device("meta"):
        base = family.model_class()(config)
    text = sum(p.numel() for n, p in base.named_parameters() if family.part_of(n) == "text layers")
    text -= base.model.text_model.embed_tokens.weight.numel()
    assert family.training_flops(config, 10, 0) == pytest.approx(40 * text, rel=1e-3)
    products = 0
    for part, tokens in seen_by(base, patches):
        products += tokens * sum(p.numel() for p in part.parameters() if p.dim() == 2)
    assert family.training_flops(config, 0, 3) == pytest.approx(12 * products, rel=1e-3)


def seen_by(base, patches):
    """The modules that see a tile, and how many tokens each of them sees."""
    yield base.model.vision_model.encoder, patches
    connector = base.model.connector
    if not hasattr(connector, "perceiver_resampler"):
        scale_factor = base.config.scale_factor
        yield connector, patches // scale_factor**2
        return
    yield connector.modality_projection, patches
    latents = len(connector.perceiver_resampler.latents)
    for layer in connector.perceiver_resampler.layers:
        yield from ((m, latents) for m in (layer.self_attn.q_proj, layer.self_attn.o_proj))
        yield from (
            (m, latents + patches) for m in (layer.self_attn.k_proj, layer.self_attn.v_proj)
        )
        yield layer.mlp, latents


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image_seq_len": 9}, "its tiles have 9 tokens, the model's 4"),
        ({"image_token": "<end_of_utterance>"}, r"its image token is \d+, the model's \d+"),
    ],
)
def test_a_processor_of_another_base_is_refused(successor, processor, examples, change, reason):
    """What would fail deep in the model, or not at all, is told first."""
    for name, value in change.items():
        owner = processor if hasattr(processor, name) else processor.image_processor
        setattr(owner, name, value)
    with pytest.raises(ValueError, match=reason):
        iq.evaluate(successor[0], processor, examples[:2])


def test_the_longest_edge_decides_what_a_picture_costs(successor, examples, tmp_path):
    """It is a setting of loading, kept by the checkpoint, and a run goes on with the same alone."""
    folder = successor[0].name_or_path
    base, processor = iq.load_model(folder, device="cpu", longest_edge=64)
    collator = Collator(processor)
    assert collator(examples[:1]).vision.pixel_values.numel() == 3 * 64 * 64 * num_tiles(base)
    assert Collator(successor[1])(examples[:1]).vision.pixel_values.shape[1:] == {
        "idefics2": (5, 3, 128, 94)
    }.get(base.config.model_type, (5, 3, 64, 64))
    model = iq.add_lora(base)
    config = config_of(tmp_path, max_steps=1)
    iq.train(model, processor, examples, config=config)
    assert load_checkpoint(tmp_path / "checkpoint-1").state["image_side"] == 64
    _, again = iq.load_finetuned(tmp_path / "checkpoint-1", device="cpu")
    assert Collator(again).reader.side == 64
    with pytest.raises(ValueError, match=r"longest_edge=...\): was 64, now 128"):
        iq.train(model, successor[1], examples, config=config_of(tmp_path, max_steps=2))
    for edge in (63, 5000):
        with pytest.raises(ValueError, match=f"longest_edge={edge}: expected pixels from 64"):
            iq.load_model(folder, device="cpu", longest_edge=edge)


def num_tiles(base):
    """Of a picture whose sides are one tile long: Idefics2 has its quarters nevertheless."""
    return 5 if base.config.model_type == "idefics2" else 1


def test_pictures_of_idefics_have_one_size():
    """A setting that cannot act is an error."""
    with pytest.raises(ValueError, match="longest_edge=512: pictures of 'idefics' models have one"):
        iq.tiny.load_model(device="cpu", longest_edge=512)


def test_an_unknown_family_of_small_bases():
    """The error lists those that are known."""
    with pytest.raises(
        ValueError, match="'idefics4': expected one of idefics, idefics2, idefics3, smolvlm"
    ):
        iq.tiny.load_model(family="idefics4")


def test_an_unknown_base_lists_the_known(tmp_path):
    """By their types and by examples."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(
        ValueError, match=r"'llama' model: .*'idefics'.*'idefics2'.*'idefics3'.*'smolvlm'"
    ):
        iq.load_model(tmp_path)


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_the_estimate_counts_what_the_graph_saves(successor, processor, micro_batch):
    """What a forward pass over tiles and text keeps: never too little, at most 8 % too much."""
    lora = LoraConfig(r=16, lora_alpha=32)  # a CPU keeps dropout's mask in another dtype
    model = iq.add_lora(copy.deepcopy(successor[0]), lora).train()
    set_compute_dtype(model, torch.float32)
    rows = iq.tiny.creature_cards(1)
    picture = rows[0]["image"].resize((256, 256))  # every tile as large as it may be
    example = iq.Example([picture, "Who? " * 40], " It.")
    batch = Collator(processor)([example] * micro_batch)
    inputs = batch.inputs()
    there = [*model.parameters(), *model.buffers(), *inputs.values()]
    known = {tensor.untyped_storage() for tensor in there}
    saved = {}

    def pack(tensor):
        if tensor.untyped_storage() not in known:
            saved[tensor.untyped_storage()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(**inputs, use_cache=False).logits
    estimate = iq.estimate_memory(
        successor[0].name_or_path,
        text_tokens=batch.input_ids.shape[1],
        images=5,
        precision="fp32",
        lora=lora,
        nested_constants=True,
        fast=False,
    )
    kept = sum(saved.values()) + logits.nbytes
    assert kept <= estimate.kept.of(micro_batch) < 1.08 * kept
