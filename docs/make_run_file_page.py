"""Writes docs/run-file.md from the fields of config/sections.py and the line under each.

python docs/make_run_file_page.py
"""

import json
from pathlib import Path

from pydantic import BaseModel

from preceptor import config

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
    parts = [INTRODUCTION]
    for name, section, note in SECTIONS:
        rows = []
        for key, field in section.model_fields.items():
            default = "required" if field.is_required() else f"`{shown(field.default)}`"
            rows.append(f"| `{key}` | {default} | {field.description} |")
        parts.append(f"## {name}\n\n{note}\n\n| key | default | |\n|---|---|---|\n" + "\n".join(rows) + "\n")
    parts.append(f"## engine\n\nDefault: `auto`. {config.Run.model_fields['engine'].description}\n")
    parts.append(f"## tracker\n\nDefault: `[]`. {config.Run.model_fields['tracker'].description}\n")
    parts.append(f"## out\n\n{config.Run.model_fields['out'].description} `--replace` replaces an earlier run.\n")
    return "\n".join(parts)


def shown(default: object) -> str:
    """As it would stand in the file."""
    return json.dumps(default) if default is None or isinstance(default, bool) else str(default)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
