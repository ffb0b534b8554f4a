"""Show that the tests notice when the loop, its state or its checkpoints lose a piece.

Each :class:`Mutant` is a small change to the package's source that takes one guarantee away. The
few tests that ought to notice are run against a changed copy of the repository; if they pass, a
wider selection is. A mutant that no test notices has to be in :data:`ACCEPTED`, with its reason.
More than 400 lines: most are the list of mutants.

    python tools/mutants.py              # all of them, one after the other
    python tools/mutants.py clip fsync   # those with such words in their names
    python tools/mutants.py --list

Exit code 1: a mutant survived that is not accepted, or is accepted and does not survive. 2: the
tests fail without any change, or a mutant no longer fits the source.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 900
WIDER = (
    *(
        "training/test_loop.py",
        "training/test_resume.py",
        "test_checkpoint.py",
        "test_runs_of_0_1.py",
    ),
    *(
        "data/test_batches.py",
        "data/test_order.py",
        "data/test_bad_rows.py",
        "model/test_precision.py",
        "model/test_adapters.py",
        "training/test_diagnostics.py",
        "training/test_overflow.py",
        "training/test_optim.py",
        "training/test_saving.py",
        "training/test_faults.py",
        "test_process.py",
    ),
)
"""Files of tests for a mutant that its own tests did not notice."""


@dataclass(frozen=True)
class Mutant:
    """A change that takes one guarantee away."""

    name: str
    """What is lost, in words."""
    file: str
    """Within ``idefics_qlora/``."""
    old: str
    """Text that stands exactly once in the file."""
    new: str
    tests: tuple[str, ...]
    """Those that should notice, within ``tests/``."""

    def source(self) -> str:
        """The changed file.

        Raises:
            ValueError: If the text to be changed is not there exactly once.
        """
        source = (ROOT / "idefics_qlora" / self.file).read_text(encoding="utf-8")
        if (times := source.count(self.old)) != 1:
            raise ValueError(
                f"mutant {self.name!r}: {self.old!r} is {times} times in {self.file}, expected "
                "once: adapt it to the source"
            )
        return source.replace(self.old, self.new)


def _m(name: str, file: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(name, file, old, new, tests)


EVERY_STEP = "training/test_resume.py::test_interrupted_at_every_step"
OVERFLOWING = f"{EVERY_STEP}[overflowing]"
FAILING = "training/test_resume.py::test_what_failed_is_made_up_for"
SPLIT = "training/test_micro_batch_size.py::test_resumed_anywhere_the_same_windows_are_split"
LOWERED = "training/test_micro_batch_size.py::test_auto_keeps_what_the_first_window_came_to"
STREAM = "data/test_order.py::test_a_run_over_a_stream_resumes_exactly"
HALVES = "training/test_micro_batch_size.py::test_out_of_memory_halves_the_micro_batch"
OVERFLOW = "training/test_loop.py::test_an_overflow_skips_the_update"
TRAINER = "training/test_loop.py::test_parity_with_hugging_face_trainer"
WINDOW = "training/test_loop.py::test_the_window_decides_not_the_micro_batch"
FSYNC = "test_checkpoint.py::test_files_are_on_the_disk_before_the_folder_has_its_name"
DAMAGE = "test_checkpoint.py::test_damage_is_found_and_passed_over"

NOT_RESTORED = {
    "global_step": OVERFLOWING,
    "window": OVERFLOWING,
    "skipped_windows": OVERFLOWING,
    "skips_in_a_row": "training/test_resume.py::test_every_count_goes_on",
    "micro_batch_size": LOWERED,
    "growing": SPLIT,
    "too_large": SPLIT,
    "num_examples": OVERFLOWING,
    "num_images": OVERFLOWING,
    "num_tokens": OVERFLOWING,
    "num_bad_rows": "training/test_resume.py::test_every_count_goes_on",
    "position": STREAM,
    "seconds": "training/test_resume.py::test_every_count_goes_on",
    "loss_sum": OVERFLOWING,
    "unlogged_steps": OVERFLOWING,
    "best_metric": "training/test_resume.py::test_going_on_elsewhere_takes_the_best_along",
    "log_history": OVERFLOWING,
    "first_nonfinite_module": "training/test_resume.py::test_every_count_goes_on",
    "finished_step": "training/test_resume.py::test_a_finished_run_returns_its_result_at_once",
    "num_told": FAILING,
    "judged_from": "training/test_best.py::test_other_rows_begin_the_comparison_anew",
}
"""Fields of the state, each left out of a restore, and the tests that should notice."""

MUTANTS = (
    # What a checkpoint brings back.
    *(
        _m(
            f"a resume forgets {name}",
            "training/state.py",
            "            setattr(self._state, counter.name, state[counter.name])\n",
            f'            if counter.name != "{name}":\n'
            "                setattr(self._state, counter.name, state[counter.name])\n",
            test,
        )
        for name, test in NOT_RESTORED.items()
    ),
    _m(
        "a resume forgets the adapter",
        "training/parts.py",
        'load_adapter(self._model, saved.adapter, "of the checkpoint")',
        "pass",
        EVERY_STEP,
    ),
    _m(
        "a resume forgets the optimizer",
        "training/parts.py",
        'self._optimizer.load_state_by_name(tensors, scalars, complete="run" in saved.state)',
        "pass",
        EVERY_STEP,
    ),
    _m(
        "a resume forgets the loss scale",
        "training/parts.py",
        "self._scaler.load_state_dict(scaler)",
        "pass",
        OVERFLOWING,
    ),
    _m(
        "a resume forgets the random states",
        "training/parts.py",
        "restore_rng(saved.rng, self._device)",
        "pass",
        EVERY_STEP,
    ),
    _m(
        "a resume forgets the unlogged loss",
        "training/parts.py",
        'self._loss.fill_(saved.state["unlogged_loss"])',
        "pass",
        EVERY_STEP,
    ),
    _m(
        "a dump holds the random states after the window",
        "training/state.py",
        '            taken["rng"] = rng\n',
        "            pass\n",
        "training/test_overflow.py::test_what_is_not_finite_can_be_replayed",
    ),
    _m(
        "another run's settings are accepted",
        "training/resume.py",
        "    if problems:\n",
        "    if False:\n",
        "training/test_resume.py::test_what_changes_the_mathematics_is_refused",
    ),
    _m(
        "the step's number is no part of the optimizer's state",
        "training/flat.py",
        'scalars[slot.name] = {"step": slot.step}',
        'scalars[slot.name] = {"step": 1}',
        "training/test_resume.py::test_interrupted_in_each_execution",
    ),
    # The step.
    _m(
        "the gradient is clipped before it is unscaled",
        "training/loop.py",
        "    state.scaler.unscale_(state.optimizer)\n",
        "",
        "training/test_loop.py::test_clipping_sees_the_true_gradient",
    ),
    _m(
        "nothing is clipped",
        "training/loop.py",
        "state.optimizer.clip(state.config.max_grad_norm)",
        'state.optimizer.clip(float("inf"))',
        "training/test_loop.py::test_the_gradient_is_clipped",
    ),
    _m(
        "a micro-batch's loss is divided by its own targets",
        "training/window_pass.py",
        "                window.num_targets,\n",
        "                batch.num_targets,\n",
        WINDOW,
    ),
    _m(
        "the loss is a sum over the window",
        "model/execution.py",
        " / num_targets",
        "",
        TRAINER,
    ),
    _m(
        "the gradients of a window are kept for the next",
        "training/loop.py",
        "    state.scaler.update()\n    state.optimizer.zero_grad()\n",
        "    state.scaler.update()\n",
        TRAINER,
    ),
    _m(
        "the loss scale never changes",
        "training/loop.py",
        "    state.scaler.update()\n",
        "",
        OVERFLOW,
    ),
    _m(
        "the loss is not scaled",
        "model/execution.py",
        "scaler.scale(loss).backward()",
        "loss.backward()",
        "training/test_loop.py::test_clipping_sees_the_true_gradient",
    ),
    _m(
        "an infinite loss updates the weights",
        "training/loop.py",
        "state.optimizer.spoil_unless_finite(loss)",
        "pass",
        "training/test_overflow.py::test_an_infinite_loss_is_an_overflow",
    ),
    _m(
        "a skipped window advances the step",
        "training/loop.py",
        "        state.skips_in_a_row += 1\n",
        "        state.skips_in_a_row += 1\n        state.global_step += 1\n",
        OVERFLOW,
    ),
    _m(
        "a skipped window is not told from a step",
        "training/loop.py",
        "skipped = not state.scaler.step(state.optimizer)",
        "skipped = state.scaler.step(state.optimizer) is None",
        OVERFLOW,
    ),
    _m(
        "skips in a row are counted over steps",
        "training/loop.py",
        "        state.skips_in_a_row = 0\n",
        "",
        OVERFLOW,
    ),
    _m(
        "a gradient that is not finite updates the weights in fp32",
        "training/loop.py",
        "if not state.scaler.is_enabled() and not torch.isfinite(loss + grad_norm):",
        "if False:",
        "training/test_loop.py::test_a_bad_gradient_in_fp32_touches_no_weight",
    ),
    _m(
        "the learning rate stays that of the first step",
        "training/loop.py",
        '        group["lr"] = learning_rate\n',
        "        pass\n",
        TRAINER,
    ),
    _m(
        "the learning rate falls a step too early",
        "training/optim.py",
        "max(0.0, (total_steps - step) / decay_steps)",
        "max(0.0, (total_steps - step - 1) / decay_steps)",
        "training/test_optim.py::test_schedules_equal_transformers",
    ),
    _m(
        "there is no warm-up",
        "training/optim.py",
        "if step < warmup_steps:",
        "if False:",
        "training/test_optim.py::test_schedules_equal_transformers",
    ),
    _m(
        "AdamW's constants are its defaults",
        "training/flat.py",
        '"betas": (config.adam_beta1, config.adam_beta2),',
        '"betas": (0.9, 0.999),',
        "training/test_optim.py::test_the_constants_of_adamw_are_the_settings",
    ),
    _m(
        "weight decay is ignored",
        "training/flat.py",
        '"weight_decay": config.weight_decay,',
        '"weight_decay": 0.0,',
        "training/test_optim.py::test_weights_decay",
    ),
    _m(
        "a window that did not fit leaves its gradient",
        "training/window_pass.py",
        "        state.optimizer.zero_grad()\n",
        "",
        HALVES,
    ),
    _m(
        "a window that did not fit leaves its random states",
        "training/window_pass.py",
        "        restore_rng(state.window_rng, state.device)\n",
        "",
        HALVES,
    ),
    _m(
        "a failed step leaves its random states",
        "training/saving.py",
        "                restore_rng(rng, state.device)\n",
        "                pass\n",
        "training/test_failures.py::test_a_step_that_fails",
    ),
    _m(
        "a long window changes the size of all after it",
        "training/window_pass.py",
        "        first.settle(tries)\n",
        "        pass\n",
        SPLIT,
    ),
    _m(
        "the search for an overflow leaves its random states",
        "training/overflow.py",
        "            restore_rng(rng, state.device)\n        if",
        "            pass\n        if",
        "training/test_overflow.py::test_the_search_for_an_overflow_changes_nothing",
    ),
    _m(
        "the search for an overflow draws other dropout masks",
        "training/overflow.py",
        "        restore_rng(state.window_rng, state.device)\n        try",
        "        try",
        "training/test_overflow.py::test_the_search_for_an_overflow_changes_nothing",
    ),
    _m(
        "an update that broke off half-way is saved",
        "training/run.py",
        "        if state.half_updated:\n",
        "        if False:\n",
        "training/test_failures.py::test_half_an_update_is_not_saved",
    ),
    # The loss.
    _m(
        "a token learns to predict itself",
        "model/loss.py",
        "labels[:, 1:].flatten()",
        "labels[:, :-1].flatten()",
        "model/test_loss.py::test_loss_equals_pytorchs_over_the_targets",
    ),
    _m(
        "the prompt is learnt",
        "data/batches.py",
        "labels=input_ids.masked_fill(~is_target, IGNORE),",
        "labels=input_ids,",
        "data/test_batches.py",
    ),
    _m(
        "padding is learnt",
        "data/batches.py",
        "is_target = torch.zeros_like(is_token)",
        "is_target = torch.ones_like(is_token)",
        "data/test_batches.py",
    ),
    _m(
        "image tokens are learnt",
        "data/batches.py",
        "is_target &= ~torch.isin(input_ids, self.never_target)",
        "pass",
        "data/test_batches.py",
    ),
    _m(
        "padding is attended to",
        "data/batches.py",
        "attention_mask=is_token.long(),",
        "attention_mask=torch.ones_like(input_ids),",
        "data/test_batches.py",
    ),
    _m(
        "words see every picture of their row",
        "families/idefics.py",
        "sees = latest_image[:, :, None] == torch.arange(most_images)",
        "sees = latest_image[:, :, None] >= torch.arange(most_images)",
        "data/test_batches.py",
    ),
    # What the successors of IDEFICS see.
    _m(
        "places of patches depend on the dtype",
        "families/patches.py",
        "torch.bucketize(parts, bounds, right=True)",
        "torch.bucketize(parts.to(pixels.dtype), bounds, right=True)",
        "families/test_patches.py",
    ),
    _m(
        "a loaded base places patches as transformers does",
        "families/successor.py",
        "place_exactly(model.model.vision_model.embeddings)",
        "model.eval()",
        "families/test_patches.py",
    ),
    _m(
        "weights of another shape pass",
        "model/base.py",
        "if found != expected:",
        "if found is None:",
        "families/test_bad_input.py::test_weights_of_another_size",
    ),
    _m(
        "a checkpoint does not know whether pictures were cut",
        "training/inputs.py",
        '"image_splitting": collator.reader.splits,',
        '"image_splitting": True,',
        "families/test_whole_pictures.py",
    ),
    _m(
        "a batch without a picture has pixels",
        "families/tiles.py",
        "if not any(self.grids):",
        "if not self.grids:",
        "families/test_tiles.py::test_a_batch_without_pictures_has_no_pixels",
    ),
    _m(
        "pixels of padding are not zero",
        "families/tiles.py",
        "pixels * self.is_pixel()[:, :, None]}",
        "pixels}",
        "families/test_tiles.py::test_a_batch_without_pictures_has_no_pixels",
    ),
    _m(
        "a processor with another image token passes",
        "families/idefics3.py",
        "if image_id != config.image_token_id:",
        "if image_id is None:",
        "families/test_bases.py::test_a_processor_of_another_base_is_refused",
    ),
    # The windows.
    _m(
        "every epoch has the same order",
        "data/order.py",
        "np.random.default_rng((seed, epoch))",
        "np.random.default_rng((seed, 0))",
        "data/test_order.py",
        "data/test_bad_rows.py::test_nothing_takes_a_bad_rows_place",
    ),
    _m(
        "every run has the same order",
        "data/order.py",
        "np.random.default_rng((seed, epoch))",
        "np.random.default_rng((0, epoch))",
        "data/test_order.py",
    ),
    _m(
        "every epoch has the same crops",
        "data/order.py",
        "np.random.SeedSequence((seed, epoch, row))",
        "np.random.SeedSequence((seed, 0, row))",
        "data/test_order.py",
    ),
    _m(
        "every row has the same crop",
        "data/order.py",
        "np.random.SeedSequence((seed, epoch, row))",
        "np.random.SeedSequence((seed, epoch, 0))",
        "data/test_order.py",
    ),
    _m(
        "a stream begins anew",
        "data/order.py",
        'stream.load_state_dict(self.position["stream"])',
        "pass",
        STREAM,
    ),
    _m(
        "a stream forgets its epoch",
        "data/order.py",
        'epoch, number = self.position["epoch"], self.position["row"]',
        'number = self.position["row"]',
        "data/test_order.py::test_a_stream_gives_its_rows_in_order",
        STREAM,
    ),
    _m(
        "a micro-batch is as wide as its window",
        "data/windows.py",
        "num_tokens=self.lengths[start],",
        "num_tokens=self.lengths[0],",
        "data/test_windows.py",
    ),
    _m(
        "loading draws from the global generator",
        "data/workers.py",
        "generator=torch.Generator(),",
        "generator=None,",
        "evaluation/test_held_out.py::test_evaluating_changes_nothing",
    ),
    _m(
        "loader workers die of a stop signal",
        "process.py",
        "        signal.signal(number, signal.SIG_IGN)\n",
        "        pass\n",
        "test_process.py::test_loader_workers_ignore_stop_signals",
    ),
    _m(
        "loader workers keep the lock",
        "process.py",
        "self._lock.acquire(blocking=False)",
        "self._lock.acquire(blocking=False); os.dup(self._lock._context.lock_file_fd)",
        "test_process.py::test_workers_that_outlive_a_run_do_not_lock_its_folder",
    ),
    # Evaluation.
    _m(
        "an evaluation leaves every module in its mode",
        "model/precision.py",
        "            module.training = training\n",
        "            pass\n",
        "evaluation/test_held_out.py::test_evaluate_averages_over_tokens",
        "evaluation/test_held_out.py::test_evaluating_changes_nothing",
    ),
    _m(
        "an evaluation drops out",
        "model/precision.py",
        "    model.eval()\n    try:\n",
        "    try:\n",
        "evaluation/test_held_out.py::test_evaluating_changes_nothing",
    ),
    _m(
        "an evaluation averages over batches",
        "evaluation/held_out.py",
        "num_targets += window.num_targets",
        "num_targets += window.num_targets if num_batches == 1 else 0",
        "evaluation/test_held_out.py::test_evaluate_averages_over_tokens",
    ),
    _m(
        "the worst checkpoint is the best",
        "training/saving.py",
        "state.criterion.better(value, state.best_metric)",
        "value != state.best_metric",
        "training/test_saving.py::test_the_best_is_loaded_and_never_deleted",
    ),
    _m(
        "the best is not loaded at the end",
        "training/run.py",
        "        if state.is_over and self.config.load_best_model_at_end:\n",
        "        if False:\n",
        "training/test_saving.py::test_the_best_is_loaded_and_never_deleted",
    ),
    _m(
        "the best checkpoint is deleted",
        "training/saving.py",
        "protected = {self._state.global_step, self._state.best_step}",
        "protected = {self._state.global_step}",
        "training/test_saving.py::test_the_best_is_loaded_and_never_deleted",
    ),
    # When things happen.
    _m(
        "the last step is not saved",
        "training/loop.py",
        "if state.is_over or due(state.global_step, config.save_steps):",
        "if due(state.global_step, config.save_steps):",
        "training/test_saving.py::test_the_last_step_is_evaluated_and_saved",
    ),
    _m(
        "the last step is not evaluated",
        "training/loop.py",
        "(last or due(state.global_step, config.eval_steps))",
        "due(state.global_step, config.eval_steps)",
        "training/test_saving.py::test_the_last_step_is_evaluated_and_saved",
    ),
    _m(
        "signals do not stop a run",
        "training/loop.py",
        "while state.global_step < state.total_steps and run.stopped_by is None:",
        "while state.global_step < state.total_steps:",
        "test_process.py::test_a_signal_saves_and_returns",
    ),
    _m(
        "a stopped run is not saved",
        "training/loop.py",
        "            if run.stopped_by is not None:\n                run.saving.save_if_new()\n",
        "",
        "test_process.py::test_a_signal_saves_and_returns",
    ),
    _m(
        "dropout depends on what ran before",
        "training/loop.py",
        "        seeded(config.seed, next(model.parameters()).device),  # dropout\n",
        "",
        "training/test_loop.py::test_a_run_depends_on_its_seed_alone",
    ),
    _m(
        "a run leaves its random numbers to its caller",
        "process.py",
        '    with torch.random.fork_rng([device] if device.type == "cuda" else []):\n',
        "    if True:\n",
        "test_generators.py",
    ),
    _m(
        "what a step's end had not done is left undone",
        "training/loop.py",
        "            if state.finished_step < state.global_step:",
        "            if False:",
        FAILING,
    ),
    _m(
        "a step is finished before it is evaluated",
        "training/loop.py",
        "    run.history.hand_out()\n",
        "    state.finished_step = state.global_step\n    run.history.hand_out()\n",
        FAILING,
    ),
    # The folder.
    _m(
        "a second run in the folder is let in",
        "process.py",
        "            self._lock.acquire(blocking=False)\n",
        "",
        "test_process.py::test_two_runs_in_one_folder",
    ),
    _m(
        "files are not on the disk when the folder gets its name",
        "durable.py",
        "        file.flush()\n        os.fsync(file.fileno())\n",
        "        file.flush()\n",
        FSYNC,
    ),
    _m(
        "names of files are not on the disk when the folder gets its name",
        "checkpoint.py",
        "        sync_folder(temporary)\n",
        "",
        FSYNC,
    ),
    _m(
        "the folder's name is not on the disk",
        "checkpoint.py",
        "        sync_folder(folder.parent)\n",
        "",
        FSYNC,
    ),
    _m(
        "a checkpoint appears file by file",
        "checkpoint.py",
        "        temporary.rename(folder)\n",
        "        shutil.copytree(temporary, folder)\n        shutil.rmtree(temporary)\n",
        FSYNC,
        "training/test_faults.py::test_each_file_operation_of_a_save",
    ),
    _m(
        "a failed save leaves its files",
        "checkpoint.py",
        "        shutil.rmtree(temporary, ignore_errors=True)\n",
        "        pass\n",
        "training/test_faults.py::test_a_write_that_breaks_off",
    ),
    _m(
        "altered files are not noticed",
        "checkpoint.py",
        "        if sums[name] != expected:\n",
        "        if False:\n",
        "test_checkpoint.py::test_an_altered_file_that_can_be_read_is_found",
    ),
    _m(
        "files of another size are not noticed",
        "durable.py",
        "            if size not in (None, status.st_size):\n",
        "            if False:\n",
        DAMAGE,
    ),
    _m(
        "a manifest need not list every file",
        "checkpoint.py",
        "        if missing := {ADAPTER, ADAPTER_CONFIG, OPTIMIZER, RNG, STATE} - files.keys():\n",
        "        if missing := set():\n",
        "test_damage.py::test_a_manifest_that_is_an_object_but_wrong",
    ),
    _m(
        "a checkpoint of another format is read",
        "checkpoint.py",
        '        if manifest["format"] != FORMAT:\n',
        "        if False:\n",
        "test_checkpoint.py",
    ),
    _m(
        "steps are compared as words",
        "checkpoint.py",
        "sorted((step, path) for step, path in found",
        "sorted((str(step), path) for step, path in found",
        "test_checkpoint.py",
    ),
    _m(
        "what another program wrote is deleted",
        "checkpoint.py",
        'if is_of_run(folder, snapshot.state.get("run")):',
        "if os.path.lexists(folder):",
        "test_checkpoint.py",
    ),
    _m(
        "an old checkpoint is lost while it is replaced",
        "checkpoint.py",
        '        if name[2] == "replaced" and path.is_dir() and not os.path.lexists(whole):\n',
        "        if False:\n",
        "test_checkpoint.py",
    ),
    _m(
        "checkpoints of later steps stay when a run goes back",
        "training/resume.py",
        "    set_aside(folder, state.global_step)\n",
        "",
        "training/test_resume.py::test_a_path_goes_back",
    ),
    _m(
        "a copy of another step's checkpoint is taken for its name's",
        "checkpoint.py",
        "    if promised is not None and promised != step:\n",
        "    if False:\n",
        "test_identity.py",
    ),
    _m(
        "another run's checkpoint is taken for ours",
        "checkpoint.py",
        "        check_run(folder, state, run)\n",
        "",
        "test_identity.py",
    ),
    # The model.
    _m(
        "recomputed layers below the text get no gradient",
        "model/precision.py",
        '{"use_reentrant": False}',
        '{"use_reentrant": True}',
        "model/test_precision.py::test_every_adapter_gets_a_gradient",
    ),
    _m(
        "an evaluation repacks 4-bit weights",
        "model/cpu.py",
        "            module.support_avx512bf16_for_cpu = False\n",
        "            pass\n",
        "model/test_cpu.py::test_evaluation_does_not_break_training",
    ),
    _m(
        "a kept picture is not compared with its checksum",
        "images/kept.py",
        "    if _checksum(width, height, pixels) != checksum:\n",
        "    if False:\n",
        "images/test_kept.py::test_whatever_is_damaged_is_decoded_again",
    ),
    _m(
        "a kept picture is found whatever was asked of its decoding",
        "images/kept.py",
        "hashlib.sha256(repr(decides).encode())",
        "hashlib.sha256()",
        "images/test_kept.py",
    ),
    _m(
        "a resumed run decodes in another way",
        "training/resume.py",
        '    if draft != state.origin["draft"]:\n',
        "    if False:\n",
        "data/test_decoding.py",
    ),
    _m(
        "the time per row is that of what is kept",
        "training/inputs.py",
        "        reader.collator.decoding_all(),\n",
        "",
        "data/test_decoding.py::test_the_first_rows_are_decoded_whatever_is_kept",
    ),
)

ACCEPTED = {
    "files of another size are not noticed": (
        "the SHA-256 differs as well; the size only says in plainer words what is wrong"
    ),
}
"""Mutants that no test can notice, and why."""


def main(arguments: list[str] | None = None) -> int:
    """Run the mutants; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("words", nargs="*", help="only mutants with one of these in their names")
    parser.add_argument("--list", action="store_true", help="show them and run nothing")
    options = parser.parse_args(arguments)
    chosen = [m for m in MUTANTS if not options.words or any(w in m.name for w in options.words)]
    if options.list:
        print("\n".join(f"{m.file:22} {m.name}" for m in chosen))
        return 0
    try:
        sources = [mutant.source() for mutant in chosen]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    _import_the_slow_ones()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder) / "copy"
        ignored = shutil.ignore_patterns(".*", "build", "dist", "runs", "__pycache__")
        shutil.copytree(ROOT, copy, ignore=ignored)
        every_test = list(dict.fromkeys(test for mutant in chosen for test in mutant.tests))
        code, said, _ = _pytest(copy, every_test, TIMEOUT_S * 4)
        if code != 0:
            print(f"{said}\nthese tests fail without any change")
            return 2
        print(f"without a change: {''.join(re.findall('[0-9]+ passed.*', said))}", flush=True)
        wrong = [
            _judge(copy, mutant, source) for mutant, source in zip(chosen, sources, strict=True)
        ]
    wrong = [line for line in wrong if line]
    print(f"\n{len(chosen) - len(wrong)} of {len(chosen)} mutants are as expected")
    print("\n".join(wrong))
    return 1 if wrong else 0


