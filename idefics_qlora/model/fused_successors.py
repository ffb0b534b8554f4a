"""Idefics2, Idefics3 and SmolVLM computed with few operations.

Past 400 lines: what they have in common, and the little in which they differ.

Their images are tiles whose features are rows of the text. Tiles of all examples are taken
together, without those that pad an example; which rows they become follows from the token ids, and
is told before the pass.

Shapes: B examples, T tokens, P tiles of all examples, L patches and F features of a tile, M packed
rows, D width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.models.idefics2 import modeling_idefics2 as idefics2
from transformers.models.idefics3 import modeling_idefics3 as idefics3
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.smolvlm import modeling_smolvlm as smolvlm

from idefics_qlora.families.family import Vision
from idefics_qlora.families.idefics2_reader import Idefics2Vision
from idefics_qlora.families.idefics3_reader import Idefics3Vision
from idefics_qlora.families.patches import patches_of
from idefics_qlora.families.tiles import TiledVision
from idefics_qlora.model.fused import (
    Architecture,
    Block,
    FusedBlocks,
    GatedMLP,
    Packing,
    Unfit,
    VisionLayer,
    add_norm,
    attend,
    check,
    check_attention,
    take,
)
from idefics_qlora.model.lora_linear import compute_dtype

FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")
"""Kinds of RoPE whose frequencies do not depend on the length."""


class Decoder(Block):
    """A layer of Llama or Mistral, with fewer heads of key and value than of the query."""

    def __init__(self, blocks: FusedBlocks, module: Any) -> None:
        super().__init__(blocks, module)
        attention = module.self_attn
        check(module, [module.input_layernorm, module.post_attention_layernorm])
        check_attention(attention, attention.attention_dropout)
        config = attention.config
        self.heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        self.window = getattr(config, "sliding_window", None)
        if attention.head_dim % 2:
            raise Unfit("heads of an odd width")
        self.qkv = blocks.group(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = blocks.group(attention.o_proj)
        self.mlp = GatedMLP(blocks, module.mlp)

    def __call__(
        self, hidden_states: Tensor, *, rotation: tuple[Tensor, Tensor], **_: Any
    ) -> Tensor:
        """Packed rows (M, D), with :meth:`FusedBlocks.rotation`."""
        module, packing = self.module, self.blocks.packing
        residual, x = add_norm(hidden_states, None, module.input_layernorm)
        q, k, v = self.query_key_value(x, self.qkv, self.heads, packing, rotation)
        # Causal is all it takes: no token has padding before it.
        sees: dict[str, Any] = {"is_causal": True}
        if self.window is not None and packing.length > self.window:
            sees = {"attn_mask": causal_mask(packing.length, self.window, x.device)}
        x = attend(q, k, v, scale=module.self_attn.scaling, **sees)
        x = self.linear(packing.rows(x.flatten(0, 1)), self.out)
        residual, x = add_norm(x, residual, module.post_attention_layernorm)
        return residual + self.mlp(x, self.blocks.linears.seed)


def causal_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """(1, 1, T, T) bool: what a token sees, itself and at most ``window - 1`` before it."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    if window is not None:
        mask = mask.triu(1 - window)
    return mask[None, None]


class _Connector(Block):
    """Some neighbouring patches of a tile become one row of the text."""

    def __init__(self, blocks: FusedBlocks, module: Any) -> None:
        super().__init__(blocks, module)
        check(module, [])
        self.projection = blocks.group(module.modality_projection.proj)

    def __call__(self, patches: Tensor) -> Tensor:
        shuffled = self.module.pixel_shuffle(patches, self.module.scale_factor)
        return self.linear(shuffled, self.projection)


class _Projection(Block):
    """A gated MLP that is no part of another block."""

    def __init__(self, blocks: FusedBlocks, module: Any) -> None:
        super().__init__(blocks, module)
        check(module, [])
        self.mlp = GatedMLP(blocks, module)

    def __call__(self, x: Tensor) -> Tensor:
        return self.mlp(x, self.blocks.linears.seed)


