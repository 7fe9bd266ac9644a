"""The scholar: the small base model that ships with the package, and its data files.

`experiments/make_scholar.py` builds both; nothing of that is needed to use them.
"""

from pathlib import Path

from preceptor.errors import DataError

MODEL_DIR = Path(__file__).parent / "model"
DATA_DIR = Path(__file__).parent / "data"


def data_file(name: str) -> Path:
    """Path of a data file that ships with the package; a run file addresses it as `scholar:NAME`."""
    if not (DATA_DIR / name).is_file():
        known = ", ".join(sorted(path.name for path in DATA_DIR.iterdir() if path.is_file()))
        raise DataError(f"scholar:{name}: the package has no such data file; it has {known}")
    return DATA_DIR / name