def _judge(copy: Path, mutant: Mutant, source: str) -> str:
    """Run a mutant and print its line of the table; what is wrong, or nothing."""
    file = copy / "idefics_qlora" / mutant.file
    original = file.read_text(encoding="utf-8")
    file.write_text(source, encoding="utf-8")
    accepted = mutant.name in ACCEPTED
    code, said, seconds = _pytest(copy, mutant.tests, TIMEOUT_S)
    by = "its tests"
    if code == 0 and not accepted:
        code, said, more = _pytest(copy, WIDER, TIMEOUT_S * 2)
        by, seconds = "others", seconds + more
    file.write_text(original, encoding="utf-8")
    noticed = re.findall(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)", said, re.MULTILINE)
    if by == "others" and code == 1 and _pytest(copy, noticed[:1], TIMEOUT_S)[0] != 0:
        return f"- {mutant.name}: {noticed[0]} fails without the change as well"
    verdict = "survived" if code == 0 else "too long" if code is None else f"noticed by {by}"
    if code not in (None, 0, 1):
        verdict = f"pytest's exit code is {code}"
    print(f"{verdict:20} {seconds:4.0f} s  {mutant.name}: {', '.join(noticed[:1])}", flush=True)
    if code not in (None, 0, 1):
        return f"- {mutant.name}: {verdict}\n{said}"
    if (code == 0) != accepted:
        return f"- {mutant.name}: {verdict}, {'but accepted' if accepted else 'not accepted'}"
    return ""


