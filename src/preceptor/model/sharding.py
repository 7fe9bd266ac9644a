"""A model over several processes: which weights each rank holds, and how gradients are summed.

    replicate   every rank holds the whole model; gradients are summed once a step, after its last backward pass
    shard       every rank holds 1/N of each weight, gradient and optimizer state (FSDP2: ZeRO stage 3, Rajbhandari et
                al. 2020); a layer is gathered while it runs
    hybrid      sharded over the ranks of a node, replicated over nodes (HSDP)

The strategy is the mesh: its dimensions are named `replicate` and `shard`. Gradients are sums over ranks, never means:
the loss is divided once, by the global number of trained tokens (StepContext.divisor).

    Engine                     its `forward`, `call`: gathers its own group, which stays for forward and backward
      embedding                a group of its own, unless head or adapter share it
      layer 0 ... layer n - 1  a group each
      norm, head, the rest     in the engine's own group: the loss reads the head's weight, not its `forward`
      towers                   a group each, which nothing ever gathers
"""

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from preceptor.errors import ModelError
from preceptor.model.activations.passes import Ranks
from preceptor.model.forward import Engine
from preceptor.model.optimisations import OPTIMISATIONS, Mode, install
from preceptor.model.parts import decoder_layers, decoder_of, device_of, model_type, tower_parameters

Strategy = Literal["replicate", "shard", "hybrid"]

SPREAD = "it is spread over processes"
"""Why the layers of a sharded model are not compiled."""

_IN_PLACE = ("embedding_gradient", "head_gradient")  # they add to `.grad` of a whole weight
_BUCKET_BYTES = 64 * 2**20


def device_mesh(strategy: Strategy, device_type: str, num_ranks: int, ranks_per_node: int) -> DeviceMesh:
    """The mesh of a strategy over all ranks. One node's `hybrid` is `shard`."""
    if strategy == "hybrid" and ranks_per_node < num_ranks:
        shape = num_ranks // ranks_per_node, ranks_per_node
        return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))
    name = "replicate" if strategy == "replicate" else "shard"
    return init_device_mesh(device_type, (num_ranks,), mesh_dim_names=(name,))


def shard_model(engine: Engine, mesh: DeviceMesh, regathers: bool = True) -> None:
    """Spread the engine's model over the ranks of a mesh, after adapters have been added and optimisations installed.

    regathers: a layer's weights are gathered again for each forward and backward pass, gradients are scattered after
    each sequence; False: whole weights and gradients stay from the first sequence of a step to the last. Afterwards the
    model runs through this engine alone (`forward`, `call`). Raises ModelError for weights that FSDP2 cannot shard.
    """
    if "shard" not in (mesh.mesh_dim_names or ()):
        engine.state.ranks = Ranks(mesh)
        return
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise ModelError(
            f"parallel.strategy: shard and hybrid need torch 2.13 or newer, this is {torch.__version__}: older ones do "
            "not keep processes in step where one has a gradient that another has not, nor recover from a check that "
            "fails. Update torch, or set parallel.strategy: replicate"
        )
    _require_shardable(engine.model)
    for optimisation in OPTIMISATIONS:
        if optimisation.name in _IN_PLACE:
            optimisation.remove(engine.model, engine.state)
    skeleton = without_values(engine.model)
    ranks = engine.state.ranks = Ranks(mesh, regathers=regathers, skeleton=skeleton)
    half = any(p.requires_grad and p.dtype == torch.bfloat16 for p in engine.model.parameters())
    precision = MixedPrecisionPolicy(reduce_dtype=torch.float32 if half else None)
    for unit in _units(engine.model):
        fully_shard(unit, mesh=mesh, reshard_after_forward=regathers, mp_policy=precision)
    root: Any = fully_shard(engine, mesh=mesh, reshard_after_forward=False, mp_policy=precision)
    for module in engine.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other, NCCL rounds factors to bfloat16
    root.set_reshard_after_backward(regathers)
    root.set_reduce_scatter_unused_params(True)  # a rank's tokens may go through other experts
    register_fsdp_forward_method(engine, "enter")
    engine.register_forward_hook(lambda *_: None if torch.is_grad_enabled() else ranks.reshard())
    ranks.root = engine


