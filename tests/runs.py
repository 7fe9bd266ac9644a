"""Runs for the tests: trained in this process, or folders of runs made by hand, without training."""

import json

import yaml

CONFIG = {
    "model": {"path": "scholar"},
    "data": {"train": [{"path": "rows.jsonl"}], "eval": [{"path": "eval.jsonl"}], "allow_rejected": []},
    "train": {"seed": 0},
    "optimizer": {"learning_rate": 0.001, "max_grad_norm": 1.0},
    "adapter": None,
    "out": "runs/a",
}
NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)> {{ 7 * 7777 }} \u2028 & <b>日"


def execute(prepared, console, *, resume=False, replace=False):
    """Train in the folder that the run file names; the summary. resume, replace: as `claim`."""
    from preceptor.train.run_folder import claim

    with claim(prepared.run, resume=resume, replace=replace) as folder:
        return execute_in(folder, prepared, console)


def execute_in(folder, prepared, console):
    """As `execute`, in a folder that is claimed already. Where the model is saved, only the record is completed."""
    from preceptor.train.finish import finish
    from preceptor.train.run import Training
    from preceptor.train.signals import StopRequest

    training = Training(folder, prepared, console, StopRequest())
    if folder.has_model:
        return finish(folder, training.say)
    for _ in training.steps():
        pass
    return training.summary


def steps(losses, **values):
    """A line of metrics.jsonl for each loss; other keys for all lines, or a list of them."""
    lines = []
    for index, loss in enumerate(losses):
        line = {"step": index + 1, "loss": loss, "learning_rate": 0.001, "grad_norm": 0.5, "num_tokens": 100}
        line |= {"num_trained": 40, "seconds": 0.5, "peak_memory_bytes": 400_000_000}
        lines.append(line | {k: v[index] if isinstance(v, list) else v for k, v in values.items()})
    return lines


def looks(*pairs, num_trained=900):
    """A line of eval.jsonl for each (step, loss)."""
    return [{"step": step, "loss": loss, "token_accuracy": 0.5, "num_trained": num_trained} for step, loss in pairs]


def sample(step, prompt, answer, **more):
    line = {"step": step, "source": "eval.jsonl:1", "prompt": prompt, "answer": answer, "stopped": True}
    return {**line, "reference": "The reference.", **more}


def segment(index, parent, kind, *texts, gap=None):
    pieces = [{"text": text, "ids": [10 * index + place], "special": "<|" in text} for place, text in enumerate(texts)]
    num = len(pieces) + (gap["num_tokens"] if gap else 0)
    return {"id": index, "parent": parent, "kind": kind, "weight": 1.0, "num_tokens": num, "pieces": pieces, "gap": gap}


def example(*segments, source="rows.jsonl:1", why=("the first",)):
    num = sum(own["num_tokens"] for own in segments)
    trained = sum(own["num_tokens"] for own in segments if own["kind"] == "target")
    counts = {"num_tokens": num, "num_trained": trained, "num_segments_left_out": 0, "number": 1}
    return {"source": source, "why": list(why), "segments": list(segments), **counts}


CHAIN = example(segment(0, None, "context", "<|im_start|>", "user\n", "Hi\t"), segment(1, 0, "target", "Hel", "lo."))
TREE = example(
    segment(0, None, "context", "Which", "?"),
    segment(1, 0, "target", "Think", " first."),
    segment(2, 0, "context", " first.", " Sure?"),
    segment(3, 2, "target", "Yes."),
    source="rows.jsonl:2",
    why=("the first that branches",),
)
DATA = {
    "num_examples": 100,
    "examples_per_epoch": 100,
    "num_steps": 60,
    "fill": 0.9,
    "tokens": {"computed": 9000, "trained": 3000},
    "shortened": {"num_truncated": 0, "num_split": 0},
    "lengths": {"trees": {"edges": [10, 20, 30], "counts": [60, 40], "min": 10, "max": 29, "median": 18, "p95": 28}},
}
ENVIRONMENT = {
    "command": "preceptor train run.yaml",
    "directory": "/home/me/my project",
    "date": "2026-11-22T12:00:00+00:00",
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "platform": "Linux",
    "device": "cpu",
    "cuda": None,
    "num_cores": 2,
    "num_threads": 1,
    "model": {"path": "scholar", "folder": "/m", "revision": None, "config_sha256": "c" * 64, "weights": []},
    "data": [
        {"use": "train", "name": "rows.jsonl", "num_bytes": 1234, "sha256": "a" * 64},
        {"use": "held out", "name": "some/set", "revision": "main", "num_bytes": None, "sha256": None},
    ],
    "template": {"name": "chatml", "sha256": "b" * 64},
    "trees_sha256": "d" * 64,
    "resumed": [],
}


