"""A model exported: written to a folder, proved, described; all or nothing. Pushing such a folder to the Hub."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from preceptor.chat.format import load_trained_format
from preceptor.errors import CheckpointError, ConfigError, ModelError, first_line
from preceptor.export.card import card
from preceptor.export.gguf import SENTENCE_PIECES, GgufType, Vocabulary, answers, convert, find_converter
from preceptor.export.ollama import TEXT_END, modelfile, turn_format
from preceptor.export.proof import TrainedTurns, last_logits, prove_folder, prove_gguf, prove_logits, trained_turns
from preceptor.export.source import ExportSource
from preceptor.files import read_json, replacing
from preceptor.hub import ADAPTER_CONFIG, copy_file, model_files

Target = Literal["hf", "adapter", "gguf", "ollama", "hub"]
GGUF_FILE = "model.gguf"
_NUM_LOGITS = 2  # prompts after which logits are compared
_NUM_ANSWERS, _NEW_TOKENS = 4, 32  # prompts that both programs answer, and the length of an answer


@dataclass(frozen=True)
class Export:
    """What is wanted. skip_proof: write even what is not proved. repo: on the Hub, with `private`."""

    to: Target
    out: Path
    gguf_type: GgufType = "auto"
    licence: str | None = None
    skip_proof: bool = False
    repo: str | None = None
    private: bool = True


def export(source: ExportSource, wanted: Export, say: Callable[[str], None]) -> dict[str, Any]:
    """Write what is wanted and return what was written and proved.

    Raises ModelError where it is refused, CheckpointError where `out` exists or cannot be written.
    """
    if wanted.out.exists():
        raise CheckpointError(f"{wanted.out}: exists already; choose another folder with --out, or remove this one")
    if wanted.to in ("gguf", "ollama"):
        find_converter()
    if wanted.to == "hub" and wanted.repo is None:
        raise ConfigError("--to hub: name the model to make there, as --repo OWNER/NAME")
    if wanted.repo is not None and wanted.private:
        require_not_public(wanted.repo)
    with replacing(wanted.out) as partial:
        partial.mkdir(parents=True)
        with source.made(partial.parent, say) as made:
            trained = trained_turns(made, say)
            # to the Hub the whole model; the adapter, where its own folder was named
            names_adapter = (Path(made.name).expanduser() / ADAPTER_CONFIG).is_file() and made.base is not None
            of_hub = "adapter" if names_adapter else "hf"
            proof = _WRITERS[of_hub if wanted.to == "hub" else wanted.to](made, wanted, partial, trained, say)
        if wanted.skip_proof:
            proof = ["nothing was proved (--skip-proof)"]
        text = card(made, proof, wanted.repo or wanted.out.name, wanted.licence, _use(wanted, partial))
        (partial / "README.md").write_text(text, encoding="utf-8")
    for line in proof:
        say(line)
    found: dict[str, Any] = {"out": str(wanted.out), "to": wanted.to, "proof": proof}
    if wanted.to == "hub":
        assert wanted.repo is not None
        found["address"] = push(wanted.out, wanted.repo, wanted.private)
    return found


def _write_hf(
    source: ExportSource, wanted: Export, folder: Path, trained: TrainedTurns, say: Callable[[str], None]
) -> list[str]:
    """A whole model; an adapter is merged into its base."""
    code = source.trust_remote_code
    if source.base is None:
        return _copy(source.folder, source, wanted, folder, trained)
    from preceptor.model.adapters.folder import merge_folder
    from preceptor.model.load import load_model, save_model, stored_dtype

    say(f"merging {source.folder} into {source.base}")
    contexts = [] if wanted.skip_proof else [turn.rendered.context for turn in trained.turns[:_NUM_LOGITS]]
    origin: dict[str, Any] = {"trust_remote_code": code, "revision": source.revision}
    base, expected = load_model(source.base, "float32", "cpu", **origin), []
    merged = merge_folder(base, source.folder, lambda adapted: expected.extend(last_logits(adapted, contexts)))
    tokenizer = load_trained_format(str(source.folder), trust_remote_code=code).tokenizer
    shutil.rmtree(folder)
    dtype = stored_dtype(source.base, **origin)
    save_model(merged, tokenizer, folder, dtype=dtype)
    del base, merged
    if wanted.skip_proof:
        return []
    copy = load_model(folder, "float32", "cpu", trust_remote_code=code)
    return prove_folder(folder, trained, code) + prove_logits(folder, copy, contexts, expected, dtype)


def _write_adapter(
    source: ExportSource, wanted: Export, folder: Path, trained: TrainedTurns, say: Callable[[str], None]
) -> list[str]:
    return _copy(source.adapter, source, wanted, folder, trained)


def _copy(origin: Path, source: ExportSource, wanted: Export, folder: Path, trained: TrainedTurns) -> list[str]:
    for name in model_files(origin):
        copy_file(origin / name, folder / name)
    return [] if wanted.skip_proof else prove_folder(folder, trained, source.trust_remote_code)


def _write_gguf(
    source: ExportSource, wanted: Export, folder: Path, trained: TrainedTurns, say: Callable[[str], None]
) -> list[str]:
    whole = source.folder
    if source.base is not None:
        whole = folder / "merged"
        whole.mkdir()
        _write_hf(source, wanted, whole, trained, say)
    say(f"llama.cpp converts {source.folder}")
    code = source.trust_remote_code
    chat = load_trained_format(str(whole), trust_remote_code=code)
    texts = [text for turn in trained.turns for text in (turn.rendered.context_text, turn.rendered.target_text)]
    pieces = None if (whole / SENTENCE_PIECES).exists() else source.base_file(SENTENCE_PIECES)
    proof = convert(whole, folder / GGUF_FILE, wanted.gguf_type, chat.tokenizer, texts, pieces)
    form = turn_format(chat) if wanted.to == "ollama" else None
    if not wanted.skip_proof:
        proof += [*prove_folder(whole, trained, code), *prove_gguf(folder / GGUF_FILE, trained, form)]
        proof += _compare_answers(whole, folder / GGUF_FILE, wanted.gguf_type, trained, code)
    if form is not None:
        stops = chat.tokenizer.convert_ids_to_tokens(list(chat.stop_token_ids))
        bos = None if wanted.skip_proof else Vocabulary(folder / GGUF_FILE).bos
        settings = {**read_json(whole / "generation_config.json"), "num_ctx": _num_ctx(source, whole)}
        system = _only_system_prompt(source)
        if system and TEXT_END in system:
            say(f"Modelfile: no SYSTEM, as {TEXT_END} in the system prompt would end it there; send it as a message")
            system = None
        text = modelfile(form, GGUF_FILE, bos, stops, settings, system, wanted.licence)
        (folder / "Modelfile").write_text(text, encoding="utf-8")
    if whole != source.folder:
        shutil.rmtree(whole)
    return proof


_WRITERS = {"hf": _write_hf, "adapter": _write_adapter, "gguf": _write_gguf, "ollama": _write_gguf}


def _compare_answers(
    whole: Path, file: Path, gguf_type: GgufType, trained: TrainedTurns, trust_remote_code: bool
) -> list[str]:
    """Say how many greedy answers are the same in transformers and llama.cpp; types of weights round differently.

    Raises ModelError where none is, unless weights of 8 bits or a sliding window that llama.cpp may leave out say why.
    """
    from preceptor.evaluate.model import load_evaluated_model

    contexts = [turn.rendered.context for turn in trained.turns[:_NUM_ANSWERS]]
    if not contexts:
        return []
    model = load_evaluated_model(str(whole), "float32", "cpu", trust_remote_code=trust_remote_code)
    here, stops = model.generate(contexts, _NEW_TOKENS), model.chat.stop_token_ids
    there = [tuple(id_ for id_ in answer if id_ not in stops) for answer in answers(file, contexts, _NEW_TOKENS)]
    same = sum(a.ids == b for a, b in zip(here, there, strict=True))
    answered = f"{same} of {len(contexts)} greedy answers of {_NEW_TOKENS} tokens are those of transformers"
    window = getattr(model.model.config.get_text_config(decoder=True), "sliding_window", None)
    exceeds_window = isinstance(window, int) and max(map(len, contexts)) + _NEW_TOKENS > window
    if not same and gguf_type != "q8_0" and not exceeds_window:
        raise ModelError(
            f"refused: {file.name}, in llama.cpp: {answered}, though it reads the same tokens: it computes something "
            "else. Nothing was written (--skip-proof writes it all the same)"
        )
    warning = "" if same else ": its answers are others; compare both before you use it"
    return [f"llama.cpp: {answered}{warning}"]


def _num_ctx(source: ExportSource, folder: Path) -> int | None:
    """The context that Ollama makes room for: that of training, at least 4,096, as far as the model has positions."""
    positions = read_json(folder / "config.json").get("max_position_embeddings")
    wanted = max(4096, int(source.run.config["data"]["max_length"])) if source.run else 4096
    return min(wanted, positions) if isinstance(positions, int) else wanted


def _only_system_prompt(source: ExportSource) -> str | None:
    """The system prompt that all conversations of the run had."""
    found: dict[str, Any] = (source.run.data.get("system_prompts") if source.run else None) or {}
    most_common = found.get("most_common") or [("", 0)]
    prompt, count = most_common[0]
    return prompt if prompt and count == found.get("num_conversations") else None


def _use(wanted: Export, folder: Path) -> str | None:
    """How to load what is no whole model; an adapter: as in the README that came with it."""
    readme = folder / "README.md"
    if (folder / ADAPTER_CONFIG).is_file() and readme.is_file():
        before, _, code = readme.read_text(encoding="utf-8").partition("```python\n")
        return f"```python\n{code.partition('```')[0]}```\n" if before and code else None
    if wanted.to == "gguf":
        return f"    llama-server -m {GGUF_FILE} --jinja\n"
    if wanted.to == "ollama":
        return f"    ollama create {wanted.out.name} -f Modelfile\n    ollama run {wanted.out.name}\n"
    return None


def require_not_public(repo: str) -> None:
    """Raises ModelError where the model `repo` (owner/name) is on the Hub already, for all to see."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    with _explained(repo):
        try:
            is_public = HfApi().model_info(repo).private is False
        except RepositoryNotFoundError:
            return
    if is_public:
        raise ModelError(
            f"{repo}: is on the Hub already, for all to see, and so would be what is pushed there. Allow it with "
            "--public, or name another model with --repo. Nothing was written or pushed"
        )


def push(folder: Path, repo: str, private: bool) -> str:
    """Upload a folder as the model `repo` (owner/name), made where it does not exist; return its address.

    Raises ModelError where the Hub does not take it.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _explained(repo):
        address = str(api.create_repo(repo, private=private, exist_ok=True))
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload by preceptor export")
    return address


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever its HTTP client raises: no connection, no right, no such owner
        raise ModelError(
            f"{repo}: cannot be pushed to the Hub: {first_line(error)}. Log in with a token that may write "
            "(`hf auth login`, or HF_TOKEN)"
        ) from error
