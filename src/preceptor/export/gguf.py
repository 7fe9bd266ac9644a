"""GGUF files: llama.cpp's converter, driven; its tokenizer and its answers, by llama-cpp-python."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from preceptor.errors import ModelError

CONVERTER = "convert_hf_to_gguf.py"
GgufType = Literal["auto", "f32", "f16", "bf16", "q8_0"]

# Runs the converter. A byte-level tokenizer whose pattern is GPT-2's, and which its list does not know, is named so;
# the token ids are compared afterwards.
_DRIVER = """
import json, pathlib, runpy, sys
converter, folder = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
sys.path.insert(0, str(converter.parent))
sys.path.insert(1, str(converter.parent / "gguf-py"))
sys.argv = [str(converter), *sys.argv[2:]]
def plain_gpt2():
    split = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")).get("pre_tokenizer") or {}
    return split.get("type") == "ByteLevel" and split.get("use_regex", True) and not split.get("add_prefix_space")
try:
    from conversion.base import TextModel
except ImportError:
    pass
else:
    known = TextModel.get_vocab_base_pre
    def pre(self, tokenizer):
        try:
            return known(self, tokenizer)
        except NotImplementedError:
            if plain_gpt2():
                return "gpt-2"
            raise
    TextModel.get_vocab_base_pre = pre
runpy.run_path(str(converter), run_name="__main__")
"""


def find_converter() -> Path:
    """llama.cpp's converter: in the folder that LLAMA_CPP names, else on the PATH. Raises ModelError."""
    named = os.environ.get("LLAMA_CPP")
    if named:
        place = Path(named).expanduser()
        file = place if place.is_file() else place / CONVERTER
        if not file.is_file():
            raise ModelError(f"LLAMA_CPP={named}: holds no {CONVERTER}; name the folder of llama.cpp's sources")
        return file
    found = shutil.which(CONVERTER)
    if found is None:
        raise ModelError(
            f"no {CONVERTER} here: GGUF files are made by llama.cpp's converter. Get its sources (`git clone "
            "https://github.com/ggml-org/llama.cpp`; the source package of llama-cpp-python holds them in "
            "vendor/llama.cpp too) and name their folder in LLAMA_CPP"
        )
    return Path(found)


def convert(folder: Path, file: Path, gguf_type: GgufType) -> None:
    """Write a GGUF file from a Hugging Face folder. Raises ModelError with the converter's own reason."""
    command = [sys.executable, "-c", _DRIVER, str(find_converter()), str(folder)]
    done = subprocess.run(
        [*command, "--outfile", str(file), "--outtype", gguf_type], capture_output=True, text=True, errors="replace"
    )
    if done.returncode or not file.is_file():
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        errors = [line for line in said if line.startswith(("ERROR", "NotImplementedError"))] or said[-1:]
        unknown = "" if "pre-tokenizer" not in done.stderr else " (llama.cpp does not know this tokenizer's pattern)"
        raise ModelError(f"{folder}: llama.cpp's converter failed{unknown}: {errors[-1] if errors else 'no output'}")


def _llama(file: Path, **settings: Any) -> Any:
    try:
        import llama_cpp
    except ImportError:
        raise ModelError(
            "llama-cpp-python is not installed, without which it cannot be proved that the GGUF file reads what was "
            "trained: `pip install llama-cpp-python`, or --skip-proof"
        ) from None
    try:
        return llama_cpp.Llama(str(file), verbose=False, **settings)
    except ValueError as error:
        raise ModelError(f"{file}: llama.cpp cannot load what its converter wrote: {error}") from error


class Vocabulary:
    """The tokenizer that llama.cpp reads from a GGUF file."""

    def __init__(self, file: Path) -> None:
        self._llama = _llama(file, vocab_only=True)

    def ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._llama.tokenize(text.encode(), add_bos=False, special=True)) if text else ()

    @property
    def bos(self) -> str | None:
        """The text of the bos token that llama.cpp puts before a prompt by itself; None if it puts none."""
        adds = self._llama.metadata.get("tokenizer.ggml.add_bos_token") == "true"
        return self.text([self._llama.token_bos()]) if adds else None

    def prompt_ids(self, text: str) -> tuple[int, ...]:
        """As a server that lets llama.cpp add its bos token; where the text begins with one, none is added."""
        bos = self.bos
        ids = self.ids(text if bos is None else text.removeprefix(bos))
        return ids if bos is None else (self._llama.token_bos(), *ids)

    def text(self, ids: Sequence[int]) -> str:
        pieces = self._llama.detokenize(list(ids), special=True) if ids else b""
        return bytes(pieces).decode(errors="replace")

    def ends(self, id_: int) -> bool:
        """Whether llama.cpp stops at this token."""
        import llama_cpp

        return bool(llama_cpp.llama_vocab_is_eog(llama_cpp.llama_model_get_vocab(self._llama.model), id_))


def answers(file: Path, contexts: Sequence[Sequence[int]], max_new_tokens: int) -> list[tuple[int, ...]]:
    """The greedy answer to each context, by llama.cpp on the CPU; the token that ends it included."""
    longest = max(map(len, contexts)) + max_new_tokens + 1
    llama = _llama(file, n_ctx=longest, n_threads=1)
    vocabulary, found = Vocabulary(file), []
    for context in contexts:
        answer: list[int] = []
        llama.reset()
        for id_ in llama.generate(list(context), temp=0.0, repeat_penalty=1.0, reset=True):
            answer.append(id_)
            if vocabulary.ends(id_) or len(answer) == max_new_tokens:
                break
        found.append(tuple(answer))
    return found
