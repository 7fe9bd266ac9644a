"""Tasks of the lm-eval harness as tasks here: its prompts, choices and answers; run and scored as all others are.

    lm_eval:arc_easy            a task that lm-eval ships with, or finds; its data comes from the Hub or its cache
    lm_eval:tasks/own.yaml      a task file of lm-eval

multiple_choice becomes multiple choice (`acc`; `acc_norm` is per byte here, per character there),
loglikelihood_rolling becomes perplexity, generate_until with exact_match alone becomes generation. What is scored by
lm-eval's own filters or functions is refused, with the command that runs it. Prompts of choices and texts are plain
text for every model, as lm-eval gives them without --apply_chat_template, so that base and tuned model read the same;
of answers they are a user message.
"""

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from preceptor.data.sources import OpenSource
from preceptor.errors import ConfigError, DataError, first_line, short
from preceptor.evaluate.tasks import HARNESS, Task, TaskItem, TaskKind, TaskPrompt, file_of, read_task

_KINDS: Mapping[str, TaskKind] = {
    "multiple_choice": "multiple choice",
    "loglikelihood_rolling": "perplexity",
    "generate_until": "generation",
}
_FEWSHOT_SEED = 1234  # lm-eval's own
_PLAIN_FILTERS = ({"function": "take_first"}, {"function": "take_first", "kwargs": None})
_OWN_RULES = "scored by lm-eval's own rules"
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_PLAIN_METRIC = {"metric", "aggregation", "higher_is_better"}


def require_harness(path: str) -> None:
    """Raises ConfigError where lm-eval is not installed, or its task file is not there."""
    name = path.removeprefix(HARNESS)
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(f"{path}: lm-eval is not installed: pip install 'preceptor[lm-eval]'")
    if name.endswith((".yaml", ".yml")) and not Path(name).is_file():
        raise ConfigError(f"{path}: there is no file {name}")


def open_task(path: str) -> Task:
    """The task of a task file, or of lm-eval. Raises as `read_task`, and as `read_harness_task`."""
    return read_harness_task(path) if path.startswith(HARNESS) else read_task(path)


def check_task(path: str) -> None:
    """Raises ConfigError or DataError for a task that is not there, before anything is loaded."""
    if path.startswith(HARNESS):
        require_harness(path)
    else:
        OpenSource(file_of(path))


def read_harness_task(path: str) -> Task:
    """Raises ConfigError as `require_harness`, DataError for a task that cannot be read or measured here."""
    require_harness(path)
    try:
        task = _loaded(path)
        kind = _KINDS.get(str(task.config.output_type))
        items = tuple(_items(path, kind, task))
        limit = _limit(task) if kind == "generation" else None
    except DataError:
        raise
    except Exception as error:  # whatever lm-eval, datasets or a task's own code raises
        what = short(first_line(error))
        raise DataError(f"{path}: lm-eval cannot load it: {type(error).__name__}: {what}") from error
    if kind is None or not items:
        raise DataError(f"{path}: it has no items")
    return Task(path, kind, items, max_new_tokens=limit)


def _loaded(path: str) -> Any:
    from lm_eval.tasks import TaskManager

    name, place = path.removeprefix(HARNESS), None
    if name.endswith((".yaml", ".yml")):
        place = Path(name)
        found = yaml.load(place.read_text(encoding="utf-8"), _AnyTag)
        name = str((found.get("task") if isinstance(found, dict) else None) or "")
        if not name:
            raise DataError(f"{path}: the file has no key `task`, the name of an lm-eval task")
    # its own tasks are thousands of files, which take a minute to look through: not for a file that is named
    where = None if place is None else str(place.parent.absolute())
    manager = TaskManager(include_path=where, include_defaults=place is None)
    tasks = list(manager.load([name])["tasks"].values())
    if len(tasks) != 1:
        raise DataError(f"{path}: a group of {len(tasks)} tasks; name each one that is to be measured")
    tasks[0].set_fewshot_seed(_FEWSHOT_SEED)
    return tasks[0]


class _AnyTag(yaml.SafeLoader):
    """`!function utils.name` and the like are not needed to find the task's name."""


_AnyTag.add_multi_constructor("!", lambda loader, suffix, node: None)


def _items(path: str, kind: TaskKind | None, task: Any) -> Iterator[TaskItem]:
    """One item for each document of the split that lm-eval evaluates."""
    config = task.config
    why = _OWN_RULES if kind is None else _why_not(kind, task)
    if kind is None or why:
        raise DataError(
            f"{path}: {config.output_type}, {why}; run it on the saved model: lm_eval run --model hf "
            f"--model_args pretrained=RUN/model --tasks {config.task} --apply_chat_template"
        )
    for number, doc in enumerate(task.eval_docs, start=1):
        source = f"{path}:{number}"
        if kind == "perplexity":
            yield TaskItem(source, text=str(task.doc_to_target(doc)))
            continue
        prompt = str(task.fewshot_context(doc, config.num_fewshot or 0))
        if kind == "generation":
            target = task.doc_to_target(doc)
            accepted = tuple(map(str, target)) if isinstance(target, list) else (str(target),)
            until = (config.generation_kwargs or {}).get("until") or ()
            until = (until,) if isinstance(until, str) else tuple(until)
            asked = TaskPrompt(({"role": "user", "content": prompt},))
            yield TaskItem(source, asked, accepted, until=until)
            continue
        choices, target = list(task.doc_to_choice(doc)), task.doc_to_target(doc)
        right = choices.index(target) if target in choices else int(target)
        asked, shown = TaskPrompt(text=prompt), tuple(map(str, choices))
        yield TaskItem(source, asked, choices=shown, answer=right, delimiter=str(config.target_delimiter))


def _limit(task: Any) -> int | None:
    """The number of new tokens that the task asks for, under any of lm-eval's names, in its order."""
    given = task.config.generation_kwargs or {}
    return next((int(given[name]) for name in _LIMITS if given.get(name) is not None), None)


def _is_drawn(task: Any) -> bool:
    """As lm-eval decides: a temperature alone draws too."""
    given = task.config.generation_kwargs or {}
    draws = given.get("do_sample")
    if draws is None:
        draws = float(given.get("temperature") or 0) > 0
    return bool(draws) or (given.get("num_beams") or 1) > 1


def _why_not(kind: TaskKind, task: Any) -> str:
    """Why the figures here would not be the task's own; "" where they are."""
    if kind == "generation" and _is_drawn(task):
        return "whose answers are drawn or searched for (generation_kwargs: here they are greedy)"
    return _OWN_RULES if _has_own_rules(kind, task) else ""


def _has_own_rules(kind: TaskKind, task: Any) -> bool:
    """Whether it has a filter, function, metric or option that is not known here."""
    config = task.config
    filters = [step for each in config.filter_list or () for step in each.get("filter", ())]
    if config.process_results or any(step not in _PLAIN_FILTERS for step in filters):
        return True
    if kind == "perplexity":
        return False
    if getattr(task, "multiple_input", 0):  # the choices are prompts
        return True
    metrics = config.metric_list or ()
    names = {metric.get("metric") for metric in metrics}
    if kind == "generation":
        is_known = names == {"exact_match"}
    else:  # multiple_target: several answers are right
        is_known = names <= {"acc", "acc_norm"} and not getattr(task, "multiple_target", 0)
    # without options, such as which letters of an answer are ignored
    plain = (each.keys() <= _PLAIN_METRIC and each.get("aggregation") in (None, "mean") for each in metrics)
    return not (is_known and all(plain))
