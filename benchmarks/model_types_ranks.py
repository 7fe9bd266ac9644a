"""Every causal model type over several processes: does a step have the gradient of one process, or is it refused?

Called by `python benchmarks/model_types.py --ranks 2`. The processes (gloo) are started once, and again after a type
that ends them. Each type that one process trains is read by the first process and sharded (`parallel.strategy: shard`),
or replicated where that is refused: in each way of keeping less for backward, and with a LoRA adapter, the relative
error of the whole gradient of a step of three unlike sequences.
"""

import argparse
import copy
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
from model_types import MODES, conversations, kind_of, loaded

from preceptor.data.forest import PackedSequence, pack_trees
from preceptor.data.prefix_sharing import chains_of
from preceptor.errors import ModelError
from preceptor.model.adapters.lora import add_adapter
from preceptor.model.checks import check_phases
from preceptor.model.forward import Engine
from preceptor.model.options import ActivationPolicy
from preceptor.model.sharding import Strategy, device_mesh, shard_from_first, shard_model, without_values
from preceptor.train.step import Objective, accumulate_gradients
from preceptor.world import ONE, World

SECONDS = 600  # of one type at most


def over_ranks(kinds: list[str], num_ranks: int) -> dict[str, Any]:
    """What each type gives, in processes that this one starts."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "found.jsonl"
        while left := [kind for kind in kinds if kind not in found]:
            place.write_text("")
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
            command += [f"--nproc-per-node={num_ranks}", __file__, str(place), *left]
            ended = subprocess.run(command, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=-1)
            lines = [json.loads(line) for line in place.read_text().splitlines()]
            found |= {line["type"]: line["found"] for line in lines if "found" in line}
            if ended.returncode:
                broken = next(kind for kind in left if kind not in found)
                why = [line["why"] for line in lines if "why" in line and line["type"] == broken]
                found[broken] = {"outcome": "broke", "why": (why or [f"a process ended, or took {SECONDS} s"])[0]}
                print(broken, json.dumps(found[broken]), flush=True)
    return found


def main(place: str, kinds: list[str]) -> None:
    """In each of the processes."""
    torch.set_num_threads(1)
    with World.launched() as world, Path(place).open("a") as file:
        world.connect("cpu")
        for kind in kinds:
            signal.alarm(SECONDS)  # ends the process: one that waits for another runs no Python
            try:
                found = examine(kind, world)
            except Exception as error:
                why = f"process {world.rank}: {type(error).__name__}: {error}"
                print(json.dumps({"type": kind, "why": why}), file=file, flush=True)
                traceback.print_exc()
                os._exit(1)  # the others may wait for this one
            if world.is_first:
                print(json.dumps({"type": kind, "found": found}), file=file, flush=True)
                print(kind, json.dumps(found), flush=True)


def examine(kind: str, world: World) -> dict[str, Any]:
    """outcome: sharded, refused, or not trained by one process; why, but for sharded; errors by mode."""
    try:
        model = _without_rows_of_zeros(loaded(kind))
        alone = kind_of(model)[0] == "alone"
    except (ValueError, ModelError) as error:
        return {"outcome": "not trained", "why": str(error)}
    models = {"": model, "lora": _adapted(model)}
    true = {
        name: {} if own is None else _true(own, _sequences(alone), {"lora": MODES["full"]} if name else MODES, alone)
        for name, own in models.items()
    }
    try:
        return {"outcome": "sharded", "errors": _errors(models, true, "shard", _sequences(alone), world)}
    except ModelError as error:
        errors = _errors(models, true, "replicate", _sequences(alone), world)
        return {"outcome": "refused", "why": str(error), "errors": errors}


@torch.no_grad()
def _without_rows_of_zeros(model: Any) -> Any:
    """Those of padding: some norms have no derivative there, and the token is one of the data here."""
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            torch.nn.init.normal_(module.weight[module.padding_idx], std=0.2)
    return model


def _without_graphs(model: Any) -> Any:
    """States that layers keep of their last pass (RecurrentGemma), of which a run has none when it shards a model."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                setattr(module, name, value.detach())
    return model


def _sequences(alone: bool) -> list[PackedSequence]:
    trees = conversations()
    if alone:
        return [pack_trees([chain], alone=True) for tree in trees for chain in chains_of(tree)]
    return [pack_trees([tree]) for tree in trees]


def _true(
    model: Any, sequences: list[PackedSequence], policies: dict[str, ActivationPolicy], alone: bool
) -> dict[str, torch.Tensor]:
    """The gradient of one process, in each mode that the type takes."""
    found = {}
    for mode, policy in policies.items():
        if alone and policy.context_gradient != "full":
            continue
        try:
            check_phases(model, policy)
            found[mode] = _gradient(Engine(model), sequences, policy, ONE)
        except ModelError:
            if policy is MODES["full"]:
                raise
    return found


def _adapted(model: Any) -> Any:
    """A copy with an adapter that already does something; None where peft and the model do not go together."""
    try:
        adapted = add_adapter(copy.deepcopy(_without_graphs(model)), 2, 4.0, 0.0, None, [], seed=0)
    except Exception:  # `python benchmarks/model_types.py` says which
        return None
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted


def _errors(
    models: dict[str, Any],
    true: dict[str, dict[str, torch.Tensor]],
    strategy: Strategy,
    sequences: list[PackedSequence],
    world: World,
) -> dict[str, float]:
    """Of each mode, and of the adapter. Raises ModelError where the strategy is refused."""
    mesh, errors = device_mesh(strategy, "cpu", world.size, world.size), {}
    for name, model in models.items():
        if not true[name]:
            continue
        _without_graphs(model)
        if strategy == "shard":
            read = model if world.is_first else without_values(model)
            engine = Engine.of(shard_from_first(read, "auto", mesh, True, torch.device("cpu")))
        else:
            engine = Engine(copy.deepcopy(model))
            shard_model(engine, mesh)
        for mode, expected in true[name].items():
            found = _gradient(
                engine, sequences[world.rank :: world.size], (MODES | {"lora": MODES["full"]})[mode], world
            )
            errors[mode] = float(f"{(found - expected).norm() / expected.norm():.1e}")
    return errors


def _gradient(engine: Engine, sequences: list[PackedSequence], policy: ActivationPolicy, world: World) -> torch.Tensor:
    """Of a step, of all trained parameters, whole, in float64."""
    engine.model.zero_grad(set_to_none=True)
    accumulate_gradients(engine, sequences, 10.0, "float32", Objective(policy), "", world=world)
    return torch.cat([_whole(p).flatten().double() for p in engine.model.parameters() if p.requires_grad])


def _whole(parameter: torch.nn.Parameter) -> torch.Tensor:
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    gradient = gradient.detach()
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient  # type: ignore[no-any-return]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("place", help="the file that gets a line for each type")
    parser.add_argument("kinds", nargs="+")
    arguments = parser.parse_args()
    main(arguments.place, arguments.kinds)
