"""Findings about a run in four levels, the worst first. Each says what was found and what to do.

The thresholds are judgement, not statistics.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from preceptor.compare.verdict import change, is_finite, sentence, short_names, tells
from preceptor.data.loader import FEW_STEPS, few_steps
from preceptor.errors import counted
from preceptor.evaluate.intervals import SHARE, interval
from preceptor.evaluate.tasks import repeated_answer
from preceptor.report.run_record import JsonObject, RunRecord, finite

Severity = Literal["error", "warning", "note", "good"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note", "good")

NOTHING_LEARNED = 0.02  # a loss that falls by a smaller share has not changed
OVERFITTED = 0.02  # held-out loss at the end above its lowest by this share
MEMORISED = 0.5  # training loss below this share of the held-out loss
SPIKE = 10.0  # gradient norm over the median of the steps before
SPIKE_STEPS = 50  # steps of that median; fewer than SPIKE_FIRST: no judgement
SPIKE_FIRST = 10
OFTEN_CLIPPED = 0.5  # share of the steps after the first tenth
LOW_FILL = 0.7  # share of the sequences that tokens fill
MANY_REJECTED = 0.05  # share of the examples
NOT_STOPPED = 0.1  # share of answers that do not stop
MANY_ANSWERS = 10  # to praise that they stop
ENOUGH_STEPS = 10  # to praise a training loss
ENOUGH_TOKENS = 200  # to praise a held-out loss
_NAMED = 5  # steps and examples of a finding


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found, in a sentence or two, and what to do about it."""

    level: Severity
    seen: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    headline: str
    level: Severity
    findings: list[Finding]


def judge(run: RunRecord) -> Verdict:
    """All findings of a run, the worst first, with a headline."""
    found = [
        *_whether_finished(run),
        *_skipped(run),
        *_steps(run),
        *_training_loss(run),
        *_not_finite(run),
        *_held_out(run),
        *_left_out(run),
        *_gradients(run),
        *_answers(run),
        *_data(run),
        *_tax(run),
    ]
    found.sort(key=_rank)
    errors, warnings = (sum(finding.level == level for finding in found) for level in ("error", "warning"))
    if errors:
        return Verdict("Something went wrong", "error", found)
    state = _state(run)
    if warnings:
        return Verdict(f"{state}, with {counted(warnings, 'warning')}", "warning", found)
    return Verdict(f"{state}; nothing looks suspicious", "good", found)


def warnings_so_far(run: RunRecord) -> list[Finding]:
    """What is wrong with a run that goes on. Its losses and answers are judged when a tenth of it is done."""
    found = [*_skipped(run), *_steps(run), *_not_finite(run), *_gradients(run), *_data(run)]
    if run.num_steps >= max(ENOUGH_STEPS, run.data.get("num_steps", 0) / 10):
        found += [*_training_loss(run), *_held_out(run), *_answers(run)]
    return sorted((finding for finding in found if finding.level in ("error", "warning")), key=_rank)


def _rank(finding: Finding) -> int:
    return SEVERITIES.index(finding.level)


def _state(run: RunRecord) -> str:
    """What became of the run, as far as its losses tell."""
    evaluations = finite(run.held_out_of_model)  # of a finished run all, else `judge` had an error
    learned = len(evaluations) > 1 and evaluations[-1]["loss"] < evaluations[0]["loss"] * (1 - NOTHING_LEARNED)
    if not run.is_finished:
        begun = "It is not finished" if run.num_steps else "It has not begun"
        return f"{begun}; it is learning" if learned else begun
    if _has_few_steps(run):
        return "It is finished; too few steps to say what it learned"
    # A training loss that did not fall is an error in `judge`, but of a loss that need not.
    memorised = "It memorised its training examples"
    only_trained = memorised if run.is_cross_entropy else "It is finished; held-out examples show no learning"
    if len(evaluations) < 2:
        right, before = _right_answers(run), run.summary.get("base_exact_match")
        if right and before is not None:
            return "It learned" if sum(right) / len(right) > before else only_trained
        fitted = "It learned its training examples" if run.is_cross_entropy else "It is finished"
        return f"{fitted}; more was not measured" if run.steps else "It is finished"
    return "It learned" if learned else only_trained


