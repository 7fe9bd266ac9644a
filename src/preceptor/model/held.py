"""A model that a program holds: fit to be trained where it is, known by its content, released as plain transformers.

Its configuration and its tokenizer are written to a temporary folder at once, so that all that is read of a model but
its weights is read as of any other, and as it was when the program gave it.
"""

import copy
import hashlib
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Collection, Mapping, Set
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from tokenizers import AddedToken
from torch import nn
from transformers import PreTrainedModel

from preceptor.errors import CheckpointError, ConfigError, ModelError
from preceptor.model.embeddings import TokenRows
from preceptor.model.load import make_ready
from preceptor.model.optimisations import remove

_unfinished: "weakref.WeakValueDictionary[int, HeldModel]" = weakref.WeakValueDictionary()
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class HeldModel:
    """A model and its tokenizer. folder: what is read of them, without weights.

    built: what training has made of it, with the tokens that its base never saw; None before. It is the same model,
    or the adapter around it. base: the `ReferenceModel` that was taken of it then. has_steps: whether it was trained.
    unfinished: the folder of a run that has trained it and has not ended.
    record: its configuration and weights as hashes. trainable: names of the parameters that required gradients when the
    model was taken; trained: when it was built.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        """Raises ConfigError and ModelError for what cannot be trained as it is."""
        _require_trainable(model)
        _require_known_code(model, tokenizer)
        self.model, self.tokenizer = model, tokenizer
        self.built: tuple[Any, list[int]] | None = None
        self.base: Any = None
        self.has_steps = False
        self.unfinished: Path | None = None
        self._left: str | None = None
        self.record: dict[str, Any] | None = None
        self.trainable: set[str] | None = None
        self.trained: set[str] = set()
        self._before: _BeforeTraining | None = None
        self.folder = Path(tempfile.mkdtemp(prefix="preceptor-live-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        model.config.save_pretrained(self.folder)
        generation = model.generation_config
        if generation is not None:  # what transformers refuses to save is read all the same
            text = json.dumps(generation.to_diff_dict(), default=str)
            (self.folder / "generation_config.json").write_text(text, encoding="utf-8")
        tokenizer.save_pretrained(self.folder)

    @staticmethod
    def of_unfinished(model: Any, tokenizer: Any, out: str | Path | None) -> "HeldModel | None":
        """The one that an unfinished run in `out` trains, while this program has that run, if nothing of model and
        tokenizer was changed since. tokenizer: None where none is given.
        """
        known = _unfinished.get(id(model))
        if known is None or known.model is not model or tokenizer not in (None, known.tokenizer) or out is None:
            return None
        same = known.unfinished == Path(os.path.realpath(str(out))) and known._left == known._settings()
        return known if same else None

    def _settings(self) -> str:
        """What is read of model and tokenizer beside weights, to tell whether a program has changed it."""
        of_model = (each and each.to_dict() for each in (self.model.config, self.model.generation_config))
        tokenizer = self.tokenizer
        return repr((*of_model, tokenizer.chat_template, tokenizer.special_tokens_map, tokenizer.get_added_vocab()))

    @property
    def name(self) -> str:
        return type(self.model).__name__

    @property
    def dtype(self) -> str:
        return _DTYPES[self.model.dtype]

    def take(self, device: torch.device, chat_tokenizer: Any) -> tuple[Any, bool]:
        """The model on the device, as a run would have loaded it; and whether it was moved there.

        Its content is recorded before anything is changed. The program's tokenizer gets the tokens, the chat template
        and the stop token that the model is trained with.
        """
        if self.record is None:
            self.record = content_of(self.model)
        moved = self.model.device.type != device.type
        remove(self.model)  # what a single step outside this run may have installed
        self._before = _BeforeTraining(self.model, self.tokenizer)
        make_ready(self.model)
        self.model.to(device).eval()
        self.trainable = _trainable(self.model)
        if not self.trainable:
            self.model.requires_grad_(True)  # as an adapter that was merged leaves them
        _align(self.tokenizer, chat_tokenizer)
        return self.model, moved

    def keep_rows(self, ids: Collection[int]) -> None:
        """Keep the rows of tokens that are about to get first values."""
        assert self._before is not None
        self._before.rows = TokenRows.of(self.model, ids)

    def keep(self, model: Any, untrained: list[int]) -> None:
        """Keep what training has made of the model."""
        self.built, self.trained = (model, untrained), _trainable(model)

    def take_again(self) -> tuple[Any, list[int]]:
        """What was kept, to be trained on by another session of this program."""
        assert self.built is not None
        _require_gradients(self.built[0], self.trained)
        return self.built

    def ends_at(self, step: int, unfinished: Path | None) -> None:
        """A session has ended after a step. unfinished: as above."""
        self.has_steps = step > 0
        self.unfinished = unfinished if step > 0 else None
        _unfinished[id(self.model)] = self

    def require_steps_saved(self, step: int) -> None:
        """Raises CheckpointError where a run would begin with weights that it has trained already."""
        if self.has_steps and not step:
            raise CheckpointError(
                "model: this run has trained the live model, and there is no checkpoint to go on from: load the model "
                "again and give it to a new Run"
            )

    def release(self) -> None:
        """Leave the model to the program: as plain transformers or peft runs it, in evaluation mode.

        Where no step was taken, model and tokenizer are as they were when the model was taken, but for its device: a
        second try finds what the first one found. Without an adapter, the parameters require gradients that did then.
        """
        self._release()
        self._left = self._settings()

    def _release(self) -> None:
        if self.built is not None:
            model = self.built[0]
            leave_plain(model)
            if isinstance(model, PeftModel):
                if self.has_steps:
                    return
                for module in model.modules():  # of which peft would leave the copy
                    if isinstance(module, ModulesToSaveWrapper):
                        module.modules_to_save["default"] = module.original_module
                self.model = model.unload()
        if self._before is not None and not self.has_steps:
            _take_off_adapter(self.model)  # of a build that was not finished
            self._before.put_back()
            self.built, self.base, self._before = None, None, None
        if self.trainable is not None:
            _require_gradients(self.model, self.trainable)


class _BeforeTraining:
    """What a run changes of a model and its tokenizer before the first step. rows: None until they are changed."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any) -> None:
        holders = (model.config, model.config.get_text_config(decoder=True), model.generation_config)
        self._model, self._tokenizer = model, tokenizer
        self._settings = [(holder, dict(vars(holder))) for holder in holders if holder is not None]
        self._tokenizers_own = vars(copy.deepcopy(tokenizer))
        self.rows: TokenRows | None = None

    def put_back(self) -> None:
        if self.rows is not None:
            self.rows.put_back(self._model)
        for holder, own in [*self._settings, (self._tokenizer, self._tokenizers_own)]:
            vars(holder).clear()
            vars(holder).update(own)


