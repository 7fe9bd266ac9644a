"""Checkpoints of several ranks: saved by any number, read by any other, to the bit; published by all or none."""

import json
import os
from pathlib import Path

import pytest
import torch
from ranks import on_ranks

from preceptor import files
from preceptor.errors import CheckpointError
from preceptor.train import checkpoint
from preceptor.train.checkpoint import Checkpoints, State
from preceptor.train.optimizer import accumulate_in_float32, build_optimizer
from preceptor.world import World
from tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork")  # Python 3.12: a native library may have a thread


def sharded(model):
    """FSDP2 by layer; parameters that have fewer rows than ranks, or an odd number, are spread unevenly."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def state_of(seed=0, on_ranks=False, odd=True, optimizer="adamw", rounding=None):
    model = tiny_model("llama", seed=seed)
    if odd:
        model.odd = torch.nn.Linear(5, 1)
        torch.nn.init.constant_(model.odd.weight, seed)
        torch.nn.init.constant_(model.odd.bias, seed)
    model = model.to(torch.bfloat16) if rounding else model
    model = sharded(model) if on_ranks else model
    accumulate_in_float32(model)
    return State(model, build_optimizer(model, 0.1, (0.9, 0.95), optimizer, 0.9, rounding))


def take_steps(state, num):
    """Steps on gradients that are a function of the step, whatever the ranks hold of them."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    for _ in range(num):
        generator = torch.Generator().manual_seed(state.step)
        for name, parameter in state.trained.items():
            whole = torch.randn(parameter.shape, generator=generator)
            if name == "model.norm.weight" and state.step < 3:
                continue  # no gradient yet: no state of the optimizer either
            if isinstance(parameter, DTensor):
                whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
            parameter.grad = whole
        for group in state.optimizer.param_groups:
            group["lr"] = 1e-2
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
    return state


def whole(value):
    if not hasattr(value, "full_tensor"):
        return value
    return value.int().full_tensor().to(value.dtype) if value.dtype == torch.int16 else value.full_tensor()  # gloo


def same(one, other):
    for name, parameter in one.trained.items():
        theirs = other.trained[name]
        assert torch.equal(whole(parameter), whole(theirs)), name
        ours, moments = one.optimizer.state.get(parameter, {}), other.optimizer.state.get(theirs, {})
        assert ours.keys() == moments.keys(), name
        assert all(torch.equal(whole(value), whole(moments[key])) for key, value in ours.items()), name


@pytest.mark.parametrize(
    ("async_save", "optimizer"),
    [
        (False, ("adamw", None)),
        (True, ("adamw", None)),
        (False, ("adamw_8bit", "exact")),
        (False, ("sgd", "stochastic")),
    ],
)
def test_saved_on_two_ranks_and_read_on_one_and_back(tmp_path, async_save, optimizer):
    held = dict(zip(("optimizer", "rounding"), optimizer, strict=True))
    here = Checkpoints(tmp_path / "checkpoints", "this", keep=5, async_save=async_save)

    def save(rank):
        checkpoints = Checkpoints(here.folder, "this", 5, async_save, world=World.of_process_group().with_own_group())
        state = take_steps(state_of(on_ranks=True, **held), 2)
        checkpoints.save(state)
        take_steps(state, 1)  # what is being written is a copy
        checkpoints.wait()

    def read_and_go_on(rank):
        checkpoints = Checkpoints(here.folder, "this", 5, async_save, world=World.of_process_group().with_own_group())
        state = state_of(seed=4, on_ranks=True, **held)
        checkpoints.restore(state, print)
        assert state.step == 4
        same(state, take_steps(state_of(**held), 4))
        checkpoints.save(take_steps(state, 1))
        checkpoints.wait()

    on_ranks(2, save)
    files = {path.name for path in (here.folder / "step-00000002").iterdir()}
    assert files == {".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json"}
    described = json.loads((here.folder / "step-00000002" / "manifest.json").read_text())["files"]
    assert set(described) == files - {"manifest.json"}
    state = state_of(seed=3, **held)
    here.restore(state, print)
    assert state.step == 2
    same(state, take_steps(state_of(**held), 2))
    here.save(take_steps(state, 2))
    here.wait()
    on_ranks(2, read_and_go_on)
    here.restore(state, print)
    assert state.step == 5
    same(state, take_steps(state_of(**held), 5))