def _steps(run: RunRecord) -> Iterator[Finding]:
    if _has_few_steps(run):
        tokens, lengths = run.data.get("tokens", {}), run.data.get("lengths", {}).get("trees", {})
        steps = _length(run), run.data.get("steps_per_epoch") or 0
        by_epochs = "step" not in str(run.config.get("train", {}).get("duration"))
        said = few_steps(*steps, tokens.get("computed", 0), lengths.get("max", 0), by_epochs) or ""
        seen, _, advice = said.partition(": ")
        advice = "" if run.data["num_steps"] >= FEW_STEPS else f"{advice[:1].upper()}{advice[1:]}."
        yield Finding("warning", f"{seen[:1].upper()}{seen[1:]}.", advice)


def _has_few_steps(run: RunRecord) -> bool:
    return bool(run.data.get("num_steps")) and _length(run) < FEW_STEPS


def _length(run: RunRecord) -> int:
    """The steps that were planned; of a run that ended early, those that were taken."""
    return run.num_steps if run.ended_early else int(run.data["num_steps"])


def _whether_finished(run: RunRecord) -> Iterator[Finding]:
    planned = run.data.get("num_steps")
    if not run.is_finished:
        done = f"{run.num_steps:,} of {counted(planned, 'step')}" if planned else counted(run.num_steps, "step")
        seen = f"The run is not finished: {done} on record."
        yield Finding("warning", seen, "If it was stopped, the same `preceptor train` command continues it.")
    for resumed in run.environment.get("resumed", ()):
        yield Finding("note", f"The run was resumed after step {resumed['step']:,} ({resumed['date']}).")
    early, best = run.summary.get("stopped_early"), run.summary.get("best")
    if early:
        since = f"after step {early['on_step']:,}" if early["on_step"] else "before the first step"
        num = early["num_evaluations"]
        seen = (
            f"The run stopped early, after step {early['step']:,}: {counted(num, 'evaluation')} did not lower the "
            f"held-out loss of {since} beyond chance ({_difference(early)}train.patience)."
        )
        yield Finding("note", seen, "" if best else "`checkpoint.best: loss` saves the best weights, not the last.")
    if (step := run.summary.get("ended_by_program")) is not None:
        of = f" of {planned:,}" if planned else ""
        yield Finding("note", f"The program ended the run after step {step:,}{of} (Run.stop).")
    if best:
        last = "the last" if best["step"] == run.num_steps else f"not the last, {run.num_steps:,}"
        yield Finding("note", f"The model is that of step {best['step']:,}, the best by {best['metric']}; {last}.")


def _difference(early: JsonObject) -> str:
    """Of the last held-out loss from the best before, where it has an interval."""
    if early.get("low") is None or early.get("high") is None:
        return ""
    return f"difference {early['difference']:+.4f}, 95% interval {early['low']:+.4f} to {early['high']:+.4f}; "


def _skipped(run: RunRecord) -> Iterator[Finding]:
    if run.skipped:
        named = ", ".join(f"{step['step']:,}" for step in run.skipped[:_NAMED])
        examples = list(dict.fromkeys(name for step in run.skipped for name in step.get("examples", ())))
        more = ", ..." if len(run.skipped) > _NAMED else ""
        seen = f"{_were(len(run.skipped), 'step')} skipped, because loss or gradient was not finite: {named}{more}."
        shown = ", ".join(examples[:_NAMED]) + (", ..." if len(examples) > _NAMED else "")
        yield Finding("warning", seen, f"Look at the examples {shown}; lower optimizer.learning_rate.")


# The loss ------------------------------------------------------------------------------------------------------------


def _training_loss(run: RunRecord) -> Iterator[Finding]:
    broken = [step["step"] for step in run.steps if not math.isfinite(step["loss"])]
    if broken:
        yield Finding("error", f"The loss is not finite from step {broken[0]:,} on.", "Lower optimizer.learning_rate.")
        return
    if run.loss_ends is None:
        return
    first, last = run.loss_ends
    course = f"{first:.3f} in the first tenth of the steps, {last:.3f} in the last"
    if not run.is_cross_entropy:
        seen = f"Training loss ({run.loss_unit}): {course}"
        yield Finding("note", f"{seen}; it need not fall where the model learns. A held-out loss or task tells.")
    elif len(run.steps) < ENOUGH_STEPS and last >= first * (1 - NOTHING_LEARNED):  # other examples have other losses
        seen = f"Training loss {first:.3f} in the first step, {last:.3f} in the last"
        yield Finding("note", f"{seen}; so few steps do not say what it did.")
    elif last > first * (1 + NOTHING_LEARNED):
        advice = "Lower optimizer.learning_rate, lengthen the warm-up."
        yield Finding("error", f"The training loss rose: {course}.", advice)
    elif last >= first * (1 - NOTHING_LEARNED):
        advice = (
            "Raise optimizer.learning_rate or train.duration; if the loss was low from the start, the model knew this."
        )
        yield Finding("error", f"Nothing was learned: training loss {course}.", advice)
    else:
        level: Severity = "good" if len(run.steps) >= ENOUGH_STEPS else "note"
        yield Finding(level, f"The training loss fell by {_share(1 - last / first)}: {course}.")


