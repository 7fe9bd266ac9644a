"""The model card: what a run left in its folder, for those who find the model."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from preceptor.export.source import ExportSource
from preceptor.report.comparison import read_comparison
from preceptor.report.run_record import RunRecord

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
    is_local = base is not None and Path(base).exists()  # a path of this machine says nothing elsewhere
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
    parts += [
        "## Use\n",
        use or USE.format(name=name, code=", trust_remote_code=True" if source.trust_remote_code else ""),
    ]
    if run is not None:
        parts += [
            "## Training\n",
            "\n".join(_training(run)) + "\n",
            "## Evaluation\n",
            "\n".join(_evaluation(run)) + "\n",
        ]
    parts += ["## Proof of the export\n", "\n".join(f"- {line}" for line in proof) + "\n"]
    return "\n".join(parts)


def _training(run: RunRecord) -> Iterator[str]:
    data, settings, environment = run.data, run.config, run.environment
    tokens = data.get("tokens") or {}
    yield "| | |"
    yield "|---|---|"
    for file in environment.get("data") or ():
        digest = f", SHA-256 {file['sha256'][:16]}" if file.get("sha256") else ""
        yield f"| data ({file['use']}) | {file['name'].rpartition('/')[2]}{digest} |"
    if "num_examples" in data:
        yield f"| examples | {run.counts}; {data.get('num_rejected', 0):,} of all were rejected |"
    if tokens:
        yield f"| tokens per epoch | {tokens['computed']:,}, of which {tokens['trained']:,} are trained |"
    template = environment.get("template") or {}
    yield f"| chat template | {template.get('name') or 'none'} |"
    for system, count in ((data.get("system_prompts") or {}).get("most_common") or ())[:1]:
        yield f"| most common system prompt | {_one_line(system) or 'none'} ({count:,} conversations) |"
    at_most = f"at most {settings['data']['max_length']:,} tokens"
    yield f"| steps | {run.num_steps:,} of {settings['train']['batch_size']} sequences, {at_most} |"
    yield f"| learning rate | {settings['optimizer']['learning_rate']:g}, {settings['optimizer']['lr_scheduler']} |"
    adapter = settings.get("adapter")
    yield "| method | " + (
        "full fine-tuning |" if not adapter else f"LoRA, rank {adapter['rank']}, alpha {adapter['alpha']:g} |"
    )
    versions = environment.get("versions") or {}
    yield (
        "| versions | "
        + ", ".join(f"{n} {versions[n]}" for n in ("preceptor", "torch", "transformers") if n in versions)
        + " |"
    )


def _evaluation(run: RunRecord) -> Iterator[str]:
    found = False
    if run.held_out:
        found, first, last = True, run.held_out[0], run.held_out[-1]
        yield f"- held-out loss {first['loss']:.3f} before training, {last['loss']:.3f} after (nats per trained token)"
    for task in (run.evaluations[-1].get("tasks") or ()) if run.evaluations else ():
        found = True
        figures = ", ".join(f"{name} {figure['value']:.3f}" for name, figure in task["figures"].items())
        yield f"- {task['task'].rpartition('/')[2]}: {figures}"
    comparison = read_comparison(run.compare)
    for label, (metric, base, tuned, difference, num) in comparison.rows if comparison else ():
        found = True
        task = label.rpartition("/")[2]
        yield f"- {task}: {metric} {base} in the base, {tuned} here, difference {difference}; {num} items"
    for sentence in comparison.sentences if comparison else ():
        yield f"- {sentence}"
    if not found:
        yield "Not evaluated."
    elif not run.compare:
        yield "- what training cost in other abilities (the alignment tax) was not measured"


def _one_line(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())[:200]
