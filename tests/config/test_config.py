"""The run file: strict, typed, resolved, and the same again when its resolved copy is read."""

import inspect
from typing import get_args

import pytest
from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from preceptor import config
from preceptor.config.durations import Duration, Unit
from preceptor.errors import ConfigError
from preceptor.train.loop import Clock
from preceptor.train.optimizer import schedule

SECTIONS = [
    value
    for value in vars(config).values()
    if isinstance(value, type) and issubclass(value, config.Section) and value is not config.Run
]
MINIMAL = "model: {path: scholar}\ndata:\n  train: [{path: train.jsonl}]\nout: runs/x\n"


def load(tmp_path, text, overrides=()):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return config.load(file, overrides)


def test_only_model_data_and_out_are_required(tmp_path):
    run = load(tmp_path, MINIMAL)
    assert run.train.duration == Duration(3, "epochs")
    assert run.optimizer.learning_rate == 2e-5
    assert load(tmp_path, MINIMAL + "adapter: {kind: lora, rank: 4}\n").optimizer.learning_rate == 2e-4


@pytest.mark.parametrize("key", ["model: {path: scholar}", "out: runs/x"])
def test_a_required_key_that_is_absent_is_named(tmp_path, key):
    with pytest.raises(ConfigError, match=r"run.yaml: \w+(\.\w+)?: required, but absent"):
        load(tmp_path, MINIMAL.replace(key, ""))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("optimizer: {learnin_rate: 1}", "optimizer.learnin_rate: unknown key; did you mean 'learning_rate'"),
        ("trian: {}", "trian: unknown key; did you mean 'train'"),
        (
            "zzz: 1",
            "zzz: unknown key; known keys are model, data, train, optimizer, loss, memory, parallel, checkpoint",
        ),
        ("train: {batch_size: two}", "train.batch_size: input should be a valid integer; found 'two'"),
        ("train: {batch_size: 0}", "train.batch_size: input should be greater than or equal to 1; found 0"),
        ("train: {duration: 3 weeks}", "train.duration: a duration is written as `3 epochs`"),
        ("train: {duration: 0 steps}", "train.duration: must be more than 0"),
        ("train: {duration: 10 %}", "not in percent of itself"),
        ("train: {duration: 1.5 steps}", "steps are whole numbers"),
        (
            "optimizer: {lr_scheduler: cosin}",
            "optimizer.lr_scheduler: input should be 'cosine', 'linear', 'constant' or 'wsd'",
        ),
        ("adapter: {kind: qlora}", "adapter.kind"),
        ("train: 5", "train: "),
    ],
)
def test_a_mistake_is_named_with_its_key(tmp_path, extra, message):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, f"{MINIMAL}{extra}\n")
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "run.yaml"))


def test_a_wrong_value_of_a_key_of_several_kinds_is_one_mistake_of_that_key():
    seen = set()
    for section in (config.Run, *SECTIONS):
        schema = section.model_json_schema()
        for key, own in schema["properties"].items():
            kinds = [kind for kind in own.get("anyOf", ()) if kind != {"type": "null"}]
            for wrong in ("1 layers", 0, {"a": 1}, ["1 layers"]) if len(kinds) > 1 else ():
                seen.add(key)
                with pytest.raises(ValidationError) as error:
                    section.model_validate({key: wrong})
                assert [found["loc"] for found in error.value.errors() if found["loc"][0] == key] == [(key,)]
    assert seen == {"activation_checkpointing", "tracker"}
    tree = {"model": {"path": "m"}, "data": {"train": [{"path": "a"}]}, "out": "o"}
    with pytest.raises(ConfigError) as error:
        config.build({**tree, "memory": {"activation_checkpointing": "1 layers"}}, "test")
    must = "must be `none`, `all`, or a number of layers from 1 on"
    assert str(error.value) == f"test: memory.activation_checkpointing: {must}; found '1 layers'"