def _import_the_slow_ones() -> None:
    """Import what every test needs, once: the children of this process have it."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # its time and size do not tell two mutants apart
    sys.dont_write_bytecode = True
    import bitsandbytes  # noqa: F401
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import torchvision  # noqa: F401
    import transformers.models.idefics.modeling_idefics  # noqa: F401


def _pytest(
    copy: Path, tests: tuple[str, ...] | list[str], timeout_s: float
) -> tuple[int | None, str, float]:
    """Exit code (``None``: too long), output and seconds of tests, in a child of this process."""
    started = time.monotonic()
    log = copy.parent / "log"
    child = os.fork()
    if child == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = 99
        try:
            os.chdir(copy)
            sys.path.insert(0, str(copy))
            os.environ["PYTHONPATH"] = str(copy)
            import pytest

            temporary = f"--basetemp={copy.parent / 'tmp'}"
            options = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider", temporary]
            options += ["-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning"]
            ended = pytest.main([*options, *(f"tests/{test}" for test in tests)])
            used = sys.modules["idefics_qlora"].__file__ or ""
            if not used.startswith(str(copy)):
                raise RuntimeError(f"the tests used {used}")
            code = int(ended)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    ended = 0
    try:
        while not ended and time.monotonic() - started < timeout_s:
            ended, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.05)
    finally:  # what a test has left behind goes with it, and all of it if this process is stopped
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    if not ended:
        os.waitpid(child, 0)
    outcome = os.waitstatus_to_exitcode(status) if ended else None
    return outcome, log.read_text(errors="replace"), time.monotonic() - started


if __name__ == "__main__":
    sys.exit(main())
