"""What goes with which base: adapters, processors, sizes of pictures."""

import copy

import pytest
import torch
from helpers import config_of
from peft import LoraConfig
from torch.autograd.graph import saved_tensors_hooks
from transformers import Idefics3Config, SmolVLMConfig

import idefics_qlora as iq
from idefics_qlora.checkpoint import load_checkpoint
from idefics_qlora.data.batches import Collator
from idefics_qlora.families import family_of_config
from idefics_qlora.model.precision import set_compute_dtype

SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
}
BASE_16 = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "patch_size": 16,
    "image_size": 512,
}
NAMES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads"),
)
# configuration, vision tower, scale factor, text layers; parameters, q/k/v r=16, the makers'
PUBLISHED = {
    "Idefics3-8B-Llama3": (
        *(Idefics3Config, {**SO400M, "image_size": 364}, 2),
        (128259, 4096, 14336, 32, 32, 8),
        *(8_462_086_384, 12_423_168, 22_464_512),
    ),
    "SmolVLM-Instruct": (
        *(Idefics3Config, {**SO400M, "image_size": 384}, 3),
        (49155, 2048, 8192, 24, 32, 32),
        *(2_246_272_880, 7_704_576, 10_536_960),
    ),
    "SmolVLM2-2.2B": (
        *(SmolVLMConfig, {**SO400M, "image_size": 384}, 3),
        (49280, 2048, 8192, 24, 32, 32),
        *(2_246_784_880, 7_704_576, 10_536_960),
    ),
    "SmolVLM2-500M": (
        *(SmolVLMConfig, BASE_16, 4),
        (49280, 960, 2560, 32, 15, 5),
        *(507_482_304, 3_178_496, 4_784_128),
    ),
    "SmolVLM-256M": (
        *(Idefics3Config, BASE_16, 4),
        (49280, 576, 1536, 30, 9, 3),
        *(256_484_928, 2_174_976, 2_884_608),
    ),
}


def configuration(name):
    """The configuration of a published base."""
    kind, vision, scale_factor, text, *_ = PUBLISHED[name]
    return kind(
        vision_config=vision,
        text_config={"model_type": "llama", **dict(zip(NAMES, text, strict=True))},
        scale_factor=scale_factor,
        tie_word_embeddings=False,
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_bases_have_the_known_parameters(name):
    """Of the base, of the default adapter, and of that which the makers published."""
    config = configuration(name)
    family = family_of_config(config)
    trainable = []
    for lora in (None, "makers"):
        with torch.device("meta"):
            base = family.model_class()(copy.deepcopy(config))
            total = sum(p.numel() for p in base.parameters())
            model = iq.add_lora(base, lora)
        trainable.append(model.get_nb_trainable_parameters()[0])
        parts = {family.part_of(n) for n, p in model.named_parameters() if p.requires_grad}
        assert parts == {"vision tower", "text layers"}
        assert {family.part_of(n) for n, _ in model.named_parameters()} == set(family.parts)
    assert [total, *trainable] == list(PUBLISHED[name][4:])


def test_the_makers_recipe(base):
    """r=8, alpha=8, dropout 0.1, gaussian; IDEFICS has none."""
    config = iq.add_lora(base, "makers").active_peft_config
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 8, 0.1)
    assert config.init_lora_weights == "gaussian"
    assert config.target_modules == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }


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
    assert "model.connector.modality_projection.proj" in quantised


def test_flops_follow_the_parameters():
    """4 operations per weight and token; per tile, those of its patches."""
    config = configuration("SmolVLM2-500M")
    family = family_of_config(config)
    with torch.device("meta"):
        base = family.model_class()(config)
    text = sum(p.numel() for n, p in base.named_parameters() if family.part_of(n) == "text layers")
    text -= base.model.text_model.embed_tokens.weight.numel()
    assert family.training_flops(config, 10, 0) == pytest.approx(40 * text, rel=1e-3)
    vision = sum(p.numel() for p in base.model.vision_model.encoder.parameters())
    assert family.training_flops(config, 0, 3) == pytest.approx(12 * 32**2 * vision, rel=1e-2)


def test_a_processor_of_another_family_is_refused(successor, loaded, examples):
    """Before anything is computed, by every function that takes both."""
    model, processor = successor
    for function in (iq.evaluate, iq.generate, iq.image_use):
        with pytest.raises(ValueError, match="processor does not go with the model: it is a Idef"):
            function(model, loaded[1], examples[:2])
        with pytest.raises(ValueError, match="that of a 'idefics' model a IdeficsProcessor"):
            function(loaded[0], processor, examples[:2])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image_seq_len": 9}, "its tiles have 9 tokens, the model's 4"),
        ({"max_image_size": {"longest_edge": 32}}, "its tiles have 32 pixels, the model's 64"),
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
    reader = Collator(processor).reader
    picture = examples[0].prompt[0]
    assert reader.num_tiles(reader.pixels(picture, None)) == 1
    model = iq.add_lora(base)
    config = config_of(tmp_path, max_steps=1)
    iq.train(model, processor, examples, config=config)
    assert load_checkpoint(tmp_path / "checkpoint-1").state["image_side"] == 64
    _, again = iq.load_finetuned(tmp_path / "checkpoint-1", device="cpu")
    assert Collator(again).reader.side == 64
    with pytest.raises(ValueError, match=r"longest_edge=...\): 64 there, 128 here"):
        iq.train(model, successor[1], examples, config=config_of(tmp_path, max_steps=2))
    for edge in (63, 5000):
        with pytest.raises(ValueError, match=f"longest_edge={edge}: expected pixels from 64"):
            iq.load_model(folder, device="cpu", longest_edge=edge)


def test_pictures_of_idefics_have_one_size():
    """A setting that cannot act is an error."""
    with pytest.raises(ValueError, match="longest_edge=512: pictures of 'idefics' models have one"):
        iq.tiny.load_model(device="cpu", longest_edge=512)


def test_an_unknown_family_of_small_bases():
    """The error lists those that are known."""
    with pytest.raises(ValueError, match="'idefics4': expected one of idefics, idefics3, smolvlm"):
        iq.tiny.load_model(family="idefics4")


def test_an_unknown_base_lists_the_known(tmp_path):
    """By their types and by examples."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"'llama' model: .*'idefics'.*'idefics3'.*'smolvlm'"):
        iq.load_model(tmp_path)


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_the_estimate_counts_what_the_graph_saves(successor, processor, micro_batch):
    """What a forward pass over tiles and text keeps: never too little, at most 8 % too much."""
    lora = LoraConfig(r=16, lora_alpha=32)  # a CPU keeps dropout's mask in another dtype
    model = iq.add_lora(copy.deepcopy(successor[0]), lora).train()
    set_compute_dtype(model, torch.float32)
    rows = iq.tiny.creature_cards(1)
    example = iq.Example([rows[0]["image"], "Who? " * 40], " It.")
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
    )
    assert not estimate.fast
    kept = sum(saved.values()) + logits.nbytes
    assert kept <= estimate.kept.of(micro_batch) < 1.08 * kept
