"""Checkpoints: exact, whole, and never read where one byte is not what was written."""

import ast
import errno
import os
import resource
import shutil
import signal
import sys

import pytest
import torch

from preceptor.errors import CheckpointError, ModelError
from preceptor.train.checkpoint import Checkpoints, State, checkpoint_bytes
from preceptor.train.optimizer import apply_learning_rate, build_optimizer
from tiny import tiny_model

FILE_OPERATIONS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.scandir", "os.listdir")


def state_of(seed=0, steps=2, offload=False):
    """A tiny model after some steps of noise."""
    model = tiny_model("llama", seed=seed)
    state = State(model, build_optimizer(model, 0.0, (0.9, 0.95), offload=offload))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        state.optimizer.step()
        state.step += 1
    return state


def same(one, other):
    weights = all(torch.equal(p, other.trained[name]) for name, p in one.trained.items())
    moments = one.optimizer.state_dict()["state"], other.optimizer.state_dict()["state"]
    return weights and all(
        torch.equal(value, moments[1][index][key])
        for index, values in moments[0].items()
        for key, value in values.items()
    )


def restored(checkpoints, said=None, offload=False):
    state = state_of(seed=5, steps=1, offload=offload)
    state.step = 0
    checkpoints.restore(state, (said if said is not None else []).append)
    return state


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints", "this", keep=2)


@pytest.mark.parametrize("offload", [False, True])
def test_what_is_saved_comes_back_to_the_bit(checkpoints, offload):
    state = state_of(offload=offload)
    checkpoints.save(state)
    back = restored(checkpoints, offload=offload)
    assert back.step == 2 and same(state, back)
    size = sum(file.stat().st_size for file in (checkpoints.folder / "step-00000002").iterdir())
    assert size <= checkpoint_bytes(state) < size + (1 << 20)


@pytest.mark.parametrize("offload", [False, True])
def test_states_move_to_the_hosts_memory_and_back(checkpoints, offload):
    """A run whose memory ran out goes on with `optimizer.offload`."""
    checkpoints.save(state_of(offload=not offload))
    back, state = restored(checkpoints, offload=offload), state_of(offload=offload)
    for each in (back, state):
        for parameter in each.trained.values():
            parameter.grad = torch.ones_like(parameter)
        apply_learning_rate(each.optimizer, 1e-3)
        each.optimizer.step()
    assert all(torch.equal(p, back.trained[name]) for name, p in state.trained.items())


def test_the_newest_are_kept_and_stray_names_are_none_of_them(checkpoints):
    state = state_of()
    for name in ("step-foo", "step-3", "step-000000099", ".step-00000009.partial"):
        (checkpoints.folder / name).mkdir(parents=True)
    (checkpoints.folder / "step-00000098").touch()
    for step in (1, 2, 3):
        state.step = step
        checkpoints.save(state)
    assert [path.name for path in checkpoints.found()] == ["step-00000002", "step-00000003"]
    checkpoints.save(state)  # the same step once more
    assert restored(checkpoints).step == 3


