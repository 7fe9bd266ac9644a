"""The model card: what a run left in its folder, for those who find the model."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from preceptor.errors import counted
from preceptor.export.source import ExportSource
from preceptor.report.comparison import read_comparison
from preceptor.report.run_record import RunRecord, in_figures

USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}"{code})
model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto"{code})
prompt = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "..."}}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=256)[0, prompt["input_ids"].shape[1] :]))
```

To serve it with OpenAI's API:

    vllm serve {name}
    python -m sglang.launch_server --model-path {name}
    transformers serve {name}

No `--chat-template` is needed: the saved one is the one that was trained, and its defaults are the arguments of
training.
"""


def card(source: ExportSource, proof: Sequence[str], name: str, licence: str | None, use: str | None = None) -> str:
    """The card as Markdown. name: of the exported model, as its users load it. use: how, where it is no whole model."""
    run = source.run
    base = source.base or (None if run is None else str(run.config["model"]["path"]))
    started = "" if run is None else run.environment.get("directory") or ""  # where its relative paths were read
    recorded = {} if run is None else run.environment.get("model") or {}
    was_local = recorded.get("path") == base and recorded.get("folder") is not None  # and may be gone
    # a path of this machine says nothing elsewhere
    is_local = base is not None and (was_local or os.access(Path(started, base), os.F_OK))
    about: dict[str, Any] = {
        "base_model": None if is_local else base,
        "library_name": "transformers" if use is None else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["sft", "preceptor"],
        "license": licence,
    }
    front = yaml.safe_dump({key: value for key, value in about.items() if value}, sort_keys=False, allow_unicode=True)
    parts = [f"---\n{front}---\n", f"# {Path(source.title).name}\n"]
    if base:
        parts.append(f"{Path(base).name if is_local else base}, fine-tuned by supervised fine-tuning with Preceptor.\n")
    if not licence:
        parts.append("Licence: not stated. That of the base model and of the data applies to what is made from them.\n")
    code = ", trust_remote_code=True" if source.trust_remote_code else ""
    parts += ["## Use\n", use or USE.format(name=name, code=code)]
    if run is not None:
        rows = ["| | |", "|---|---|", *(f"| {what} | {said} |" for what, said in _training(run))]
        parts += ["## Training\n", "\n".join(rows) + "\n", "## Evaluation\n", "\n".join(_evaluation(run)) + "\n"]
    parts += ["## Proof of the export\n", "\n".join(f"- {line}" for line in proof) + "\n"]
    return "\n".join(parts)


def _training(run: RunRecord) -> Iterator[tuple[str, str]]:
    data, settings, environment = run.data, run.config, run.environment
    for file in environment.get("data") or ():
        digest = f", SHA-256 {file['sha256'][:16]}" if file.get("sha256") else ""
        yield f"data ({file['use']})", f"{file['name'].rpartition('/')[2]}{digest}"
    if "num_examples" in data:
        yield "examples", f"{run.counts}; {data.get('num_rejected', 0):,} of all were rejected"
    if tokens := data.get("tokens"):
        yield "tokens per epoch", f"{tokens['computed']:,}, of which {tokens['trained']:,} are trained"
    yield "chat template", (environment.get("template") or {}).get("name") or "none"
    for system, count in ((data.get("system_prompts") or {}).get("most_common") or ())[:1]:
        shown = " ".join(system.replace("|", "\\|").split())[:200]
        yield "most common system prompt", f"{shown or 'none'} ({counted(count, 'conversation')})"
    at_most = f"at most {settings['data']['max_length']:,} tokens"
    yield "steps", f"{run.num_steps:,} of {counted(settings['train']['batch_size'], 'sequence')}, {at_most}"
    yield "learning rate", f"{settings['optimizer']['learning_rate']:g}, {settings['optimizer']['lr_scheduler']}"
    adapter = settings.get("adapter")
    lora = f"LoRA, rank {adapter['rank']}, alpha {adapter['alpha']:g}" if adapter else ""
    yield "method", lora or "full fine-tuning"
    versions = environment.get("versions") or {}
    known = (name for name in ("preceptor", "torch", "transformers") if name in versions)
    yield "versions", ", ".join(f"{name} {versions[name]}" for name in known)


def _evaluation(run: RunRecord) -> list[str]:
    found = []
    if lines := run.held_out_of_model:
        first, last = (in_figures(line["loss"], ".3f") for line in (lines[0], lines[-1]))
        course = f"{last} after training" if lines[0]["step"] else f"{first} before training, {last} after"
        found.append(f"- held-out loss {course} (nats per trained token)")
    for task in next((line.get("tasks") or () for line in reversed(run.of_model(run.evaluations))), ()):
        figures = ", ".join(f"{name} {in_figures(figure['value'], '.3f')}" for name, figure in task["figures"].items())
        found.append(f"- {task['task'].rpartition('/')[2]}: {figures}")
    if comparison := read_comparison(run.compare):
        for label, (metric, base, tuned, difference, num) in comparison.rows:
            here = f"{metric} {base} in the base, {tuned} here, difference {difference}; {num} items"
            found.append(f"- {label.rpartition('/')[2]}: {here}")
        found += [f"- {sentence}" for sentence in comparison.sentences]
    elif found:
        found.append("- what training cost in other abilities (the alignment tax) was not measured")
    return found or ["Not evaluated."]
