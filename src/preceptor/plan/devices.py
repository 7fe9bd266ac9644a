"""Devices by name: their memory, and how fast they multiply matrices.

Memory is what the driver reports, in bytes. Rates are the makers' for dense products, in operations per second: in
bfloat16 with float32 sums, and in float32. A training step reaches only a share of them; `plan` says which it assumes.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from preceptor.errors import ConfigError

MIB = 2**20
SHARE_OF_RATE = 0.4  # assumed: well-tuned training of 1-8 B models reaches 35-55 % of the makers' dense bfloat16 rates
USABLE = 0.92  # share of a device's memory that a plan may fill; the rest: the driver's context and fragmentation
THIS_MACHINE = "this machine"
_MEMINFO = Path("/proc/meminfo")
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_WITHOUT_BFLOAT16 = ("3.", "5.", "6.", "7.")  # compute capabilities of GPUs before Ampere


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """half_rate, float_rate: operations per second in bfloat16 and float32; None where not known."""

    name: str
    memory_bytes: int
    half_rate: float | None
    float_rate: float | None
    device_type: str = "cuda"
    has_bfloat16: bool = True

    @property
    def usable_bytes(self) -> int:
        return int(self.memory_bytes * USABLE)

    def precision(self, precision: str | None) -> str:
        """`train.precision` as given; absent: bfloat16 on a GPU that has it, otherwise float32, as the trainer."""
        return precision or ("bfloat16" if self.has_bfloat16 and self.device_type != "cpu" else "float32")

    def rate(self, half: bool) -> float | None:
        return self.half_rate if half else self.float_rate


DEVICES: tuple[DeviceSpec, ...] = (
    DeviceSpec("RTX 4090", 24_564 * MIB, 165.2e12, 82.6e12),
    DeviceSpec("A100 40", 40_960 * MIB, 312e12, 19.5e12),
    DeviceSpec("A100 80", 81_920 * MIB, 312e12, 19.5e12),
    DeviceSpec("H100", 81_559 * MIB, 989e12, 67e12),
    DeviceSpec("H200", 143_771 * MIB, 989e12, 67e12),
    DeviceSpec("B200", 183_359 * MIB, 2250e12, 75e12),
)


def find_device(name: str | None, own: str = "auto") -> DeviceSpec:
    """The device whose name has these words, spelt with or without spaces, hyphens and capitals; None: this machine.

    own: `train.device`, which says whether a run on this machine leaves its GPU alone.
    Raises ConfigError naming those that are known, for none or several.
    """
    if name is None or _plain(name) in ("thismachine", "this", "auto"):
        return this_machine(own)
    found = [device for device in DEVICES if _plain(name) in _spellings(device.name.lower().split())]
    if len(found) == 1:
        return found[0]
    known = ", ".join(device.name for device in DEVICES)
    raise ConfigError(f"--device {name!r}: not one known device; known are {known} and `this`")


def _spellings(words: Sequence[str]) -> set[str]:
    """Words that follow one another, without spaces: of A100 80 a100, 80 and a10080."""
    return {"".join(words[start:end]) for start in range(len(words)) for end in range(start + 1, len(words) + 1)}


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum()).removesuffix("gb")


def this_machine(own: str = "auto") -> DeviceSpec:
    """The first GPU that its driver tells of, else and for `cpu` the processor with all of its memory."""
    gpu = None if own == "cpu" else _gpu_by_driver()
    if gpu is not None:
        return gpu
    return DeviceSpec(THIS_MACHINE, host_memory_bytes()[0], None, None, device_type="cpu")


def host_memory_bytes(meminfo: Path = _MEMINFO) -> tuple[int, int | None]:
    """All of this machine's memory, without that of GPUs, and what is available of it; None where not known.

    Where a container's limit is lower, that.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [int(text) for file in _CGROUP_LIMITS if (text := text_of(file).strip()).isdigit()]
    total = min([total, *limits])
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", text_of(meminfo), re.MULTILINE)
    return total, None if found is None else min(total, int(found[1]) * 1024)


def text_of(file: Path) -> str:
    """Of a file that may not be there: then nothing."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""


def _gpu_by_driver() -> DeviceSpec | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    return _read_gpu(lines)


def _read_gpu(lines: Sequence[str]) -> DeviceSpec | None:
    """`NVIDIA H100 80GB HBM3, 81559, 9.0` -> a device, with the rates of the one in the table that it is."""
    name, mib, capability = (*lines[0].split(","), "", "", "")[:3] if lines else ("", "", "")
    if not mib.strip().isdigit():
        return None
    known = next((device for device in DEVICES if device.name.split()[-1 if "RTX" in device.name else 0] in name), None)
    rates = (None, None) if known is None else (known.half_rate, known.float_rate)
    return DeviceSpec(
        f"{THIS_MACHINE} ({name.strip()})",
        int(mib) * MIB,
        *rates,
        has_bfloat16=not capability.strip().startswith(_WITHOUT_BFLOAT16),
    )
