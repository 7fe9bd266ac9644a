"""Kinds of adapters and quantized bases, compared on the scholar: bytes, loss, skill and tax. 10 minutes on 2 cores.

    python experiments/adapters.py        # or: make adapters; needs bitsandbytes (extra `quantized`)

All have one rank. The learning rates of LoRA and PiSSA are the best of two or three by the training loss under another
seed; DoRA and QLoRA take LoRA's, rsLoRA and LoRA+ a quarter of it. Full fine-tuning stands beside them. The trainings
are those of settings.py. Writes benchmarks/results/adapters.json; docs/make_settings_pages.py makes the table of
docs/adapters.md of it.
"""

from dataclasses import dataclass, field
from typing import Any

from preceptor import config
from preceptor.model.options import LoraOptions
from preceptor.plan.memory import Setup, state_bytes
from preceptor.plan.parameters import LoraSpec
from settings import Setting, compare

RANK, LEARNING_RATE, SMALL = 16, 4e-3, 1e-3  # of LoRA; and of what takes larger steps


@dataclass(frozen=True, slots=True)
class AdapterSetting(Setting):
    """adapter: what differs from LoRA; None: full fine-tuning."""

    adapter: dict[str, Any] | None = field(default_factory=dict)
    quantization: str | None = None

    def changes(self) -> dict[str, Any]:
        adapter = None if self.adapter is None else {"rank": RANK, "alpha": 2.0 * RANK, **self.adapter}
        return {"adapter": adapter, **({"model.quantization": self.quantization} if self.quantization else {})}

    def takes(self) -> dict[str, Any]:
        from preceptor.plan.dry_run import dry_run_of

        adapter = None
        if self.adapter is not None:
            adapter = LoraSpec(RANK, options=LoraOptions.of(config.Adapter(**self.adapter)))
        setup = Setup(
            adapter=adapter,
            quantization=self.quantization,  # type: ignore[arg-type]
            double_quantization=self.quantization == "nf4",
        )
        return {"bytes": state_bytes(setup, dry_run_of(config.Model(path="scholar")).parameters(adapter))}


SETTINGS = (
    AdapterSetting("lora", "LoRA", LEARNING_RATE),
    AdapterSetting("rslora", "rsLoRA, scale 8", SMALL, {"use_rslora": True}),
    AdapterSetting("lora-plus", "LoRA+, ratio 16", SMALL, {"lr_ratio": 16.0}),
    AdapterSetting("dora", "DoRA", LEARNING_RATE, {"kind": "dora"}),
    AdapterSetting("pissa", "PiSSA", SMALL, {"init": "pissa"}),
    AdapterSetting("int8", "QLoRA, int8", LEARNING_RATE, quantization="int8"),
    AdapterSetting("nf4", "QLoRA, nf4", LEARNING_RATE, quantization="nf4"),
    AdapterSetting("full", "full fine-tuning", LEARNING_RATE / 10, None),
)

if __name__ == "__main__":
    compare("adapters", __doc__, SETTINGS, "lora", 60, 40, {"rank": RANK}, ["bitsandbytes"])
