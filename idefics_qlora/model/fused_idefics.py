"""IDEFICS computed with few operations.

Attention gets no image mask where one image is all there is: tokens before it are gated anyway.

Shapes: B examples, T tokens, N images per example, P images that vision sees, L latents per image,
M packed rows, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.models.idefics import modeling_idefics as idefics
from transformers.models.idefics import perceiver
from transformers.models.idefics import vision as tower

from idefics_qlora.families.family import Vision
from idefics_qlora.families.idefics import IdeficsVision
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
)
from idefics_qlora.model.lora_linear import compute_dtype


class Decoder(Block):
    """A layer of the text."""

    def __init__(self, blocks: FusedBlocks, module: Any) -> None:
        super().__init__(blocks, module)
        attention = module.self_attn
        check(module, [module.input_layernorm, module.post_attention_layernorm], module.dropout)
        check_attention(attention, attention.dropout)
        if attention.qk_layer_norms or attention.is_cross_attention or attention.head_dim % 2:
            raise Unfit("self-attention of another kind")
        self.qkv = blocks.group(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = blocks.group(attention.o_proj)
        self.mlp = GatedMLP(blocks, module.mlp)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Packed rows (M, D)."""
        module, attention = self.module, self.module.self_attn
        packing = self.blocks.packing
        residual, x = add_norm(hidden_states, None, module.input_layernorm)
        rotation = self.blocks.rotation(packing.length, attention.rotary_emb, x.dtype)
        heads = attention.num_heads, attention.num_heads
        q, k, v = self.query_key_value(x, self.qkv, heads, packing, rotation)
        # Causal is all it takes: no token has padding before it.
        x = attend(q, k, v, is_causal=True, scale=attention.scaling)
        x = self.linear(packing.rows(x.flatten(0, 1)), self.out)
        residual, x = add_norm(x, residual, module.post_attention_layernorm)
        return residual + self.mlp(x, self.blocks.linears.seed)


class _CrossAttention(Block):
    def __init__(self, blocks: FusedBlocks, module: Any) -> None:
        super().__init__(blocks, module)
        attention = module.cross_attn
        norms = [module.input_layernorm, module.post_attention_layernorm]
        if attention.qk_layer_norms:
            norms += [attention.q_layer_norm, attention.k_layer_norm]
        check(module, norms, module.config)  # its config is the dropout
        check_attention(attention, attention.dropout)
        self.q = blocks.group(attention.q_proj)
        self.kv = blocks.group(attention.k_proj, attention.v_proj)
        self.out = blocks.group(attention.o_proj)
        self.mlp = GatedMLP(blocks, module.mlp)

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_hidden_states: Tensor | None = None,
        image_attention_mask: Tensor | None = None,
        cross_attention_gate: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        assert image_hidden_states is not None
        assert cross_attention_gate is not None
        module, attention = self.module, self.module.cross_attn
        packing, heads = self.blocks.packing, attention.num_heads
        residual, x = add_norm(hidden_states, None, module.input_layernorm)
        q = self.linear(x, self.q).view(-1, heads, attention.head_dim)
        kv = self.linear(image_hidden_states, self.kv)
        k, v = kv.view(packing.examples, -1, 2, heads, attention.head_dim).unbind(2)
        if attention.qk_layer_norms:
            q = add_norm(q, None, attention.q_layer_norm)[1]
            k = add_norm(k, None, attention.k_layer_norm)[1]
        q = packing.slots(q.flatten(1)).view(packing.examples, packing.length, heads, -1)
        # With one image, a token sees all of it or nothing, and is gated then.
        mask = None if self.blocks.num_images == 1 else image_attention_mask
        mask = mask if mask is None else mask.to(q.dtype)
        x = attend(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask, scale=attention.scaling)
        x = self.linear(packing.rows(x.flatten(0, 1)), self.out)
        gate = torch.tanh(module.alpha_cross_attn).view(-1) * cross_attention_gate[:, None]
        x = _gated(x, residual, gate)
        residual, x = add_norm(x, None, module.post_attention_layernorm)
        x = self.mlp(x, self.blocks.linears.seed)
        return _gated(x, residual, torch.tanh(module.alpha_dense).view(-1))


