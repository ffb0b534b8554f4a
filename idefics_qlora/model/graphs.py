"""Executing a micro-batch the fast way: fused blocks, and one CUDA graph per shape.

Tokens of a micro-batch lie one after the other without padding (M rows); only attention sees them
apart (T tokens of room for each of B examples).

The forward and backward pass of a micro-batch is launched once by Python and recorded as a CUDA
graph; for every further micro-batch of that shape the graph is replayed in one launch. The first
micro-batch of a shape runs eagerly (which loads what kernels it needs), the second is recorded and
replayed. Both run the same kernels on the same tensors with the same random numbers: which of them
a process happens to do changes no result.

Shapes: B examples, T tokens, N images per example, M rows, R of them with a target.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from idefics_qlora.data.batches import IGNORE, Batch
from idefics_qlora.model import fused, lora_linear
from idefics_qlora.model.architectures import ARCHITECTURES
from idefics_qlora.model.shapes import Shape, shape_of

logger = logging.getLogger(__name__)

MOST_GRAPHS = 64
"""A shape that comes beyond these takes the place of the one not used for longest."""


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    loss: Tensor


@dataclass
class Counts:
    """What the log can say of a run's graphs."""

    graphs: int = 0
    seconds: float = 0.0
    """Spent recording."""
    replayed: int = 0
    """Micro-batches."""
    eager: int = 0
    """Micro-batches."""


