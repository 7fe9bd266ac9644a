"""An adapter: what it trains and what did not move, its folder, and its merge into the base."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from preceptor.errors import ModelError, first_line
from preceptor.model.adapters.lora import name_of
from preceptor.model.adapters.pissa import lora_layers
from preceptor.model.sharding import own_part

_NAMED = 4  # layers without a gradient
AdaptedRow = tuple[str, str, str]
"""What is trained: its name, how, and its shape."""


def table_lines(model: nn.Module) -> Iterator[str]:
    """The table of an adapter: modules of one name, rank and shape in one line. None without an adapter."""
    rows, parameters = Counter[AdaptedRow](), Counter[AdaptedRow]()
    for row, num_parameters in _rows(model):
        rows[row] += 1
        parameters[row] += num_parameters
    if not rows:
        return
    cells = [("adapted", "in", "how", "shape", "parameters")]
    cells += [(row[0], f"{num} x", *row[1:], f"{parameters[row]:,}") for row, num in rows.items()]
    widths = [max(len(cell[at]) for cell in cells) for at in range(4)]
    for cell in cells:
        left = "  ".join(text.ljust(width) for text, width in zip(cell[:4], widths, strict=True))
        yield f"  {left}  {cell[4]:>12}"


def _rows(model: nn.Module) -> Iterator[tuple[AdaptedRow, int]]:
    for name, layer in lora_layers(model):
        own = [p for own_name, p in layer.named_parameters() if own_name.startswith("lora_")]
        rank, scale = layer.r["default"], layer.scaling["default"]
        how = f"{'DoRA' if layer.use_dora['default'] else 'LoRA'}, rank {rank}, scale {scale:.3g}"
        shape = f"{layer.in_features:,} -> {layer.out_features:,}"
        if getattr(layer, "num_experts", 1) > 1:
            shape += f", {layer.num_experts} experts"
        yield (_last(name, layer), how, shape), sum(p.numel() for p in own if p.requires_grad)
    for name, module in model.named_modules():
        short = name.rpartition(".")[2]
        if isinstance(module, ModulesToSaveWrapper):
            weights = list(module.modules_to_save["default"].parameters())
            shape = " + ".join(" x ".join(f"{size:,}" for size in p.shape) for p in weights[:2])
            yield (short, "whole", shape), sum(p.numel() for p in weights)
        elif isinstance(module, TrainableTokensWrapper):
            rows: Any = module.token_adapter.trainable_tokens_delta["default"]
            if rows.requires_grad:
                yield (name.rpartition(".")[2], "rows of tokens", " x ".join(map(str, rows.shape))), rows.numel()


def _last(name: str, layer: Any) -> str:
    """The last part of a layer's name, without the numbers of layers and experts."""
    parts = [part for part in name.split(".") if part != "base_layer" and not part.isdigit()]
    parameter = getattr(layer, "parameter_name", None)
    return f"{parts[-1]}.{parameter}" if parameter else parts[-1]


class FirstUpdate:
    """The values of an adapter before the first update, to see afterwards which layers it moved."""

    def __init__(self, model: nn.Module) -> None:
        self._before: Mapping[str, dict[str, Tensor]] = {
            layer: {name: own_part(p).detach().clone() for name, p in tensors.items()}
            for layer, tensors in _tensors_by_layer(model).items()
        }

    @torch.no_grad()
    def unmoved(self, model: nn.Module) -> list[str]:
        """The layers of which no tensor of this process has changed."""
        return [
            layer
            for layer, tensors in _tensors_by_layer(model).items()
            if all(torch.equal(own_part(p), self._before[layer][name]) for name, p in tensors.items())
        ]


