"""Writes docs/run-file.md from the fields of config/sections.py and the text below each.

python docs/make_run_file_page.py
"""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from preceptor import config
from preceptor.config.run import json_schema

PAGE = Path(__file__).parent / "run-file.md"
SECTIONS: list[tuple[str, type[BaseModel], str]] = [
    ("model", config.Model, "Required: `path`."),
    ("data", config.Data, "Required: `train`."),
    ("data.train[], data.eval[], replay.data[]", config.Source, "Required: `path`."),
    ("train", config.Train, "Everything has a default."),
    ("optimizer", config.Optimizer, "Everything has a default. More: [optimizers](optimizers.md)."),
    ("loss", config.Loss, "Everything has a default."),
    ("memory", config.Memory, "What is kept for backward and what is computed again. Everything has a default."),
    ("parallel", config.Parallel, "Runs of several processes (docs/scale.md)."),
    ("checkpoint", config.Checkpoint, "Everything has a default."),
    ("eval", config.Eval, "What is measured, besides the loss of `data.eval`, and when."),
    ("adapter", config.Adapter, "Absent: full fine-tuning."),
    ("replay", config.Replay, "Absent: only `data.train` is trained on. Required: `data`."),
]

INTRODUCTION = """# The run file

`preceptor train RUN.yaml [key=value ...]` trains what a run file says. Dotted keys override it
(`optimizer.learning_rate=1e-4`, `data.train.0.weight=2`). Everything but `model.path`, `data.train` and `out` has a
default. An unknown key, a wrong type, or a combination that cannot work is rejected before anything is loaded; the
resolved file, with every default written out, is kept in the run's folder as `config.yaml`. Paths are relative to the
working directory; a data or template file that is not there is looked for beside the run file. In paths, `~/`, `$NAME`
and `${NAME}` (environment variables) are replaced.

Durations are written `3 epochs`, `500 steps`; where a share of the run makes sense, `5 %`; and how often something
happens also `10 minutes`, `2 hours`.

This page is made from `src/preceptor/config/sections.py` by `python docs/make_run_file_page.py`.
"""


def page() -> str:
    schema = json_schema()
    parts = [INTRODUCTION]
    for name, section, note in SECTIONS:
        rows = []
        for key, field in section.model_fields.items():
            default = "required" if field.is_required() else f"`{shown(field.default)}`"
            allowed = values(schema["$defs"][section.__name__]["properties"][key])
            rows.append(f"| `{key}` | {allowed} | {default} | {said(field)} |")
        parts.append(
            f"## {name}\n\n{note}\n\n| key | values | default | |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
        )
    for key, default in (("engine", "`auto`"), ("tracker", "`[]`")):
        allowed = values(schema["properties"][key])
        parts.append(f"## {key}\n\nValues: {allowed}. Default: {default}. {said(config.Run.model_fields[key])}\n")
    parts.append(f"## out\n\n{said(config.Run.model_fields['out'])} `--replace` replaces an earlier run.\n")
    return "\n".join(parts)


def values(schema: dict[str, Any], ending: str = "") -> str:
    """What a key takes, of its JSON schema; null is left out where it is the default. ending: `s` of several."""
    if "anyOf" in schema:
        kinds = [each for each in schema["anyOf"] if each != {"type": "null"} or schema.get("default") is not None]
        return " or ".join(values(kind, ending) for kind in kinds)
    if "$ref" in schema:
        return schema["$ref"].rpartition("/")[2].lower() + ending
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema["type"] == "array":
        fixed = schema.get("minItems") if schema.get("minItems") == schema.get("maxItems") else None
        return f"list of {f'{fixed} ' if fixed else ''}{values(schema['items'], 's')}"
    if schema["type"] == "object":
        inner = schema["additionalProperties"]
        return "mapping" if inner is True else f"mapping of names to {values(inner, 's')}"
    kind = {"boolean": "`true`, `false`", "null": "`null`", "string": "text"}.get(schema["type"], schema["type"])
    if kind == "text":
        kind = "duration" if "pattern" in schema else "path" if "minLength" in schema else "text"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = ", ".join(f"{sign} {schema[name]:,}" for name, sign in signs.items() if name in schema)
    return kind + ending + f" {bounds}".rstrip()


def said(field: FieldInfo) -> str:
    """Its documentation on one line, as a cell of a table."""
    return " ".join((field.description or "").split()).replace("|", "\\|")


def shown(default: object) -> str:
    """As it would stand in the file."""
    return json.dumps(default) if default is None or isinstance(default, bool) else str(default)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
