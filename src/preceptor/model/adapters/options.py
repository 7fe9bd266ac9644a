"""What kind of LoRA an adapter is, and the types of its quantized base, as plain values; without torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from preceptor import config

Quantization = Literal["nf4", "int8"]
Init = Literal["kaiming", "gaussian", "pissa", "pissa_fast"]


@dataclass(frozen=True, slots=True)
class LoraOptions:
    """See the section `adapter` of the run file. Patterns are pairs (name, value): the first that fits holds."""

    dora: bool = False
    rslora: bool = False
    init: Init = "kaiming"
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    modules_to_save: tuple[str, ...] = ()

    @classmethod
    def of(cls, adapter: config.Adapter) -> "LoraOptions":
        return cls(
            adapter.kind == "dora",
            adapter.use_rslora,
            adapter.init,
            tuple(adapter.rank_pattern.items()),
            tuple(adapter.alpha_pattern.items()),
            tuple(adapter.modules_to_save),
        )

    @property
    def keeps_first_values(self) -> bool:
        """Whether the adapter holds its first values too, as half of its rank (pissa.py)."""
        return self.init.startswith("pissa")

    @property
    def differs_by_layer(self) -> bool:
        """Whether layers of one kind may be adapted in different ways."""
        return bool(self.rank_pattern or self.modules_to_save)


PLAIN = LoraOptions()


def lr_factors(adapter: config.Adapter | None) -> Mapping[str, float]:
    """Factors of the learning rate by pattern of names: LoRA+ (Hayou et al. 2024)."""
    return {} if adapter is None or adapter.lr_ratio == 1 else {"*.lora_B.*": adapter.lr_ratio}


def adapter_name(adapter: config.Adapter) -> str:
    """An adapter, such as `DoRA of rank 16 with PiSSA`."""
    name = "DoRA" if adapter.kind == "dora" else "rsLoRA" if adapter.use_rslora else "LoRA"
    return f"{name} of rank {adapter.rank}{' with PiSSA' if adapter.init.startswith('pissa') else ''}"