def _not_finite(run: RunRecord) -> Iterator[Finding]:
    """Held-out losses that were NaN or infinite."""
    broken = [each["step"] for each in run.all_held_out if each["loss"] is None]
    if broken:
        named = ", ".join(f"{step:,}" for step in broken[:_NAMED]) + (", ..." if len(broken) > _NAMED else "")
        where = "before the first step" if broken == [0] else f"after step {named}"
        lower = "Lower optimizer.learning_rate" if broken[0] else "Look at the base model and its dtype"
        yield Finding(
            "error", f"The held-out loss is not finite {where}.", f"{lower}; the training loss may not show it."
        )


def _held_out(run: RunRecord) -> Iterator[Finding]:
    """Of evaluations whose loss is finite; nothing of a model whose own is not."""
    evaluations = finite(run.held_out)
    if not run.held_out and not _right_answers(run):
        seen = (
            "Neither a loss on held-out examples nor answers to them were measured: what was learned beyond the "
            "training examples is not known."
        )
        also = " and set eval.every" if run.config.get("data") else ""
        yield Finding("note", seen, f"Name a file in data.eval, or set data.eval_size{also}.")
    of_model = run.held_out_of_model
    if len(of_model) > 1 and len(finite(ends := [of_model[0], of_model[-1]])) == 2:
        yield _held_out_loss(*ends)
    if len(evaluations) > 1 and evaluations[-1] is run.held_out[-1]:
        yield from _overfitting(run, evaluations[-1])


def _held_out_loss(first: JsonObject, last: JsonObject) -> Finding:
    """From the first evaluation to that of the model."""
    began = "before the first step" if first["step"] == 0 else f"after step {first['step']:,}"
    course = f"{first['loss']:.3f} {began}, {last['loss']:.3f} after step {last['step']:,}"
    accuracy = ""
    if "token_accuracy" in last and "token_accuracy" in first:
        accuracy = f" Token accuracy: {first['token_accuracy']:.1%}, then {last['token_accuracy']:.1%}."
    if last["loss"] >= first["loss"] * (1 - NOTHING_LEARNED):
        advice = (
            "The training examples may be too few or too different from the held-out ones, or the learning rate wrong."
        )
        return Finding("warning", f"The held-out loss did not fall: {course}.{accuracy}", advice)
    num = last.get("num_trained", ENOUGH_TOKENS)
    few = f" That is on only {num:,} tokens." if num < ENOUGH_TOKENS else ""
    seen = f"The held-out loss fell by {_share(1 - last['loss'] / first['loss'])}: {course}.{accuracy}{few}"
    return Finding("note" if few else "good", seen)


def _overfitting(run: RunRecord, last: JsonObject) -> Iterator[Finding]:
    """Of the whole run, after the saved model too."""
    best = min(finite(run.held_out), key=lambda each: float(each["loss"]))
    if last["loss"] > best["loss"] * (1 + OVERFITTED) and best["step"] > 0:
        seen = (
            f"Overfitting: the held-out loss was lowest after step {best['step']:,} ({best['loss']:.3f}) and then rose "
            f"to {last['loss']:.3f} (+{_share(last['loss'] / best['loss'] - 1)})."
        )
        if run.summary.get("best", {}).get("step") == best["step"]:
            yield Finding("note", f"{seen} The model is that of step {best['step']:,}.")
        else:
            shorter = f"`checkpoint.best: loss`; train shorter, {counted(best['step'], 'step')}; or on more data."
            advice = "Train on more data." if _has_few_steps(run) else f"Save the best weights: {shorter}"
            yield Finding("warning", seen, advice)
    both = run.loss_ends
    if run.is_cross_entropy and both is not None and both[1] < MEMORISED * last["loss"]:
        seen = f"The training loss ({both[1]:.3f}) is much lower than the held-out loss ({last['loss']:.3f})."
        epochs = "" if _has_few_steps(run) else ", fewer epochs"
        yield Finding("note", seen, f"More data{epochs} or an adapter of lower rank close that gap.")