def test_an_unknown_key_inside_a_list_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"data.train.0.wieght: unknown key; did you mean 'weight'"):
        load(tmp_path, MINIMAL.replace("{path: train.jsonl}", "{path: a, wieght: 2}"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("weight: 2, count: 5", "data.train.0: `weight` and `count` both say how often examples are seen"),
        ("weight: 0", "data.train.0.weight: input should be greater than 0"),
        ("count: 0", "data.train.0.count: input should be greater than or equal to 1"),
        ("count: 1.5", "data.train.0.count: input should be a valid integer"),
        (
            "columns: {qestion: a}",
            "data.train.0.columns: 'qestion' is not a key of any format; did you mean 'question'?",
        ),
        ("columns: {query: question}", "columns: turned round: our key comes first, `{question: query}`"),
        ("columns: {xyz: a}", "known keys are messages, conversations, prompt"),
        ("nulls: keap", "data.train.0.nulls: input should be 'reject', 'drop' or 'keep'"),
    ],
)
def test_mistakes_in_a_source(tmp_path, source, message):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, MINIMAL.replace("{path: train.jsonl}", f"{{path: a, {source}}}"))
    assert message in str(caught.value)


def test_rejections_are_allowed_by_their_codes(tmp_path):
    text = MINIMAL.replace("data:\n", "data:\n  allow_rejected: [too_long]\n")
    assert load(tmp_path, text).data.allow_rejected == ["too_long"]
    with pytest.raises(ConfigError, match=r"data\.allow_rejected\.0: input should be a valid string; found 3"):
        load(tmp_path, text.replace("too_long", "3"))


@pytest.mark.parametrize("betas", ["0.9", "[0.9]", "[0.9, 0.95, 0.99]", "[0.9, 1.0]"])
def test_betas_are_two_numbers_under_one(tmp_path, betas):
    with pytest.raises(ConfigError, match=r"optimizer\.betas"):
        load(tmp_path, f"{MINIMAL}optimizer: {{betas: {betas}}}\n")


def test_several_mistakes_come_together(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, MINIMAL + "train: {sed: 1, batch_size: -1}\n")
    assert "train.sed" in str(caught.value) and "train.batch_size" in str(caught.value)


def test_overrides_win_and_keep_their_types(tmp_path):
    run = load(
        tmp_path,
        MINIMAL,
        [
            "optimizer.learning_rate=1e-4",
            "adapter.rank=8",
            "data.train.0.weight=0.5",
            "train.duration=7 steps",
            "out=b",
        ],
    )
    assert run.optimizer.learning_rate == 1e-4
    assert run.adapter.rank == 8 and run.adapter.alpha == 16
    assert run.data.train[0].weight == 0.5
    assert run.train.duration == Duration(7, "steps")
    assert run.out == "b"


@pytest.mark.parametrize("strategy", ["shard", "hybrid"])
@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("optimizer: {name: adafactor}", "parallel.strategy: adafactor needs whole matrices"),
        ("optimizer: {offload: true}", "optimizer.offload: the states of sharded weights"),
        ("engine: compiled", "engine: layers that are spread over processes cannot be compiled"),
    ],
)
def test_what_does_not_go_with_sharded_weights_is_refused(tmp_path, strategy, section, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, MINIMAL + f"{section}\nparallel: {{strategy: {strategy}}}\n")
    assert load(tmp_path, MINIMAL + f"{section}\nparallel: {{strategy: replicate}}\n")


def test_layers_that_are_to_be_compiled_are_not_spread_by_auto(tmp_path):
    assert load(tmp_path, MINIMAL + "engine: compiled\n").parallel.strategy == "replicate"
    assert load(tmp_path, MINIMAL).parallel.strategy == "auto"


@pytest.mark.parametrize("override", ["train.seed", "=1", "out.x=1", "data.train.3.weight=1", "data.train.x=1"])
def test_an_override_that_cannot_be_applied_is_rejected(tmp_path, override):
    with pytest.raises(ConfigError, match="override"):
        load(tmp_path, MINIMAL, [override])


def test_an_override_into_an_element_that_has_no_keys_is_rejected(tmp_path):
    with pytest.raises(ConfigError, match=r"0 is 'a\.jsonl' in the run file, which has no keys"):
        load(tmp_path, "model: {path: m}\ndata: {train: [a.jsonl]}\nout: o\n", ["data.train.0.path=b.jsonl"])


def test_numbers_without_a_point_are_numbers(tmp_path):
    assert load(tmp_path, MINIMAL + "optimizer: {learning_rate: 2e-4}\n").optimizer.learning_rate == 2e-4


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "not valid YAML"), ("- 1", "is a mapping"), ("", "is a mapping"), (MINIMAL + "out: y\n", "given twice")],
)
def test_a_file_that_is_no_run_file(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, text)


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="no such run file"):
        config.load(tmp_path / "none.yaml")


