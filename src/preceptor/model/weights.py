"""Weights of a model as files in Hugging Face's layout: written by all ranks together, then read back.

Tensors that belong together (an adapted layer, or experts that are one tensor in memory and many in files) form a
group. Groups are cut into files of about one size, and files are dealt to ranks. A group is gathered on all ranks, and
kept by the one that writes it: no rank holds more than one file and one group. Then every tensor is read from its file
and compared with what was to be written, byte by byte.
"""

import copy
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from preceptor.errors import CheckpointError
from preceptor.files import not_seen, writing
from preceptor.model.forward import Engine
from preceptor.model.parts import causal_lm
from preceptor.model.sharding import without_values
from preceptor.world import ONE, World

INDEX = "model.safetensors.index.json"
_FILE_BYTES = 50 * 10**9  # the most in one file, as `save_pretrained` has it
_FILE_BYTES_OF_RANK = 5 * 10**9  # where a rank holds a file for no other reason than to write it


def ranks_of(model: nn.Module) -> World:
    """The ranks that write a model together."""
    return ONE if Engine(model).state.ranks is None else World.of_process_group()


@torch.no_grad()
def write_weights(model: nn.Module, merged: PreTrainedModel, folder: Path, dtype: torch.dtype | None) -> bool:
    """Write a model's weights into a folder, an adapter merged into them; all ranks call it alike.

    merged: `merged_skeleton(model)`. dtype: what floating-point weights are written in, but for those that transformers
    keeps in float32; None: as they are held. False where `dtype` cannot hold a weight: no file of weights is left then.
    Raises CheckpointError on all ranks where one cannot write, or reads back something else than it wrote.
    """
    world = ranks_of(model)
    source = _SavedTensors(model, merged, dtype)
    files = _files(source, world.size)
    written: dict[str, str] = {}
    for first in range(0, len(files), world.size):
        own: dict[str, Tensor] = {}
        for writer, groups in enumerate(files[first : first + world.size]):
            for group in groups:
                own.update(source.gather(group, keep=writer == world.rank))
        if any(world.gather(source.overflowed)):
            world.together(partial(_remove_files, [folder / name for name in set(written.values())]))
            return False
        place, num = first + world.rank + 1, len(files)
        name = "model.safetensors" if num == 1 else f"model-{place:05d}-of-{num:05d}.safetensors"
        world.together(partial(_write_file, folder / name, own))
        written |= dict.fromkeys(own, name)
    weight_map = {name: file for of_rank in world.gather(written) for name, file in of_rank.items()}
    world.first(lambda: _write_index(folder, weight_map, source))
    return True


