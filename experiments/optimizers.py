"""Optimizers and types of weights, compared on the scholar: bytes, loss, skill and tax. About 25 minutes on 2 cores.

    python experiments/optimizers.py        # or: make optimizers

Each setting has a learning rate of its own: the best of a few, by the training loss under another seed. The trainings
are those of settings.py. Writes benchmarks/results/optimizers.json; docs/make_settings_pages.py makes the table of
docs/optimizers.md of it.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from preceptor.plan.memory import Setup, state_bytes
from preceptor.plan.parameters import Parameters
from settings import Setting, compare


@dataclass(frozen=True, slots=True)
class OptimizerSetting(Setting):
    optimizer: str = "adamw"
    rounding: str | None = None

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.rounding else "float32"

    def changes(self) -> dict[str, Any]:
        return {
            "model.dtype": self.dtype,
            "optimizer.name": self.optimizer,
            "optimizer.rounding": self.rounding,
            "optimizer.momentum": None,
        }

    def takes(self) -> dict[str, Any]:
        parameters = scholar_parameters()
        setup = Setup(self.dtype, optimizer=self.optimizer, rounding=self.rounding)  # type: ignore[arg-type]
        total = parameters.num_trained
        each = {name: round(count / total, 3) for name, count in state_bytes(setup, parameters).items()}
        return {"dtype": self.dtype, "bytes_per_parameter": each}


SETTINGS = (
    OptimizerSetting("float32", "adamw, float32 weights", 4e-4),
    OptimizerSetting("nearest", "adamw, bfloat16, nearest (plain)", 4e-4, rounding="nearest"),
    OptimizerSetting("stochastic", "adamw, bfloat16, stochastic", 4e-4, rounding="stochastic"),
    OptimizerSetting("exact", "adamw, bfloat16, exact", 4e-4, rounding="exact"),
    OptimizerSetting("adamw_8bit", "adamw_8bit, float32 weights", 4e-4, "adamw_8bit"),
    OptimizerSetting("exact-8bit", "adamw_8bit, bfloat16, exact", 4e-4, "adamw_8bit", "exact"),
    OptimizerSetting("muon", "muon, float32 weights", 1e-3, "muon"),
    OptimizerSetting("adafactor", "adafactor, float32 weights", 1e-2, "adafactor"),
    OptimizerSetting("sgd", "sgd, float32 weights", 2e-2, "sgd"),
)


@lru_cache
def scholar_parameters() -> Parameters:
    from preceptor import config
    from preceptor.plan.dry_run import dry_run_of

    return dry_run_of(config.Model(path="scholar")).parameters()


if __name__ == "__main__":
    compare("optimizers", __doc__, SETTINGS, "float32", num_questions=120, num_pages=80)
