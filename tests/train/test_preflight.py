"""What cannot work is found before step 1, by name; what can leaves no trace of having been tried."""

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from rich.console import Console
from transformers import AutoModelForCausalLM

from conftest import conversations
from preceptor import config
from preceptor.data.dataset import Dataset
from preceptor.data.loader import Loader
from preceptor.errors import ModelError
from preceptor.model import compiled
from preceptor.model.attention import cuda, runs
from preceptor.model.forward import Engine
from preceptor.model.optimisations import install
from preceptor.model.sharding import device_mesh, shard_model
from preceptor.train import preflight as proofs
from preceptor.train import run as execution
from preceptor.train.preflight import preflight
from preceptor.train.prepare import prepare
from preceptor.train.step import Objective
from preceptor.world import Silenced
from runs import execute
from tiny import branching, chain, tiny_model, tiny_tokenizer

RNG = np.random.default_rng(0)
TREES = [chain(RNG, (5, 7)), chain(RNG, (3, 9, 4, 6)), branching(RNG), chain(RNG, (8, 2)), chain(RNG, (2, 20))]


def planted(loss):
    """An objective that is this function of engine and sequence."""

    class Planted(Objective):
        def __call__(self, engine, sequence, step=None):
            return loss(engine, sequence)

    return Planted()


def loader(trees=TREES, batch_size=2):
    return Loader(Dataset.of(trees), max_length=64, batch_size=batch_size, seed=0)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss"])
