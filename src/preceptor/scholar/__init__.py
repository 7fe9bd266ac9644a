"""The scholar: the small base model that ships with the package, its questions, and how it was made.

Other layers use the two names below and nothing else. The order in which the scholar was made:

    freeze -> facts -> library -> tokenizer -> pretraining (recipes/scholar_pretrain.yaml) -> ship
                └────> questions
"""

from pathlib import Path

from preceptor.errors import DataError

MODEL_DIR = Path(__file__).parent / "model"


def data_file(name: str) -> Path:
    """Path of a data file that ships with the package; a run file addresses it as `scholar:NAME`."""
    folder = Path(__file__).parent / "data"
    if not (folder / name).is_file():
        known = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_file()))
        raise DataError(f"scholar:{name}: the package has no such data file; it has {known}")
    return folder / name