class FastPath:
    """The fast execution of the micro-batches of one model. Close it when training is over.

    Args:
        model: ``peft``'s model around a base of a known architecture, its adapters fp32.
        dtype: Autocast's dtype; fp32 for none.
        graphs: Whether to record CUDA graphs (on a CPU nothing is recorded in any case).
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, *, graphs: bool = True) -> None:
        self.model, self.dtype = model, dtype
        self.base: Any = getattr(model, "get_base_model", lambda: model)()
        self.architecture = ARCHITECTURES[type(self.base)]
        self.device = next(model.parameters()).device
        self.counts = Counts()
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self._graphs: dict[Shape, _Graph] = {}
        self._seen: set[Shape] = set()
        self._pool: Any = None
        self._stream: Any = None
        self._facts: list[Any] = []
        self._with_images: set[bool] = set()
        """Of the micro-batches of this window."""
        self._install()
        self.why_eager = self._why_eager() if graphs else "they are switched off"
        if self.device.type == "cuda":
            lora_linear.adds_products()  # looks once, outside of any recording
            if self.why_eager is None:
                self._stream = torch.cuda.Stream(self.device)
            else:
                logger.info("micro-batches run without CUDA graphs: %s", self.why_eager)

    def _install(self) -> None:
        self._reached: dict[bool, list[Parameter]] = {}
        """The parameters that get a gradient with images and without, once a pass has shown it."""
        self._modules = list(self.model.modules())
        self.linears = lora_linear.install(self.model)
        self.blocks = fused.install(self.model, self.linears, self.architecture)

    @property
    def reached(self) -> list[Parameter] | None:
        """The parameters that got a gradient in this window, once a pass has shown it."""
        kinds = [self._reached.get(kind) for kind in self._with_images]
        if not kinds or any(found is None for found in kinds):
            return None
        return list({id(p): p for found in kinds for p in found or ()}.values())

    @staticmethod
    def why_not(model: nn.Module) -> str | None:
        """Why a model cannot be trained the fast way at all; ``None`` if it can."""
        base: Any = getattr(model, "get_base_model", lambda: model)()
        if type(base) not in ARCHITECTURES:
            return f"the base is a {type(base).__name__}"
        return ARCHITECTURES[type(base)].why_not(base)

    def _why_eager(self) -> str | None:
        if self.device.type != "cuda":
            return "not on a CUDA GPU"
        if any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules()):
            return "activations are recomputed"
        for name, module in self.model.named_modules():
            if lora_linear.has_hooks(module):
                return f"{name} has hooks"
            if hasattr(module, "_hf_hook"):
                return f"{name} is dispatched by accelerate"
        return None

    def close(self) -> None:
        """Free the graphs and give every layer its own forward back."""
        self.free_graphs()
        self.blocks.uninstall()
        self.linears.uninstall()

    def free_graphs(self) -> None:
        """Give the memory of all graphs back; shapes are recorded anew when they come again."""
        for graph in self._graphs.values():
            graph.graph.reset()
        self._graphs.clear()
        self._pool = None
        if self.device.type == "cuda":
            torch._C._cuda_clearCublasWorkspaces()  # that of the graphs' stream lies in their pool
            torch.cuda.empty_cache()

    def is_unchanged(self) -> bool:
        """Whether all that graphs rely on is what it was when the last window began."""
        return self.linears.is_current and self._facts == self._present_facts()

    def begin_window(self, *, unchanged: bool = False) -> None:
        """Take over the present values of the adapter: before the first micro-batch of a window.

        Graphs add to the ``.grad`` that is there now: zero it, do not set it to ``None``.

        Args:
            unchanged: Whether :meth:`is_unchanged` has said so since anybody else could change the
                model.
        """
        if not unchanged:
            self._take_over()
        self.linears.refresh(self.dtype)
        self._with_images.clear()

    def _take_over(self) -> None:
        if not self.linears.is_current:
            logger.info("the adapter's layers were changed: the fast path is set up anew")
            self.free_graphs()
            self.blocks.uninstall()
            self.linears.uninstall()
            self._install()
        if self.why_eager is None:
            for parameter in self.parameters:
                if parameter.grad is None:  # a graph must not allocate what outlives it
                    parameter.grad = torch.zeros_like(parameter)
        facts = self._present_facts()
        if self._graphs and facts != self._facts:
            self.free_graphs()  # they would read and write what is elsewhere now
        self._facts = facts

    def _present_facts(self) -> list[Any]:
        """Addresses and modes that graphs have been recorded with; nothing where there are none."""
        if self.why_eager is not None:
            return []
        facts: list[Any] = [module.training for module in self._modules]
        for p in self.parameters:
            facts += (p.data_ptr(), p.grad is not None and p.grad.data_ptr(), p.requires_grad)
        return facts

    def micro_batch_backward(
        self,
        batch: Batch,
        num_targets: int,
        *,
        lengths: Sequence[int],
        images: Sequence[int],
        scale: Tensor | None = None,
        micro_targets: int | None = None,
    ) -> Tensor:
        """Forward and backward of a micro-batch; its gradient is added to the ``.grad`` there is.

        Args:
            batch: On the device of the model, padded on the right.
            num_targets: Target tokens of the whole window, which the loss is divided by.
            lengths: Tokens of each example of the micro-batch.
            images: Images of each, which come before those that pad.
            scale: The gradient scaler's scale, fp32, on the device; ``None``: 1.
            micro_targets: Target tokens of this micro-batch, where the caller knows the number
                without waiting for the GPU; the head then computes few others.

        Returns:
            Its part of the window's loss, fp32, on the device, not scaled.

        Raises:
            torch.OutOfMemoryError: If the memory does not suffice; the graphs are freed, and
                ``.grad`` may hold a part of the gradient.
        """
        on_gpu, architecture = batch.labels.is_cuda, self.architecture
        tokens, longest = sum(lengths), max(lengths)
        num_images, pictures = architecture.num_images(batch.vision, images), sum(images)
        image_tokens = pictures * architecture.tokens_of_an_image(self.base)
        if on_gpu:
            targets = tokens - image_tokens if micro_targets is None else micro_targets
            shape = shape_of(
                *(len(lengths), tokens, longest, targets, num_images, pictures, image_tokens)
            )
        else:  # nothing comes again: as it is
            targets = int((batch.labels[:, 1:] != IGNORE).sum())
            pictures = min(max(1, pictures), len(lengths) * num_images)
            shape = Shape(len(lengths), longest, tokens, max(1, targets), num_images, pictures)
        shape = replace(shape, sides=architecture.sides(self.base, batch.vision))
        self._with_images.add(shape.pictures > 0)
        try:
            inputs = self._inputs(batch, shape, num_targets, images, scale)
            if self.why_eager is None:
                return self._with_graph(shape, inputs)
            return self._eagerly(shape, inputs)
        except torch.OutOfMemoryError:
            self.free_graphs()
            raise

    # --- inputs ----------------------------------------------------------------------------------

    def _inputs(
        self,
        batch: Batch,
        shape: Shape,
        num_targets: int,
        images: Sequence[int],
        scale: Tensor | None,
    ) -> dict[str, Tensor]:
        """The tensors of a micro-batch at their padded sizes, made without a sync."""
        padding = shape.length - batch.input_ids.shape[1]
        is_token = F.pad(batch.attention_mask, (0, padding)).bool()
        packing = fused.Packing.of(is_token, shape.rows)
        slots = packing.slot_of.clamp(min=0)
        input_ids = F.pad(batch.input_ids, (0, padding)).flatten()[slots]
        labels = F.pad(batch.labels[:, 1:], (0, padding + 1), value=IGNORE).flatten()[slots]
        labels = labels.masked_fill(packing.slot_of < 0, IGNORE)  # (M,)
        # Rows with a target first, in their order; then others, without loss.
        rows = torch.argsort((labels == IGNORE).to(torch.uint8), stable=True)[: shape.targets]
        factor = torch.full((1,), 1 / num_targets, dtype=torch.float32, device=labels.device)
        return {
            "input_ids": input_ids,
            "slot_of": packing.slot_of,
            "row_at": packing.row_at,
            "rows": rows,
            "labels": labels[rows],
            "factor": factor,
            "scale": torch.ones_like(factor) if scale is None else scale.reshape(1).float(),
            "seed": self.linears.draw_seed(),
            **self.architecture.inputs(
                self.base, batch.vision, images, shape.pictures, packing, input_ids
            ),
        }

    # --- the passes ------------------------------------------------------------------------------

    def _pass(self, shape: Shape, inputs: dict[str, Tensor]) -> Tensor:
        """The forward and backward pass; nothing in it waits for the GPU."""
        base = self.base
        self.linears.seed = inputs["seed"]
        autocast = torch.autocast(
            self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32,
            cache_enabled=False,
        )  # fmt: skip
        packing = fused.Packing(shape.examples, shape.length, inputs["slot_of"], inputs["row_at"])
        with (
            self.linears.active(accumulate=True),
            self.blocks.active(packing, shape.images),
            autocast,
        ):
            embeddings = fused.embed(self.architecture.embedding(base), inputs["input_ids"])
            hidden = self.architecture.hidden_states(base, self.blocks, embeddings, inputs)
            loss = fused.target_loss(hidden, inputs["rows"], base.lm_head, inputs["labels"])
            loss = loss * inputs["factor"][0]
            with_images = shape.pictures > 0
            if with_images not in self._reached:
                self._reached[with_images] = lora_linear.reached_by(loss)
            (loss * inputs["scale"][0]).backward()
        return loss.detach()

    def _eagerly(self, shape: Shape, inputs: dict[str, Tensor]) -> Tensor:
        self.counts.eager += 1
        if self._stream is None:
            return self._pass(shape, inputs)
        # On the stream and in the memory of the graphs: it would be held twice otherwise. The
        # backward pass has to run in this thread for it, whose allocations alone go there.
        if self._pool is None:
            self._pool = torch.cuda.MemPool()
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with (
            torch.cuda.stream(self._stream),
            torch.cuda.use_mem_pool(self._pool),
            torch.autograd.set_multithreading_enabled(False),
        ):
            loss = self._pass(shape, inputs)
        current.wait_stream(self._stream)
        return loss.clone()

    def _with_graph(self, shape: Shape, inputs: dict[str, Tensor]) -> Tensor:
        graph = self._graphs.pop(shape, None)
        if graph is None:
            if shape not in self._seen:
                self._seen.add(shape)
                return self._eagerly(shape, inputs)
            if len(self._graphs) >= MOST_GRAPHS:
                self._graphs.pop(next(iter(self._graphs))).graph.reset()
            graph = self._record(shape, inputs)
            if graph is None:
                return self._eagerly(shape, inputs)
        self._graphs[shape] = graph  # the last is the one used last
        for name, target in graph.inputs.items():
            target.copy_(inputs[name])
        graph.graph.replay()
        self.counts.replayed += 1
        return graph.loss.clone()

    def _record(self, shape: Shape, inputs: dict[str, Tensor]) -> _Graph | None:
        started = time.perf_counter()
        generator = torch.cuda.default_generators[self.device.index or 0]
        before = generator.clone_state()
        static = {name: tensor.clone() for name, tensor in inputs.items()}
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.MemPool()
        current = torch.cuda.current_stream(self.device)
        try:
            # In this thread, whose cuBLAS handle the eager pass has made: none can be made now.
            # What other threads do, such as the loader's that pins memory, is no part of it.
            with (
                torch.autograd.set_multithreading_enabled(False),
                torch.cuda.graph(
                    graph,
                    pool=self._pool.id,
                    stream=self._stream,
                    capture_error_mode="thread_local",
                ),
            ):
                loss = self._pass(shape, static)
        except Exception as error:
            # A recording that breaks off leaves stream, generator and allocator as if it went on.
            torch.cuda.set_stream(current)
            generator.graphsafe_set_state(before)
            with contextlib.suppress(Exception):
                torch._C._cuda_endAllocateToPool(self.device.index or 0, self._pool.id)
                torch._C._cuda_releasePool(self.device.index or 0, self._pool.id)
            causes: list[BaseException] = [error]  # its end raises once more
            while causes[-1].__context__ is not None:
                causes.append(causes[-1].__context__)
            for cause in causes:
                if isinstance(cause, torch.OutOfMemoryError):
                    raise cause from None
            first = str(causes[-1]).splitlines()[0]
            self.why_eager = f"recording failed ({first})"
            logger.warning("micro-batches run without CUDA graphs: %s", self.why_eager)
            self._stream = None
            self.free_graphs()
            return None
        seconds = time.perf_counter() - started
        self.counts.graphs += 1
        self.counts.seconds += seconds
        logger.info(
            "recorded a CUDA graph for %d examples with %d tokens and %s in %.1f s (%d so far, "
            "%.1f s)",
            *(
                shape.examples,
                shape.rows,
                self.architecture.described(shape.images, shape.pictures),
                seconds,
            ),
            *(self.counts.graphs, self.counts.seconds),
        )
        return _Graph(graph, static, loss)