def test_where_one_rank_cannot_write_none_publishes_and_all_say_so(tmp_path, monkeypatch):
    def save(rank):
        checkpoints = Checkpoints(tmp_path / "checkpoints", "this", 5, world=World.of_process_group().with_own_group())
        state = take_steps(state_of(on_ranks=True), 2)
        checkpoints.save(state)
        if rank == 1:
            write = checkpoint.FileSystemWriter.write_data

            def full(*arguments):
                write(*arguments)
                raise OSError(28, "No space left on device")

            checkpoint.FileSystemWriter.write_data = full
        with pytest.raises(CheckpointError, match=r"step-00000003: cannot be written: No space left on device"):
            checkpoints.save(take_steps(state, 1))
        back = state_of(seed=3, on_ranks=True)
        checkpoints.restore(back, print)
        assert back.step == 2

    on_ranks(2, save)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_what_one_rank_writes_where_the_first_does_not_see_it_is_not_published(tmp_path):
    """As of two nodes whose `out` are two disks."""

    def save(rank):
        if rank == 1:
            describe = checkpoint.describe_files

            def on_another_disk(folder, files):
                described = describe(folder, files)
                for file in files:
                    file.unlink()
                return described

            checkpoint.describe_files = on_another_disk
        checkpoints = Checkpoints(tmp_path / "checkpoints", "this", 5, world=World.of_process_group().with_own_group())
        with pytest.raises(CheckpointError, match=r"__1_0\.distcp: another process has written it.*all nodes share"):
            checkpoints.save(take_steps(state_of(on_ranks=True), 2))

    on_ranks(2, save)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_damage_that_one_rank_sees_is_seen_by_all(tmp_path):
    here = Checkpoints(tmp_path / "checkpoints", "this", keep=5)
    for num in (2, 3):
        here.save(take_steps(state_of(), num))
    file = here.folder / "step-00000003" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)

    def read(rank):
        said = []
        state = state_of(seed=4, on_ranks=True)
        checkpoints = Checkpoints(here.folder, "this", 5, world=World.of_process_group().with_own_group())
        assert checkpoints.has(2) and not checkpoints.has(3)
        checkpoints.restore(state, said.append)
        assert state.step == 2 and len(said) == 1 and "__0_0.distcp: is damaged" in said[0]

    on_ranks(2, read)


def test_a_rank_that_dies_leaves_the_checkpoint_before(tmp_path):
    """Killed while the other one writes: the other ends with an error, and nothing half written counts."""

    def save(rank):
        checkpoints = Checkpoints(tmp_path / "checkpoints", "this", 5, world=World.of_process_group().with_own_group())
        state = take_steps(state_of(on_ranks=True), 2)
        checkpoints.save(state)
        if rank == 1:
            (tmp_path / "dies").touch()
            os._exit(0)
        with pytest.raises(Exception, match=r"."):
            checkpoints.save(take_steps(state, 1))
        os._exit(0)

    on_ranks(2, save)
    assert (tmp_path / "dies").exists()
    assert [path.name for path in Path(tmp_path / "checkpoints").glob("step-*")] == ["step-00000002"]
    state = state_of(seed=4)
    Checkpoints(tmp_path / "checkpoints", "this", 5).restore(state, print)
    same(state, take_steps(state_of(), 2))


def test_a_node_that_remembers_that_a_checkpoint_was_not_there_does_not_have_it_written_again(tmp_path):
    """As over NFS: a name that was looked for before it was written is not there until its folder is read again."""

    def save(rank):
        checkpoints = Checkpoints(tmp_path / "checkpoints", "this", 5, world=World.of_process_group().with_own_group())
        state = take_steps(state_of(on_ranks=True), 2)
        checkpoints.save(state)
        place = checkpoints.folder / "step-00000002"
        written = (place / "manifest.json").stat().st_ino
        if rank == 1:
            remembers_none_of(place)
        assert not checkpoints.has(3) and checkpoints.has(2)
        checkpoints.save(state)
        assert (place / "manifest.json").stat().st_ino == written
        if rank == 1:
            remembers_none_of(place)
        checkpoints.restore_weights(state, 2)

    on_ranks(2, save)


def remembers_none_of(place):
    """Of this process: the names within a folder are not there, until the folder above is listed."""
    is_dir, read, iterdir = Path.is_dir, files.read_json, Path.iterdir

    def renewed(folder):
        if folder == place.parent:
            Path.is_dir, files.read_json, Path.iterdir = is_dir, read, iterdir
        return iterdir(folder)

    def not_there(path):
        raise FileNotFoundError(2, "No such file or directory", str(path))

    Path.is_dir = lambda path: path != place and is_dir(path)
    files.read_json = lambda path: not_there(path) if path.parent == place else read(path)
    Path.iterdir = renewed