def _tensors_by_layer(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """The trained tensors of each adapted layer. A of a new adapter has no gradient while B is 0, so both count.

    Not the rows of new tokens: one that no context holds gets no gradient.
    """
    found: dict[str, dict[str, nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad and ".token_adapter." not in name:
            layer = name.removeprefix("base_model.model.")
            for mark in (".lora_", ".modules_to_save."):
                layer = layer.partition(mark)[0]
            found.setdefault(layer.replace(".base_layer", ""), {})[name] = p
    return found


def without_gradient(layers: Sequence[str]) -> str:
    """What to say of adapters that the first step has not moved; "" of none."""
    if not layers:
        return ""
    experts = [layer for layer in layers if ".experts." in layer]
    others = [layer for layer in layers if layer not in experts]
    said = []
    if others:
        more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
        said.append(
            f"no gradient reached the adapter on {', '.join(others[:_NAMED])}{more}: it stays as it is (docs/models.md "
            "lists the layers of which that is known; leave them out with adapter.target_modules)"
        )
    if experts:
        said.append(f"no token of the first step went to {len(experts)} of the adapted experts' layers")
    return "; ".join(said)


README = """---
base_model: {base}
library_name: peft
pipeline_tag: text-generation
---

# LoRA adapter of {base}

The folder holds the adapter, the tokenizer with the chat template of training, and the generation config with its stop
tokens. {tokens}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

adapter = "."  # this folder, or its id on the Hub
tokenizer = AutoTokenizer.from_pretrained(adapter)
model = AutoModelForCausalLM.from_pretrained("{base}"{arguments})
{resize}model = PeftModel.from_pretrained(model, adapter)
model.generation_config = GenerationConfig.from_pretrained(adapter)
```

`model.merge_and_unload()` gives a model of the base's kind that needs no peft.
"""
_RESIZE = "model.resize_token_embeddings({rows}, mean_resizing=False)  # rows for the new tokens\n"


def write_beside_adapter(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig, folder: Path
) -> None:
    """Write what an adapter needs beside its weights to load in plain peft on its base."""
    tokenizer.save_pretrained(folder)  # AutoPeftModel makes rows for its new tokens
    generation_config.save_pretrained(folder)
    (settings,) = model.peft_config.values()
    base = str(settings.base_model_name_or_path)
    kinds = (type(model.config), type(model.get_base_model()))
    own_code = any(kind.__module__.startswith("transformers_modules.") for kind in kinds)  # that the run trusts
    readme = _readme(num_rows(folder, settings, model.get_base_model()), base, settings.revision, own_code)
    (folder / "README.md").write_text(readme, encoding="utf-8")


def _readme(rows: int, base: str, revision: str | None, own_code: bool) -> str:
    base_rows, resize = _base_rows(base, revision, own_code), ""
    if not rows:
        tokens = "No token was added."
    elif base_rows is not None and rows <= base_rows:
        tokens = "Rows of some special tokens are trained and part of it."
    else:
        tokens = "Training added tokens that the base has no rows for, so it gets them before the adapter is loaded:"
        resize = _RESIZE.format(rows=rows)
    arguments = "" if revision is None else f', revision="{revision}"'
    arguments += ", trust_remote_code=True" if own_code else ""
    return README.format(base=base, tokens=tokens, resize=resize, arguments=arguments)


def _base_rows(base: str, revision: str | None, own_code: bool) -> int | None:
    """How many tokens have rows in the base, by its configuration; None where that cannot be read."""
    try:
        config = AutoConfig.from_pretrained(base, revision=revision or "main", trust_remote_code=own_code)
        return int(config.get_text_config(decoder=True).vocab_size)
    except Exception:  # whatever it raises for a base of another form
        return None


def num_rows(folder: Path, settings: PeftConfig, model: Any) -> int:
    """How many rows of the embedding the adapter in a folder needs for the rows that it holds itself; 0 if none.

    model: its base, which says what the tables with a row for each token are called.
    """
    indices = getattr(settings, "trainable_token_indices", None) or []
    lists = indices.values() if isinstance(indices, dict) else [indices]
    of_tokens = max((max(ids) + 1 for ids in lists if ids), default=0)
    stored = folder / "adapter_model.safetensors"
    if not settings.modules_to_save or not stored.is_file():  # type: ignore[attr-defined]
        return of_tokens
    tables = [table for table in (model.get_input_embeddings(), model.get_output_embeddings()) if table is not None]
    whole = {f"base_model.model.{name_of(model, table)}.weight" for table in tables}
    with safe_open(stored, framework="pt") as file:
        names = whole.intersection(file.keys())
        return max([of_tokens, *(file.get_slice(name).get_shape()[0] for name in names)])


def _require_all(missing: Sequence[str], unexpected: Sequence[str]) -> None:
    """Raises ModelError for weights that an adapter's folder lacks, or that fit nothing in the model."""
    for names, what in ((missing, "weights are missing in it"), (unexpected, "of its weights fit no layer")):
        if names:
            raise ModelError(f"{len(names)} {what}: {', '.join(sorted(names)[:_NAMED])}")


def merge_folder(
    model: PreTrainedModel, folder: Path, before: Callable[[PeftModel], None] | None = None
) -> PreTrainedModel:
    """The base `model` with the adapter of a folder merged into it, and with its decoding settings, if it has some.

    Of a model without values (device meta) only the shapes are those of the merged one. before: gets the base with the
    adapter beside it, not merged yet. Raises ModelError for an adapter that is not one of this model.
    """
    try:
        rows = num_rows(folder, PeftConfig.from_pretrained(str(folder)), model)
        if rows > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(rows, mean_resizing=False)
        if model.device.type == "meta":
            return model
        with warnings.catch_warnings():  # as in `add_adapter`
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            warnings.filterwarnings(
                "ignore", message=".*(rank|alpha)_pattern keys did not match", category=RuntimeWarning
            )
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # an error below
            mapping = getattr(model, "_checkpoint_conversion_mapping", {})
            adapted = PeftModel.from_pretrained(model, str(folder))
            found = adapted.load_adapter(str(folder), "default", key_mapping=mapping)  # says what peft has passed over
        _require_all(found.missing_keys, found.unexpected_keys)
        if before is not None:
            before(adapted.eval())
        merged: PreTrainedModel = adapted.merge_and_unload()  # type: ignore[operator]
        if (folder / "generation_config.json").is_file():
            merged.generation_config = GenerationConfig.from_pretrained(folder)
    except Exception as error:  # whatever peft raises for an adapter of another model or a damaged file
        raise ModelError(
            f"{folder}: cannot be loaded as an adapter of {model.name_or_path}: {first_line(error)}"
        ) from error
    return merged.eval()  # type: ignore[no-any-return]
