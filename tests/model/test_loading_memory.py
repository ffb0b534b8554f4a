"""Loading takes little more host memory than what it makes."""

import json
import subprocess
import sys

import pytest
import torch
from random_model import ARCHITECTURES
from transformers import AutoProcessor, IdeficsConfig, IdeficsForVisionText2Text

import idefics_qlora as iq

MEASURED = """
import json, sys
import idefics_qlora as iq

def memory(kind):
    (line,) = (line for line in open("/proc/self/status") if line.startswith(kind))
    return 1024 * int(line.split()[1])

iq.tiny.load_model(device="cpu")  # libraries load what they need with the first base
before = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
model, _ = iq.load_model(sys.argv[1], device="cpu")
peak = memory("VmHWM") - before
from idefics_qlora.model.memory_trace import quantized_tensors, storage_bytes
tensors = [*model.parameters(), *model.buffers(), *quantized_tensors(model)]
print(json.dumps([peak, sum(storage_bytes(tensors).values())]))
"""


@pytest.fixture
def many_shards(tmp_path):
    """A base in shards, in proportions like those of idefics-80b: a weight is a small part of one.

    Its files and the sum of their bytes.
    """
    settings = {**ARCHITECTURES["small"], "hidden_size": 512, "intermediate_size": 1376}
    settings |= {"num_hidden_layers": 40, "num_attention_heads": 8, "cross_layer_interval": 4}
    config = IdeficsConfig(
        **settings, use_resampler=True, qk_layer_norms=True, alpha_type="float",
        alpha_initializer="ones",
    )  # fmt: skip
    with torch.device("meta"):
        model = IdeficsForVisionText2Text(config).half()
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    folder = tmp_path / "base"
    model.save_pretrained(folder, max_shard_size="40MB")
    AutoProcessor.from_pretrained(iq.tiny.BASE).save_pretrained(folder)
    return folder, [file.stat().st_size for file in folder.glob("*.safetensors")]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's count of a process")
def test_a_base_in_many_shards_is_loaded_piece_by_piece(many_shards, monkeypatch):
    """At most 1.3 times the largest shard beside the base in 4 bits, files in memory included."""
    folder, shards = many_shards
    assert len(shards) >= 8
    # Weights of real bases are over 32 MB, which the C library gives back to the kernel at once.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    child = subprocess.run(
        [sys.executable, "-c", MEASURED, str(folder)],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    peak, made = json.loads(child.stdout.splitlines()[-1])
    assert sum(shards) > 2.5 * made  # so that holding it all would be seen
    assert made < peak < 1.3 * max(shards) + made