def test_all_is_proved_and_nothing_has_changed(kind, precision):
    model, lines = tiny_model(kind), []
    before, state = {n: p.clone() for n, p in model.named_parameters()}, torch.get_rng_state()
    draws = lambda engine, sequence: engine(sequence) + 0 * torch.rand(())  # noqa: E731 (as dropout does)
    proved, seconds = preflight(model, loader(), precision, lines.append, objective=planted(draws))
    assert [line.split(":")[0] for line in lines] == ["proved"] * 5 + [f"all proved in {seconds:.1f} s"]
    assert not proved.alone and 0 < seconds < 60
    assert model.training and all(p.grad is None and torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("adapter", [(), ("adapter.rank=4", "adapter.dropout=0.1")])
def test_training_is_the_same_to_the_bit_without_the_proofs(run_file, monkeypatch, adapter):
    file = run_file(conversations(6))

    def weights(out):
        run = config.load(file, [f"out={file.parent}/{out}", *adapter])
        execute(prepare(run), Console(quiet=True))
        return AutoModelForCausalLM.from_pretrained(Path(run.out) / "model").state_dict()

    proved = weights("proved")
    monkeypatch.setattr(execution, "preflight", lambda model, loader, *_: (loader, 0.0))
    assert all(torch.equal(tensor, proved[name]) for name, tensor in weights("unproved").items())


def test_the_largest_sequences_are_the_longest_and_the_one_with_most_targets():
    trees = [chain(RNG, (60, 2)), chain(RNG, (2, 50)), *(chain(RNG, (20, 4)) for _ in range(9))]
    longest, most_trained = loader(trees).largest_sequences()
    plan = loader(trees).trees(0, len(trees))
    assert longest.num_tokens == max(sum(tree.num_tokens for tree in sequence) for sequence in plan) >= 62
    assert most_trained.num_trained == max(sum(tree.num_trained for tree in sequence) for sequence in plan) >= 50


@pytest.mark.parametrize(("batch_size", "alone"), [(1, False), (2, False), (1, True)])
def test_a_sequence_that_is_the_largest_in_both_goes_once_beside_the_gradients_of_a_step(batch_size, alone):
    model = tiny_model("llama", dtype=torch.float32)
    trees = [chain(RNG, (30, 90)), *(chain(RNG, (8, 4)) for _ in range(3))]
    seen = []

    def loss_of(engine, sequence):
        if torch.is_grad_enabled():
            seen.append((sequence.num_tokens, all(p.grad is not None for p in model.parameters())))
        return engine(sequence)

    together = Loader(Dataset.of(trees), 128, batch_size, seed=0)
    given = together.apart() if alone else together
    preflight(model, given, "float32", lambda line: None, planted(loss_of))
    ((num_tokens, beside_gradients),) = seen
    assert num_tokens >= 120 and beside_gradients == (batch_size > 1 or alone)


def fails_on_largest(error):
    """A loss that fails for the first sequence that has a graph, which is the first of the largest sequences."""

    def loss_of(engine, sequence):
        if torch.is_grad_enabled():
            error()
        return engine(sequence)

    return planted(loss_of)


def raise_cuda():
    raise torch.OutOfMemoryError("CUDA out of memory")


OUT_OF_MEMORY = {"cpu": lambda: torch.empty(1 << 60), "cuda": raise_cuda}


@pytest.mark.parametrize("error", OUT_OF_MEMORY.values(), ids=OUT_OF_MEMORY)
def test_out_of_memory_names_the_sequence_and_the_keys(error):
    model = tiny_model("llama")
    with pytest.raises(ModelError, match=r"largest sequence of the run, \d+ tokens.*data\.max_length.*adapter"):
        preflight(model, loader(), "float32", lambda _: None, objective=fails_on_largest(error))
    assert model.training and all(p.grad is None for p in model.parameters())


def test_any_other_error_stays_what_it_is():
    with pytest.raises(RuntimeError, match="shape"):
        preflight(
            tiny_model("llama"),
            loader(),
            "float32",
            lambda _: None,
            objective=fails_on_largest(lambda: torch.ones(3).view(2)),
        )


def test_a_loss_that_is_not_finite_is_found():
    with pytest.raises(ModelError, match="has a loss of inf or a gradient that is not finite"):
        preflight(
            tiny_model("llama"),
            loader(TREES[:1]),
            "float32",
            lambda _: None,
            objective=planted(lambda engine, sequence: engine(sequence) * torch.inf),
        )


def test_a_loss_that_depends_on_the_sequence_is_found():
    """Planted: something is added once a sequence."""
    with pytest.raises(ModelError, match=r"another loss in one sequence .* than each alone"):
        preflight(
            tiny_model("llama"),
            loader(),
            "float32",
            lambda _: None,
            objective=planted(lambda engine, sequence: engine(sequence) + 0.01),
        )


def test_a_leak_between_the_runs_own_conversations_is_found(monkeypatch):
    """Planted: each hidden state takes a little of the first."""
    hidden = Engine.hidden_states
    leaks = lambda *given: hidden(*given) + 1e-3 * hidden(*given)[:1]  # noqa: E731
    monkeypatch.setattr(proofs, "check_isolation", lambda model: None)
    monkeypatch.setattr(Engine, "hidden_states", leaks)
    with pytest.raises(ModelError, match=r"move when chain:1 changes, which is in the same sequence"):
        preflight(tiny_model("llama"), loader(), "float32", lambda _: None)


def test_a_model_that_mixes_conversations_reads_each_chain_alone():
    model, lines = tiny_model("stablelm").bfloat16(), []
    packed = loader()
    apart, _ = preflight(model, packed, "float32", lines.append)
    assert "each conversation goes through the model alone" in lines[1] and "StableLm" in lines[1]
    assert "Use a" not in lines[1]
    assert {p.grad_dtype for p in model.parameters()} == {torch.float32}, "gradients of several passes are summed"
    assert apart.alone and not packed.alone and apart.steps_per_epoch == packed.steps_per_epoch
    for step in range(3):
        sequences = apart.batch(step)
        assert all(sequence.alone and len(set(sequence.subtree_end_T.tolist())) == 1 for sequence in sequences)
        assert sum(sequence.num_trained for sequence in sequences) == sum(
            sequence.num_trained for sequence in packed.batch(step)
        )
        assert len(sequences) > len(packed.batch(step))


@pytest.mark.parametrize("kind", ["stablelm", "lfm2"])
@pytest.mark.parametrize("context_gradient", ["full", "detach"])
def test_such_a_model_is_trained_to_an_end(run_file, tmp_path, kind, context_gradient):
    """And one whose layers mix tokens, which go run by run."""
    tokenizer = tiny_tokenizer()
    settings = {"layer_types": ["conv", "full_attention"]} if kind == "lfm2" else {}
    model = tiny_model(kind, vocab_size=len(tokenizer), **settings)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / kind)
    file = run_file(conversations(12), eval_rows=conversations(3), model={"path": str(tmp_path / kind)})
    run = config.load(file, ["train.duration=20 steps", f"memory.context_gradient={context_gradient}"])
    if context_gradient == "detach":
        with pytest.raises(ModelError, match=r"context_gradient: detach"):
            execute(prepare(run), Console(quiet=True))
        return
    summary = execute(prepare(run), Console(quiet=True))
    assert summary["each_conversation_alone"] == (kind == "stablelm")
    losses = [json.loads(line)["loss"] for line in (Path(run.out) / "eval.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]


def test_a_head_that_is_not_known_is_still_rejected():
    model = tiny_model("llama")
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 1.01)
    with pytest.raises(ModelError, match="llama: the logits"):
        preflight(model, loader(), "float32", lambda _: None)


@pytest.mark.parametrize(
    ("reserved", "message"),
    [
        ((1 << 60, 0), r"largest sequence of the run, \d+ tokens.*does not fit.*optimizer state"),
        ((0, 1 << 60), r"first step: the update of the weights does not fit.*adamw_8bit"),
    ],
)
def test_the_optimizers_states_and_its_largest_update_are_tried_as_well(reserved, message):
    model = tiny_model("llama")
    with pytest.raises(ModelError, match=message):
        preflight(model, loader(), "float32", lambda _: None, reserved=reserved)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("place", ["torch.zeros_like", "preceptor.train.preflight.check_head"])
def test_memory_that_runs_out_in_the_first_minute_is_no_bug(place, monkeypatch):
    """In the buffers of gradients, and in any proof."""

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    if place == "torch.zeros_like":
        monkeypatch.setattr(proofs, "accumulate_gradients", lambda *_: pytest.fail("too late"))
        monkeypatch.setattr(proofs, "check_isolation", lambda model: monkeypatch.setattr(place, fail))
        monkeypatch.setattr(proofs, "_sample", lambda loader: [])
    else:
        monkeypatch.setattr(place, fail)
    with pytest.raises(ModelError, match=r"not fit in memory beside|before step 1 ran out of memory with the weights"):
        preflight(tiny_model("llama"), loader(), "float32", lambda _: None)


class FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        raise NoSuchKernel("out of resource: shared memory, Required: 262144, Hardware limit: 232448")


class NoSuchKernel(Exception):
    """As Triton's own, no RuntimeError."""


@pytest.fixture
def kernels(monkeypatch):
    """Nothing has run yet."""
    monkeypatch.setattr(cuda, "_in_use", set())
    monkeypatch.setattr(cuda, "_given_up", {})
    return cuda.kernels


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, in tracing
@pytest.mark.parametrize("engine", ["efficient", "compiled"])
@pytest.mark.parametrize("where", ["probe", "sample", "backward"])
def test_attention_goes_on_without_a_kernel_that_fails(where, engine, kernels, monkeypatch):
    """Flex takes its own kernel from 128 tokens on, and its backward needs more of a GPU than its forward."""

    def attend(query, key, value, layout, *named):
        cuda._in_use.add(cuda.FLEX)
        if where == "backward":
            value = FailsInBackward.apply(value)
        elif where == "probe" or query.shape[2] > 128:
            raise NoSuchKernel("out of resource: shared memory, Required: 262144, Hardware limit: 232448\nmore")
        return runs.attend_runs(query, key, value, layout, *named)

    monkeypatch.setattr(compiled, "BACKEND", "eager")
    monkeypatch.setattr(runs, "fast_path", lambda *_: None if cuda.FLEX in cuda._given_up else attend)
    model, lines = tiny_model("llama"), []
    state = install(model, engine)
    assert "last_layer" in state.optimisations, "it is tried before"
    trees = [chain(RNG, (60, 30)), chain(RNG, (50, 20)), branching(RNG)]
    passed = preflight(model, Loader(Dataset.of(trees), 256, 1, seed=0), "float32", lines.append)
    assert not passed[0].alone and all(p.grad is None for p in model.parameters())
    said = [line for line in lines if "flex_attention failed on this GPU and is switched off for this run: No" in line]
    assert len(said) == 1 and Engine(model).state.compiles == (engine == "compiled")
    assert list(kernels()["kernels_given_up"]) == ["flex_attention"]
    assert "shared memory" in kernels()["kernels_given_up"]["flex_attention"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, in tracing
def test_layers_are_compiled_where_no_sequence_holds_two_conversations(monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    model, lines = tiny_model("llama"), []
    install(model, "compiled")
    loader = Loader(Dataset.of([chain(RNG, (60, 30)), chain(RNG, (50, 20))]), 100, 1, seed=0)
    preflight(model, loader, "float32", lines.append)
    assert Engine(model).state.compiles
    assert any("compiled layers give the loss and the gradient" in line for line in lines)
    assert not any("of this run" in line for line in lines), "two conversations beside each other"


def test_an_error_of_another_kind_gives_no_kernel_up(kernels):
    cuda._in_use.add(cuda.FLEX)
    lines = []
    with pytest.raises(RuntimeError, match="shape"):
        objective = fails_on_largest(lambda: torch.ones(3).view(2))
        preflight(tiny_model("llama"), loader(), "float32", lines.append, objective=objective)
    assert kernels() == {} and cuda.replaceable_kernels() == [cuda.FLEX]
    assert not any("switched off" in line for line in lines)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_attention_goes_on_without_a_kernel_whose_numbers_are_wrong(precision, kernels, monkeypatch):
    """It shows what it must not, or scales wrongly: no reason to read each conversation alone."""

    def attend(query, key, value, layout, options, seen):
        cuda._in_use.add(cuda.FLEX)
        wrong = runs.AttentionOptions(2 * options.scale, options.window, options.softcap, options.sinks)
        return runs.attend_runs(query, key, value, layout, wrong, seen)

    monkeypatch.setattr(runs, "fast_path", lambda *_: None if cuda.FLEX in cuda._given_up else attend)
    lines = []
    proved, _ = preflight(tiny_model("llama"), loader(), precision, lines.append)
    (said,) = [line for line in lines if "switched off" in line]
    assert not proved.alone and "ModelError: llama: hidden states move between the model's own attention" in said
    assert list(kernels()["kernels_given_up"]) == ["flex_attention"]


def test_a_proof_that_fails_without_the_kernels_too_gives_none_up(kernels):
    cuda._in_use.add(cuda.FLEX)
    lines = []
    proved, _ = preflight(tiny_model("stablelm"), loader(), "float32", lines.append)
    assert proved.alone and kernels() == {} and not any("switched off" in line for line in lines)


def test_a_sequence_that_does_not_fit_is_not_tried_again_without_the_kernels(kernels):
    cuda._in_use.add(cuda.FLEX)
    tries = []

    def fails():
        tries.append(1)
        raise_cuda()

    with pytest.raises(ModelError, match=r"largest sequence of the run, \d+ tokens"):
        preflight(tiny_model("llama"), loader(), "float32", lambda _: None, objective=fails_on_largest(fails))
    assert len(tries) == 1 and kernels() == {}


@pytest.mark.parametrize("name", ["check_isolation", "check_phases", "_Proofs._isolated", "_Proofs._summed"])
def test_each_comparison_of_attention_is_tried_again_without_the_kernel(name, kernels, monkeypatch):
    cuda._in_use.add(cuda.FLEX)

    def proof(*_):
        if cuda.FLEX not in cuda._given_up:
            raise ModelError("of other numbers")

    monkeypatch.setattr(f"preceptor.train.preflight.{name}", proof)
    proved, _ = preflight(tiny_model("llama"), loader(), "float32", lambda _: None)
    assert not proved.alone and kernels() == {"kernels_given_up": {cuda.FLEX: "ModelError: of other numbers"}}


@pytest.mark.parametrize("name", ["check_head", "check_compiled", "check_fused", "accumulate_gradients"])
def test_a_proof_that_compares_no_attention_is_not_tried_again_without_the_kernels(name, kernels, monkeypatch):
    """That of the head, of compiled layers or parts, of the largest sequence (of which a loss may be nan)."""
    cuda._in_use.add(cuda.FLEX)
    tries = []

    def fails(*_):
        tries.append(name)
        raise ModelError("of other numbers")

    monkeypatch.setattr(proofs, "no_compiler", lambda device: None)
    monkeypatch.setattr(proofs, "check_fused", lambda *_: None)
    monkeypatch.setattr(proofs, name, fails)
    model = tiny_model("llama")
    install(model, "compiled" if name == "check_compiled" else "efficient")
    with nullcontext() if name == "check_fused" else pytest.raises(ModelError, match="of other numbers"):
        preflight(model, loader(), "float32", lambda _: None)
    assert tries == [name] and kernels() == {}


# Several processes ----------------------------------------------------------------------------------------------------


def prove_spread(world, strategy, fails, in_backward=False):
    """All proofs of a model on two ranks: its lines about kernels. fails: whether flex does, for how many tokens."""
    cuda._in_use, cuda._given_up = set(), {}
    given = Loader(Dataset.of([chain(RNG, (180, 8)), chain(RNG, (8, 130))]), 200, 2, seed=0)
    assert [sequence.num_tokens for sequence in given.largest_sequences()] == [188, 138]
    running = []

    def attend(query, key, value, layout, *named):
        cuda._in_use.add(cuda.FLEX)
        if query.requires_grad and fails(running[-1]):
            if not in_backward:
                raise NoSuchKernel("no space left on device")
            value = FailsInBackward.apply(value)
        return runs.attend_runs(query, key, value, layout, *named)

    def loss_of(engine, sequence):
        running.append(sequence.num_tokens)
        return engine(sequence)

    runs.fast_path = lambda *_: None if cuda.FLEX in cuda._given_up else attend
    engine, lines = Engine(tiny_model("llama")), []
    shard_model(engine, device_mesh(strategy, "cpu", world.size, world.size))
    preflight(engine.model, given, "float32", lines.append, planted(loss_of), world=world)
    assert world.gather(world.rank) == [0, 1], "in step to the end"
    assert lines[-2].startswith("proved: the largest sequences")
    return running[-2:], [line for line in lines if "switched off" in line]


def test_a_process_that_lacks_a_kernel_for_the_second_sequence_stays_in_step():
    """It proves both without that kernel then, and so do the others, who sum gradients with it."""
    found = run_ranks(2, lambda world: prove_spread(world, "replicate", lambda tokens: world.rank and tokens < 188))
    (first, none), (second, (line,)) = found
    assert first == second == [188, 138] and none == [] and "flex_attention failed" in line


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_sharded_model_goes_on_without_a_kernel_that_fails_in_all_processes(in_backward):
    for tokens, lines in run_ranks(2, lambda world: prove_spread(world, "shard", lambda tokens: True, in_backward)):
        assert tokens == [188, 138] and len(lines) == 1


def test_of_a_sharded_model_the_error_of_one_process_ends_all(monkeypatch):
    """Which wait for its weights meanwhile."""
    monkeypatch.setattr("preceptor.world._ALIKE_SECONDS", 0.3)

    def work(world):
        with world.errors_told_once():
            return prove_spread(world, "shard", lambda tokens: world.rank == 1)

    first, second = run_ranks(2, work)
    assert "no space left on device" in str(second) and isinstance(first, Silenced)


@pytest.mark.parametrize(("error", "num_asked"), [(NoSuchKernel("no space left on device"), 1), (ModelError("nan"), 0)])
def test_the_other_processes_are_waited_for_once(error, num_asked, kernels, monkeypatch):
    """Also where attention's kernels and compiled parts could each be the cause."""

    class Alone:
        asked = 0

        def fails_everywhere(self, name):
            self.asked += 1
            return False

    def fails(self, sequence):
        raise error

    cuda._in_use.add(cuda.FLEX)
    monkeypatch.setattr(proofs, "is_sharded", lambda _: True)
    monkeypatch.setattr(proofs._Proofs, "_fits", fails)
    world, engine = Alone(), Engine(tiny_model("llama"))
    engine.state.optimisations.add("fused")
    proved = proofs._Proofs(engine, loader(), "float32", print, Objective(), (0, 0), world)
    with pytest.raises(type(error)):
        proved._prove_fit(loader().largest_sequences()[0])
    assert world.asked == num_asked and kernels() == {}