def test_trained_weights_in_bfloat16_lose_no_update_unless_asked_to(tmp_path):
    text = MINIMAL.replace("path: scholar", "path: scholar, dtype: bfloat16")
    assert load(tmp_path, text).optimizer.rounding == "exact"
    assert load(tmp_path, text + "optimizer: {rounding: nearest}\n").optimizer.rounding == "nearest"
    assert load(tmp_path, text + "adapter: {rank: 4}\n").optimizer.rounding is None  # what it trains is float32


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("optimizer: {name: sgd, betas: [0.9, 0.999]}", "optimizer.betas: of adamw, adamw_8bit and muon; sgd has none"),
        ("optimizer: {name: adafactor, betas: [0.9, 0.999]}", "optimizer.betas: of .*; adafactor has none"),
        (
            "optimizer: {lr_scheduler: constant, min_lr_ratio: 0}",
            "optimizer.min_lr_ratio: with `lr_scheduler: constant",
        ),
        ("train: {neftune_alpha: 5}\ndata.share_prefixes", "data.share_prefixes: with train.neftune_alpha"),
    ],
)
def test_keys_that_do_nothing_or_something_else_together_are_refused(tmp_path, section, message):
    section, _, more = section.partition("\n")
    override = [f"{more}=true"] if more else []
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, f"{MINIMAL}{section}\n", override)
    assert load(tmp_path, f"{MINIMAL}{section}\n") if more else load(tmp_path, MINIMAL, override)


@pytest.mark.parametrize("optimizer", ["{name: sgd}", "{name: adafactor}", "{lr_scheduler: constant}"])
def test_a_dumped_run_with_defaults_that_do_nothing_is_loaded_again(tmp_path, optimizer):
    run = load(tmp_path, f"{MINIMAL}optimizer: {optimizer}\n")
    assert load(tmp_path, config.dump(run)) == run


@pytest.mark.parametrize("source", ["", ", weight: 0.5", ", count: 7, columns: {text: body}, split: train"])
def test_the_resolved_copy_is_the_same_run(tmp_path, source):
    text = MINIMAL.replace("{path: train.jsonl}", f"{{path: a{source}}}")
    run = load(tmp_path, text + "adapter: {rank: 8}\noptimizer: {warmup: 3 %}\ncheckpoint: {every: 100 steps}\n")
    assert load(tmp_path, config.dump(run)) == run