def _take_off_adapter(model: nn.Module) -> None:
    """Leave the modules that peft has put its own around."""
    around: list[str] = []
    for name, module in [*model.named_modules()]:
        inner = module
        if any(name.startswith(f"{outer}.") for outer in around):
            continue
        while isinstance(inner, BaseTunerLayer | AuxiliaryTrainingWrapper):
            inner = inner.get_base_layer() if isinstance(inner, BaseTunerLayer) else inner.original_module
        if inner is not module:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, inner)
            around.append(name)
    vars(model).pop("peft_config", None)


def _trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def _require_gradients(model: nn.Module, names: Set[str]) -> None:
    """Let these parameters require gradients, and no others."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)


def leave_plain(model: Any) -> None:
    """A trained model as plain transformers or peft runs it, in evaluation mode."""
    model.zero_grad(set_to_none=True)
    for parameter in model.parameters():
        if parameter.grad_dtype != parameter.dtype:  # of bfloat16 weights float32 in training
            parameter.grad_dtype = parameter.dtype
    remove(model)
    model.eval()


def content_of(model: PreTrainedModel) -> dict[str, Any]:
    """SHA-256 of configuration and weights, as the record of a run has them."""
    settings = copy.deepcopy(model.config.to_dict())
    for name in ("_name_or_path", "transformers_version", "_attn_implementation"):
        settings.pop(name, None)
    spelled = json.dumps(settings, sort_keys=True, default=str).encode()
    found, seen, num_bytes = hashlib.sha256(), set(), 0
    state: Mapping[str, torch.Tensor] = model.state_dict()  # every parameter and saved buffer
    for name, tensor in sorted(state.items()):  # a tied one once
        place = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        held = tensor.detach().cpu().contiguous().reshape(-1)
        found.update(held.view(torch.uint8).numpy().data)
        num_bytes += tensor.numel() * tensor.element_size()
    about = {"name": "held in memory", "num_bytes": num_bytes, "modified_ns": None, "sha256": found.hexdigest()}
    return {"config_sha256": hashlib.sha256(spelled).hexdigest(), "weights": [about]}


def _require_trainable(model: Any) -> None:
    modules = [*model.modules()] if isinstance(model, nn.Module) else []
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in modules):
        raise ConfigError(
            "model: carries an adapter already. Give the base model, and `adapter={...}` for a new one; or merge the "
            "adapter first: model = model.merge_and_unload(). If it is of a run that was stopped: call train() of the "
            "Run that you have, or load the model again"
        )
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            f"model: {type(model).__name__} is neither a path nor a transformers.PreTrainedModel, such as "
            "AutoModelForCausalLM.from_pretrained gives"
        )
    if getattr(model.config, "quantization_config", None) is not None or getattr(model, "is_quantized", False):
        raise ModelError("model: its weights are quantized and cannot be trained; load it without quantization")
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or any(device.type == "meta" for device in devices):
        names = ", ".join(sorted(map(str, devices)))
        raise ModelError(f"model: its weights are on {names}; load it whole on one device, without `device_map`")
    if model.dtype not in _DTYPES:
        raise ModelError(
            f"model: its weights are {str(model.dtype).removeprefix('torch.')}; load it with dtype=torch.float32 or "
            "torch.bfloat16"
        )
    if any(getattr(module, "gradient_checkpointing", False) for module in modules):
        raise ConfigError(
            "model: gradient checkpointing is on; call model.gradient_checkpointing_disable() and set "
            "memory={'activation_checkpointing': 'all'}"
        )


def _require_known_code(model: Any, tokenizer: Any) -> None:
    """Raises ConfigError for a class that came with the files of a model: it is read from a folder without them."""
    for each in (model, model.config, tokenizer):
        if type(each).__module__.partition(".")[0] == "transformers_modules":
            place = model.name_or_path or "FOLDER"
            raise ConfigError(
                f"model: {type(each).__name__} is Python code that comes with the model, which is not trained live. "
                f"Give its path: model={{'path': {place!r}, 'trust_remote_code': True}}"
            )


def _align(tokenizer: Any, trained: Any) -> None:
    """Give a tokenizer what another one of the same vocabulary has gained."""
    known = tokenizer.get_vocab()
    added = sorted((id_, str(token)) for id_, token in trained.added_tokens_decoder.items())
    new = [AddedToken(token, special=True, normalized=False) for _, token in added if token not in known]
    if new:
        tokenizer.add_tokens(new, special_tokens=True)
    tokenizer.chat_template = trained.chat_template
    for name in ("eos_token", "pad_token"):
        if getattr(tokenizer, name) != getattr(trained, name):
            setattr(tokenizer, name, getattr(trained, name))
