"""What a run runs on."""

import json
import subprocess
import sys
from importlib.metadata import version

from helpers import config_of

import idefics_qlora as iq
from idefics_qlora.checkpoint import load_checkpoint


def test_the_environment_is_reported(lora, processor, examples, tmp_path):
    """As JSON values, on the command line, and in every checkpoint; without names of places."""
    report = iq.environment()
    assert report["versions"]["torch"] == version("torch")
    assert json.loads(json.dumps(report)) == report
    done = subprocess.run(
        [sys.executable, "-m", "idefics_qlora.environment"],
        capture_output=True,
        text=True,
        check=True,
    )
    printed = json.loads(done.stdout)
    assert printed["versions"] == report["versions"]
    assert done.stderr == ""
    iq.train(
        lora, processor, examples, config=config_of(tmp_path, max_steps=1, global_batch_size=4)
    )
    state = load_checkpoint(tmp_path / "checkpoint-1").state
    assert state["environment"] == report
