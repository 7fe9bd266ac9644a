"""The command `plan`: time and memory of a run, predicted."""

import time
from typing import Annotated

import typer

from preceptor.commands.options import AsJson, Overrides, RunFile, load_run, print_result
from preceptor.errors import ConfigError


def plan(
    run_file: RunFile,
    overrides: Overrides = None,
    device: Annotated[str | None, typer.Option(help="A device such as `H100`. Default: this machine.")] = None,
    as_json: AsJson = False,
    measure: Annotated[bool, typer.Option(help="Measure this machine's matrix products first.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Weights, gradients and optimizer only, at once: torch is not loaded.")
    ] = False,
    nproc: Annotated[int, typer.Option(min=1, help="Processes on each node, one to a device.")] = 1,
    nnodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 1,
) -> None:
    """Predict time and memory of a run. Reads the run file and the model's config.json only."""
    from preceptor.plan.devices import THIS_MACHINE, find_device
    from preceptor.plan.model import read_model
    from preceptor.plan.plan import make_plan
    from preceptor.plan.sample import sample_data
    from preceptor.plan.text import to_text

    run = load_run(run_file, overrides)
    target = find_device(device, run.train.device)
    if measure and not target.name.startswith(THIS_MACHINE):
        raise ConfigError(
            f"--measure: is of this machine, and --device names another ({target.name}); give one of them"
        )
    model = read_model(run.model)
    sample = sample_data(run, model.tokenizer_file)
    if quick:
        found = make_plan(run, model, sample, target)
    else:
        from preceptor.plan.changes import find_plan
        from preceptor.plan.dry_run import dry_run_of

        half = target.precision(run.train.precision) == "bfloat16" or run.model.dtype == "bfloat16"
        rate = measured_rate(half, target.device_type) if measure else None
        found = find_plan(run, model, sample, target, dry_run_of(run.model, run.engine), rate, (nproc, nnodes))
    print_result(found, as_json, to_text)


def measured_rate(half: bool, device_type: str = "cuda", seconds: float = 1.0) -> float:
    """Operations per second of large matrix products on this machine, the best of those made in `seconds`."""
    import torch

    device = device_type if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 1024
    left = torch.randn(size, size, device=device, dtype=torch.bfloat16 if half else torch.float32)
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < seconds:
        begun = time.perf_counter()
        (left @ left)[0, 0].item()
        best = min(best, time.perf_counter() - begun)
    return 2.0 * size**3 / best
