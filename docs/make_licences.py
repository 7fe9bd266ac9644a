"""Writes docs/licences.md: the licence of each package that Preceptor needs, from the metadata of what is installed.

python docs/make_licences.py
"""

import re
import tomllib
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "licences.md"

# Spellings of licences in metadata that names them in words.
SPELLINGS = {
    "apache": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache 2.0 license": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "mit license": "MIT",
    "bsd": "BSD-3-Clause",
    "bsd license": "BSD-3-Clause",
    "isc license": "ISC",
    "isc license (iscl)": "ISC",
    "python software foundation license": "PSF-2.0",
}
# Licences that allow use, change and distribution with a notice. MPL-2.0 asks for changed files of its own only.
KNOWN = {
    "0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0",
    "CNRI-Python", "ISC", "MIT", "MIT-CMU", "MPL-2.0", "PSF-2.0", "Zlib",
}  # fmt: skip

INTRODUCTION = """# Licences of dependencies

Preceptor is under the [Apache License 2.0](../LICENSE). This is what it brings along, with the licence that each
package states. `python docs/make_licences.py` makes this page, and a test fails where a licence is unknown. Builds of
torch for CUDA also bring NVIDIA's libraries, under NVIDIA's own terms. Optional extras are not listed.

| package | licence | needed by |
|---|---|---|
"""


def name_of(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", requirement).lower()


def needed() -> dict[str, set[str]]:
    """Every package that Preceptor needs here, without extras -> the packages that ask for it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: dict[str, set[str]] = {}
    waiting = [("preceptor", project["dependencies"])]
    while waiting:
        asking, requirements = waiting.pop()
        for requirement in map(Requirement, requirements):
            marker = requirement.marker
            if marker is not None and ("extra" in str(marker) or not marker.evaluate()):
                continue
            package = name_of(requirement.name)
            if package.startswith(("nvidia-", "cuda-")):
                continue  # NVIDIA's own terms, which the page names
            if package not in found:
                waiting.append((package, distribution(package).requires or []))
            found.setdefault(package, set()).add(asking)
    return found


def licence(package: Distribution) -> str | None:
    """The licence as an SPDX expression; None where the metadata states none that is known."""
    metadata = package.metadata
    classifiers = metadata.get_all("Classifier") or ()
    words = [text.split(" :: ")[-1] for text in classifiers if text.startswith("License")]
    for stated in (metadata.get("License-Expression"), metadata.get("License"), *words):
        expression = SPELLINGS.get((stated or "").strip().lower(), (stated or "").strip())
        if expression and set(re.split(r" AND | OR ", expression)) <= KNOWN:
            return expression
    return None


def rows() -> dict[str, str]:
    """Package -> its row of the table."""
    return {
        package: f"| {package} | {licence(distribution(package)) or 'unknown'} | {', '.join(sorted(asking))} |"
        for package, asking in sorted(needed().items())
    }


if __name__ == "__main__":
    PAGE.write_text(INTRODUCTION + "\n".join(rows().values()) + "\n", encoding="utf-8")
