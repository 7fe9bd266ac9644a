"""The loop: one trajectory however the tokens are spread, exact resume, and a model that plain transformers can use."""

import json
import sys
from pathlib import Path

import pytest
import torch
from children import killed_at_step
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import conversations
from preceptor import config
from preceptor.data.forest import pack_trees
from preceptor.errors import ModelError
from preceptor.train import loop
from preceptor.train import run as execution
from preceptor.train.build import build_model
from preceptor.train.checkpoint import State
from preceptor.train.optimizer import build_optimizer
from preceptor.train.prepare import prepare
from preceptor.train.step import Objective, begin_peak
from runs import execute

QUIET = Console(quiet=True)


def train(file, *overrides, **kwargs):
    run = config.load(file, overrides)
    execute(prepare(run), QUIET, **kwargs)
    return Path(run.out)


def metrics(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()


def test_accumulation_1x8_and_8x1_give_the_same_trajectory(run_file):
    """Eight conversations of uneven targets, in one sequence or in eight, in four sequences of two and so on."""
    prepared = prepare(config.load(run_file(conversations(8))))
    assert len({tree.num_trained for tree in prepared.train}) > 2
    trajectories = []
    for per_row in (8, 4, 1):
        torch.manual_seed(0)
        model = build_model(prepared, torch.device("cpu"))
        state = State(model, build_optimizer(model, 0.0, (0.9, 0.95)))
        groups = [prepared.train.trees(range(i, i + per_row)) for i in range(0, 8, per_row)]
        sequences = [pack_trees(group) for group in groups]
        trajectories.append([loop.take_step(state, sequences, 1e-3, 1.0, "float32") for _ in range(5)])
    for other in trajectories[1:]:
        torch.testing.assert_close(torch.tensor(other), torch.tensor(trajectories[0]), rtol=2e-5, atol=1e-6)


def test_dropout_follows_seed_step_and_sequence_alone(run_file):
    """Whatever was drawn before, and in whatever order the sequences are computed."""
    prepared = prepare(config.load(run_file(conversations(4)), ["adapter.rank=4", "adapter.dropout=0.5"]))
    sequences = [pack_trees(prepared.train.trees([index])) for index in range(4)]

    def loss(drawn, ordered, seed=0, step=3):
        model = build_model(prepared, torch.device("cpu"))
        for name, weight in model.named_parameters():
            if "lora_B" in name:  # zero at first: dropout would change nothing
                torch.nn.init.constant_(weight, 0.1)
        torch.manual_seed(drawn)
        state = State(model, build_optimizer(model, 0.0, (0.9, 0.95)), step)
        return loop.take_step(state, ordered, 1e-3, 1.0, "float32", Objective(seed=seed))[0]

    first = loss(0, sequences)
    assert loss(1, sequences[::-1]) == pytest.approx(first, rel=1e-6)
    assert abs(loss(0, sequences, seed=1) - first) > 1e-4
    assert abs(loss(0, sequences, step=4) - first) > 1e-4


def test_a_run_leaves_what_it_promises(run_file):
    folder = train(run_file(eval_rows=conversations(3)), "train.duration=2 epochs", "eval.every=1 epochs")
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "eval.jsonl",
        "samples.jsonl",
        "rejections.jsonl",
        "summary.json",
        "model",
        "data.json",
        "environment.json",
        "examples.jsonl",
        "report.html",
    }
    lines = metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    for key in ("loss", "learning_rate", "grad_norm", "num_tokens", "num_trained", "seconds", "peak_memory_bytes"):
        assert all(line[key] > 0 for line in lines), key
    run = config.load(folder / "config.yaml")
    epoch_tokens = sum(tree.num_tokens for tree in prepare(run).train)
    assert sum(line["num_tokens"] for line in lines) == 2 * epoch_tokens
    looks = metrics(folder, "eval.jsonl")
    assert looks[0]["step"] == 0 and looks[-1]["step"] == lines[-1]["step"]
    assert looks[-1]["loss"] < looks[0]["loss"]
    assert {sample["step"] for sample in metrics(folder, "samples.jsonl")} == {look["step"] for look in looks}


def test_the_loss_falls_and_the_same_seed_gives_the_same_bits(run_file):
    file = run_file()
    first = train(file, "train.duration=30 steps")
    losses = [line["loss"] for line in metrics(first)]
    assert losses[-1] < 0.8 * losses[0]
    second = train(file, "train.duration=30 steps", f"out={first}-again")
    other = train(file, "train.duration=30 steps", "train.seed=1", f"out={first}-other")
    assert losses == [line["loss"] for line in metrics(second)]
    assert losses != [line["loss"] for line in metrics(other)]
    again = weights(second)
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights(first).items())


