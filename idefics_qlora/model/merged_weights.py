"""An adapter's weights in those of its base, tensor by tensor: no model is ever in memory.

The adapter is attached to a model without data. Each of its layers in turn gets its weights from
the base's files, in fp32, is merged by ``peft``, and goes to the new file. So each variant of LoRA
is merged as ``peft`` merges it, and the memory is that of the largest layer.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import Parameter
from transformers import AutoProcessor, GenerationConfig

from idefics_qlora.checkpoint import ADAPTER
from idefics_qlora.durable import json_bytes, tensor_file, write_synced
from idefics_qlora.families import family_of_config, read_as_trained
from idefics_qlora.model.adapters import attach, check_start, load_adapter
from idefics_qlora.model.base import fingerprint
from idefics_qlora.model.base_files import INDEX, BaseFiles
from idefics_qlora.model.loading import Adapter
from idefics_qlora.process import seeded
from idefics_qlora.progress import counting

GENERATION = "generation_config.json"
LEAST_KEPT = 0.5
"""Of what an adapter adds to the weights: a merge with less, or as many times more, is not the
adapter any more. Weights near 0 change in any dtype, so that something differs says little."""


@dataclass
class MergedWeights:
    """What the weights of a base are with an adapter in them.

    Args:
        adapter: As ``read_adapter`` gave it.
        files: Those of its base.

    Raises:
        ValueError: If the adapter is of another base, does not fit it, or has something that cannot
            be merged; the message names it.
    """

    adapter: Adapter
    files: BaseFiles
    num_changed: int = field(default=0, init=False)
    """Tensors that were written and differ from the base's."""
    _learnt: float = field(default=0.0, init=False)
    _kept: float = field(default=0.0, init=False)
    """Of what the adapter adds to weights its product with itself, and with what it adds to them
    after rounding."""

    def __post_init__(self) -> None:
        config = self.adapter.config
        with seeded(0, torch.device("cpu")), torch.device("meta"):
            base = family_of_config(self.files.config).model_class()(self.files.config)
        named = dict(base.named_parameters(remove_duplicate=False))
        self._check_files(named)
        self._check_base({name: tuple(p.shape) for name, p in base.named_parameters()})
        check_start(base, config)
        # Initial values that are computed from weights need weights: see `_merged`.
        plain = copy.copy(config)
        plain.init_lora_weights, plain.inference_mode = True, True
        plain.base_model_name_or_path = plain.revision = None
        _forget(base)
        empty = set(base.parameters())
        with seeded(0, torch.device("cpu")):
            self._model = attach(base, plain)
        source = str(self.adapter.folder / ADAPTER)
        tensors = {name: tensor.float() for name, tensor in self.adapter.tensors.items()}
        load_adapter(self._model, tensors, source, assign=True)
        # The base's own parameters that the adapter has: biases, and modules that learnt whole.
        self._whole = {
            _plain(name): parameter.detach()
            for name, parameter in self._model.get_base_model().named_parameters()
            if parameter not in empty and _plain(name) in named
        }
        self._layer_of = dict(_adapted(self._model))
        for name, (_, module) in self._layer_of.items():
            if name not in named:
                raise ValueError(
                    f"{name.rpartition('.')[0]} cannot be merged: it is a {type(module).__name__} "
                    "of peft; share the adapter as it is"
                )
        self._last: tuple[nn.Module | None, dict[str, Tensor]] = (None, {})
        self._check_tied(named)

    @property
    def adapted(self) -> set[str]:
        """Names of the tensors that an adapter may change."""
        return self._whole.keys() | {
            name for name, (_, layer) in self._layer_of.items() if name in self.files.kinds
        }

    @property
    def kept(self) -> float:
        """Share of what the adapter adds to the weights that is in them after rounding: about 1; 0
        where each is rounded to what it was; more where small changes tip large roundings."""
        return self._kept / self._learnt if self._learnt else 0.0

    def _check_files(self, named: dict[str, Any]) -> None:
        """See that the base's files have every parameter, one name of those that are tied."""
        self._same = defaultdict[int, list[str]](list)
        for name, parameter in named.items():
            self._same[id(parameter)].append(name)
        kinds = self.files.kinds
        lacking = [names[0] for names in self._same.values() if not kinds.keys() & set(names)]
        other = [n for n, p in named.items() if n in kinds and kinds[n][1] != tuple(p.shape)]
        if lacking or other:
            what = f"lack {lacking[0]}" if lacking else f"have another shape of {other[0]}"
            raise ValueError(
                f"the weights in {self.files.folder} {what} of the model that its config.json "
                "describes: get all files of one base, whole"
            )

    def _check_base(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """See that the adapter was trained on this base, in the dtype that it computed in."""
        if (state := self.adapter.state) is None:
            return
        name_in_file = {
            name: next(each for each in names if each in self.files.kinds)
            for names in self._same.values()
            for name in names
        }
        is_bf16 = state["base"]["rounding"] == "bf16"
        half, bf16 = torch.float16, torch.bfloat16
        ways = [[bf16], [half, bf16]] if is_bf16 else [[half], [torch.float32]]

        def rounded(dtypes: list[torch.dtype], name: str) -> Tensor:
            tensor = self.files.tensor(name_in_file[name]).flatten()[:256]
            for dtype in dtypes:
                tensor = tensor.to(dtype)
            return tensor

        found = (fingerprint(shapes, partial(rounded, way), is_bf16) for way in ways)
        self.adapter.check_base(*found)

    def _check_tied(self, named: dict[str, Any]) -> None:
        """See that no weight is changed that is another's as well."""
        touched = self._whole.keys() | self._layer_of.keys()
        for names in self._same.values():
            if len(names) > 1 and touched & set(names):
                raise ValueError(
                    f"{sorted(touched & set(names))[0]} cannot be merged: the base ties it, "
                    f"{' = '.join(names)}, and the adapter changes one of them alone; share the "
                    "adapter as it is"
                )

    def write(self, folder: Path, dtype: torch.dtype) -> None:
        """Write the weights, in files as the base's, and what ``from_pretrained`` needs.

        Args:
            folder: An empty one.
            dtype: Of all floating-point weights.

        Raises:
            ValueError: If nothing differs from the base, or little of what the adapter has learnt,
                or a value is too large for the dtype.
        """
        files = self.files
        shards = defaultdict[str, list[str]](list)
        for name, file_name in files.file_of.items():
            shards[file_name].append(name)
        with counting("merging", len(files.file_of), "tensors") as counted:
            for file_name, names in shards.items():
                kinds = {
                    name: (
                        dtype if files.kinds[name][0].is_floating_point else files.kinds[name][0],
                        files.kinds[name][1],
                    )
                    for name in names
                }

                def tensor_of(name: str) -> Tensor:
                    counted.advance()
                    return self._rounded(name, dtype)

                write_synced(folder / file_name, tensor_file(kinds, tensor_of, {"format": "pt"}))
        if self.num_changed == 0:
            raise ValueError(
                f"merged, {self.adapter.folder} gives the base's own weights in {dtype}: the "
                "adapter has learnt nothing, or less than this dtype can tell; evaluate it, or "
                "take a wider dtype"
            )
        if not LEAST_KEPT <= self.kept <= 1 / LEAST_KEPT:
            raise ValueError(
                f"merged in {dtype}, {self.adapter.folder} adds {self.kept:.0%} of what it has "
                "learnt to the weights: that is less than this dtype can tell beside them; take a "
                "wider dtype, such as torch.float32, or share the adapter as it is"
            )
        if len(shards) > 1:
            size = sum((folder / name).stat().st_size for name in shards)
            index = {"metadata": {"total_size": size}, "weight_map": dict(files.file_of)}
            (folder / INDEX).write_bytes(json_bytes(index))
        self._write_rest(folder, dtype)

    def _rounded(self, name: str, dtype: torch.dtype) -> Tensor:
        value = self.tensor(name)
        if not value.is_floating_point():
            return value
        result = value.to(dtype)
        if not result.isfinite().all():
            raise ValueError(
                f"{name} has values that are too large for {dtype}, or not finite: take "
                "torch.bfloat16 or torch.float32"
            )
        if name in self._whole or name in self._layer_of:
            base = self.files.tensor(name)
            self.num_changed += not torch.equal(result, base.to(dtype))
            added = (value.float() - base.float()).flatten()
            self._learnt += float(added @ added)
            self._kept += float(added @ (result.float() - base.to(dtype).float()).flatten())
        return result

    def _write_rest(self, folder: Path, dtype: torch.dtype) -> None:
        files, state = self.files, self.adapter.state
        config = copy.deepcopy(files.config)
        for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
            if part is not None:
                part.dtype = dtype
        config.save_pretrained(folder)
        if (files.folder / GENERATION).is_file():
            generation = GenerationConfig.from_pretrained(files.folder)
        else:
            generation = GenerationConfig.from_model_config(config)
        processor = AutoProcessor.from_pretrained(files.folder)
        family = family_of_config(config)
        reader = family.reader(processor)
        _end_as_learnt(generation, reader.tokenizer.convert_tokens_to_ids([*reader.end_tokens]))
        generation.save_pretrained(folder)
        read_as_trained(family, processor, state)
        processor.save_pretrained(folder)

    def tensor(self, name: str) -> Tensor:
        """A weight of the merged model: fp32 where an adapter has part in it."""
        if name in self._layer_of:
            module = self._layer_of[name][1]
            if self._last[0] is not module:
                self._last = module, self._merged(module)
            return self._last[1][name]
        if name in self._whole:
            return self._whole[name]
        return self.files.tensor(name)

    def _merged(self, module: Any) -> dict[str, Tensor]:
        """All weights of an adapted layer, by name."""
        names = {n: name for name, (n, layer) in self._layer_of.items() if layer is module}
        layer, wrappers = module.get_base_layer(), [module]
        while isinstance(wrappers[-1].base_layer, BaseTunerLayer):  # several of its parameters
            wrappers.append(wrappers[-1].base_layer)
        given = {
            n: self._whole[name] if name in self._whole else self.files.tensor(name).float()
            for n, name in names.items()
        }
        layer.load_state_dict(given, strict=False, assign=True)
        try:
            for wrapper in reversed(wrappers):
                if _starts_from_weights(self.adapter.config):
                    _start_again(wrapper, self.adapter.config)
                wrapper.merge(safe_merge=True)
        # Each kind of layer of peft has its own way to say that it cannot.
        except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            name = next(iter(names.values())).rpartition(".")[0]
            raise ValueError(
                f"{name} cannot be merged: {error}; share the adapter as it is"
            ) from error
        merged = {names[n]: p.detach() for n, p in layer.named_parameters() if n in names}
        _forget(layer)
        for wrapper in wrappers:
            wrapper.merged_adapters.clear()
        return merged


def _end_as_learnt(generation: GenerationConfig, end_ids: Sequence[int]) -> None:
    """Let texts end where training ended them, whoever generates.

    Some bases name the end of a sequence alone, and a server that asks turns of a dialogue would
    write on behind the end of its turn.
    """
    known = generation.eos_token_id
    ids = [] if known is None else [known] if isinstance(known, int) else [*known]
    if missing := [i for i in end_ids if i not in ids]:
        generation.eos_token_id = [*ids, *missing]


def _forget(module: nn.Module) -> None:
    """Leave a module's parameters their shapes alone: on the CPU, where adapters shall be, too."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            empty = torch.zeros(()).expand(parameter.shape)
            setattr(part, name, Parameter(empty, requires_grad=False))


def _starts_from_weights(config: LoraConfig) -> bool:
    """Whether attaching such an adapter takes a part out of the base's weights."""
    start = config.init_lora_weights
    return (isinstance(start, str) and start != "gaussian") or bool(
        getattr(config, "kasa_config", None)
    )


def _start_again(module: Any, config: LoraConfig) -> None:
    """Let a layer that has its weights now begin as ``load_finetuned`` lets it begin."""
    own = {n: p.detach() for n, p in module.named_parameters() if not n.startswith("base_layer.")}
    (name,) = module.r
    with seeded(0, torch.device("cpu")):
        module.update_layer(name, module.r[name], lora_alpha=module.lora_alpha[name], config=config)
    module.load_state_dict(own, strict=False, assign=True)


def _plain(name: str) -> str:
    """A parameter's name in the base without adapters."""
    return name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")


def _adapted(model: PeftModel) -> Iterator[tuple[str, tuple[str, nn.Module]]]:
    """For each parameter under an adapter its name in its layer, and the adapter's module."""
    inside: set[nn.Module] = set()
    for path, module in model.get_base_model().named_modules():
        if isinstance(module, BaseTunerLayer) and module not in inside:
            inside.update(module.modules())
            for name, _ in module.get_base_layer().named_parameters():
                yield _plain(f"{path}.{name}"), (name, module)
