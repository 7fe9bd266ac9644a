"""GGUF files: llama.cpp's converter, driven; its tokenizer and its answers, by llama-cpp-python."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from preceptor.errors import ModelError, short
from preceptor.files import read_json
from preceptor.hub import model_files

CONVERTER = "convert_hf_to_gguf.py"
TOKENIZER_CONFIG, SENTENCE_PIECES = "tokenizer_config.json", "tokenizer.model"
GgufType = Literal["auto", "f32", "f16", "bf16", "q8_0"]

# Runs the converter: once, or once for each name of a pattern, which takes the place of what it would find.
_DRIVER = """
import pathlib, runpy, sys
converter, names, *arguments = sys.argv[1:]
folder = pathlib.Path(converter).parent
sys.path.insert(0, str(folder))
sys.path.insert(1, str(folder / "gguf-py"))
for name in names.split(","):
    if name:
        from conversion.base import TextModel
        TextModel.get_vocab_base_pre = lambda self, tokenizer, name=name: name
    sys.argv = [converter, *(argument.replace("{name}", name) for argument in arguments)]
    runpy.run_path(converter, run_name="__main__")
"""
# How llama.cpp can split a text before its byte pairs are merged: one name of each form, the usual ones first. `bloom`
# splits least: it gives the same ids wherever no merge of the tokenizer crosses the pieces of its own pattern.
_PATTERNS = """gpt-2 llama-bpe qwen2 qwen35 gpt-4o tekken deepseek-v3 starcoder falcon viking
bloom""".split()  # noqa: SIM905
_CHUNK = 40  # tokens whose texts are joined, in several ways, to compare patterns


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


def convert(
    folder: Path, file: Path, gguf_type: GgufType, tokenizer: Any, texts: Sequence[str], pieces: Path | None = None
) -> list[str]:
    """Write a GGUF file from a Hugging Face folder.

    tokenizer, texts: where llama.cpp does not know the tokenizer's pattern, one that it knows and that gives the same
    ids for these texts, and for the tokens of the vocabulary beside one another, takes its place; which one is returned
    as a sentence. pieces: the tokenizer.model of the model that was trained, where the folder has none. Raises
    ModelError with the converter's own reason, or where there is no such pattern.
    """
    settings = ["--outfile", str(file), "--outtype", gguf_type]
    with tempfile.TemporaryDirectory() as place:
        given = _as_the_converter_reads_it(folder, Path(place) / folder.resolve().name, tokenizer, pieces)
        said, named = _driven("", given, *settings), []
        if "pre-tokenizer" in said:
            name, num = _equal_pattern(folder, given, tokenizer, texts)
            said = _driven(name, given, *settings)
            named = [
                f"llama.cpp: its pattern `{name}`, in place of the tokenizer's, gave the same ids for {num:,} texts"
            ]
    if said or not file.is_file():
        raise ModelError(f"{folder}: llama.cpp's converter failed: {_reason(said)}")
    return named


def _as_the_converter_reads_it(folder: Path, place: Path, tokenizer: Any, pieces: Path | None) -> Path:
    """The folder with what the converter reads of a SentencePiece tokenizer and transformers no longer writes.

    tokenizer.model, added_tokens_decoder, and whether a space is put before a text that follows a special token.
    """
    place.mkdir()
    for name in model_files(folder):
        if name.name != TOKENIZER_CONFIG:
            (place / name).parent.mkdir(exist_ok=True)
            (place / name).symlink_to((folder / name).resolve())
    about = read_json(folder / TOKENIZER_CONFIG)
    if pieces is not None:
        (place / SENTENCE_PIECES).symlink_to(pieces.resolve())
    added = tokenizer.added_tokens_decoder
    about.setdefault(
        "added_tokens_decoder",
        {id_: {"content": token.content, "special": token.special} for id_, token in added.items()},
    )
    if "\u2581" in tokenizer.get_vocab():
        after = tokenizer.tokenize(f"{tokenizer.eos_token}a", add_special_tokens=False)
        about["add_prefix_space"] = any(token.startswith("\u2581") for token in after[1:])
    (place / TOKENIZER_CONFIG).write_text(json.dumps(about), encoding="utf-8")
    return place


def _driven(names: str, folder: Path, *arguments: str) -> str:
    """What the converter said where it failed."""
    command = [sys.executable, "-c", _DRIVER, str(find_converter()), names, str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    return (done.stderr + done.stdout).strip() or f"exit code {done.returncode}" if done.returncode else ""


def _reason(said: str) -> str:
    if "File not found: " in said and SENTENCE_PIECES in said:
        return (
            f"it reads this kind of tokenizer from {SENTENCE_PIECES}, which neither this folder nor its base has: copy "
            "it there from the model that was trained"
        )
    lines = [line for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("ERROR", "NotImplementedError"))] or lines[-1:]
    return errors[-1] if errors else "no output"


def _equal_pattern(folder: Path, given: Path, tokenizer: Any, texts: Sequence[str]) -> tuple[str, int]:
    """The first of _PATTERNS with the tokenizer's ids, and the number of texts compared. Raises ModelError."""
    unknown = f"{folder}: llama.cpp does not know this tokenizer's pattern (its pre-tokenizer)"
    otherwise = "`--to hf` is proved with transformers; docs/serve.md says what serves it"
    if importlib.util.find_spec("llama_cpp") is None or sys.modules.get("llama_cpp", ...) is None:
        raise ModelError(
            f"{unknown}. With llama-cpp-python installed (`pip install llama-cpp-python`), those that it knows are "
            f"tried for one that gives the same token ids. {otherwise}"
        )
    compared = [*texts, *_joined_tokens(tokenizer)]
    expected = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in compared]
    differs = ""
    with tempfile.TemporaryDirectory() as place:
        settings = ("--outfile", f"{place}/{{name}}.gguf", "--vocab-only")
        if said := _driven(",".join(_PATTERNS), given, *settings):
            raise ModelError(f"{unknown}; its converter failed: {_reason(said)}")
        for name in _PATTERNS:
            try:
                vocabulary = Vocabulary(Path(place) / f"{name}.gguf")
            except ModelError:  # a pattern that the installed llama.cpp does not know
                continue
            pairs = zip(compared, expected, strict=True)
            text = next((text for text, ids in pairs if vocabulary.ids(text) != ids), None)
            if text is None:
                return name, len(compared)
            differs = short(text)
    raise ModelError(
        f"{unknown}, and none of the {len(_PATTERNS)} that were tried gives its token ids: the last differs for "
        f"{differs}. {otherwise}"
    )


def _joined_tokens(tokenizer: Any) -> Iterator[str]:
    """Texts in which the vocabulary's tokens stand beside one another, and beside what patterns treat apart."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    texts = [tokenizer.decode([id_]) for id_ in range(len(tokenizer)) if id_ not in special]
    texts = [text for text in texts if text and "\ufffd" not in text]
    for start in range(0, len(texts), _CHUNK):
        for between in ("", " ", "'", "\n\n", "  ", "1"):
            yield between.join(texts[start : start + _CHUNK])


def _llama(file: Path, **settings: Any) -> Any:
    try:
        import llama_cpp
    except ImportError:
        raise ModelError(
            "llama-cpp-python is not installed, without which it cannot be proved that the GGUF file reads what was "
            "trained: `pip install llama-cpp-python`, or --skip-proof"
        ) from None
    llama_cpp.llama_log_set(_silence(llama_cpp), None)  # what goes wrong is raised
    try:
        return llama_cpp.Llama(str(file), verbose=False, **settings)
    except ValueError as error:
        raise ModelError(f"{file}: llama.cpp cannot load what its converter wrote: {error}") from error


@cache
def _silence(llama_cpp: Any) -> Any:
    return llama_cpp.llama_log_callback(lambda level, text, user_data: None)


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
