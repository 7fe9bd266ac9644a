"""What goes on: the very run only, and what differs from it is named."""

import io
import json
import re
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import torch
from children import killed_at_step
from rich.console import Console
from safetensors.torch import load_file, save_file

from conftest import conversations
from preceptor import config
from preceptor.errors import CheckpointError, ModelError
from preceptor.report.run_record import DataCounts, read_run
from preceptor.train.differences import changed_keys
from preceptor.train.prepare import prepare
from preceptor.train.run_folder import claim
from runs import execute, execute_in

DATED = """{% for m in messages %}{% if loop.first %}<|im_start|>system
Today is {{ strftime_now('%d %B %Y') }}<|im_end|>
{% endif %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def train(file, *overrides, date=None, **kwargs):
    """As the command does it; what was shown."""
    run = config.load(file, overrides)
    shown = Console(file=io.StringIO(), width=1000)
    with claim(run, run_file=file, **kwargs) as folder:
        execute_in(folder, prepare(run, date=date or folder.date), shown)
    return shown.file.getvalue()


@pytest.fixture
def stopped(run_file):
    """Writes a run file, and trains by it until the run is killed at step 4, with a checkpoint of step 3."""

    def stop(*overrides, **changes):
        file = run_file(**{"eval_rows": conversations(2), "checkpoint__every": "3 steps", **changes})
        with killed_at_step(4):
            train(file, "train.duration=6 steps", *overrides)
        return file

    return stop


def again(file, *overrides, **kwargs):
    return train(file, "train.duration=6 steps", *overrides, **kwargs)


def test_the_first_line_says_that_a_run_goes_on(stopped, preceptor):
    file = stopped()
    again = ("train", file, "train.duration=6 steps")
    code, shown, error = preceptor(*again)
    assert code == 0, error
    assert re.search(
        r" -> \S+/run; goes on with the run that began on \d+ \w+ \d{4}, \d\d:\d\d$", shown.splitlines()[0]
    )
    code, shown, error = preceptor(*again, "--restart")
    assert code == 0 and shown.splitlines()[0].endswith("/run"), error


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.learning_rate=5e-4", r"optimizer\.learning_rate: 0\.001 in .*run/config\.yaml, 0\.0005 now"),
        ("train.seed=3", r"train\.seed: 0 in .*, 3 now"),
        ("train.batch_size=1", r"train\.batch_size: 2 in .*, 1 now"),
        ("data.max_length=256", r"data\.max_length: 128 in .*, 256 now"),
        ("adapter={rank: 2}", r"adapter: null in .*, absent now\n.*adapter\.kind: absent in .*, lora now"),
        ("memory.context_gradient=detach", r"memory\.context_gradient: full in .*, detach now"),
        ("train.precision=bfloat16", r"train\.precision: float32 in .*, bfloat16 now"),
        (
            "train.duration=9 steps",
            r"(?s)train\.duration: 6 steps in .*, 9 steps now.*lr_scheduler: constant.*--from .*run out=.*run-2",
        ),
    ],
)
def test_keys_that_change_what_is_trained_are_named(stopped, override, words):
    file = stopped()
    with pytest.raises(CheckpointError, match=words):
        again(file, override)


def test_keys_that_change_no_weight_may_change(stopped, tmp_path, monkeypatch):
    """Intervals, samples, tolerances, the spelling of paths, and where the same data and model are."""
    file = stopped()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "moved.jsonl").write_bytes((tmp_path / "train.jsonl").read_bytes())
    shown = again(
        file,
        "checkpoint.every=2 steps",
        "checkpoint.keep=1",
        "eval.every=null",
        "eval.num_samples=0",
        "data.max_rejected=0.5",
        "data.train.0.path=moved.jsonl",
        "out=./run",
    )
    assert "goes on" not in shown and "not equal" not in shown and "differ" not in shown
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["num_steps"] == 6
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000006"]


def test_keys_that_save_memory_for_the_same_gradient_may_change(stopped, tmp_path):
    """So that a run whose memory ran out goes on."""
    file = stopped()
    shown = again(file, "memory.context_gradient=recompute", "optimizer.offload=true")
    assert "memory.context_gradient: full in " in shown and "optimizer.offload: false in " in shown
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["num_steps"] == 6


def test_every_key_of_the_run_file_is_of_one_kind():
    """A key changes what is trained unless it is listed: a new key is compared until somebody decides otherwise."""
    tree = {"model": {"path": "m"}, "data": {"train": [{"path": "a"}], "eval": [{"path": "e"}]}, "out": "o"}
    tree |= {"tracker": ["tensorboard"], "adapter": {}, "replay": {"data": [{"path": "r"}]}, "eval": {"tasks": ["t"]}}
    tree["data"] |= {"allow_rejected": ["too_long"], "chat_template": "c"}
    run = config.build(tree, "test")

    def another(value):
        if isinstance(value, dict) and value:
            return {key: another(own) for key, own in value.items()}
        return [another(own) for own in value] if isinstance(value, list) and value else "another"

    changed = changed_keys(another(run.model_dump(mode="json")), run, "config.yaml")
    by_content = {line.partition(":")[0] for line in changed.by_content}
    rounding = {line.partition(":")[0] for line in changed.rounding}
    assert by_content == {
        "model.path",
        "model.revision",
        "model.trust_remote_code",
        "model.from_run",
        "data.train[0].path",
        "data.chat_template",
        "replay.data[0].path",
        "loss.code",
        "data.train[0].code",
        "replay.data[0].code",
    }
    assert rounding == {
        "engine",
        "parallel.strategy",
        "train.device",
        "memory.activation_checkpointing",
        "memory.context_gradient",
        "optimizer.offload",
    }
    compared = {re.sub(r"\[\d+\]", "[]", line.partition(":")[0]) for line in changed.weights}
    free = set(config.run.all_keys()) - {key.removesuffix("[]") for key in compared}
    free -= {re.sub(r"\[\d+\]", "[]", key) for key in by_content | rounding}
    sections = {
        key for key in free if any(other.startswith((f"{key}.", f"{key}[]")) for other in config.run.all_keys())
    }
    expected = {"out", "tracker", "model.save_dtype", "data.max_rejected", "data.allow_rejected", "train.precision"}
    expected |= {"train.patience", "train.max_skipped", "data.cache", "adapter.save"}
    assert {key for key in free - sections if not key.startswith(("eval.", "checkpoint.", "data.eval"))} == expected


def test_another_base_model_is_not_trained_on(stopped, base_folder, tmp_path):
    """With an adapter the base is in no checkpoint: a run would go on from other weights unseen."""
    import shutil

    base = tmp_path / "base"
    shutil.copytree(base_folder, base)
    file = stopped(f"model.path={base}", "adapter={rank: 2}")
    again_on = (f"model.path={base}", "adapter={rank: 2}")
    weights = load_file(base / "model.safetensors")
    changed = {name: tensor + 0.05 for name, tensor in weights.items()}
    save_file(changed, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"the base model's weights \(.*base\) are others: model\.safetensors"):
        again(file, *again_on)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})  # the same bytes at another time
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 0.5}))
    with pytest.raises(CheckpointError, match=r"the base model's config\.json \(.*base\) is another one"):
        again(file, *again_on)
    (base / "config.json").write_bytes((base_folder / "config.json").read_bytes())
    again(file, *again_on)


def test_other_data_are_named_by_file(stopped, tmp_path):
    file = stopped()
    data = tmp_path / "train.jsonl"
    whole = data.read_text()
    data.write_text(whole.replace("of a message", "of the message", 1))
    with pytest.raises(CheckpointError, match=r"the trained tokens are others; these files are others: .*train\.jsonl"):
        again(file)
    data.write_text(whole)
    template = tmp_path / "t.jinja"
    template.write_text(DATED.replace("Today is {{ strftime_now('%d %B %Y') }}", "Now"))
    with pytest.raises(CheckpointError, match=r"(?s)chat template is another one.*data\.chat_template: chatml in"):
        again(file, f"data.chat_template={template}")


def test_other_held_out_data_and_tasks_are_said(stopped, tmp_path, write_jsonl):
    task = write_jsonl([{"prompt": "a user", "accepted": ["x"]}], "task.jsonl")
    file = stopped(eval__tasks=[task])
    rows = conversations(3)
    write_jsonl(rows, "eval.jsonl")
    write_jsonl([{"prompt": "a user", "accepted": ["y"]}], "task.jsonl")
    shown = again(file)
    assert "the held-out examples are not those of the run so far" in shown
    assert "the tasks are not those of the run so far" in shown
    assert (tmp_path / "run" / "summary.json").is_file()
    lines = (tmp_path / "run" / "eval.jsonl").read_text().splitlines()
    first, last = (json.loads(line)["measured_on"] for line in (lines[0], lines[-1]))
    assert first.keys() == last.keys() == {"held_out", task} and not first.items() & last.items()


def test_other_held_out_data_are_counted_again(stopped, tmp_path, write_jsonl):
    file = stopped("data.allow_rejected=[no_assistant_message]", "data.max_rejected=1.0")
    data = tmp_path / "run" / "data.json"
    before = json.loads(data.read_text())
    unanswered = {"messages": [{"role": "user", "content": "Hm?"}]}
    write_jsonl([*conversations(3), unanswered], "eval.jsonl")
    again(file, "data.allow_rejected=[no_assistant_message]", "data.max_rejected=1.0")
    now = json.loads(data.read_text())
    assert now["num_held_out"] == 3 and now["held_out"] == {"num_examples": 4, "num_rejected": 1}
    assert now["num_examples"] == before["num_examples"] + 2 and now["num_rejected"] == 1
    (line,) = (tmp_path / "run" / "rejections.jsonl").read_text().splitlines()
    assert "eval.jsonl:4" in line
    assert read_run(tmp_path / "run").counts == DataCounts(before["num_examples"] - 2, 0, 4, 1)


def test_other_threads_and_versions_are_said(stopped, tmp_path, monkeypatch):
    file = stopped()
    record = json.loads((tmp_path / "run" / "environment.json").read_text())
    record["num_threads"] += 1
    record["versions"]["torch"] = "1.0"
    (tmp_path / "run" / "environment.json").write_text(json.dumps(record))
    shown = again(file, "engine=plain")
    assert "no longer equal to the bit" in shown
    assert f"num_threads: {torch.get_num_threads() + 1} before, {torch.get_num_threads()} now" in shown
    assert f"torch: 1.0 before, {torch.__version__} now" in shown and "engine: auto in" in shown


def test_a_template_that_writes_the_date_keeps_that_of_the_first_start(stopped, tmp_path):
    """Also after midnight, and for all that is rendered later, as by evaluation."""
    template = tmp_path / "date.jinja"
    template.write_text(DATED)
    file = stopped(f"data.chat_template={template}")
    record = json.loads((tmp_path / "run" / "environment.json").read_text())
    began = datetime.fromisoformat(record["date"])
    override = f"data.chat_template={template}"
    with pytest.raises(CheckpointError, match=r"the date that the chat template writes"):
        again(file, override, date=began + timedelta(days=1))
    shown = again(file, override)
    assert f"the chat template writes the date: {began:%d %B %Y} in all of this run" in shown


def test_the_date_is_that_of_the_run_in_contexts_and_prompts(run_file, tmp_path):
    template = tmp_path / "date.jinja"
    template.write_text(DATED)
    date = datetime(2001, 2, 3, 23, 59)
    run = config.load(run_file(eval_rows=conversations(1)), [f"data.chat_template={template}"])
    prepared = prepare(run, date=date)
    trees = [*prepared.train, *(tree for _, tree in prepared.held_out)]
    texts = [prepared.chat.tokenizer.decode(tree.segments[0].ids) for tree in trees]
    assert len(texts) == 13 and all("Today is 03 February 2001" in text for text in texts)
    renderer = prepared.chat.renderer(run.data)
    assert "03 February 2001" in renderer.template.render([{"role": "user", "content": "x"}])
    assert "strftime_now" in prepared.chat.template.text  # what is saved still asks for the day


@pytest.mark.parametrize(("learning_rate", "every"), [("1e38", "1 steps"), ("1e39", "1 steps"), ("1e39", "null")])
def test_a_damaged_model_is_not_saved(run_file, tmp_path, learning_rate, every):
    """Loss and gradient of the only step are finite; the weights after it are not, or far too large."""
    file = run_file(train__duration="1 steps", eval_rows=conversations(2))
    settings = (f"optimizer.learning_rate={learning_rate}", "optimizer.warmup=0 steps", f"eval.every={every}")
    with pytest.raises(ModelError, match=r"not finite|NaN or infinite|the loss is (nan|inf)"):
        execute(prepare(config.load(file, settings)), Console(quiet=True))
    assert not (tmp_path / "run" / "model").exists() and not list((tmp_path / "run").glob("checkpoints/*"))
    assert "NaN" not in "".join(path.read_text() for path in (tmp_path / "run").glob("*.json*"))


def test_a_finished_run_says_how_to_train_on_and_that_works(run_file, tmp_path, preceptor):
    file = run_file()
    train(file)
    with pytest.raises(CheckpointError, match="this run is finished") as refused:
        train(file)
    longer = re.search(r"--from (\S+) (out=\S+)", str(refused.value))
    code, _, error = preceptor("train", file, "--from", longer[1], longer[2])
    assert code == 0, error
    assert (tmp_path / "run-2" / "model").is_dir() and Path(longer[2].removeprefix("out=")) == tmp_path / "run-2"