def damage(file, kind):
    content = bytearray(file.read_bytes())
    if kind == "truncated":
        content = content[: len(content) // 2]
    elif kind == "empty":
        content = b""
    elif kind == "garbage":
        content = b"\0" * len(content)
    elif kind == "missing":
        file.unlink()
        return
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "manifest.json"])
@pytest.mark.parametrize("kind", ["truncated", "empty", "garbage", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(checkpoints, name, kind):
    older = state_of(steps=2)
    checkpoints.save(older)
    checkpoints.save(state_of(steps=3))
    damage(checkpoints.folder / "step-00000003" / name, kind)
    said = []
    back = restored(checkpoints, said)
    assert back.step == 2 and same(older, back)
    assert len(said) == 1 and "passed over" in said[0] and "step-00000003" in said[0] and name in said[0]
    assert not checkpoints.has(3) and checkpoints.has(2)
    shutil.rmtree(checkpoints.folder / "step-00000002")
    with pytest.raises(CheckpointError, match=r"no checkpoint can be read: .*step-00000003.*--replace"):
        restored(checkpoints)
    checkpoints.save(state_of(steps=3))  # a resumed run comes by that step again
    assert checkpoints.has(3)


def test_a_damaged_newer_checkpoint_never_costs_a_good_one(checkpoints):
    """Of one that is kept, the sound one: also where the run goes on before the damaged one's step."""
    for steps in (2, 3, 5):
        checkpoints.save(state_of(steps=steps))
    damage(checkpoints.folder / "step-00000005" / "__0_0.distcp", "truncated")
    one = Checkpoints(checkpoints.folder, "this", keep=1)
    assert restored(one).step == 3 and one.has(3)
    one.save(state_of(steps=4))
    assert [path.name for path in one.found()] == ["step-00000004"] and restored(one).step == 4


def test_no_flipped_bit_is_read(checkpoints):
    """One bit in 20 places of either file: each is noticed, none gives another model."""
    older, newer = state_of(steps=2), state_of(steps=3)
    checkpoints.save(older)
    checkpoints.save(newer)
    for name in ("__0_0.distcp", ".metadata", "manifest.json"):
        file = checkpoints.folder / "step-00000003" / name
        content = file.read_bytes()
        for place in range(20):
            altered = bytearray(content)
            altered[place * len(content) // 20] ^= 0x40
            file.write_bytes(altered)
            back = restored(checkpoints)
            expected = newer if back.step == 3 else older
            assert same(expected, back), (name, place)
            assert back.step == 2 or name == "manifest.json", (name, place)  # a blank of the manifest says nothing
        file.write_bytes(content)
    assert restored(checkpoints).step == 3


def test_a_checkpoint_of_another_run_or_step_is_not_taken(checkpoints, tmp_path):
    other = Checkpoints(tmp_path / "other", "other", keep=2)
    other.save(state_of(steps=3))
    checkpoints.save(state_of(steps=2))
    shutil.copytree(other.folder / "step-00000003", checkpoints.folder / "step-00000003")
    shutil.copytree(checkpoints.folder / "step-00000002", checkpoints.folder / "step-00000004")
    said = []
    assert restored(checkpoints, said).step == 2
    assert "is a checkpoint of step 2" in said[0] and "is a checkpoint of another run" in said[1]


def test_other_parameters_change_nothing(checkpoints):
    checkpoints.save(state_of())
    state = State(tiny_model("llama", vocab_size=80), None)
    before = {name: p.clone() for name, p in state.trained.items()}
    with pytest.raises(CheckpointError, match="holds other parameters"):
        checkpoints.restore(state, print)
    assert all(torch.equal(p, before[name]) for name, p in state.trained.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_never_saved(checkpoints, value, dtype):
    checkpoints.save(state_of())
    state = state_of(steps=3)
    state.model.to(dtype)
    with torch.no_grad():
        state.model.model.layers[1].mlp.up_proj.weight[3, 1] = value
    with pytest.raises(ModelError, match=r"after step 3 model.layers.1.mlp.up_proj.weight holds 1 value of"):
        checkpoints.save(state)
    assert [path.name for path in checkpoints.found()] == ["step-00000002"]


@pytest.fixture
def limited():
    """Files cannot grow over a number of bytes, as on a full disk: Python, torch and Rust see the same."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda num: resource.setrlimit(resource.RLIMIT_FSIZE, (num, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_checkpoint_that_does_not_fit_leaves_the_older_one(checkpoints, limited):
    """At any number of bytes; the message has the path, what is needed and what is free."""
    state = state_of()
    checkpoints.save(state)
    size = (checkpoints.folder / "step-00000002" / "__0_0.distcp").stat().st_size
    state.step = 3
    for num in (0, 1, 1000, size // 2, size - 1):
        limited(num)
        with pytest.raises(
            CheckpointError, match=r"step-00000003: cannot be written: File too large \(needs .* free\)"
        ):
            checkpoints.save(state)
        assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000002"]
        assert restored(checkpoints).step == 2


def _save_with_failing_operations(checkpoints):
    """Save step 3 until no operation on a file fails: at first the first does, then the second, ...

    What was raised, by the operation; "" is as it should be.
    """
    state, done, failing, found = state_of(), 0, 0, {}
    checkpoints.save(state)
    state.step = 3

    def fail(event, values):
        nonlocal done
        if event in FILE_OPERATIONS and str(values[0]).startswith(str(checkpoints.folder)):
            done += 1
            if done == failing:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

    sys.addaudithook(fail)
    while done >= failing:
        done, failing = 0, failing + 1
        try:
            checkpoints.save(state)
        except CheckpointError as error:
            found[failing] = "" if ": cannot be " in str(error) and "checkpoints" in str(error) else str(error)
        except BaseException as error:
            found[failing] = repr(error)
        num, done = done, -1000
        assert checkpoints.has(2)
        shutil.rmtree(checkpoints.folder / "step-00000003", ignore_errors=True)
        done = num
    return found


def test_any_operation_on_a_file_may_fail(checkpoints, tmp_path):
    """In a child, whose hook goes with it: what was written is read back, and that may fail too."""
    if not (pid := os.fork()):
        try:
            (tmp_path / "found").write_text(repr(_save_with_failing_operations(checkpoints)))
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    found = ast.literal_eval((tmp_path / "found").read_text())
    assert len(found) > 5 and set(found.values()) == {""}, found


def test_a_full_disk_costs_all_older_checkpoints_but_one(checkpoints, monkeypatch):
    """There is room for two checkpoints and not for three: the oldest goes first."""
    state = state_of()
    for step in (1, 2):
        state.step = step
        checkpoints.save(state)
    write = Checkpoints._write

    def as_on_a_small_disk(self, *arguments):
        if len(self.found()) > 1:
            raise CheckpointError("full") from OSError(28, "No space left on device")
        write(self, *arguments)

    monkeypatch.setattr(Checkpoints, "_write", as_on_a_small_disk)
    state.step = 3
    checkpoints.save(state)
    assert [path.name for path in checkpoints.found()] == ["step-00000002", "step-00000003"]
