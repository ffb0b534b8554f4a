"""Compares a pass with Triton's kernels and one without, by the interpreter (a script)."""

import sys

import torch
from peft import LoraConfig

import idefics_qlora as iq
from idefics_qlora.data.batches import Collator
from idefics_qlora.model import kernels
from idefics_qlora.model.graphs import FastPath
from idefics_qlora.model.precision import set_compute_dtype

if __name__ == "__main__":
    torch.manual_seed(0)
    base, processor = iq.tiny.load_model(family=sys.argv[1], device="cpu")
    model = iq.add_lora(base, LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    set_compute_dtype(model, torch.float32)
    model.train()
    cards = iq.tiny.creature_cards(2, seed=0)
    examples = [
        iq.Example([card["image"], "Answer:"], " It is." * (3 - i)) for i, card in enumerate(cards)
    ]
    batch = Collator(processor)(examples)
    results = []
    for usable in (kernels.usable, lambda tensor: False):
        kernels.usable = usable
        model.zero_grad()
        path = FastPath(model, torch.float32)
        path.begin_window()
        lengths = batch.attention_mask.sum(1).tolist()
        tiles = getattr(batch.vision, "is_tile", torch.ones(2, 1))
        loss = path.micro_batch_backward(
            batch, batch.num_targets, lengths=lengths, images=tiles.sum(1).int().tolist()
        )
        path.close()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        results.append((loss, torch.cat(grads)))
    (loss, grad), (other_loss, other_grad) = results
    torch.testing.assert_close(loss, other_loss, rtol=1e-5, atol=0)
    assert (grad - other_grad).norm() < 1e-5 * grad.norm()
    print("equal")