def test_paths_beside_the_run_file_are_found(tmp_path, monkeypatch):
    (tmp_path / "train.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path.parent)
    assert load(tmp_path, MINIMAL).data.train[0].path == str(tmp_path / "train.jsonl")
    (tmp_path / "folder").mkdir()
    folder = load(tmp_path, MINIMAL.replace("train.jsonl", "folder"))
    assert folder.data.train[0].path == str(tmp_path / "folder")
    monkeypatch.chdir(tmp_path)
    assert load(tmp_path, MINIMAL).data.train[0].path == "train.jsonl"


@pytest.mark.parametrize(
    ("text", "steps"), [("3 epochs", 30), ("1 epoch", 10), ("0.25 epochs", 3), ("7 steps", 7), ("5 %", 2), ("5%", 2)]
)
def test_durations_in_steps(text, steps):
    assert Duration.parse(text).steps(steps_per_epoch=10, total_steps=30) == steps


def test_durations_in_time_say_how_often_and_not_how_long():
    assert Duration.parse("10 minutes").seconds == 600 and Duration.parse("1.5 hours").seconds == 5400
    assert Duration.parse("3 epochs").seconds is None and str(Duration.parse("1 minute")) == "1 minutes"
    tree = {"model": {"path": "m"}, "data": {"train": [{"path": "a"}]}, "out": "o"}
    run = config.build({**tree, "checkpoint": {"every": "2 hours"}, "eval": {"every": "30 seconds"}}, "test")
    assert run.checkpoint.every.seconds == 7200 and config.build(run.model_dump(mode="json"), "test") == run
    for section, key in (("train", "duration"), ("optimizer", "warmup"), ("optimizer", "decay")):
        with pytest.raises(ConfigError, match=rf"{section}\.{key}: in epochs or steps, not in time"):
            config.build({**tree, section: {key: "10 minutes"}}, "test")


DURATIONS = [
    (section, key)
    for section, field in config.Run.model_fields.items()
    for key, own in getattr(field.annotation, "model_fields", {}).items()
    if Duration in (own.annotation, *get_args(own.annotation))
]


@pytest.mark.parametrize(("section", "key"), DURATIONS)
@pytest.mark.parametrize("unit", get_args(Unit))
def test_every_duration_is_refused_at_load_or_can_be_counted(tmp_path, section, key, unit):
    wsd = "optimizer.lr_scheduler=wsd"
    try:
        run = load(tmp_path, MINIMAL, [wsd, f"{section}.{key}=3 {unit.replace('percent', '%')}"])
    except ConfigError as error:
        assert str(error).startswith(f"{tmp_path / 'run.yaml'}: {section}.{key}: ")
        return
    total = run.train.duration.steps(10)
    schedule(run.optimizer, 10, total)(0)
    for every in (run.checkpoint.every, run.eval.every):
        Clock(every, 10, total).due(1)


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_has_its_line(section):
    for name, field in section.model_fields.items():
        assert field.description, f"{section.__name__}.{name} has no line under it"


PATHS = """model: {path: ~/models/a}
data:
  train: [{path: $DATA/train.jsonl}, {path: "scholar:heldout"}]
  eval: [{path: "${DATA}-old/$NAME.jsonl"}]
  chat_template: ${DATA}/t.jinja
eval: {tasks: [$DATA/task.jsonl]}
replay: {data: [{path: $DATA/web.txt}]}
out: $OUT/x
"""


def test_variables_and_home_in_paths(tmp_path, monkeypatch):
    for name, value in {"DATA": "/data", "NAME": "held out", "OUT": "/big", "HOME": "/home/me"}.items():
        monkeypatch.setenv(name, value)
    run = load(tmp_path, PATHS, ["data.train.1.path=$DATA/two.jsonl"])
    assert run.model.path == "/home/me/models/a"
    assert [source.path for source in run.data.train] == ["/data/train.jsonl", "/data/two.jsonl"]
    assert run.data.eval[0].path == "/data-old/held out.jsonl"
    assert (run.data.chat_template, run.eval.tasks, run.out) == ("/data/t.jinja", ["/data/task.jsonl"], "/big/x")
    assert run.replay.data[0].path == "/data/web.txt"
    assert load(tmp_path, config.dump(run)) == run


@pytest.mark.parametrize("value", [None, ""])
def test_a_variable_that_is_not_set_is_named_with_its_key(tmp_path, monkeypatch, value):
    monkeypatch.delenv("SCRATCH", raising=False)
    if value is not None:
        monkeypatch.setenv("SCRATCH", value)
    with pytest.raises(ConfigError, match=r"run.yaml: out: the environment variable SCRATCH is not set; set it, or"):
        load(tmp_path, MINIMAL.replace("runs/x", "${SCRATCH}/x"))


def test_a_path_that_exists_as_it_is_written_is_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "$DATA").write_text("")
    assert load(tmp_path, MINIMAL.replace("train.jsonl", "$DATA")).data.train[0].path == "$DATA"


def test_other_texts_and_runs_that_are_built_keep_their_signs(tmp_path):
    text = MINIMAL.replace("[{path: train.jsonl}]", "[{path: a$, split: $x}]")
    assert load(tmp_path, text).data.train[0].model_dump(include={"path", "split"}) == {"path": "a$", "split": "$x"}
    tree = {"model": {"path": "scholar"}, "data": {"train": [{"path": "$x"}]}, "out": "~/a"}
    assert config.build(tree, "here").out == "~/a"


@pytest.mark.parametrize("text", ["1234567 steps", "0.00001 epochs", "12.5 %", "3 epochs", "1000000000 steps"])
def test_a_duration_is_written_as_it_is_read(text):
    """An exponent would be read by nobody: such a run could not go on from its own run file."""
    assert str(Duration.parse(text)) == text


def test_no_template_is_given_an_argument_that_transformers_takes_itself():
    """Of what `apply_chat_template` and its render are given by name, only `documents` goes on to the template."""
    taken = set()
    for function in (PreTrainedTokenizerBase.apply_chat_template, render_jinja_template):
        named = inspect.signature(function).parameters.values()
        taken |= {parameter.name for parameter in named if parameter.kind is not parameter.VAR_KEYWORD}
    assert taken - config.RESERVED_ARGUMENTS == {"documents"}