class _PerceiverAttention(Block):
    def __init__(self, blocks: FusedBlocks, module: Any) -> None:
        super().__init__(blocks, module)
        norms = [module.context_layer_norm, module.latents_layer_norm]
        if module.qk_layer_norms:
            norms += [module.q_layer_norm, module.k_layer_norm]
        check(module, norms)
        self.q = blocks.group(module.q_proj)
        self.kv = blocks.group(module.k_proj, module.v_proj)
        self.out = blocks.group(module.output_proj)

    def __call__(self, context: Tensor, latents: Tensor) -> Tensor:
        module = self.module
        context = add_norm(context, None, module.context_layer_norm)[1]
        latents = add_norm(latents, None, module.latents_layer_norm)[1]
        examples, heads = context.shape[0], module.n_heads
        q = self.linear(latents, self.q).view(examples, -1, heads, module.head_dim)
        kv = self.linear(torch.cat([context, latents], dim=-2), self.kv)
        k, v = kv.view(examples, -1, 2, heads, module.head_dim).unbind(2)
        if module.qk_layer_norms:
            q = add_norm(q, None, module.q_layer_norm)[1]
            k = add_norm(k, None, module.k_layer_norm)[1]
        x = attend(*(t.transpose(1, 2) for t in (q, k, v)), scale=module.qk_scale)
        return self.linear(x, self.out)


class _PerceiverMLP(Block):
    def __init__(self, blocks: FusedBlocks, module: Any) -> None:
        super().__init__(blocks, module)
        check(module, [module.ln])
        self.up, self.down = blocks.group(module.fc), blocks.group(module.c_proj)

    def __call__(self, hidden_states: Tensor) -> Tensor:
        x = add_norm(hidden_states, None, self.module.ln)[1]
        return self.linear(self.module.act(self.linear(x, self.up)), self.down)


