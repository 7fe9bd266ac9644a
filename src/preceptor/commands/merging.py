"""`merge`."""

from pathlib import Path
from typing import Annotated

import typer

from preceptor import errors


def merge(
    base: Annotated[str, typer.Argument(help="The base model: folder, Hub id or `scholar`.")],
    tuned: Annotated[str, typer.Argument(help="The model after tuning.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    weight: Annotated[float, typer.Option(help="Share of the tuned model: 0 is the base, 1 the tuned model.")] = 0.5,
) -> None:
    """Average the weights of base and tuned model: (1 - weight) * base + weight * tuned (WiSE-FT)."""
    if not 0 <= weight <= 1:
        raise errors.ConfigError(f"--weight {weight:g}: must be from 0 (the base) to 1 (the tuned model)")
    from preceptor.model.merge import merge_weights

    merge_weights(base, tuned, weight, out)
    print(f"{out}: {1 - weight:g} of {base}, {weight:g} of {tuned}")