def is_sharded(engine: Engine) -> bool:
    """Whether each rank holds a part of the model, so that all must make the same passes through it."""
    return engine.state.ranks is not None and engine.state.ranks.root is not None


def without_values(model: nn.Module) -> Any:
    """A copy of a model, or of its skeleton if it is sharded, whose parameters are on the meta device."""
    ranks = Engine(model).state.ranks
    if ranks is not None and ranks.root is not None:
        return copy.deepcopy(ranks.skeleton)
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in model.parameters()
    }
    return copy.deepcopy(model, memo)


def shard_from_first(model: nn.Module, mode: Mode, mesh: DeviceMesh, regathers: bool, device: torch.device) -> Any:
    """The first rank's model, sharded, on `device`: no other rank ever holds more of it than its shards and one tensor.

    model: whole on the first rank, wherever it fits; on the others the same without values (`load_model` on the meta
    device). mode: of the optimisations (`install`), of which the first rank tries which hold.
    """
    is_first = dist.get_rank() == 0
    state = install(model, mode, check=is_first)
    if state.not_compiled is not None:
        state.not_compiled = SPREAD  # wherever the model is meanwhile
    found = [state.optimisations]
    dist.broadcast_object_list(found, src=0)
    for optimisation in OPTIMISATIONS:
        if optimisation.name not in found[0]:
            optimisation.remove(model, state)
    engine = Engine(without_values(model))
    shard_model(engine, mesh, regathers)
    engine.model.to_empty(device=device)
    with torch.no_grad():
        for (module, name, own), (_, _, value) in zip(_tensors(engine.model), _tensors(model), strict=True):
            value = value.detach().to(device) if is_first else torch.empty(own.shape, dtype=own.dtype, device=device)
            dist.broadcast(value, src=0)
            if isinstance(own, DTensor):
                value = distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)
            _put(module, name, own, value)
    return engine.model


def _put(module: nn.Module, name: str, own: Tensor, value: Tensor) -> None:
    if own.device.type == "meta":  # no parameter and no buffer, just an attribute
        setattr(module, name, value)
    else:
        own_part(own).copy_(own_part(value))