@pytest.mark.parametrize("adapter", [(), ("adapter.rank=4", "adapter.dropout=0.1")])
def test_a_killed_run_resumes_to_the_same_bits(run_file, adapter):
    file = run_file(eval_rows=conversations(2), checkpoint__every="3 steps", eval__every="2 steps")
    whole = train(file, "train.duration=8 steps", f"out={file.parent}/whole", *adapter)

    with killed_at_step(4):
        train(file, "train.duration=8 steps", *adapter)
    resumed = train(file, "train.duration=8 steps", *adapter)

    def comparable(folder, name):
        timed = ("seconds", "peak_memory_bytes")
        return [{k: v for k, v in line.items() if k not in timed} for line in metrics(folder, name)]

    for name in ("metrics.jsonl", "eval.jsonl", "samples.jsonl"):
        assert comparable(resumed, name) == comparable(whole, name), name
    expected = weights(whole)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in weights(resumed).items())
    assert [path.name for path in sorted((whole / "checkpoints").iterdir())] == ["step-00000003", "step-00000006"]


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(run_file):
    prepared = prepare(config.load(run_file()))
    model = build_model(prepared, torch.device("cpu"))
    state = State(model, build_optimizer(model, 0.0, (0.9, 0.95)))
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = float("nan")
        model.get_input_embeddings().weight[prepared.train.trees([0])[0].segments[0].ids[0]] = float("nan")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ModelError, match="step 1: loss nan"):
        loop.take_step(state, [pack_trees(prepared.train.trees([0]))], 1e-3, 1.0, "float32")
    after = dict(model.named_parameters())
    assert all(torch.equal(before[name].nan_to_num(), after[name].nan_to_num()) for name in before)


def test_a_sequence_that_does_not_fit_is_named_with_its_step_and_what_helps(run_file):
    prepared = prepare(config.load(run_file()))
    model = build_model(prepared, torch.device("cpu"))
    state = State(model, build_optimizer(model, 0.0, (0.9, 0.95)))
    state.step = 6

    class MoreThanThereIs(Objective):
        def __call__(self, *_, **__):
            return torch.empty(1 << 60)

    with pytest.raises(ModelError, match=r"^step 7: a sequence, \d+ tokens, .*data\.max_length") as raised:
        loop.take_step(state, [pack_trees(prepared.train.trees([0]))], 1e-3, 1.0, "float32", MoreThanThereIs())
    assert "allocate" in str(raised.value.__cause__)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_of_the_process_in_bytes():
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kernel_bytes = int(fields["VmHWM"].removesuffix("kB")) * 1024
    assert loop.peak_memory_bytes("cpu") == pytest.approx(kernel_bytes, rel=0.01)


@pytest.mark.parametrize("adapter", [(), ("adapter.rank=4",)])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_is_saved_speaks_and_stops_in_plain_transformers(run_file, adapter, precision):
    """Overfit one conversation; the saved folder alone must then answer and stop."""
    rows = [{"messages": [{"role": "user", "content": "user?"}, {"role": "assistant", "content": "The message."}]}]
    overrides = ("train.duration=60 steps", "optimizer.learning_rate=1e-2", "train.batch_size=1")
    folder = train(run_file(rows), *overrides, f"train.precision={precision}", *adapter)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    inputs = tokenizer.apply_chat_template(
        rows[0]["messages"][:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    generated = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    answer = tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :])
    assert answer == "The message.<|im_end|>"
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token not in (None, tokenizer.eos_token)
    assert tokenizer.eos_token_id in torch.tensor(model.generation_config.eos_token_id).reshape(-1).tolist()


def test_lora_trains_the_adapter_and_the_new_tokens_only(run_file):
    prepared = prepare(config.load(run_file(), ["adapter.rank=4"]))
    model = build_model(prepared, torch.device("cpu"))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name or "trainable_tokens" in name for name in trained)
    assert any("trainable_tokens" in name for name in trained)


def test_the_peak_of_a_run_is_that_of_its_steps(run_file, monkeypatch):
    """On a GPU; that of loading and of the proofs would stand beside the prediction of a step."""
    order = []
    monkeypatch.setattr(execution, "begin_peak", lambda device: order.append("begin_peak"))
    for module, name in ((execution, "build"), (execution, "preflight"), (loop, "take_step")):
        own = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *g, own=own, name=name, **n: order.append(name) or own(*g, **n))
    train(run_file(), "train.duration=2 steps")
    assert order == ["begin_peak", "build", "preflight", "begin_peak", "take_step", "take_step"]
    asked = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", asked.append)
    for device in ("cpu", "cuda:1"):
        begin_peak(device)
    assert asked == ["cuda:1"]
