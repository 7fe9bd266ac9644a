"""The folder of an adapter: weights, tokenizer, decoding settings and instructions; and its merge into the base."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from peft import PeftConfig, PeftModel
from safetensors import safe_open

from preceptor.errors import ModelError, first_line

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

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
_TABLES = {"embed_tokens", "embed_in", "wte", "word_embeddings", "lm_head", "embed_out", "output"}
"""What modules with a row for each token are called."""
_RESIZE = "model.resize_token_embeddings({rows}, mean_resizing=False)  # rows for the new tokens\n"


def write_beside_adapter(
    model: PeftModel, tokenizer: "PreTrainedTokenizerBase", generation_config: "GenerationConfig", folder: Path
) -> None:
    """Write what an adapter needs beside its weights to load in plain peft on its base."""
    tokenizer.save_pretrained(folder)  # AutoPeftModel makes rows for its new tokens
    generation_config.save_pretrained(folder)
    (settings,) = model.peft_config.values()
    base = str(settings.base_model_name_or_path)
    kinds = (type(model.config), type(model.get_base_model()))
    own_code = any(kind.__module__.startswith("transformers_modules.") for kind in kinds)  # that the run trusts
    readme = _readme(num_rows(folder, settings), base, settings.revision, own_code)
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
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(base, revision=revision or "main", trust_remote_code=own_code)
        return int(config.get_text_config(decoder=True).vocab_size)
    except Exception:  # whatever it raises for a base of another form
        return None


def num_rows(folder: Path, settings: PeftConfig) -> int:
    """How many rows of the embedding the adapter in a folder needs for the rows that it holds itself; 0 if none."""
    indices = getattr(settings, "trainable_token_indices", None) or []
    lists = indices.values() if isinstance(indices, dict) else [indices]
    of_tokens = max((max(ids) + 1 for ids in lists if ids), default=0)
    whole = {name.rpartition(".")[2] for name in settings.modules_to_save or ()} & _TABLES
    if not whole:
        return of_tokens
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if name.split(".")[-2] in whole]  # noqa: SIM118 (no mapping)
        return max([of_tokens, *(file.get_slice(name).get_shape()[0] for name in names)])


def merge_folder(
    model: "PreTrainedModel", folder: Path, before: Callable[[PeftModel], None] | None = None
) -> "PreTrainedModel":
    """The base `model` with the adapter of a folder merged into it, and with its decoding settings, if it has some.

    Of a model without values (device meta) only the shapes are those of the merged one. before: gets the base with the
    adapter beside it, not merged yet. Raises ModelError for an adapter that is not one of this model.
    """
    from transformers import GenerationConfig

    try:
        rows = num_rows(folder, PeftConfig.from_pretrained(str(folder)))
        if rows > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(rows, mean_resizing=False)
        if model.device.type == "meta":
            return model
        with warnings.catch_warnings():  # as in `add_adapter`
            warnings.filterwarnings(
                "ignore", message=".*(rank|alpha)_pattern keys did not match", category=RuntimeWarning
            )
            adapted = PeftModel.from_pretrained(model, str(folder))
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
