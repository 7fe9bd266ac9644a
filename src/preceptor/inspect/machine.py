"""This machine: versions, devices, memory, disk, optional extras, and what is missing. Imports no torch."""

import importlib.util
import os
import platform
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import requires
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from preceptor.files import free_bytes, readable_bytes
from preceptor.plan.devices import host_memory_bytes, text_of, this_machine
from preceptor.world import num_cores, package_version

EXTRAS: Mapping[str, tuple[str, str]] = {
    "lm-eval": ("lm-eval", "tasks of lm-evaluation-harness in `preceptor eval`"),
    "tensorboard": ("tensorboard", "`tracker: tensorboard`: curves in the browser, from files in the run folder"),
    "trackio": ("trackio", "`tracker: trackio`: a local database of runs and its page"),
    "mlflow": ("mlflow", "`tracker: mlflow`"),
    "wandb": ("wandb", "`tracker: wandb`: Weights & Biases, online or offline"),
    "quantized": ("bitsandbytes", "`model.quantization`: adapters on a base in 4 or 8 bits (QLoRA)"),
    "serve": ("openai", "`transformers serve`, and a client to ask it"),
    "gguf": ("llama-cpp-python", "proof of `preceptor export --to gguf` and `--to ollama`"),
}
"""Extra -> (the package that it installs, what it adds)."""


def look_at_machine() -> dict[str, Any]:
    """All of it as plain values; `problems` says what is wrong and what to do."""
    packages = {need.name: package_version(need.name) for need in _required()}
    torch = {"version": packages.get("torch"), "build": _torch_build()}
    device = this_machine()
    gpu = {"name": device.name, "memory_bytes": device.memory_bytes} if device.device_type == "cuda" else None
    total, available = host_memory_bytes()
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    return {
        "preceptor": package_version("preceptor"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "num_cores": num_cores(),
        "memory_bytes": total,
        "available_memory_bytes": available,
        "disk": [{"path": str(place), "free_bytes": free_bytes(place)} for place in (Path.cwd(), cache)],
        "gpu": gpu,
        "torch": torch,
        "packages": packages,
        "extras": {
            name: {"installed": package_version(package), "adds": adds} for name, (package, adds) in EXTRAS.items()
        },
        "problems": list(_problems(gpu is not None, torch["build"])),
    }


def _required() -> list[Requirement]:
    """What the package needs, extras apart."""
    found = [Requirement(text) for text in requires("preceptor") or ()]
    return [need for need in found if need.marker is None or need.marker.evaluate({"extra": ""})]


def _torch_build() -> str | None:
    """`cpu`, or for which CUDA or ROCm torch was built, from its own file; None where that does not say."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = text_of(Path(spec.origin).with_name("version.py"))
    built = {name: found[1] for name in ("cuda", "hip") if (found := re.search(rf"^{name}.*= '(.+)'$", text, re.M))}
    if "cuda" in built:
        return f"CUDA {built['cuda']}"
    return f"ROCm {built['hip']}" if "hip" in built else "cpu" if text else None


def _problems(has_gpu: bool, build: str | None) -> Iterator[str]:
    for need in _required():
        found = package_version(need.name)
        wanted = f"{need.name}{need.specifier}"
        if found is None:
            yield f"{need.name} is not installed: pip install '{wanted}'"
        elif not need.specifier.contains(found, prereleases=True):
            yield f"{need.name} {found} is not the version that is needed: pip install '{wanted}'"
    if has_gpu and build == "cpu":
        yield "there is a GPU, but torch is built for the CPU: install torch's build for your CUDA version"


def to_text(found: Mapping[str, Any]) -> str:
    total, available = found["memory_bytes"], found["available_memory_bytes"]
    free = "" if available is None else f", {readable_bytes(available)} of them available"
    gpu = "none that nvidia-smi, which comes with NVIDIA's driver, tells of: training runs on the CPU"
    if found["gpu"] is not None:
        gpu = f"{found['gpu']['name']}, {readable_bytes(found['gpu']['memory_bytes'])}"
    disks = ((place["path"], place["free_bytes"]) for place in found["disk"])
    lines = [
        f"preceptor {found['preceptor']}, Python {found['python']}, {found['platform']}",
        f"  cores     {found['num_cores']}",
        f"  memory    {readable_bytes(total)}{free}",
        *(f"  disk      {'unknown' if n is None else readable_bytes(n)} free in {path}" for path, n in disks),
        f"  GPU       {gpu}",
        f"  torch     {found['torch']['version'] or 'not installed'}, built for {found['torch']['build'] or 'unknown'}",
        "",
        "Packages",
        *(f"  {name:<14}{installed or 'not installed'}" for name, installed in found["packages"].items()),
        "",
        "Extras (pip install 'preceptor[NAME]')",
        *(
            f"  {name:<14}{extra['installed'] or 'not installed':<16}{extra['adds']}"
            for name, extra in found["extras"].items()
        ),
        "",
    ]
    problems = [f"  {problem}" for problem in found["problems"]]
    return "\n".join([*lines, *(["Problems", *problems] if problems else ["Nothing is wrong."])])