def _interval(value, half, num=60):
    return {"value": value, "low": value - half, "high": value + half, "num": num}


def compared(role, value, half, kind="generation", name="accuracy", task="scholar:arithmetic.jsonl", num_items=60):
    figure = {"base": _interval(0.9, 0.05), "tuned": _interval(0.9 + value, 0.05), "difference": _interval(value, half)}
    figures = {name: {**figure, "num_changed": 9}}
    return {"task": task, "kind": kind, "num_items": num_items, "role": role, "figures": figures, "sentence": "x"}


COMPARE = {
    "base": "scholar",
    "tuned": "runs/a/model",
    "verdict": ["Outside it: lost 10.0 points."],
    "tasks": [
        compared("tax", -0.1, 0.02),
        compared("text", 0.2, 0.01, "perplexity", "bits_per_byte", "library.txt"),
    ],
    "shift": {
        "num_prompts": 2,
        "num_tokens": 3,
        "num_added": 1,
        "shares": {
            name: _interval(value, 0.05) for name, value in (("unshifted", 0.6), ("marginal", 0.3), ("shifted", 0.1))
        },
        "mean_prob": _interval(0.7, 0.1),
        "mean_kl": _interval(0.9, 0.1),
        "by_position": [
            {
                "position": place,
                "num": 2,
                "unshifted": 0.5,
                "marginal": 0.3,
                "shifted": 0.2,
                "mean_prob": 0.5,
                "mean_kl": 1.0,
            }
            for place in (1, 2, 3)
        ],
        "most_shifted": [{"token": " The", "num": 2, "num_shifted": 1, "num_marginal": 0, "mean_prob": 0.01}],
        "answers": [
            {
                "source": "q:1",
                "texts": ["The", " end", ".", "<|im_end|>"],
                "ranks": [7, 2, 1, 0],
                "probs": [0.01, 0.2, 0.9, 0.0],
                "kls": [3.0, 0.5, 0.1, 0.0],
            }
        ],
    },
    "samples": [],
}


def write_run(folder, **files):
    """A run that went well, with files replaced (lists are .jsonl, dicts .json; None: left out). config: changes."""
    falling = [3.0 * 0.9**step for step in range(20)]
    contents = {
        "metrics": steps(falling),
        "eval": looks((0, 3.0), (10, 1.5), (20, 0.75)),
        "samples": [
            sample(step, prompt, answer)
            for step, answers in ((0, ("a", "b", "c")), (10, ("d", "e", "f")), (20, ("One.", "Two.", "Three.")))
            for prompt, answer in zip(("1?", "2?", "3?"), answers, strict=True)
        ],
        "rejections": [],
        "examples": [CHAIN, TREE, {**CHAIN, "why": ["the longest"]}],
        "summary": {"num_steps": 20, "seconds": 12.0},
        "environment": ENVIRONMENT,
        "data": DATA,
        "compare": None,
        **{name: content for name, content in files.items() if name != "config"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | files.get("config", {})), encoding="utf-8")
    for name, content in contents.items():
        if isinstance(content, list):
            lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in content)
            (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        elif content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder
