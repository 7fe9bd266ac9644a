"""What the methods of `Run` return: typed, as text in a terminal, as a page in a notebook."""

import html
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preceptor.errors import CheckpointError
from preceptor.inspect.check_text import to_text
from preceptor.plan import text as plan_text
from preceptor.report.curves import panels
from preceptor.report.findings import judge
from preceptor.report.plots import draw_file
from preceptor.report.run_record import RunRecord, read_run

_OF_TRL = {"loss": "loss", "token_accuracy": "mean_token_accuracy"}  # names of held-out figures
_PLOTS = ("Loss", "Held-out token accuracy", "Learning rate", "Gradient norm")  # the report has more
_FRAME_HEIGHT = 480


class _ShownAsText:
    """In a notebook as in a terminal."""

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


@dataclass(frozen=True)
class CheckResult(_ShownAsText):
    """What the proof of every example found. passed: whether all of them are trained, or may be left out.

    rejections: for each reason code, count, share, allowed, first_at, message. facts: all of `preceptor check --json`.
    """

    passed: bool
    num_examples: int
    num_rejected: int
    num_tokens: int
    num_trained: int
    rejections: Sequence[Mapping[str, Any]]
    facts: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of(cls, found: dict[str, Any]) -> "CheckResult":
        own = {name: found[name] for name in ("passed", "num_examples", "num_rejected", "num_tokens", "num_trained")}
        return cls(**own, rejections=found["rejections"], facts=found)

    def __str__(self) -> str:
        return to_text(dict(self.facts))


@dataclass(frozen=True)
class PlanResult(_ShownAsText):
    """A prediction. fits: in memory; of several processes, each in its own. peak_bytes: of one process. seconds: None
    where the speed of the device is not known.

    facts: all of `preceptor plan --json`.
    """

    fits: bool
    peak_bytes: int
    num_steps: int | None
    seconds: float | None
    facts: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> "PlanResult":
        memory = found["ranks"]["chosen"] if found["ranks"] else found["memory"]
        steps, seconds = found["data"].get("num_steps"), found["work"]["seconds"]
        return cls(memory["fits"], memory["peak_bytes"], steps, seconds, found)

    def __str__(self) -> str:
        return plan_text.to_text(self.facts)


@dataclass(frozen=True)
class ShownExamples:
    """Examples with their context and trained tokens: text with ⟦trained⟧ parts, in a notebook a page to browse."""

    text: str
    page: str = field(repr=False)

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return (
            f'<iframe srcdoc="{html.escape(self.page)}" style="width:100%;height:{_FRAME_HEIGHT}px;border:0" '
            'sandbox="allow-scripts" title="What is trained"></iframe>'
        )


@dataclass(frozen=True)
class EvaluationResult:
    """What was measured after a step. loss: of held-out examples, in nats per trained token; None where there are none.

    tasks: figures with their 95 % intervals, by the name of the task. facts: the line of eval.jsonl.
    """

    step: int
    loss: float | None
    token_accuracy: float | None
    bits_per_byte: float | None
    tasks: Mapping[str, Mapping[str, Any]]
    facts: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of(cls, line: Mapping[str, Any], step: int) -> "EvaluationResult":
        tasks = {task["task"]: task["figures"] for task in line.get("tasks", ())}
        return cls(step, line.get("loss"), line.get("token_accuracy"), line.get("bits_per_byte"), tasks, line)


@dataclass(frozen=True)
class TrainResult(_ShownAsText):
    """A run that is finished. model: the folder of the saved model. facts: summary.json.

    losses: of every step that was taken; one that was skipped, as it was not finite, has none.
    """

    out: Path
    model: Path
    report: Path
    num_steps: int
    seconds: float
    losses: Sequence[float] = field(repr=False)
    evaluations: Sequence[EvaluationResult] = field(repr=False)
    facts: Mapping[str, Any] = field(repr=False)
    record: RunRecord = field(repr=False)

    @classmethod
    def of(cls, folder: Path) -> "TrainResult":
        """Raises CheckpointError where the run is not finished."""
        record = read_run(folder)
        if not record.summary:
            raise CheckpointError(f"{folder}: this run is not finished: train() begins it, or goes on with it")
        return cls(
            out=folder,
            model=folder / "model",
            report=folder / "report.html",
            num_steps=int(record.summary["num_steps"]),
            seconds=float(record.summary["seconds"]),
            losses=[float(step["loss"]) for step in record.steps],
            evaluations=[EvaluationResult.of(line, int(line["step"])) for line in record.evaluations],
            facts=record.summary,
            record=record,
        )

    @property
    def metrics(self) -> dict[str, float]:
        """As TRL's trainer names them."""
        return {"train_loss": self.training_loss, "train_runtime": self.seconds, "train_steps": self.num_steps}

    @property
    def training_loss(self) -> float:
        """The mean of all steps."""
        return sum(self.losses) / max(1, len(self.losses))

    @property
    def global_step(self) -> int:
        return self.num_steps

    def __str__(self) -> str:
        """The verdict of the report, and where the model is."""
        verdict = judge(self.record)
        lines = [verdict.headline, *(f"  {found.seen} {found.advice}".rstrip() for found in verdict.findings)]
        return "\n".join([*lines, f"model: {self.model}", f"report: {self.report}"])

    def plots(self) -> dict[str, str]:
        """SVG by title, drawn as in the report."""
        return {panel.title: draw_file(panel) for panel in panels([self.record], [""])}

    def _repr_html_(self) -> str:
        images = "".join(
            f'<img alt="{html.escape(title)}" style="max-width:49%" '
            f'src="data:image/svg+xml;base64,{b64encode(svg.encode()).decode()}">'
            for title, svg in self.plots().items()
            if title in _PLOTS
        )
        return f"{super()._repr_html_()}<div>{images}</div>"


def held_out_figures(line: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Of an evaluation, by TRL's names."""
    return [(theirs, line[ours]) for ours, theirs in _OF_TRL.items() if line.get(ours) is not None]


def log_history(record: RunRecord) -> list[dict[str, Any]]:
    """Every step and held-out evaluation, as TRL's trainer names them."""
    keys = ("loss", "grad_norm", "learning_rate", "epoch", "step")
    found = [{key: step[key] for key in keys if key in step} for step in record.steps]
    for line in record.evaluations:
        if figures := held_out_figures(line):
            found.append({**{f"eval_{key}": value for key, value in figures}, "step": line["step"]})
    return sorted(found, key=lambda entry: int(entry["step"]))
