"""A run in a notebook, executed by a real kernel."""

import nbclient
import nbformat
import pytest

CELLS = """
import idefics_qlora as iq
model, processor = iq.tiny.load_model(device="cpu")
rows = iq.tiny.creature_cards(6, seed=0)
config = iq.TrainConfig(
    output_dir="run", max_steps=2, global_batch_size=2, logging_steps=1, eval_steps=1,
    save_steps=1, eval_samples=2, num_workers=0,
)
---
result = iq.train(iq.add_lora(model), processor, rows[:4], rows[4:], config=config,
                  to_example=iq.pokemon_card_example)
---
iq.preview_batch(processor, rows, iq.pokemon_card_example, indices=[0])
"""


@pytest.mark.slow
def test_an_executed_notebook_shows_one_live_table(tmp_path, monkeypatch):
    """The kernel's own machinery for displays has one page in the end, which is that of the whole
    run, and no line of ours beside it; a preview is shown with its picture, once."""
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    cells = [nbformat.v4.new_code_cell(cell) for cell in CELLS.strip().split("---\n")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    _, trained, shown = notebook.cells
    assert [o.text for o in trained.outputs if o.output_type == "stream"] == []
    (page,) = filter(None, (output.data["text/html"] for output in trained.outputs))
    assert '<progress value="2" max="2"' in page
    assert "<th>Held-out loss</th>" in page
    assert page.count("<tr>") == 3
    assert page.count("says: ") == 2
    assert "load_finetuned(" in page
    (preview,) = shown.outputs
    assert preview.output_type == "execute_result"
    assert preview.data["text/html"].count("<img") == 1