def _gated(x: Tensor, residual: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(residual, x, scale.to(x.dtype))


def hidden_states(
    model: Any,
    blocks: FusedBlocks,
    embeddings: Tensor,
    pixels: Tensor,
    picture_at: Tensor,
    image_mask: Tensor,
) -> Tensor:
    """The last hidden states (M, D) of an IDEFICS model over packed rows.

    Args:
        model: The base (not ``peft``'s wrapper).
        blocks: Its blocks, active.
        embeddings: (M, D).
        pixels: (P, 3, S, S), normalised.
        picture_at: (P,): where among all B N images each is; the others pad.
        image_mask: (B, T, N) bool: which image a token attends to.
    """
    inner, packing = model.model, blocks.packing
    examples, _, images = image_mask.shape
    features = inner.vision_model(pixel_values=pixels.to(inner.dtype))
    features = features.last_hidden_state
    if inner.config.use_resampler:
        features = inner.perceiver_resampler(features)
    latents = features.shape[1]
    if len(features) < examples * images:  # nobody attends to the others
        none = features.new_zeros(examples * images, *features.shape[1:])
        features = none.index_copy(0, picture_at, features)
    features = features.reshape(examples, images * latents, -1)
    sees = image_mask.repeat_interleave(latents, dim=2)[:, None]  # (B, 1, T, N L)
    # In the dtype of attention: the least number of a larger one would be rounded to -inf, and
    # a token that sees no image have no finite score.
    dtype = compute_dtype(features)
    mask = torch.zeros(sees.shape, dtype=dtype, device=sees.device)
    mask = mask.masked_fill(~sees, torch.finfo(dtype).min)
    gate = image_mask.any(dim=2).to(features.dtype)  # (B, T)
    gate_of_rows = gate.flatten()[packing.slot_of.clamp(min=0)]  # whatever where there is no token
    # For blocks that are not fused.
    length = packing.length
    causal = torch.ones(length, length, dtype=torch.bool, device=gate.device).tril()[None, None]
    positions = torch.arange(length, device=gate.device)[None]

    def run(block: Any, x: Tensor, mask: Tensor, *args: Any, **options: Any) -> Tensor:
        if hasattr(block, "fused_plan"):
            if "cross_attention_gate" in options:
                options["cross_attention_gate"] = gate_of_rows
            return block(x, mask, *args, **options)
        padded = packing.slots(x).view(packing.examples, length, -1)
        return packing.rows(block(padded, mask, *args, **options).flatten(0, 1))

    x = embeddings
    for n, layer in enumerate(inner.layers):
        if n % inner.cross_layer_interval == 0:
            block = inner.gated_cross_attn_layers[n // inner.cross_layer_interval]
            x = run(
                block, x, causal, features, image_attention_mask=mask, cross_attention_gate=gate
            )
        x = run(layer, x, causal, position_ids=positions)
    result: Tensor = inner.norm(x)
    return result


class Idefics(Architecture):
    """Gated cross-attention to the images that stand beside the text."""

    blocks = MappingProxyType(
        {
            idefics.IdeficsDecoderLayer: Decoder,
            idefics.IdeficsGatedCrossAttentionLayer: _CrossAttention,
            tower.IdeficsVisionEncoderLayer: VisionLayer,
            perceiver.IdeficsPerceiverAttention: _PerceiverAttention,
            perceiver.IdeficsMLP: _PerceiverMLP,
        }
    )
    lone_norms = ("model.norm", "model.vision_model.pre_layrnorm")

    def embedding(self, base: Any) -> nn.Module:
        """The embedding of the text."""
        embedding: nn.Module = base.model.embed_tokens
        return embedding

    def num_images(self, vision: Vision, images: Sequence[int]) -> int:
        """N: at least one, a blank where there is none."""
        return _known(vision).pixel_values.shape[1]

    def described(self, num_images: int, num_pictures: int) -> str:
        """N in words."""
        return f"{num_images} images each"

    def inputs(
        self, base: Any, vision: Vision, images: Sequence[int], num_pictures: int,
        packing: Packing, input_ids: Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Pixels, where those are that vision sees, and which image a token sees."""
        known = _known(vision)
        pixels, mask = known.pixel_values, known.image_attention_mask
        room = pixels.shape[1]
        # Images that there are, then as many of those that pad as there is room for.
        taken = {n * room + i for n, number in enumerate(images) for i in range(number)}
        others = (n for n in range(len(pixels) * room) if n not in taken)
        chosen = sorted([*taken, *others][:num_pictures])
        picture_at = torch.tensor(chosen, pin_memory=pixels.is_cuda)
        return {
            "image_mask": F.pad(mask, (0, 0, 0, packing.length - mask.shape[1])),
            "picture_at": picture_at.to(pixels.device, non_blocking=True),
            "pixels": pixels,
            "pixel_mean": known.pixel_mean,
            "pixel_std": known.pixel_std,
        }

    def hidden_states(
        self, base: Any, blocks: FusedBlocks, embeddings: Tensor, inputs: Mapping[str, Tensor]
    ) -> Tensor:
        """The last hidden states (M, D) over packed rows."""
        picture_at, present = inputs["picture_at"], inputs["image_mask"].any(dim=1)
        pixels = inputs["pixels"].flatten(0, 1)[picture_at].float()  # (P, 3, S, S)
        pixels -= inputs["pixel_mean"].view(3, 1, 1)
        pixels /= inputs["pixel_std"].view(3, 1, 1)
        pixels *= present.flatten()[picture_at][:, None, None, None]
        return hidden_states(base, blocks, embeddings, pixels, picture_at, inputs["image_mask"])

    def traced_vision(
        self, config: PretrainedConfig, examples: int, num_tokens: int, num_images: int
    ) -> IdeficsVision:
        """Images of examples without data."""
        side = config.vision_config.image_size
        sees = torch.empty(examples, num_tokens, num_images, dtype=torch.bool)
        pixels = torch.empty(examples, num_images, 3, side, side, dtype=torch.uint8)
        return IdeficsVision(pixels, sees, torch.empty(3), torch.empty(3))


def _known(vision: Vision) -> IdeficsVision:
    assert isinstance(vision, IdeficsVision)
    return vision
