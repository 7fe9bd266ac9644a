"""`show`, `check` and `template`: what will be trained, before it is."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from preceptor import errors
from preceptor.commands.arguments import REJECTED, DataFile, ModelPath, OptionalRunFile, TemplateName, run_of
from preceptor.commands.importing import large_imports


def show(
    run_file: OptionalRunFile = None,
    model: ModelPath = None,
    data: DataFile = None,
    chat_template: TemplateName = None,
    example: Annotated[int | None, typer.Option(min=1, help="Only this example of the data, counted from 1.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a conversation.")] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="A page on which to step through rows.")
    ] = None,
) -> None:
    """Show which tokens of each conversation are context and which are trained."""
    from preceptor.console import standard_console
    from preceptor.inspect.page import check_page_file, write_page
    from preceptor.inspect.show import show_rows

    if html is not None:
        check_page_file(html, as_json)
    run = run_of(run_file, model, data, chat_template)
    renderer, records = _open_data(run)
    console = standard_console()
    if html is not None:
        about = f"{', '.join(source.path for source in run.data.train)}, as {run.model.path} reads it"
        num_rows = write_page(html, records, renderer, about, example)
        console.print(f"rows in {html}: {num_rows}; open it in a browser", highlight=False)
    else:
        num_rows = show_rows(records, renderer, example, as_json, console)
    if not num_rows:
        raise errors.DataError(
            "the data has no examples" if example is None else f"--example {example}: the data has fewer examples"
        )


def check(
    run_file: OptionalRunFile = None,
    model: ModelPath = None,
    data: DataFile = None,
    chat_template: TemplateName = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Prove every row of the data and count what is rejected and why; exit code 3 unless the run file allows it."""
    run = run_of(run_file, model, data, chat_template)
    with large_imports():
        from preceptor.inspect.check import check_data, to_json
        from preceptor.inspect.check_text import to_text

    found = to_json(check_data(run, num_processes=min(4, os.cpu_count() or 1)), run)
    print(json.dumps(found, indent=2, ensure_ascii=False) if as_json else to_text(found))
    if not found["passed"]:
        raise typer.Exit(REJECTED)


def template(
    name: Annotated[str, typer.Argument(help="`chatml`, `llama3`, a .jinja file, or a model with its own.")],
    model: Annotated[str | None, typer.Option(help="With a template's name or file: whose tokenizer to use.")] = None,
    kwargs: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="An argument of the template, e.g. enable_thinking=false; repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show what a chat template can and cannot do, from the same proofs as training."""
    from preceptor.chat.template import BUILTIN
    from preceptor.inspect.stand_in import stand_in_renderer
    from preceptor.inspect.template import find_abilities, to_json, to_text

    is_template = name in BUILTIN or Path(name).suffix == ".jinja" or Path(name).is_file()
    if model is not None and not is_template:
        raise errors.ConfigError(
            f"--model goes with chatml, llama3 or a .jinja file; {name} is taken for a model itself"
        )
    arguments = _template_kwargs(kwargs or [])
    assumed: tuple[str, ...] | None = None
    if is_template and model is None:
        renderer, assumed = stand_in_renderer(name, arguments)
    else:
        renderer = _renderer_for(model or name, name if is_template else "tokenizer", arguments)
    for unread in sorted(arguments.keys() - renderer.template.names_read):
        raise errors.ConfigError(f"--kwargs {unread}: the template {name} reads no argument of this name")
    found = to_json(find_abilities(renderer, assumed))
    print(json.dumps(found, indent=2, ensure_ascii=False) if as_json else to_text(found))


def _template_kwargs(pairs: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` with YAML values -> arguments of a template. Raises ConfigError."""
    import yaml

    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise errors.ConfigError(f"--kwargs {pair}: give KEY=VALUE, e.g. --kwargs enable_thinking=false")
        if key in ("messages", "tools", "add_generation_prompt"):
            raise errors.ConfigError(
                f"--kwargs {pair}: {key} is what the template is tried with; give another argument"
            )
        try:
            found[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise errors.ConfigError(f"--kwargs {pair}: {text!r} is no YAML value ({error})") from error
    return found


def _renderer_for(model: str, template: str, template_kwargs: dict[str, Any]) -> Any:
    from preceptor import config

    with large_imports():
        from preceptor.chat.format import load_chat_format

    data = {"train": [{"path": "-"}], "chat_template": template, "chat_template_kwargs": template_kwargs}
    tree = {"model": {"path": model}, "data": data, "out": "-"}
    run = config.build(tree, "command line")
    return load_chat_format(run.model, run.data).renderer(run.data)


def _open_data(run: Any) -> tuple[Any, Iterator[Any]]:
    """The renderer of a run and its examples to train on."""
    with large_imports():
        from preceptor.chat.format import load_chat_format
        from preceptor.data.sources import OpenSource

    train, held_out = ([OpenSource(source) for source in part] for part in (run.data.train, run.data.eval))
    renderer = load_chat_format(run.model, run.data, [*train, *held_out]).renderer(run.data)
    return renderer, (example for source in train for example in source.examples())
