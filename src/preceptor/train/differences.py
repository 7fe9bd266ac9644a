"""What differs between a run in its folder and the session that goes on with it, and which differences matter.

Keys that change what is trained must be the same, and so must what they name: the trained tokens, the base model, the
chat template. What changes only the rounding (device, processes, versions, engine, what is held in memory) or what is
measured (held-out data, tasks) is said. Everything else may change: `out`, `checkpoint.*`, `eval.*`, when to stop
early, and paths whose content is the same; and `train.duration` may grow where the rate of no step depends on it.
No torch here.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from preceptor import config
from preceptor.files import LIVE
from preceptor.report.run_record import flat

_FREE = re.compile(
    r"(out|tracker.*|checkpoint\..*|eval\..*|data\.eval\b(?!_).*|data\.cache|model\.save_dtype|adapter\.save|data\.max_rejected"
    r"|data\.allow_rejected.*|train\.patience|train\.max_skipped)"
)
# Compared by what they name (`content_differences`), not by how they spell it.
_BY_CONTENT = re.compile(r"(model\.(path|revision|trust_remote_code|from_run)|.*\.path|.*\.code|data\.chat_template)")
_ROUNDING = re.compile(r"(engine|parallel\.strategy|train\.device|memory\.activation_checkpointing|optimizer\.offload)")
_GRADIENT, _NO_GRADIENT = "memory.context_gradient", "detach"  # any other value of this key has the same gradient
_PACKAGES = ("preceptor", "torch", "transformers", "peft", "numpy")
_ABSENT = object()


@dataclass(frozen=True)
class Changed:
    """Keys with other values than in the run's folder. weights, rounding: sentences, by what the keys change.

    lengthened: whether the run is to be longer than it was, and may be.
    """

    keys: list[str]
    weights: list[str]
    rounding: list[str]
    by_content: list[str]
    lengthened: bool = False


def changed_keys(recorded: Mapping[str, Any], run: config.Run, where: str) -> Changed:
    """The keys of the resolved run file `recorded` (read from `where`) that have another value in `run`.

    A `train.precision` that is left out is that of the folder.
    """
    before, now = flat(dict(recorded)), flat(run.model_dump(mode="json"))
    if run.train.precision is None:
        now.pop("train.precision")
        before.pop("train.precision", None)
    lengthened = _is_longer(before.get("train.duration"), run)
    found = Changed([], [], [], [], lengthened)
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key, _ABSENT), now.get(key, _ABSENT)
        if old is _ABSENT and (new is None or new is False):
            continue  # of a section that was left out
        if old == new or _FREE.fullmatch(key) or (key == "train.duration" and lengthened):
            continue
        line = f"{key}: {_shown(old)} in {where}, {_shown(new)} now"
        found.keys.append(key)
        if _BY_CONTENT.fullmatch(key):
            found.by_content.append(line)
        elif _ROUNDING.fullmatch(key) or (key == _GRADIENT and _NO_GRADIENT not in (old, new)):
            found.rounding.append(line)
        else:
            found.weights.append(line)
    return found


def may_be_lengthened(run: config.Run) -> bool:
    """Whether the learning rate of no step depends on the length of the run."""
    return run.optimizer.lr_scheduler == "constant" and run.optimizer.warmup.unit != "percent"


def _is_longer(before: Any, run: config.Run) -> bool:
    try:
        old = config.Duration.parse(before)
    except ValueError:
        return False
    now = run.train.duration
    return may_be_lengthened(run) and old.unit == now.unit and now.count > old.count


def _shown(value: object) -> str:
    if value is _ABSENT:
        return "absent"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def content_differences(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What the run is made from and differs from what its folder records: then it cannot go on."""
    yield from _of_model(recorded.get("model") or {}, now["model"])
    before, start = recorded.get("from_run") or {}, now.get("from_run") or {}
    if before.get("adapter_sha256") != start.get("adapter_sha256"):  # without one its model is the base model
        yield f"the adapter that the run starts from ({start.get('folder') or before.get('folder')}) is another one"
    old, new = ((side.get("template") or {}).get("sha256") for side in (recorded, now))
    if old != new:
        yield "the chat template is another one"
    if recorded.get("loss_sha256") != now.get("loss_sha256"):
        yield "the function of loss.code is another one, or a value that it uses is (a default, a name from outside)"
    if recorded.get("trees_sha256") != now["trees_sha256"]:
        yield f"the trained tokens are others; {_why_other_tokens(recorded, now)}"


def _of_model(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    if before.get("config_sha256") != now.get("config_sha256"):
        yield f"the base model's config.json ({now['path']}) is another one"
    old, new = ({file["name"]: file["sha256"] for file in side.get("weights", ())} for side in (before, now))
    changed = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    if changed:
        trained = (
            ". If this program has trained it: call train() of the Run that you have, or load the model again"
            if str(now["path"]).startswith(LIVE)
            else ""
        )
        yield f"the base model's weights ({now['path']}) are others: {', '.join(changed)}{trained}"


def base_differences(run: str, start: Mapping[str, Any] | None, now: Mapping[str, Any]) -> list[str]:
    """Why the adapter of the run that this one starts from does not fit the base model `now`."""
    if start is None or start.get("base") is None:
        return []
    return [
        f"model.from_run: the adapter of {run} was trained on another base model: {line}"
        for line in _of_model(start["base"], now)
    ]


def _why_other_tokens(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    uses = ("train", "replay")
    files = _changed_files(before, now, uses)
    old, new = (side.get("versions", {}) for side in (before, now))
    versions = [f"{name} {old.get(name)}, {new[name]} now" for name in new if old.get(name) != new[name]]
    if files:
        return f"these files are others: {', '.join(files)}"
    if any(f["sha256"] is None for side in (before, now) for f in side.get("data", ()) if f["use"] in uses):
        return (
            "the data, which has no hash as a whole (a stream, pipe, URL or data set of the Hub), the tokenizer, or "
            "the date that the chat template writes is another"
            + (f"; other versions: {'; '.join(versions)}" if versions else "")
        )
    if versions:
        return f"the files are the same, but they are read by other versions: {'; '.join(versions)}"
    return "the files are the same, so the tokenizer or the date that the chat template writes is another"


def _changed_files(before: Mapping[str, Any], now: Mapping[str, Any], uses: Sequence[str]) -> list[str]:
    old, new = ([(f["name"], f["sha256"]) for f in side.get("data", ()) if f["use"] in uses] for side in (before, now))
    same = ({sha256 for _, sha256 in old} & {sha256 for _, sha256 in new}) | {None}  # without a hash: not known
    return list(dict.fromkeys(name for name, sha256 in (*new, *old) if sha256 not in same))


def rounding_differences(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Where the machine and the versions differ from those of the run's sessions so far."""
    found: dict[str, None] = {}
    for before in (recorded, *recorded.get("resumed", ())):
        for key in ("device", "cuda", "num_threads", "num_processes"):
            if key in before and before[key] != now[key]:
                found[f"{key}: {before[key]} before, {now[key]} now"] = None
        old, new = before.get("versions", {}), now["versions"]
        for name in _PACKAGES:
            if name in old and old[name] != new[name]:
                found[f"{name}: {old[name]} before, {new[name]} now"] = None
    return list(found)


def evaluation_differences(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is measured and differs from what the folder records: figures before and after cannot be compared."""
    old, new = recorded.get("evaluation") or {}, now["evaluation"]
    names = {"held_out_sha256": "the held-out examples", "tasks_sha256": "the tasks"}
    return [name for key, name in names.items() if old.get(key) != new[key]]
