"""The command `convert`: a run file from a file of another trainer."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from preceptor import errors
from preceptor.commands.options import AsJson, large_imports
from preceptor.console import print_json, say, table_console
from preceptor.files import writing

if TYPE_CHECKING:
    from preceptor.config.peer_settings import Conversion


def convert(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="YAML of Axolotl, LLaMA-Factory, TRL, torchtune; TRL or Unsloth script."),
    ],
    run_file: Annotated[
        Path | None, typer.Argument(metavar="[RUN.yaml]", help="The run file to write. Default: print it.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help="A data file: show which of its tokens each trains.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="With --data: the model whose tokenizer is used. Default: the file's.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Turn a file of another trainer into a run file."""
    from preceptor.config.convert import convert_file

    if run_file is not None and run_file.exists():
        raise errors.ConfigError(f"{run_file}: exists already and is left as it is; name another file")
    if model is not None and data is None:
        raise errors.ConfigError("--model goes with --data")
    found = convert_file(file)
    compared = None if data is None else _compared(file, found, data, model)
    if run_file is not None:
        with writing(run_file):
            run_file.write_text(found.text(file.name), encoding="utf-8")
    if as_json:
        notes, unoffered = ([{"key": key, "why": why} for key, why in each] for each in (found.notes, found.unoffered))
        said = {"peer": found.peer, "run": found.tree, "notes": notes, "unoffered": unoffered}
        tokens = {} if compared is None else {"tokens": _shown(compared, as_json)}
        print_json({**said, "missing": found.missing, **tokens})
        return
    if run_file is None:
        say(found.text(file.name).rstrip("\n"))
    else:
        for key, why in found.notes:
            say(f"{key}: {why}")
        for key in found.missing:
            say(f"to be filled in: {key}")
        say(f"written to {run_file}. Next: {errors.command('check', run_file)}")
    if compared is not None:
        say("")
        _shown(compared, as_json)


def _compared(file: Path, found: "Conversion", data: str, model: str | None) -> tuple[Any, Any, Any]:
    """The rule of the other trainer, the tokens that both train, and the tokenizer.

    Raises ConfigError without a model, and as `check_names`.
    """
    from preceptor import config
    from preceptor.config.convert import settings_of
    from preceptor.train.session import check_names

    tree = {**found.tree, "out": "-", "tracker": []}
    named = [source.get("columns", {}) for source in tree.get("data", {}).get("train", ())]
    source = {"path": data, "columns": named[0] if named else {}}
    tree["data"] = {**tree.get("data", {}), "train": [source], "eval": []}
    tree["model"] = {**tree.get("model", {}), **({"path": model} if model else {})}
    if "path" not in tree["model"]:
        raise errors.ConfigError("--data: the file names no model, whose tokenizer is needed; name one with --model")
    run = check_names(config.build(tree, str(file)))
    with large_imports():
        from preceptor.chat.format import load_chat_format, load_tokenizer
        from preceptor.data.sources import OpenSource
        from preceptor.inspect import peer_comparison
        from preceptor.inspect.peer_rules import rule_of
    sources = [OpenSource(source) for source in run.data.train]
    chat = load_chat_format(run.model, run.data, sources)
    if chat.template is None:
        chat = load_chat_format(run.model, run.data.model_copy(update={"chat_template": "chatml"}), sources)
    assert chat.template is not None, "chatml is one"
    theirs = copy.deepcopy(chat.tokenizer)  # with the tokens that the template needs, and the model's own eos
    theirs.eos_token = load_tokenizer(run.model.path, run.model.trust_remote_code, run.model.revision).eos_token
    rule = rule_of(found.peer, settings_of(file), theirs, chat.template.text)
    both = peer_comparison.compared(run.data.train[0], rule, chat.renderer(run.data))
    return rule, both, chat.tokenizer


def _shown(compared: tuple[Any, Any, Any], as_json: bool) -> dict[str, Any]:
    """Print the tokens that both train, or return them."""
    from preceptor.inspect import peer_comparison

    rule, both, tokenizer = compared
    if as_json:
        return {"rule": rule.says, **peer_comparison.to_json(both, tokenizer)}
    peer_comparison.print_comparison(rule, both, tokenizer, table_console())
    return {}