def _tensors(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Every tensor that a module holds, once: parameters, buffers and plain attributes."""
    seen: set[int] = set()
    for module in model.modules():
        for name, value in (*module._parameters.items(), *module._buffers.items(), *vars(module).items()):
            if isinstance(value, Tensor) and id(value) not in seen:
                seen.add(id(value))
                yield module, name, value


@torch.no_grad()
def sharded_copy(model: nn.Module) -> Any:
    """A frozen copy of a sharded model, sharded alike; each rank copies its own shards."""
    ranks = Engine.of(model).state.ranks
    assert ranks is not None
    engine = Engine(without_values(model).requires_grad_(False).eval())
    shard_model(engine, ranks.mesh, ranks.regathers)
    copied = engine.model.to_empty(device=device_of(model))
    for (module, name, own), (_, _, value) in zip(_tensors(copied), _tensors(model), strict=True):
        _put(module, name, own, value)
    return copied


def own_part(tensor: Tensor) -> Tensor:
    """What this process has of a tensor that is spread over several; else the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _units(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that are gathered each for itself, inner ones first; what is in none of them is the engine's own."""
    yield from reversed(decoder_layers(model))
    embedding = decoder_of(model).get_input_embeddings()
    if "weight" in embedding._parameters and not _shares_weights(embedding, model):  # not merged by peft as it is read
        yield embedding
    yield from _towers(model)


def _towers(model: nn.Module) -> list[nn.Module]:
    """The largest modules of which every parameter is a tower's."""
    of_towers = {id(parameter) for parameter in tower_parameters(model)}
    found: list[nn.Module] = []

    def search(module: nn.Module) -> None:
        own = [id(parameter) for parameter in module.parameters()]
        if own and of_towers.issuperset(own) and type(module).forward is not nn.Module.forward:
            found.append(module)
        elif not of_towers.isdisjoint(own):
            for child in module.children():
                search(child)

    search(model)
    return found


def _shares_weights(module: nn.Module, model: nn.Module) -> bool:
    """Whether other modules of the model have one of this module's parameters too."""
    within = set(module.modules())
    own = {id(parameter) for parameter in module.parameters()}
    others = (other for other in model.modules() if other not in within)
    return any(id(parameter) in own for other in others for parameter in other._parameters.values())


def _require_shardable(model: nn.Module) -> None:
    dtypes: dict[torch.dtype, str] = {}
    for name, parameter in model.named_parameters():
        if not parameter.dim():
            raise ModelError(
                f"{model_type(model)}: {name} is a single number, which cannot be sharded. Set parallel.strategy: "
                "replicate"
            )
        if parameter.requires_grad:
            dtypes.setdefault(parameter.dtype, name)
    if len(dtypes) > 1:
        kinds = ", ".join(f"{str(dtype).removeprefix('torch.')} ({name})" for dtype, name in dtypes.items())
        raise ModelError(
            f"{model_type(model)}: trained weights are of several types, {kinds}, which cannot be sharded together. "
            "Set model.dtype: float32, or parallel.strategy: replicate"
        )
    of_layers: set[int] = set()
    for layer in decoder_layers(model):
        own = {id(parameter) for parameter in layer.parameters()}
        shared = not of_layers.isdisjoint(own) or _shares_weights(layer, model)
        of_layers |= own
        if shared:
            raise ModelError(
                f"{model_type(model)}: layers share weights, so they cannot be sharded layer by layer. Set "
                "parallel.strategy: replicate"
            )


# A step --------------------------------------------------------------------------------------------------------------


def begin_sequence(engine: Engine, is_last: bool) -> None:
    """Before forward and backward of each sequence of a step. is_last: of the step, on all ranks alike."""
    ranks = engine.state.ranks
    if ranks is None or ranks.root is None:
        return
    for parameter in engine.model.parameters():  # to which FSDP adds what it has summed and rounded to bfloat16
        if parameter.requires_grad and parameter.grad is None and parameter.dtype != parameter.grad_dtype:  # type: ignore[attr-defined]
            parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)  # type: ignore[attr-defined]
    ranks.root.set_is_last_backward(is_last)
    if ranks.regathers:
        ranks.root.set_requires_all_reduce(is_last)
    else:
        ranks.root.set_requires_gradient_sync(is_last)


def sum_gradients(engine: Engine) -> None:
    """After the last backward pass of a step: each `.grad` is the sum over ranks then, or this rank's shard of it.

    What has a gradient on one rank has one on all of them.
    """
    ranks = engine.state.ranks
    if ranks is None or ranks.mesh.size() == 1:
        return
    if ranks.root is not None:
        ranks.reshard()
        return
    group = ranks.mesh.get_group()
    trained = [parameter for parameter in engine.model.parameters() if parameter.requires_grad]
    found = torch.tensor([parameter.grad is not None for parameter in trained], device=engine.model.device).int()
    dist.all_reduce(found, group=group)
    with torch.no_grad():
        for parameter, num in zip(trained, found.tolist(), strict=True):
            if num and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype or parameter.dtype)  # type: ignore[attr-defined]
        for bucket in _buckets(parameter.grad for parameter in trained if parameter.grad is not None):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            dist.all_reduce(flat, group=group)
            for gradient, part in zip(bucket, flat.split([each.numel() for each in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))


def _buckets(gradients: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of one type that go over the wire together."""
    buckets: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    num_bytes: dict[torch.dtype, int] = defaultdict(int)
    for gradient in gradients:
        buckets[gradient.dtype].append(gradient)
        num_bytes[gradient.dtype] += gradient.numel() * gradient.element_size()
        if num_bytes[gradient.dtype] >= _BUCKET_BYTES:
            yield buckets.pop(gradient.dtype)
            del num_bytes[gradient.dtype]
    yield from buckets.values()
