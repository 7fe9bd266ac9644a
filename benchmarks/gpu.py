"""The first quarter of an hour on a GPU: is all of it right, how fast is it, and does the plan hold.

    python benchmarks/gpu.py --out FOLDER [--part 1|2] [--phases facts attention ...]
    python benchmarks/gpu.py --out FOLDER --tiny --device cpu

Nothing is read from disk or network: weights are random and made on the device. Each phase has a budget of seconds;
what it has found, or why it ended, is in FOLDER/gpu.json before the next one begins. gpu.md says how to run it.
"""

import argparse
import contextlib
import gc
import importlib.util
import inspect
import json
import os
import shutil
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
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
from preceptor.files import read_json
from preceptor.model import compiled
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
from preceptor.train.optimizer import build_optimizer
from preceptor.train.step import Objective, take_step

AGAIN = 5.0  # seconds after which a phase that goes on past its budget is told once more
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
    "soft-cap": {"softcap": 20.0},
    "sinks": {"sinks": True},
}


Found = dict[str, Any]
"""What a phase has found so far, by case."""


@dataclass(frozen=True)
class Bench:
    """tiny: sizes for a test of this script. folder: for profiles beside the results."""

    device: torch.device
    tiny: bool
    folder: Path

    def shape(self, name: str) -> dict[str, Any]:
        small = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
        small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
        return SHAPES[name] | (small if self.tiny else {})

    def lengths(self, *lengths: int) -> tuple[int, ...]:
        return (96,) * len(lengths) if self.tiny else lengths

    @property
    def engines(self) -> tuple[str, ...]:
        return ("efficient",) if self.tiny else ("efficient", "compiled")

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


