"""The phases of gpu.py, each run in a process of its own: `gpu_phases.py NAME --file FILE ...`.

Nothing is read from disk or network: weights are random and made on the device. What a phase has found is in FILE
after each case, in the order of what is most wanted, since it ends wherever its budget does.
"""

import argparse
import gc
import importlib.util
import inspect
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shapes import SHAPES, matrix_product_rate, operations_of, random_model
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

import tiny_types
from machine import describe
from preceptor import Run
from preceptor.data.forest import PackedSequence, Segment, Tree, pack_trees
from preceptor.evaluate.figures import summary
from preceptor.evaluate.harness import open_task
from preceptor.evaluate.model import load_evaluated_model
from preceptor.evaluate.run import run_task
from preceptor.files import read_json, write_json
from preceptor.model import compiled
from preceptor.model.activations.passes import ModelState
from preceptor.model.adapters.lora import add_adapter
from preceptor.model.attention.cuda import fast_path
from preceptor.model.attention.layout import AttentionOptions, ForestLayout
from preceptor.model.attention.runs import attend_reference, attend_runs
from preceptor.model.forward import Engine
from preceptor.model.numerics import autocast, resolve_precision
from preceptor.model.optimisations import install
from preceptor.model.options import KEEP_ALL, ActivationPolicy
from preceptor.plan.dry_run import dry_run_like
from preceptor.plan.memory import Setup, step_memory
from preceptor.plan.parameters import LoraSpec
from preceptor.serve.chat import Speaker
from preceptor.train.checkpoint import State
from preceptor.train.optimizer import build_optimizer, compile_update
from preceptor.train.step import Objective, take_step
from preceptor.train.weightwise import WeightwiseOptimizer

RANK = 16
MODES = {
    "full": KEEP_ALL,
    "checkpointed": ActivationPolicy("full", "all"),
    "recompute": ActivationPolicy("recompute"),
    "detach": ActivationPolicy("detach"),
}
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window 63": {"window": 63},
    "window of the length": {"window": -1},
    "soft-cap 50": {"softcap": 50.0},  # Gemma 2's
    "soft-cap 20": {"softcap": 20.0},
    "sinks": {"sinks": True},
}


class Found(dict[str, Any]):
    """What a phase has found so far, by case; written with each."""

    def __init__(self, file: Path | None = None) -> None:
        super().__init__()
        self.file = file

    def __setitem__(self, case: str, value: Any) -> None:
        super().__setitem__(case, value)
        if self.file is not None:
            write_json(self.file, self)