class _PerceiverLayer(Block):
    def __init__(self, blocks: FusedBlocks, module: Any) -> None:
        super().__init__(blocks, module)
        attention = module.self_attn
        norms = [module.input_latents_norm, module.input_context_norm]
        check(module, [*norms, module.post_attention_layernorm])
        check_attention(attention, attention.attention_dropout)
        self.q = blocks.group(attention.q_proj)
        self.kv = blocks.group(attention.k_proj, attention.v_proj)
        self.out = blocks.group(attention.o_proj)
        self.mlp = GatedMLP(blocks, module.mlp)

    def __call__(
        self, latents: Tensor, context: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> Tensor:
        module, attention = self.module, self.module.self_attn
        residual, x = add_norm(latents, None, module.input_latents_norm)
        context = add_norm(context, None, module.input_context_norm)[1]
        tiles, size = len(latents), attention.head_dim
        q = self.linear(x, self.q).view(tiles, -1, attention.num_heads, size)
        kv = self.linear(torch.cat([context, x], dim=-2), self.kv)
        k, v = kv.view(tiles, -1, 2, attention.num_key_value_heads, size).unbind(2)
        x = attend(
            *(t.transpose(1, 2) for t in (q, k, v)),
            attn_mask=attention_mask,
            scale=attention.scaling,
        )
        x = self.linear(x, self.out)
        residual, x = add_norm(x, residual, module.post_attention_layernorm)
        return residual + self.mlp(x, self.blocks.linears.seed)


def text_hidden_states(text: Any, blocks: FusedBlocks, x: Tensor) -> Tensor:
    """The last hidden states (M, D) of a Llama or Mistral over packed rows.

    Args:
        text: The text model.
        blocks: Its blocks, active.
        x: (M, D), embeddings and the features of images.
    """
    packing = blocks.packing
    rotation = blocks.rotation(packing.length, text.rotary_emb, compute_dtype(x))
    for layer in text.layers:
        if hasattr(layer, "fused_plan"):
            x = layer(x, rotation=rotation)
            continue
        padded = packing.slots(x).view(packing.examples, packing.length, -1)
        positions = torch.arange(packing.length, device=x.device)[None]
        window = getattr(text.config, "sliding_window", None)
        output = layer(
            padded,
            attention_mask=causal_mask(packing.length, window, x.device),
            position_ids=positions,
            position_embeddings=text.rotary_emb(padded, position_ids=positions),
        )
        x = packing.rows(output.flatten(0, 1))
    result: Tensor = text.norm(x)
    return result


def places_of(is_image: Tensor, num_features: int) -> dict[str, Tensor]:
    """Which row of the text each feature becomes: the rows of images in their order.

    Args:
        is_image: (M,) bool, True for at most as many rows as there are features.
        num_features: Those of all images.

    Returns:
        ``feature_of_row`` (M,) and ``row_of_feature``, int64; -1: none.
    """
    number = is_image.cumsum(0)
    rows = torch.argsort((~is_image).to(torch.uint8), stable=True)[:num_features]
    if num_features > len(rows):
        rows = torch.nn.functional.pad(rows, (0, num_features - len(rows)))
    has_row = torch.arange(num_features, device=rows.device) < number[-1]
    return {
        "feature_of_row": torch.where(is_image, number - 1, -1),
        "row_of_feature": torch.where(has_row, rows, -1),
    }


def merged(embeddings: Tensor, features: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """Rows of text (M, D) with the features of images (P F, D) in their places.

    Args:
        embeddings: (M, D), frozen.
        features: Of all images.
        inputs: What :func:`places_of` gave.
    """
    places = inputs["feature_of_row"]
    rows = take(features.to(embeddings.dtype), places, inputs["row_of_feature"])
    return rows + embeddings.masked_fill((places >= 0)[:, None], 0)


def why_not_parts(base: Any, *parts: nn.Module) -> str | None:
    """Why a base cannot be computed part by part; ``None`` if it can.

    Args:
        base: The model without ``peft``'s wrapper.
        parts: Those whose own forward is not called.
    """
    for part in parts:
        if isinstance(part, AuxiliaryTrainingWrapper):
            return "a whole part of the model is trained"
        implementation = getattr(part.config, "_attn_implementation", "sdpa")
        if implementation != "sdpa":
            return f"attention is {implementation!r}"
    kind = base.model.text_model.rotary_emb.rope_type
    return None if kind in FIXED_ROTATIONS else f"its rotation is {kind!r}"


class _Successor(Architecture):
    """Vision tower, connector and text layers."""

    vision_type: type[TiledVision]

    def embedding(self, base: Any) -> nn.Module:
        """The embedding of the text."""
        embedding: nn.Module = base.model.text_model.embed_tokens
        return embedding

    def why_not(self, base: Any) -> str | None:
        """Why a base cannot be trained the fast way at all; ``None`` if it can."""
        inner = base.model
        reason = why_not_parts(base, inner, inner.text_model, inner.vision_model)
        return reason or super().why_not(base)

    def described(self, num_images: int, num_pictures: int) -> str:
        """P in words."""
        return f"{num_pictures} tiles"

    def inputs(
        self, base: Any, vision: Vision, images: Sequence[int], num_pictures: int,
        packing: Packing, input_ids: Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Tiles of all examples, and which rows their features become."""
        if not num_pictures:
            return {}
        tiled = _tiled(vision)
        order = torch.argsort((~tiled.is_tile.flatten()).to(torch.uint8), stable=True)
        chosen = order[:num_pictures]  # the last may be padding
        is_image = (input_ids == base.config.image_token_id) & (packing.slot_of >= 0)
        return {
            **self.tiles(base, tiled, chosen),
            "pixel_mean": tiled.pixel_mean,
            "pixel_std": tiled.pixel_std,
            **places_of(is_image, num_pictures * self.tokens_of_an_image(base)),
        }

    def tiles(self, base: Any, vision: TiledVision, chosen: Tensor) -> dict[str, Tensor]:
        """Some of the tiles: ``pixels`` (P, 3, H, W), and what else :meth:`features` needs."""
        return {"pixels": vision.pixel_values.flatten(0, 1)[chosen]}

    def hidden_states(
        self, base: Any, blocks: FusedBlocks, embeddings: Tensor, inputs: Mapping[str, Tensor]
    ) -> Tensor:
        """The last hidden states (M, D) over packed rows."""
        x = embeddings
        if "pixels" in inputs:
            pixels = inputs["pixels"].float()
            pixels -= inputs["pixel_mean"].view(3, 1, 1)
            pixels /= inputs["pixel_std"].view(3, 1, 1)
            patches = base.model.vision_model.embeddings.patch_embedding.weight
            features = self.features(base.model, pixels.to(patches.dtype), inputs)
            x = merged(embeddings, features.flatten(0, 1), inputs)
        return text_hidden_states(base.model.text_model, blocks, x)

    @abstractmethod
    def features(self, inner: Any, pixels: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """What the text gets of tiles: (P, F, D)."""

    def traced_vision(
        self, config: PretrainedConfig, examples: int, num_tokens: int, num_images: int
    ) -> TiledVision:
        """Tiles of examples without data."""
        side = config.vision_config.image_size
        grid = (1, num_images - 1) if num_images > 1 else (0, 0)
        return self.vision_type(
            pixel_values=torch.empty(examples, num_images, 3, side, side, dtype=torch.uint8),
            tile_sizes=torch.empty(examples, num_images, 2, dtype=torch.int64),
            sees_image=torch.empty(examples, num_tokens, 1, dtype=torch.bool),
            pixel_mean=torch.empty(3),
            pixel_std=torch.empty(3),
            sizes=(((side, side),) * num_images,) * examples,
            grids=((grid,),) * examples,
        )


def _tiled(vision: Vision) -> TiledVision:
    assert isinstance(vision, TiledVision)
    return vision


def _encoded(tower: Any, pixels: Tensor, is_patch: Tensor, mask: Tensor | None) -> Tensor:
    """Patches (P, L, D) of a vision tower.

    Args:
        tower: The model's.
        pixels: (P, 3, H, W), normalised.
        is_patch: (P, rows, columns) bool.
        mask: (P, 1, 1, L) bool: which patches are seen; ``None``: all.
    """
    x = patches_of(tower.embeddings, pixels, is_patch)
    for layer in tower.encoder.layers:
        x = layer(x, mask)
    result: Tensor = tower.post_layernorm(x)
    return result


class Idefics3(_Successor):
    """SigLIP over square tiles, pixel shuffle, and Llama: Idefics3 and SmolVLM."""

    vision_type = Idefics3Vision
    blocks = MappingProxyType(
        {
            LlamaDecoderLayer: Decoder,
            idefics3.Idefics3EncoderLayer: VisionLayer,
            smolvlm.SmolVLMEncoderLayer: VisionLayer,
            idefics3.Idefics3Connector: _Connector,
            smolvlm.SmolVLMConnector: _Connector,
        }
    )
    lone_norms = ("model.text_model.norm", "model.vision_model.post_layernorm")

    def tokens_of_an_image(self, base: Any) -> int:
        """Rows that a tile has in the text."""
        vision = base.config.vision_config
        side = vision.image_size // vision.patch_size // base.config.scale_factor
        return int(side**2)

    def features(self, inner: Any, pixels: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """What the text gets of tiles: (P, F, D)."""
        side = inner.vision_model.embeddings.num_patches_per_side
        whole = torch.ones(len(pixels), side, side, dtype=torch.bool, device=pixels.device)
        features: Tensor = inner.connector(_encoded(inner.vision_model, pixels, whole, None))
        return features


class Idefics2(_Successor):
    """SigLIP over pictures in their own shape, a perceiver, and Mistral."""

    vision_type = Idefics2Vision
    blocks = MappingProxyType(
        {
            MistralDecoderLayer: Decoder,
            idefics2.Idefics2EncoderLayer: VisionLayer,
            idefics2.Idefics2MLP: _Projection,
            idefics2.Idefics2PerceiverLayer: _PerceiverLayer,
        }
    )
    lone_norms = (
        *("model.text_model.norm", "model.vision_model.post_layernorm"),
        "model.connector.perceiver_resampler.norm",
    )

    def why_not(self, base: Any) -> str | None:
        """Why a base cannot be trained the fast way at all; ``None`` if it can."""
        connector = base.model.connector
        parts = connector, getattr(connector, "perceiver_resampler", None)
        if any(isinstance(part, AuxiliaryTrainingWrapper) for part in parts):
            return "a whole part of the model is trained"
        if base.model.connector.perceiver_resampler.latents.requires_grad:
            return "the latents are trained"
        return super().why_not(base)

    def tokens_of_an_image(self, base: Any) -> int:
        """Rows that a tile has in the text."""
        return int(base.config.perceiver_config.resampler_n_latents)

    def sides(self, base: Any, vision: Vision) -> tuple[int, ...]:
        """Rows and columns of patches of the largest tiles, and whether others are smaller."""
        patch = base.config.vision_config.patch_size
        sizes = [(h // patch, w // patch) for row in _tiled(vision).sizes for h, w in row]
        if not sizes:
            return ()
        rows, columns = max(r for r, _ in sizes), max(c for _, c in sizes)
        return rows, columns, any(size != (rows, columns) for size in sizes)

    def tiles(self, base: Any, vision: TiledVision, chosen: Tensor) -> dict[str, Tensor]:
        """Some of the tiles, and which of their patches are there, unless all are."""
        patch = base.config.vision_config.patch_size
        rows, columns, is_mixed = self.sides(base, vision)
        pixels = vision.pixel_values[:, :, :, : rows * patch, : columns * patch]
        tiles = {"pixels": pixels.flatten(0, 1)[chosen]}
        if not is_mixed:
            return tiles
        sizes = vision.tile_sizes.flatten(0, 1)[chosen] // patch  # (P, 2)
        inside = [
            torch.arange(number, device=sizes.device) < sizes[:, n, None]
            for n, number in enumerate((rows, columns))
        ]
        # One that is no tile is seen whole: attention to nothing is no number.
        is_patch = inside[0][:, :, None] & inside[1][:, None, :]
        return {**tiles, "is_patch": is_patch | (sizes[:, :1, None] == 0)}

    def features(self, inner: Any, pixels: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """What the text gets of tiles: (P, F, D)."""
        tower, connector = inner.vision_model, inner.connector
        patch = tower.embeddings.patch_size
        sides = pixels.shape[2] // patch, pixels.shape[3] // patch
        mask = mask_with_latents = None
        if "is_patch" in inputs:
            is_patch = inputs["is_patch"]
            mask = is_patch.flatten(1)[:, None, None]
            latents = mask.new_ones(len(pixels), 1, 1, connector.perceiver_resampler.n_latents)
            mask_with_latents = torch.cat([mask, latents], dim=-1)
        else:
            is_patch = torch.ones(len(pixels), *sides, dtype=torch.bool, device=pixels.device)
        context = connector.modality_projection(_encoded(tower, pixels, is_patch, mask))
        resampler = connector.perceiver_resampler
        x = resampler.latents.expand(len(context), -1, -1)
        for layer in resampler.layers:
            x = layer(x, context, attention_mask=mask_with_latents)
        result: Tensor = resampler.norm(x)
        return result