def _write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one file, if there is anything for it, and read it back: from the disk, where the system drops its own
    copy. Raises CheckpointError."""
    if not tensors:
        return
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with writing_tensors(path):
        save_file(contiguous, path, metadata={"format": "pt"})
        with path.open("rb") as file:
            os.fsync(file)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        _require_read_back(path, contiguous)


def _remove_files(paths: Sequence[Path]) -> None:
    for path in paths:
        with writing(path):
            path.unlink(missing_ok=True)


@contextmanager
def writing_tensors(path: Path) -> Iterator[None]:
    """As `writing`, where safetensors write."""
    try:
        with writing(path):
            yield
    except SafetensorError as error:
        raise CheckpointError(f"{path}: cannot be written: {error}") from None  # its own class cannot be pickled


def _require_read_back(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError where a file does not hold these tensors, byte by byte."""
    with safe_open(path, framework="pt") as read:
        names = set(read.keys())
        for name, tensor in tensors.items():
            found = read.get_tensor(name) if name in names else tensor.new_empty(0)
            same = (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            if not same or not torch.equal(_bytes(found), _bytes(tensor.contiguous())):
                raise CheckpointError(f"{path}: {name} is read back as something else than was written: check the disk")


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _write_index(folder: Path, weight_map: Mapping[str, str], source: "_SavedTensors") -> None:
    """Which tensor is in which file, where there are several. Raises CheckpointError where one is not there."""
    missing = sorted(source.sizes.keys() ^ weight_map.keys())
    if missing:
        raise CheckpointError(f"{folder}: {', '.join(missing[:3])}: not written, or written unasked")
    files = sorted(set(weight_map.values()))
    for file in files:
        if not (folder / file).is_file():
            raise not_seen(folder / file)
    if len(files) > 1:
        metadata = {"total_parameters": source.num_parameters, "total_size": sum(source.sizes.values())}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        with writing(folder):
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def write_adapter(model: nn.Module, folder: Path) -> None:
    """The adapter of a model as peft writes it, by the first rank; all ranks call it alike."""
    skeleton = without_values(model)
    trained = {name: _whole(p).cpu() for name, p in model.named_parameters() if p.requires_grad}

    def write() -> None:
        # save_embedding_layers: the new rows are in the adapter; "auto" would write whole tables and ask the Hub
        state = {**skeleton.state_dict(), **trained}
        with writing_tensors(folder):
            skeleton.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
            held = get_peft_model_state_dict(skeleton, state_dict=state, save_embedding_layers=False)
            _require_read_back(folder / "adapter_model.safetensors", held)

    ranks_of(model).first(write)


# What is written ------------------------------------------------------------------------------------------------------


def merged_skeleton(model: nn.Module) -> PreTrainedModel:
    """The model without values and without its adapter: what `save_pretrained` would write, by name and shape."""
    skeleton = without_values(model)
    plain: PreTrainedModel = skeleton.unload() if hasattr(skeleton, "peft_config") else skeleton
    return plain


class _SavedTensors:
    """Where the tensors come from: names and sizes in files, and the groups in which they are gathered."""

    def __init__(self, model: nn.Module, merged: PreTrainedModel, dtype: torch.dtype | None) -> None:
        bare = causal_lm(model)
        self.merged, self.dtype, self.overflowed = merged, dtype, False
        self.num_parameters = merged.num_parameters()
        self._held: dict[str, Tensor] = {
            **dict(bare.named_buffers(remove_duplicate=False)),
            **dict(bare.named_parameters(remove_duplicate=False)),
        }
        self._adapted = {
            name: module
            for name, module in bare.named_modules()
            if hasattr(module, "base_layer") or hasattr(module, "unload_and_optionally_merge_module")
        }
        parameters = {name for name, _ in merged.named_parameters(remove_duplicate=False)}
        kept = {*(merged._keep_in_fp32_modules_strict or ()), *(merged._keep_in_fp32_modules or ())}
        self._cast = {name for name in parameters if kept.isdisjoint(name.split("."))}
        ignored = set(merged._keys_to_ignore_on_save or ())
        state = {name: tensor for name, tensor in merged.state_dict().items() if name not in ignored}
        self._state = {
            name: self._in_dtype(name, tensor)
            for name, tensor in remove_tied_weights_from_state_dict(state, merged).items()
        }
        self.groups, self.sizes = self._grouped()

    def _in_dtype(self, name: str, tensor: Tensor) -> Tensor:
        if self.dtype is None or name not in self._cast or not tensor.is_floating_point():
            return tensor
        if tensor.device.type != "meta" and tensor.numel():
            self.overflowed |= tensor.abs().max().item() > torch.finfo(self.dtype).max
        return tensor.to(self.dtype)

    def _to_files(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the layout in memory to that of files."""
        converted: dict[str, Tensor] = revert_weight_conversion(self.merged, dict(state))
        return converted

    def _grouped(self) -> tuple[list[list[str]], dict[str, int]]:
        """Names in memory that must be gathered together; bytes of each tensor in files."""
        groups: list[list[str]] = []
        group_of: dict[str, int] = {}  # an adapted layer, or a tensor in files -> its group
        for name, tensor in self._state.items():
            parts = [*self._to_files({name: tensor}), *filter(None, [self._adapted_layer(name)])]
            joined = sorted({group_of[part] for part in parts if part in group_of})
            number = joined[0] if joined else len(groups)
            groups += [] if joined else [[]]
            for other in joined[1:]:
                groups[number] += groups[other]
                groups[other] = []
                group_of = {part: number if at == other else at for part, at in group_of.items()}
            groups[number].append(name)
            group_of |= dict.fromkeys(parts, number)
        whole = self._to_files(self._state)
        sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in whole.items()}
        return [names for names in groups if names], sizes

    def _adapted_layer(self, name: str) -> str | None:
        """The outermost module under peft that holds a tensor."""
        return min((layer for layer in self._adapted if name.startswith(f"{layer}.")), key=len, default=None)

    def num_bytes(self, names: Sequence[str]) -> int:
        return sum(self._state[name].numel() * self._state[name].element_size() for name in names)

    def gather(self, names: Sequence[str], keep: bool) -> dict[str, Tensor]:
        """A group's tensors as they are in files, on the CPU; all ranks gather them, and one keeps them."""
        layer = self._adapted_layer(names[0])
        if layer is None:
            state = {name: _whole(self._held[name]) for name in names}
        else:
            module = self._adapted[layer]
            values = {id(p): nn.Parameter(_whole(p, owned=True), requires_grad=False) for p in module.parameters()}
            state = _merged(module, layer, values) if keep else {}
        if not keep:
            return {}
        cast = {name: self._in_dtype(name, state[name]).cpu() for name in names}
        return self._to_files(cast)


def _whole(tensor: Tensor, owned: bool = False) -> Tensor:
    """owned: to be changed in place."""
    if isinstance(tensor, DTensor):
        whole: Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
        return whole
    return tensor.detach().clone() if owned else tensor.detach()


def _merged(module: nn.Module, name: str, values: dict[int, Any]) -> dict[str, Tensor]:
    """The tensors of a layer into which peft merges its adapter, which stays as it is itself."""
    layer: Any = copy.deepcopy(module, values)
    if hasattr(layer, "unload_and_optionally_merge_module"):
        base = layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    else:
        layer.merge()
        base = layer.get_base_layer()
    return {f"{name}.{key}": value for key, value in base.state_dict().items()}


def _files(source: _SavedTensors, num_ranks: int) -> list[list[list[str]]]:
    """The groups of each file, in the order of the model; files are about equally large."""
    most = _FILE_BYTES if num_ranks == 1 else _FILE_BYTES_OF_RANK
    total = sum(source.num_bytes(group) for group in source.groups)
    num_files = min(len(source.groups), num_ranks * max(1, math.ceil(total / most / num_ranks)))
    files: list[list[list[str]]] = [[] for _ in range(num_files)]
    before = 0
    for place, group in enumerate(source.groups):
        left = len(source.groups) - place  # each file gets one at least
        number = min(num_files - 1, before * num_files // max(1, total))
        number = max(number, num_files - left)
        files[number].append(group)
        before += source.num_bytes(group)
    return [file for file in files if file]
