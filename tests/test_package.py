"""The wheel: it holds every file of the package, the scholar and the licence."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_wheel_holds_every_file_of_the_package(tmp_path):
    source = tmp_path / "source"  # a copy: an old `build` folder beside the code would add its files
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", source / "src", ignore=ignored)
    package = {path.relative_to(source / "src").as_posix() for path in (source / "src").rglob("*") if path.is_file()}
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ("--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--wheel-dir", tmp_path)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", *options, source], check=True, timeout=300)
    (wheel,) = tmp_path.glob("preceptor-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert package - names == set()
    assert any(name.endswith("licenses/LICENSE") for name in names)