class OutOfTime(BaseException):
    """The budget of a phase is spent. No Exception, so that nothing on the way takes it for one of its own."""


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
    quantized = _run_of_scholar(
        bench, "qlora", steps // 2, model={"path": "scholar", "quantization": "nf4"}, adapter={}
    )
    found["qlora"] = {"losses": quantized.train().losses}


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
        "eval": {"every": "10 steps", "num_samples": 1, "max_new_tokens": 16},
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
    """Error of outputs and gradients against float64 and a dense mask; beside it that of bfloat16 and the mask."""
    lengths, sizes = ((96,), ((4, 2, 16),)) if bench.tiny else ((300, 1000, 640), ((32, 8, 128), (16, 8, 64)))
    for branches in (False, True):
        for num_tokens in lengths:
            sequence = chats(num_tokens, num_tokens // 3, 64, branches=branches)
            layout = ForestLayout.from_sequence(sequence, bench.device)
            for heads, kv_heads, size in sizes:
                for name, features in FEATURES.items():
                    case = f"{'trees' if branches else 'chains'} {num_tokens}, {heads}/{kv_heads} x {size}, {name}"
                    try:
                        found[case] = _attention_case(bench, layout, (heads, kv_heads, size), dict(features))
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
    return {
        "by": chosen.__name__,
        "errors": [distance(one, other) for one, other in zip(found, true, strict=True)],
        "errors_of_naive": [distance(one, other) for one, other in zip(naive, true, strict=True)],
        "compile_seconds": compiled.compile_seconds() - before,
        "graphs_so_far": compiled.num_graphs(),
    }


# Whole models against the CPU ----------------------------------------------------------------------------------------


def models(bench: Bench, found: Found) -> None:
    """Error of the loss, and of the whole gradient, of tiny models in all modes against the CPU in float64."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kinds = ("llama",) if bench.tiny else ("llama", "qwen3", "gemma2", "gpt_oss")
    lengths = (96,) if bench.tiny else (1000, 1300)
    for engine, kind in ((engine, kind) for engine in bench.engines for kind in kinds):
        settings = tiny_types.BASE | {"vocab_size": 128, "head_dim": 64, "sliding_window": 100}
        torch.manual_seed(0)
        true = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).train()
        own: Any = AutoModelForCausalLM.from_config(true.config).train()
        own.load_state_dict(true.state_dict())
        true, own = true.double(), own.to(bench.device)
        if kind == "gpt_oss":
            true.set_experts_implementation("eager")
        install(own, engine)  # type: ignore[arg-type]
        for mode, policy in MODES.items():
            for precision in ("bfloat16",) if bench.tiny else ("float32", "bfloat16"):
                case = f"{kind}, {engine}, {mode}, {precision}"
                try:
                    found[case] = [_model_case(true, own, each, policy, precision) for each in lengths]
                except Exception as error:
                    found[case] = {"error": first_line(error)}


def _model_case(true: Any, own: Any, num_tokens: int, policy: ActivationPolicy, precision: str) -> dict[str, float]:
    sequence = chats(num_tokens, num_tokens // 3, 128, branches=num_tokens % 200 == 0)
    losses, gradients = [], []
    for model, half in ((own, precision), (true, "float32")):
        model.zero_grad()
        with autocast(model.device, half):
            loss = Engine(model)(sequence, policy)
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(torch.cat([p.grad.flatten().cpu().double() for p in model.parameters() if p.grad is not None]))
    return {"loss_error": losses[0] / losses[1] - 1, "gradient_error": distance(*gradients)}


# Steps ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One way to train. engine: `efficient` or `compiled`. weights: their type; float32 ones under autocast."""

    shape: str
    num_tokens: int
    engine: str = "efficient"
    adapter: bool = False
    weights: str = "bfloat16"
    mode: str = "full"
    branches: bool = False
    optimizer: str = "adamw_8bit"

    def __str__(self) -> str:
        what = f"LoRA {RANK}" if self.adapter else "full fine-tuning"
        trees = ", trees" if self.branches else ""
        return f"{self.shape}, {what}, {self.weights}, {self.num_tokens} tokens{trees}, {self.mode}, {self.engine}"


def run_cases(bench: Bench, found: Found, cases: list[Case], profiled: bool = True) -> None:
    """Each as far as it gets: running out of memory is a result."""
    for case in cases:
        bench.free()
        try:
            found[str(case)] = _step_case(bench, case, profiled)
        except Exception as error:
            found[str(case)] = {"error": first_line(error)}


def _model_of(bench: Bench, case: Case) -> Any:
    model = random_model(bench.shape(case.shape), case.weights, bench.device.type, max_tokens=1 << 15)
    if case.adapter:
        model = add_adapter(model, RANK, 2.0 * RANK, 0.0, None, [], seed=0)
    install(model, case.engine)  # type: ignore[arg-type]
    return model


def _step_case(bench: Bench, case: Case, profiled: bool) -> dict[str, Any]:
    model = _model_of(bench, case)
    precision = resolve_precision(None, bench.device)  # as a run has it that does not say
    rounding: Any = "stochastic" if case.weights == "bfloat16" and not case.adapter else None
    name: Any = "adamw" if case.adapter else case.optimizer
    state = State(model, build_optimizer(model, 0.0, (0.9, 0.95), name, rounding=rounding))
    objective, losses = Objective(MODES[case.mode]), []
    length = min(512, case.num_tokens // 2)

    def step(seed: int = 0) -> None:
        sequence = chats(case.num_tokens, length, bench.shape(case.shape)["vocab_size"], seed, case.branches)
        losses.append(take_step(state, [sequence], 1e-5, 1.0, precision, objective)[0])

    started, compiling, graphs = time.perf_counter(), compiled.compile_seconds(), compiled.num_graphs()
    step()
    bench.synchronize()
    first = time.perf_counter() - started
    seconds = seconds_of(step, bench)
    sequence = chats(case.num_tokens, length, bench.shape(case.shape)["vocab_size"], 0, case.branches)
    turns = ((length // 2, length // 8), (length // 4, length // 8))
    operations = operations_of(model, turns) * max(1, case.num_tokens // length)
    peak = torch.cuda.max_memory_allocated() if bench.device.type == "cuda" else None
    return {
        "seconds": seconds,
        "first_seconds": first,
        "compile_seconds": compiled.compile_seconds() - compiling,
        "graphs": compiled.num_graphs() - graphs,
        "tokens_per_second": sequence.num_tokens / seconds,
        "operations_per_second": operations / seconds,
        "losses": losses,
        "peak_bytes": peak,
        "reserved_bytes": torch.cuda.max_memory_reserved() if bench.device.type == "cuda" else None,
        "predicted_bytes": _predicted(bench, model, case, sequence, rounding, precision),
        "waits": _waits(bench, step),
        **({"profile": _profile(bench, case, step)} if profiled else {}),
    }


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
    places = [f"{Path(each.filename).name}:{each.lineno}" for each in heard if "synchron" in str(each.message)]
    return {place: places.count(place) for place in sorted(set(places))}


def _profile(bench: Bench, case: Case, step: Callable[[], None]) -> str:
    """The name of a file with the time by kernel."""
    from torch.profiler import ProfilerActivity, profile

    cuda = bench.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
        step()
        bench.synchronize()
    name = "".join(letter if letter.isalnum() else "_" for letter in str(case)) + ".txt"
    table = found.key_averages().table(sort_by=f"self_{'device' if cuda else 'cpu'}_time_total", row_limit=40)
    (bench.folder / name).write_text(table, encoding="utf-8")
    return name


def steps_8b(bench: Bench, found: Found) -> None:
    shape, (short, long) = "llama-3.1-8b", bench.lengths(4096, 16_384)
    efficient = [Case(shape, short), Case(shape, long), Case(shape, short, branches=True)]
    compiles = [replace(case, engine="compiled") for case in efficient[:2]]
    run_cases(bench, found, [efficient[0], compiles[0]] if bench.tiny else efficient + compiles)


def lora_8b(bench: Bench, found: Found) -> None:
    cases = [Case("llama-3.1-8b", each, engine, True) for engine in bench.engines for each in (4096, 16_384)]
    run_cases(bench, found, [Case("llama-3.1-8b", 96, adapter=True)] if bench.tiny else cases)


def memory(bench: Bench, found: Found) -> None:
    """Peaks beside the plan's, float32 weights under autocast and bfloat16 ones, in all modes."""
    (length,) = bench.lengths(4096)
    cases = [Case("llama-3.2-1b", length, weights="float32", mode=mode, optimizer="adamw") for mode in MODES]
    cases += [Case("llama-3.2-1b", length, mode=mode) for mode in MODES]
    run_cases(bench, found, cases[:: 5 if bench.tiny else 1], profiled=False)


def steps_small(bench: Bench, found: Found) -> None:
    small = Case("qwen3-0.6b", 96, weights="float32", optimizer="adamw")
    cases = [replace(small, num_tokens=each, engine=engine) for engine in bench.engines for each in (4096, 16_384)]
    run_cases(bench, found, [small] if bench.tiny else cases, profiled=not bench.tiny)


# TRL -----------------------------------------------------------------------------------------------------------------


def trl(bench: Bench, found: Found) -> None:
    """The same conversations, weights and optimizer by TRL with packing, Liger and torch's varlen as its attention."""
    missing = [name for name in ("trl", "datasets") if importlib.util.find_spec(name) is None]
    if missing:
        found["skipped"] = f"not installed: {', '.join(missing)}"
        return
    for shape in ("qwen3-0.6b",) if bench.tiny else ("qwen3-0.6b", "llama-3.1-8b"):
        (num_tokens,) = bench.lengths(4096)
        case = Case(shape, num_tokens, engine="efficient" if bench.tiny else "auto", optimizer="adamw")
        bench.free()
        model = random_model(bench.shape(shape), "bfloat16", bench.device.type, max_tokens=num_tokens)
        theirs = _trl_seconds(bench, model, case)
        del model
        bench.free()
        own: Found = {}
        found[shape] = {"trl": theirs}
        run_cases(bench, own, [case], profiled=False)
        ours = found[shape]["ours"] = own[str(case)]
        if "losses" in ours:
            found[shape]["loss_difference"] = theirs["losses"][0] / ours["losses"][0] - 1
            found[shape]["times_as_fast"] = theirs["seconds"] / ours["seconds"]


def _trl_seconds(bench: Bench, model: Any, case: Case) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AttentionInterface, AttentionMaskInterface, TrainerCallback
    from transformers.masking_utils import flash_attention_mask
    from trl import SFTConfig, SFTTrainer

    AttentionInterface.register("torch_varlen", _varlen_for_trl)
    AttentionMaskInterface.register("torch_varlen", flash_attention_mask)
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
    ends: list[float] = []

    class Times(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
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
        use_liger_kernel=importlib.util.find_spec("liger_kernel") is not None,
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
    return {"seconds": float(np.diff(ends).min()), "losses": losses, "liger": arguments.use_liger_kernel}


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


# All of it -----------------------------------------------------------------------------------------------------------

PHASES: dict[str, tuple[int, int, Callable[[Bench, Found], None]]] = {
    "product": (1, 110, product),
    "facts": (1, 20, facts),
    "attention": (1, 70, attention),
    "models": (1, 60, models),
    "steps_8b": (1, 150, steps_8b),
    "memory": (1, 60, memory),
    "lora_8b": (2, 100, lora_8b),
    "steps_small": (2, 80, steps_small),
    "trl": (2, 130, trl),
}
"""Each phase: the call it belongs to, its budget in seconds, and what it does, which fills in what it has found."""


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """Raises OutOfTime inside where it takes longer, and again each few seconds: a library may hold one back."""

    def ring(*_: Any) -> None:
        raise OutOfTime(f"the budget of {seconds} s is spent")

    former = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def run_phases(bench: Bench, names: list[str]) -> dict[str, Any]:
    """What each found, also one that did not come to its end; written after each, beside what an earlier call found."""
    file = bench.folder / "gpu.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for name in names:
        _, budget, phase = PHASES[name]
        own: Found = {}
        started, found[name] = time.perf_counter(), {"found": own}
        try:
            with within(budget):
                phase(bench, own)
        except (Exception, OutOfTime) as error:
            found[name] |= {"error": first_line(error), "trace": traceback.format_exc()[-2000:]}
        found[name]["seconds"] = time.perf_counter() - started
        file.write_text(json.dumps(found, indent=1), encoding="utf-8")
        bench.free()
        print(f"{name}: {found[name].get('error', 'done')} ({found[name]['seconds']:.1f} s)", flush=True)
    return found


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "build/gpu")))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes for a test of this script")
    parser.add_argument("--part", type=int, choices=(1, 2), help="the phases of one of two calls; absent: all")
    parser.add_argument("--phases", nargs="+", choices=PHASES)
    asked = parser.parse_args(arguments)
    asked.out.mkdir(parents=True, exist_ok=True)
    names = asked.phases or [name for name, (part, *_) in PHASES.items() if asked.part in (None, part)]
    if asked.device == "cpu":
        compiled.BACKEND = "eager"  # the graphs as they are traced; a GPU has inductor
    return run_phases(Bench(torch.device(asked.device), asked.tiny, asked.out), names)


if __name__ == "__main__":
    main()
