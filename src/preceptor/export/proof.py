"""Proof that what is exported reads the contexts of training, token for token, and stops where it was trained to."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from preceptor.chat.format import ChatFormat, load_trained_format
from preceptor.errors import ModelError
from preceptor.export.contexts import TrainedTurn, TrainedTurns
from preceptor.export.ollama import TurnFormat

_SHOWN = 12  # tokens on each side of a difference
_LEAST = 1e-4  # relative difference of logits that merging in float32 may make


def prove_folder(folder: Path, trained: TrainedTurns, trust_remote_code: bool = False) -> list[str]:
    """Hold a Hugging Face folder, as plain transformers reads it, against the trained turns; say what is proved.

    Raises ModelError for the first context that differs.
    """
    chat = load_trained_format(str(folder), trust_remote_code=trust_remote_code)
    if chat.template is None:
        return ["the model has no chat template: it reads plain text, and no context of a conversation was compared"]
    needs_switch = 0
    for turn in trained.turns:
        found = _as_transformers(chat, turn, {})
        if found != turn.rendered.context and turn.switched:
            needs_switch += 1
            found = _as_transformers(chat, turn, turn.switched)
        require_equal(f"{folder}, in transformers", turn, found, turn.rendered.context)
        require_stop(str(folder), turn, turn.rendered.target[-1] in chat.stop_token_ids)
    lines = [f"transformers: the contexts of {trained.origin} are those of training, token for token"]
    if needs_switch:
        lines.append(f"{needs_switch} of them need the template's switch in the request, as it was set in training")
    return lines


def _as_transformers(chat: ChatFormat, turn: TrainedTurn, switched: object) -> tuple[int, ...]:
    arguments = {**turn.arguments, **switched}  # type: ignore[dict-item]
    ids = chat.tokenizer.apply_chat_template(
        chat.fit(turn.messages),
        tools=turn.tools,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
        **arguments,
    )
    return tuple(ids)


def require_equal(what: str, turn: TrainedTurn, found: Sequence[int], trained: Sequence[int]) -> None:
    """Raises ModelError where the tokens differ."""
    if tuple(found) == tuple(trained):
        return
    at = next(
        (i for i, (a, b) in enumerate(zip(found, trained, strict=False)) if a != b), min(len(found), len(trained))
    )
    near = slice(max(0, at - 2), at + _SHOWN)
    raise ModelError(
        f"refused: {what} reads another context than training for {turn.source}, message {turn.rendered.message}: from "
        f"token {at} on {list(found[near])} of {len(found)}, trained {list(trained[near])} of {len(trained)}. Nothing "
        "was written (--skip-proof writes it all the same)"
    )


def require_stop(what: str, turn: TrainedTurn, stops: bool) -> None:
    if not stops:
        raise ModelError(
            f"refused: {what} does not stop at token {turn.rendered.target[-1]}, which ends the trained turn "
            f"{turn.rendered.message} of {turn.source}. Nothing was written (--skip-proof writes it all the same)"
        )


def last_logits(model: Any, contexts: Sequence[Sequence[int]]) -> list[Any]:
    """The logits after each context."""
    import torch

    with torch.no_grad():
        inputs = (torch.tensor([list(context)], device=model.device) for context in contexts)
        return [model(input_ids=ids).logits[0, -1] for ids in inputs]


def prove_logits(
    folder: Path, model: Any, contexts: Sequence[Sequence[int]], expected: Sequence[Any], dtype: Any
) -> list[str]:
    """Hold the model of a folder against the logits of what was merged into it; say what is proved.

    dtype: of the weights in the folder. Raises ModelError where more than its rounding lies between them.
    """
    from preceptor.model.numerics import relative_error, rounding

    if not contexts:
        return []
    allowed = max(_LEAST, rounding(dtype or model.dtype))
    found = last_logits(model, contexts)
    error = max(relative_error(one, other) for one, other in zip(found, expected, strict=True))
    if not error <= allowed:
        raise ModelError(
            f"refused: {folder}: its logits after {len(contexts)} contexts are not those of the adapter beside its "
            f"base: a relative difference of {error:.1e}, rounding allows {allowed:.1e}. Nothing was written "
            "(--skip-proof writes it all the same)"
        )
    return [
        f"transformers: the logits after {len(contexts)} contexts are those of the adapter beside its base, unmerged"
    ]


def prove_gguf(file: Path, trained: TrainedTurns, form: TurnFormat | None = None) -> list[str]:
    """Hold a GGUF file, as llama.cpp reads it, against the trained turns; say what is proved.

    form: that of a Modelfile; its texts are held against the contexts too. Raises ModelError for the first
    difference, and where llama-cpp-python is missing.
    """
    from preceptor.export.gguf import Vocabulary

    vocabulary = Vocabulary(file)
    for turn in trained.turns:
        rendered = turn.rendered
        require_equal(f"{file.name}, in llama.cpp,", turn, vocabulary.ids(rendered.context_text), rendered.context)
        require_stop(file.name, turn, vocabulary.ends(rendered.target[-1]))
        text = vocabulary.text(rendered.target[:-1])
        require_equal(f"{file.name} (targets), in llama.cpp,", turn, vocabulary.ids(text), rendered.target[:-1])
    lines = [f"llama.cpp: contexts and answers of {trained.origin} have the token ids of training"]
    if form is None:
        return lines
    covered = [turn for turn in trained.turns if turn.is_plain]
    for turn in covered:
        prompt = form.render(turn.messages)
        require_equal("the Modelfile, in Ollama,", turn, vocabulary.prompt_ids(prompt), turn.rendered.context)
    others = len(trained.turns) - len(covered)
    lines.append(f"Modelfile: its template gives the contexts of {len(covered)} turns, token for token")
    if others:
        lines.append(f"{others} turns have tools, reasoning or template arguments: Ollama's template has none of these")
    return lines