@dataclass(frozen=True)
class Bench:
    """tiny: sizes for a test of this script. folder: for runs. kernels: the file that tables by kernel are added to."""

    device: torch.device
    tiny: bool
    folder: Path
    kernels: Path

    def shape(self, name: str) -> dict[str, Any]:
        small = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
        small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
        return SHAPES[name] | (small if self.tiny else {})

    def lengths(self, *lengths: int) -> tuple[int, ...]:
        return (96,) * len(lengths) if self.tiny else lengths

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def chats(num_tokens: int, length: int, vocab_size: int, seed: int = 0, branches: bool = False) -> PackedSequence:
    """Conversations of `length` tokens, a quarter of them trained, in two turns; branches: two answers of a prompt."""
    rng = np.random.default_rng(seed)

    def segment(kind: Any, share: float, parent: int | None) -> Segment:
        ids = rng.integers(3, vocab_size, size=max(1, round(length * share)))
        return Segment(kind, tuple(ids.tolist()), parent)

    def tree() -> Tree:
        second = 0 if branches else 1
        parts = [segment("context", 0.5, None), segment("target", 0.125, 0), segment("context", 0.25, second)]
        return Tree("made:1", (*parts, segment("target", 0.125, 2)))

    return pack_trees([tree() for _ in range(max(1, num_tokens // length))])


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def distance(found: Tensor, true: Tensor) -> float:
    found, true = found.detach().cpu().double(), true.detach().cpu().double()
    return float((found - true).norm() / true.norm().clamp_min(1e-30))


# The product ---------------------------------------------------------------------------------------------------------


def product(bench: Bench, found: Found) -> None:
    """A user's first hour in small: train the model that ships with it, stop, go on, evaluate, ask; then QLoRA."""
    steps = 2 if bench.tiny else 20
    run, losses = _run_of_scholar(bench, "product", steps), []
    for step in run.steps():
        losses.append(step.loss)
        if step.number == steps // 2:
            break  # as a signal does: the step is saved
    found["stopped_after"] = len(losses)
    trained = run.train(resume=True)
    found["losses"], found["evaluations"] = trained.losses, len(trained.evaluations)
    found["engine"] = read_json(trained.out / "environment.json")["engine"]
    evaluated = load_evaluated_model(str(trained.model), "float32", bench.device.type)
    task = open_task("scholar:heldout").limited(2 if bench.tiny else 32, 0)
    found["heldout"] = summary(task, run_task(evaluated, task, 16, batch_size=16), 0)["figures"]
    found["answer"] = Speaker(evaluated, 16).reply("Which module does IOBase belong to?")
    if importlib.util.find_spec("bitsandbytes") is None:
        found["qlora"] = "skipped: bitsandbytes is not installed"
        return
    quantized = {"path": "scholar", "quantization": "nf4"}
    found["qlora"] = {"losses": _run_of_scholar(bench, "qlora", steps // 2, model=quantized, adapter={}).train().losses}


def product_auto(bench: Bench, found: Found) -> None:
    """The same with the engine of a run that does not say: on a GPU the layers are compiled, in the preflight."""
    trained = _run_of_scholar(bench, "auto", 2 if bench.tiny else 10, engine="auto").train()
    found["losses"] = trained.losses
    found["engine"] = read_json(trained.out / "environment.json")["engine"]


def _run_of_scholar(bench: Bench, name: str, steps: int, **sections: Any) -> Run:
    """A new one, quiet."""
    out = bench.folder / name
    shutil.rmtree(out, ignore_errors=True)
    train = [{"path": "scholar:conversations.jsonl", "weight": 0.02 if bench.tiny else 1.0}]
    held_out = [{"path": "scholar:heldout.jsonl", "weight": 0.005 if bench.tiny else 0.02}]
    settings = {
        "model": "scholar",
        "data": {"train": train, "eval": held_out, "chat_template": "chatml", "max_length": 512},
        "train": {"duration": f"{steps} steps", "batch_size": 2, "device": bench.device.type},
        "eval": {"every": "10 steps", "num_samples": 1, "max_new_tokens": 2 if bench.tiny else 16},
        "engine": "efficient",
    }
    return Run(**settings | sections, out=out, quiet=True)  # type: ignore[arg-type]


# Facts ---------------------------------------------------------------------------------------------------------------


def facts(bench: Bench, found: Found) -> None:
    found["environment"], found["varlen_attn"] = describe(), str(inspect.signature(varlen_attn))
    found["not_compiled"] = compiled.why_not(
        random_model(bench.shape("qwen3-0.6b") | {"num_hidden_layers": 1}), bench.device
    )
    found["installed"] = [
        name
        for name in ("triton", "trl", "liger_kernel", "flashoptim", "torchao", "bitsandbytes", "flash_attn_interface")
        if importlib.util.find_spec(name)
    ]
    if bench.device.type == "cuda":
        found["flash"] = torch.backends.cuda.is_flash_attention_available()
        found["capability"] = torch.cuda.get_device_capability()
        found["memory_bytes"] = torch.cuda.get_device_properties(bench.device).total_memory
    precisions = ("float32",) if bench.tiny else ("bfloat16", "float32")
    found["operations_per_second"] = {each: matrix_product_rate(each, bench.device) for each in precisions}
    one = torch.zeros(1 << (10 if bench.tiny else 28), device=bench.device)
    found["copied_bytes_per_second"] = 2 * one.nbytes / seconds_of(lambda: one.clone(), bench)
    small = torch.zeros(1, device=bench.device)
    found["launch_seconds"] = seconds_of(lambda: [small.add_(1) for _ in range(1000)], bench) / 1000


def seconds_of(function: Callable[[], Any], bench: Bench, times: int = 3) -> float:
    """The fastest of a few, after one that does not count."""
    seconds = []
    for _ in range(2 if bench.tiny else times + 1):
        bench.synchronize()
        started = time.perf_counter()
        function()
        bench.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


# Attention -----------------------------------------------------------------------------------------------------------


def attention(bench: Bench, found: Found) -> None:
    """Error of outputs and gradients against float64 and a dense mask; beside it that of bfloat16 and the mask.

    Flex compiles once for each kind of case, which is most of the time.
    """
    lengths, sizes = ((384,), ((4, 2, 16),)) if bench.tiny else ((300, 1000, 640), ((32, 8, 128), (16, 8, 64)))
    first = [("trees", "plain"), ("trees", "window 63"), ("chains", "plain"), ("chains", "window 63")]
    rest = [(kind, name) for name in FEATURES for kind in ("trees", "chains") if (kind, name) not in first]
    for heads, kv_heads, size in sizes:
        for kind, name in first + rest:
            for num_tokens in lengths:
                case = f"{kind} {num_tokens}, {heads}/{kv_heads} x {size}, {name}"
                sequence = chats(num_tokens, num_tokens // 3, 64, branches=kind == "trees")
                try:
                    layout = ForestLayout.from_sequence(sequence, bench.device)
                    found[case] = _attention_case(bench, layout, (heads, kv_heads, size), dict(FEATURES[name]))
                except Exception as error:
                    found[case] = {"error": first_line(error)}


def _attention_case(bench: Bench, layout: ForestLayout, sizes: tuple[int, int, int], features: Any) -> dict[str, Any]:
    heads, kv_heads, size = sizes
    num_tokens = len(layout.position_T)
    if features.get("window") == -1:
        features["window"] = num_tokens // 3 - 1
    torch.manual_seed(0)
    made = [torch.randn(1, each, num_tokens, size, device=bench.device) for each in (heads, kv_heads, kv_heads)]
    sinks = torch.randn(heads, device=bench.device) if features.pop("sinks", None) else None
    weight = torch.randn(1, heads, num_tokens, size, device=bench.device)

    def results(attend: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        tensors = [each.to(dtype).requires_grad_() for each in made]
        own_sinks = None if sinks is None else sinks.to(dtype)
        output = attend(*tensors, layout, AttentionOptions(size**-0.5, sinks=own_sinks, **features))
        return [output, *torch.autograd.grad((output * weight.to(dtype)).sum(), tensors)]

    half = [each.bfloat16() for each in made]
    options = AttentionOptions(size**-0.5, sinks=sinks, **features)
    chosen = fast_path(half[0], half[1], half[2], layout, options) or attend_runs
    before = compiled.compile_seconds()
    found, naive = results(chosen, torch.bfloat16), results(attend_reference, torch.bfloat16)
    true = results(attend_reference, torch.float64)
    errors, of_naive = (
        [distance(one, other) for one, other in zip(each, true, strict=True)] for each in (found, naive)
    )
    return {
        "by": chosen.__name__,
        "worst": float(np.max(np.divide(errors, of_naive))),  # NaN where one is
        "errors": errors,
        "errors_of_naive": of_naive,
        "compile_seconds": compiled.compile_seconds() - before,
        "graphs_so_far": compiled.num_graphs(),
    }


# Whole models against the CPU ----------------------------------------------------------------------------------------


def models(bench: Bench, found: Found) -> None:
    """Error of the loss, and of the whole gradient, of tiny models in all modes against the CPU in float64.

    One mode and precision of each type first.
    """
    for kind, engine, mode, precision in _model_cases(bench):
        case = f"{kind}, {engine}, {mode}, {precision}"
        lengths = (400,) if bench.tiny else (1000, 1300)
        try:
            own = _own_model(kind, engine, bench.device)
            found[case] = [_model_case(kind, own, each, mode, precision) for each in lengths]
        except Exception as error:
            found[case] = {"error": first_line(error)}


def _model_cases(bench: Bench) -> list[tuple[str, str, str, str]]:
    """(type, engine, mode, precision). gpt_oss in float32 alone: rounded, its routers choose other experts for some
    tokens, and the gradient is another one; its layers are not compiled.
    """
    first = {"llama": "bfloat16", "qwen3": "bfloat16", "gemma2": "bfloat16", "gpt_oss": "float32"}
    cases = [
        (kind, engine, mode, precision)
        for engine in ("efficient", "compiled")
        for mode in MODES
        for kind in first
        for precision in ("bfloat16", "float32")
        if kind != "gpt_oss" or (precision == "float32" and engine == "efficient")
    ]
    cases.sort(key=lambda case: case[2:] != ("full", first[case[0]]))
    if bench.tiny:  # each type once, one in all modes
        cases = [case for case in cases if case[1] == "efficient" and case[3] == first[case[0]]]
        return [case for case in cases if case[2] == "full" or case[0] == "llama"]
    return cases


def _model_case(kind: str, own: Any, num_tokens: int, mode: str, precision: str) -> dict[str, float]:
    loss, gradient = _loss_and_gradient(own, num_tokens, MODES[mode], precision)
    true_loss, true_gradient = _true(kind, num_tokens, detached=mode == "detach")
    return {"loss_error": loss / true_loss - 1, "gradient_error": distance(gradient, true_gradient)}


def _loss_and_gradient(model: Any, num_tokens: int, policy: ActivationPolicy, precision: str) -> tuple[float, Tensor]:
    sequence = chats(num_tokens, num_tokens // 3, 128, branches=num_tokens % 200 == 0)
    model.zero_grad()
    with autocast(model.device, precision):
        loss = Engine(model)(sequence, policy)
    loss.backward()
    gradients = [p.grad.flatten().cpu().double() for p in model.parameters() if p.grad is not None]
    return float(loss.detach()), torch.cat(gradients)


@lru_cache
def _true(kind: str, num_tokens: int, detached: bool) -> tuple[float, Tensor]:
    """Whatever else is computed again has the same gradient."""
    return _loss_and_gradient(_true_model(kind), num_tokens, MODES["detach" if detached else "full"], "float32")


@lru_cache
def _true_model(kind: str) -> Any:
    model = _tiny_model(kind).double()
    if kind == "gpt_oss":
        model.set_experts_implementation("eager")
    return model


@lru_cache
def _own_model(kind: str, engine: str, device: torch.device) -> Any:
    model = _tiny_model(kind).to(device)
    _install(model, engine, device)
    return model


def _install(model: Any, engine: str, device: torch.device) -> ModelState:
    """As a run has it, which proves first that the formulas of `efficient` modules can be compiled (`fused`)."""
    state = install(model, engine)  # type: ignore[arg-type]
    if engine == "efficient" and compiled.no_compiler(device) is None:
        state.optimisations.add("fused")
    return state


def _tiny_model(kind: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = tiny_types.BASE | {"vocab_size": 128, "head_dim": 64, "sliding_window": 100}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).train()


# Steps ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One way to train. engine: `efficient` or `compiled`. weights: their type; float32 ones under autocast.

    without: an optimisation that is switched off.
    """

    shape: str
    num_tokens: int
    engine: str = "efficient"
    adapter: bool = False
    weights: str = "bfloat16"
    mode: str = "full"
    branches: bool = False
    optimizer: str = "adamw_8bit"
    without: str = ""

    def __str__(self) -> str:
        what = f"LoRA {RANK}" if self.adapter else "full fine-tuning"
        trees, without = ", trees" * self.branches, f" without {self.without}" * bool(self.without)
        tokens = f"{self.num_tokens} tokens{trees}"
        return f"{self.shape}, {what}, {self.weights}, {tokens}, {self.mode}, {self.engine}{without}"


def run_cases(bench: Bench, found: Found, cases: list[Case], profiled: bool = True) -> None:
    """Each as far as it gets: running out of memory is a result."""
    for case in cases:
        try:
            bench.free()
            found[str(case)] = _step_case(bench, case, profiled)
        except Exception as error:
            found[str(case)] = {"error": first_line(error)}


def _model_of(bench: Bench, case: Case) -> Any:
    model = random_model(bench.shape(case.shape), case.weights, bench.device.type, max_tokens=1 << 15)
    if case.adapter:
        model = add_adapter(model, RANK, 2.0 * RANK, 0.0, None, [], seed=0)
    _install(model, case.engine, bench.device).optimisations.discard(case.without)
    return model


class _Update:
    """In place of an optimizer's `step`: timed by itself, or left out. The host waits for the device on both sides;
    before the update it has read the loss anyway.
    """

    def __init__(self, bench: Bench, optimizer: torch.optim.Optimizer) -> None:
        self.bench, self.own, self.off = bench, optimizer.step, False
        self.seconds: list[float] = []
        optimizer.step = self  # type: ignore[assignment, method-assign]

    def __call__(self) -> None:
        self.bench.synchronize()
        started = time.perf_counter()
        if not self.off:
            self.own()
            self.bench.synchronize()
        self.seconds.append(time.perf_counter() - started)


def _step_case(bench: Bench, case: Case, profiled: bool) -> dict[str, Any]:
    model = _model_of(bench, case)
    precision = resolve_precision(None, bench.device)  # as a run has it that does not say
    rounding: Any = "stochastic" if case.weights == "bfloat16" and not case.adapter else None
    name: Any = "adamw" if case.adapter else case.optimizer
    state = State(model, build_optimizer(model, 0.0, (0.9, 0.95), name, rounding=rounding))
    said: list[str] = []
    compile_update(state.optimizer, bench.device, said.append)  # as a run does before step 1
    objective, losses, update = Objective(MODES[case.mode]), [], _Update(bench, state.optimizer)
    length = min(512, case.num_tokens // 2)
    sequence = chats(case.num_tokens, length, bench.shape(case.shape)["vocab_size"], 0, case.branches)

    def step() -> None:
        losses.append(take_step(state, [sequence], 1e-5, 1.0, precision, objective)[0])

    started, compiling, graphs = time.perf_counter(), compiled.compile_seconds(), compiled.num_graphs()
    step()
    bench.synchronize()
    first = time.perf_counter() - started
    seconds = seconds_of(step, bench, times=2)
    of_update = min(update.seconds[1:])
    turns = ((length // 2, length // 8), (length // 4, length // 8))
    adapter = LoraSpec(RANK) if case.adapter else None
    operations = operations_of(model, turns, adapter, MODES[case.mode]) * max(1, case.num_tokens // length)
    result = {
        "seconds": seconds,
        "update_seconds": of_update,
        "first_seconds": first,
        "compile_seconds": compiled.compile_seconds() - compiling,
        "graphs": compiled.num_graphs() - graphs,
        "tokens_per_second": sequence.num_tokens / seconds,
        "operations_per_second": operations / seconds,
        "operations_per_second_without_update": operations / (seconds - of_update),
        "losses": losses,
        "peak_bytes": torch.cuda.max_memory_allocated() if bench.device.type == "cuda" else None,
        "reserved_bytes": torch.cuda.max_memory_reserved() if bench.device.type == "cuda" else None,
        "predicted_bytes": _predicted(bench, model, case, sequence, rounding, precision),
        "waits": _waits(bench, step),
        "said": said,
    }
    if profiled and isinstance(state.optimizer, WeightwiseOptimizer) and state.optimizer.compiled:
        state.optimizer.compiled = False
        step()
        result["update_seconds_not_compiled"] = update.seconds[-1]
    if profiled:
        update.off = True
        result["kernels"] = _profile(bench, case, step)
    return result


def _predicted(
    bench: Bench, model: Any, case: Case, sequence: PackedSequence, rounding: Any, precision: str
) -> int | None:
    """Bytes, by the plan: of the efficient engine, also where layers are compiled."""
    adapter = LoraSpec(RANK) if case.adapter else None
    name: Any = "adamw" if case.adapter else case.optimizer
    weights: Any = case.weights
    half = precision == "bfloat16"
    setup = Setup(weights, half, adapter, device_type=bench.device.type, optimizer=name, rounding=rounding)
    dry_run = dry_run_like(model)
    parameters = dry_run.parameters(adapter)
    return step_memory(setup, parameters, dry_run.step(setup, MODES[case.mode], sequence, dry_run.num_rows)).peak_bytes


def _waits(bench: Bench, step: Callable[[], None]) -> dict[str, int] | None:
    """How often, and where, the host waits for the device in a step."""
    if bench.device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return _places(heard)


def _places(heard: list[warnings.WarningMessage]) -> dict[str, int]:
    """Not torch's warning of the mode itself, which comes once."""
    told = [each for each in heard if "called a synchronizing" in str(each.message)]
    places = [f"{Path(each.filename).name}:{each.lineno}" for each in told]
    return {place: places.count(place) for place in sorted(set(places))}


def _profile(bench: Bench, case: Case, step: Callable[[], None]) -> list[tuple[str, int, float]]:
    """The kernels that take longest: name, calls, milliseconds; more of them are added to a file."""
    from torch.profiler import ProfilerActivity, profile

    cuda = bench.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
        step()
        bench.synchronize()
    events, by = found.key_averages(), f"self_{'device' if cuda else 'cpu'}_time_total"
    with bench.kernels.open("a", encoding="utf-8") as file:
        file.write(f"{case}\n{events.table(sort_by=by, row_limit=40)}\n")
    longest = sorted(events, key=lambda each: -getattr(each, by))[:12]
    return [(each.key[:80], each.count, getattr(each, by) / 1000) for each in longest]


def steps_8b(bench: Bench, found: Found) -> None:
    shape, (short, long) = "llama-3.1-8b", bench.lengths(4096, 16_384)
    case = Case(shape, short)
    if bench.tiny:
        run_cases(bench, found, [case, replace(case, engine="compiled")])
        return
    cases = [case, replace(case, engine="compiled"), replace(case, without="fused"), Case(shape, long)]
    cases += [replace(case, branches=True), Case(shape, long, engine="compiled")]
    run_cases(bench, found, cases)


def lora_8b(bench: Bench, found: Found) -> None:
    if bench.tiny:
        run_cases(bench, found, [Case("llama-3.1-8b", 96, adapter=True)])
        return
    engines = ("efficient", "compiled")
    run_cases(bench, found, [Case("llama-3.1-8b", each, engine, True) for engine in engines for each in (4096, 16_384)])


def memory(bench: Bench, found: Found) -> None:
    """Peaks beside the plan's, float32 weights under autocast and bfloat16 ones, in all modes."""
    (length,) = bench.lengths(4096)
    cases = [Case("llama-3.2-1b", length, weights="float32", mode=mode, optimizer="adamw") for mode in MODES]
    cases += [Case("llama-3.2-1b", length, mode=mode) for mode in MODES]
    run_cases(bench, found, cases[:: 5 if bench.tiny else 1], profiled=False)


def steps_small(bench: Bench, found: Found) -> None:
    small = Case("qwen3-0.6b", 96, weights="float32", optimizer="adamw")
    engines = ("efficient", "compiled")
    cases = [replace(small, num_tokens=each, engine=engine) for engine in engines for each in (4096, 16_384)]
    run_cases(bench, found, [small] if bench.tiny else cases, profiled=not bench.tiny)


# TRL -----------------------------------------------------------------------------------------------------------------


def trl(bench: Bench, found: Found) -> None:
    """The same conversations and weights by TRL without padding, with Liger and torch's varlen as its attention.

    Ours first, of all shapes: Liger then changes the modules of transformers for the rest of the process. Compared is
    what both do alike, forward, backward and clipping; TRL's update keeps bfloat16 states and rounds to the nearest,
    ours keeps float32 states and rounds at random.
    """
    missing = [name for name in ("trl", "datasets") if importlib.util.find_spec(name) is None]
    if missing:
        found["skipped"] = f"not installed: {', '.join(missing)}"
        return
    (num_tokens,), engine = bench.lengths(4096), "efficient" if bench.tiny else "auto"
    shapes = ("qwen3-0.6b",) if bench.tiny else ("qwen3-0.6b", "llama-3.1-8b")
    cases = [Case(shape, num_tokens, engine=engine, optimizer="adamw") for shape in shapes]
    run_cases(bench, found, cases, profiled=False)
    for case in cases:
        try:
            bench.free()
            theirs = found[f"{case.shape}, TRL"] = _trl_seconds(bench, case)
            ours = found[str(case)]
            found[f"{case.shape}, compared"] = {
                "loss_difference": theirs["losses"][0] / ours["losses"][0] - 1,
                "times_as_fast": theirs["gradient_seconds"] / (ours["seconds"] - ours["update_seconds"]),
                "whole_step_times_as_fast": theirs["seconds"] / ours["seconds"],
            }
        except Exception as error:
            found[f"{case.shape}, TRL"] = {**found.get(f"{case.shape}, TRL", {}), "error": first_line(error)}


def _trl_seconds(bench: Bench, case: Case) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AttentionInterface, AttentionMaskInterface, TrainerCallback
    from transformers.masking_utils import flash_attention_mask
    from trl import SFTConfig, SFTTrainer

    AttentionInterface.register("torch_varlen", _varlen_for_trl)
    AttentionMaskInterface.register("torch_varlen", flash_attention_mask)
    model = random_model(bench.shape(case.shape), "bfloat16", bench.device.type, max_tokens=case.num_tokens)
    model.set_attn_implementation("torch_varlen")
    length, num_steps = min(512, case.num_tokens // 2), 2 if bench.tiny else 6
    sequence = chats(case.num_tokens, length, bench.shape(case.shape)["vocab_size"], 0)
    starts = [span.start for span in sequence.spans if span.parent is None]
    label_T = np.full(sequence.num_tokens, -100)
    label_T[sequence.source_N + 1] = sequence.target_N
    pieces = list(pairwise([*starts, sequence.num_tokens]))
    rows = {
        name: [each[a:b].tolist() for a, b in pieces]
        for name, each in (("input_ids", sequence.ids_T), ("labels", label_T))
    }
    begins, clipped, ends = [], [], []

    class Times(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            bench.synchronize()
            begins.append(time.perf_counter())

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            bench.synchronize()
            clipped.append(time.perf_counter())

        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            bench.synchronize()
            ends.append(time.perf_counter())

    arguments = SFTConfig(
        output_dir=str(bench.folder / "trl"),
        per_device_train_batch_size=len(pieces),
        max_steps=num_steps,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        bf16=False,  # the weights are bfloat16 on both sides
        packing=False,
        padding_free=True,
        max_length=None,
        use_liger_kernel=bench.device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None,
        gradient_checkpointing=False,
        use_cpu=bench.device.type == "cpu",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        optim="adamw_torch_fused",
        seed=0,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(rows),
        processing_class=_tokenizer(),
        callbacks=[Times()],
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    seconds = np.subtract(ends, begins)[1:], np.subtract(clipped, begins)[1:], np.subtract(ends, clipped)[1:]
    names = ("seconds", "gradient_seconds", "update_seconds")
    fastest = {name: float(each.min()) for name, each in zip(names, seconds, strict=True)}
    return {**fastest, "losses": losses, "liger": arguments.use_liger_kernel}


def _tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    made = Tokenizer(WordLevel(words, unk_token="<unk>"))
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", chat_template=template
    )


def _varlen_for_trl(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **named: Any,
) -> tuple[Tensor, None]:
    """Of all conversations of a batch without padding; where they begin is in `position_ids` or `cu_seq_lens_q`."""
    begins = named.get("cu_seq_lens_q")
    if begins is None:
        position = named["position_ids"].flatten()
        begins = torch.cat([torch.nonzero(position == 0).flatten(), position.new_tensor([len(position)])]).to(
            torch.int32
        )
    if query.device.type == "cpu":
        cuts = begins.tolist()
        parts = [_causal(query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], scaling) for a, b in pairwise(cuts)]
        return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None
    longest = int(named.get("max_length_q") or begins.diff().max())
    settings: dict[str, Any] = {"scale": scaling, "window_size": (-1, 0)}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        settings["enable_gqa"] = True
    flat: Any = [each[0].transpose(0, 1) for each in (query, key, value)]
    output: Any = varlen_attn(flat[0], flat[1], flat[2], begins, begins, longest, longest, **settings)
    return output[None], None


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)


# One of them ---------------------------------------------------------------------------------------------------------

PHASES: dict[str, Callable[[Bench, Found], None]] = {
    phase.__name__: phase
    for phase in (facts, product, attention, steps_8b, models, trl, memory, lora_8b, product_auto, steps_small)
}


def main(arguments: list[str] | None = None) -> Found:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=PHASES)
    parser.add_argument("--file", type=Path, required=True, help="what was found")
    parser.add_argument("--folder", type=Path, required=True, help="for runs")
    parser.add_argument("--kernels", type=Path, required=True, help="tables by kernel are added to it")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args(arguments)
    if asked.device == "cpu":
        compiled.BACKEND = "eager"  # the graphs as they are traced; a GPU has inductor
    found = Found(asked.file)
    PHASES[asked.phase](Bench(torch.device(asked.device), asked.tiny, asked.folder, asked.kernels), found)
    return found


if __name__ == "__main__":
    main()