def _left_out(run: RunRecord) -> Iterator[Finding]:
    """Evaluations on other held-out examples, or on other items of a task, than those of the last one."""
    tasks = {own["task"]: None for line in run.evaluations for own in line.get("tasks", ())}
    known = [("held-out examples", run.all_held_out, run.held_out)]
    known += [(f"items of {task}", run.all_of_task(task), run.of_task(task)) for task in tasks]
    for what, measured, compared in known:
        if num := len(measured) - len(compared):
            seen = f"{counted(num, 'evaluation')} had other {what} than the last one"
            yield Finding("note", f"{seen}: figures of the two cannot be compared, and these are left out.")


# Gradients -----------------------------------------------------------------------------------------------------------


def spikes(steps: Sequence[JsonObject]) -> list[int]:
    """Steps whose gradient norm is over SPIKE times the median of the steps before."""
    known = [step for step in steps if "grad_norm" in step]
    norms = [float(step["grad_norm"]) for step in known]
    return [
        int(known[index]["step"])
        for index in range(SPIKE_FIRST, len(norms))
        if norms[index] > SPIKE * median(norms[max(0, index - SPIKE_STEPS) : index])
    ]


def _gradients(run: RunRecord) -> Iterator[Finding]:
    found = spikes(run.steps)
    if found:
        shown = ", ".join(f"{step:,}" for step in found[:5]) + (" ..." if len(found) > 5 else "")
        at = f"{counted(len(found), 'step')}: {shown}"
        seen = f"The gradient norm was over {SPIKE:.0f} times its usual value at {at}."
        advice = "Look at the data of these steps; a lower optimizer.learning_rate makes such jumps rarer."
        yield Finding("warning", seen, advice)
    limit = run.config.get("optimizer", {}).get("max_grad_norm")
    norms = [step["grad_norm"] for step in run.steps[len(run.steps) // 10 :] if "grad_norm" in step]
    if limit and norms:
        clipped = sum(norm > limit for norm in norms) / len(norms)
        if clipped > OFTEN_CLIPPED:
            seen = f"In {_share(clipped)} of the steps the gradient was scaled to optimizer.max_grad_norm ({limit:g})."
            yield Finding("note", seen, "So the step size hardly depends on the gradient; that is often harmless.")


# Answers -------------------------------------------------------------------------------------------------------------


def _last_answers(run: RunRecord) -> list[Any]:
    """The prompts that the saved model was asked; none before the first step."""
    step = max((each.last["step"] for each in run.prompts), default=0)
    return [each for each in run.prompts if each.last["step"] == step] if step else []


def _right_answers(run: RunRecord) -> list[bool]:
    """Whether each answer to a held-out question is exact, where that was looked at for all."""
    last = [each.last for each in _last_answers(run)]
    return [bool(sample["exact"]) for sample in last] if all("exact" in sample for sample in last) else []


def _answers(run: RunRecord) -> Iterator[Finding]:
    """The saved model's answers: whether they stop, are right, are empty, all alike, or the base model's."""
    prompts = _last_answers(run)
    if not prompts:
        return
    last = [each.last for each in prompts]
    if all("stopped" in sample for sample in last):
        stopped = [bool(sample["stopped"]) for sample in last]
        if stopped.count(False) > NOT_STOPPED * len(last):
            advice = "Either the stop token was not learned, or eval.max_new_tokens is too low: look at the answers."
            yield Finding("warning", f"Answers do not stop by themselves: {_of(stopped)} did.", advice)
        else:
            level: Severity = "good" if len(stopped) >= MANY_ANSWERS else "note"
            yield Finding(level, f"Answers stop by themselves: {_of(stopped)}.")
    if answers := _right_answers(run):
        right = _of(answers)
        before = run.summary.get("base_exact_match")
        base = "" if before is None else f"; the base model: {before:.1%}"
        yield Finding("note", f"Exact answers to held-out questions: {right}{base}.")
    asked = ((str(own["answer"]), (str(own.get("reference", index)),)) for index, own in enumerate(last))
    if equal := repeated_answer(asked):
        yield Finding("warning", equal, "The model ignores the prompt.")
    yield from _suspicious_answers([str(sample["answer"]) for sample in last], [each.base for each in prompts])


def _suspicious_answers(answers: Sequence[str], base: Sequence[str | None]) -> Iterator[Finding]:
    empty = sum(not answer.strip() for answer in answers)
    if empty:
        advice = "The stop token comes first: look for empty or cut answers in the data."
        yield Finding("warning", f"{empty} of {len(answers)} answers are empty.", advice)
    known = [(answer, before) for answer, before in zip(answers, base, strict=True) if before is not None]
    if known and all(answer == before for answer, before in known):
        advice = "Training changed next to nothing."
        yield Finding("warning", f"All {len(known)} answers are identical to the base model's.", advice)


def _of(right: Sequence[bool]) -> str:
    """`38 of 40 (95%; 95% interval 83% to 99%)`."""
    found = interval([float(own) for own in right], bounds=SHARE)
    spread = "" if found.low is None or found.high is None else f"; 95% interval {found.low:.0%} to {found.high:.0%}"
    return f"{sum(right):,} of {len(right):,} ({found.value:.0%}{spread})"


# Data ----------------------------------------------------------------------------------------------------------------


def _data(run: RunRecord) -> Iterator[Finding]:
    yield from _rejected(run)
    fill = run.data.get("fill")
    if fill is not None and fill < LOW_FILL:
        seen = f"Tokens fill only {_share(fill)} of the packed sequences."
        advice = "" if _has_few_steps(run) else "A larger data.max_length packs conversations more tightly."
        yield Finding("note", seen, advice)
    shortened: dict[str, Any] = run.data.get("shortened", {})
    cut, split = shortened.get("num_truncated", 0), shortened.get("num_split", 0)
    if cut or split:
        yield Finding(
            "note",
            f"{_were(cut, 'example')} too long and lost {'its' if cut == 1 else 'their'} oldest context; "
            f"{split:,} {'was' if split == 1 else 'were'} split.",
        )


def _were(count: int, noun: str) -> str:
    return f"{counted(count, noun)} {'was' if count == 1 else 'were'}"


def _rejected(run: RunRecord) -> Iterator[Finding]:
    """Of the examples to train on and of those that are held out."""
    advice = "The reasons are listed under “What was trained”."
    counts = run.counts
    if counts is None or not counts.train:
        if run.rejections:
            yield Finding("note", f"{_were(len(run.rejections), 'example')} rejected and not trained.", advice)
        return
    for num, of, examples, done in (
        (counts.train_rejected, counts.train, "examples", "trained"),
        (counts.held_out_rejected, counts.held_out, "held-out examples", "measured"),
    ):
        if num:
            level: Severity = "warning" if num > MANY_REJECTED * of else "note"
            seen = f"{num:,} of {of:,} ({_share(num / of)}) {examples} were rejected and not {done}."
            yield Finding(level, seen, advice)
    if not run.rejections:
        also = f", and so are the {counts.held_out:,} held-out ones" if counts.held_out else ""
        known = (("examples_per_epoch", "trained in an epoch"), ("num_held_out", "measured"))
        used = ", ".join(f"{run.data[key]:,} are {done}" for key, done in known if run.data.get(key))
        proved = f"All {counts.train:,} examples are proved to be exactly what inference will see{also}"
        yield Finding("good", f"{proved}{': ' * bool(used)}{used}.")


def _tax(run: RunRecord) -> Iterator[Finding]:
    """What `preceptor compare` found outside what was trained."""
    tasks = [task for task in run.compare.get("tasks", ()) if is_finite(task)]
    names = short_names(task["task"] for task in run.compare.get("tasks", ()))
    if broken := [task["task"] for task in run.compare.get("tasks", ()) if not is_finite(task)]:
        seen = f"`preceptor compare` measured figures that are not finite: {', '.join(broken[:_NAMED])}."
        yield Finding("error", seen, "Look at the model's answers: `preceptor chat`.")
    for task in tasks:
        if task["role"] == "trained" and change(task) > 0:
            yield Finding("good", f"Against the base model it {sentence(task, names[task['task']])}.")
    outside = [task for task in tasks if task["role"] != "trained"]
    losses = "; ".join(sentence(task, names[task["task"]]) for task in outside if change(task) < 0)
    if losses:
        advice = "Replay, KL to the base, an adapter or averaging lower it."
        yield Finding("warning", f"An alignment tax: {losses}.", advice)
    elif outside and all(map(tells, outside)):
        yield Finding("good", "`preceptor compare` found no significant alignment tax.")
    elif outside:
        seen = "`preceptor compare` found no alignment tax, but its items are too few to show a small one."
        yield Finding("note", seen, "Compare on more items, or on more tasks.")


def _share(value: float) -> str:
    return f"{value:.0%}" if value >= 0.1 else f"{value:.1%}"
