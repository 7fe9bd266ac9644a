"""`show`, `check` and `template`: what will be trained, before it is."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from preceptor import errors
from preceptor.commands.arguments import REFUSED, DataFile, ModelPath, OptionalRunFile, TemplateName, run_of


def show(
    run_file: OptionalRunFile = None,
    model: ModelPath = None,
    data: DataFile = None,
    template: TemplateName = None,
    row: Annotated[int | None, typer.Option(min=1, help="Only this row of the data, counted from 1.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a conversation.")] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="A page on which to step through rows.")
    ] = None,
) -> None:
    """Show which tokens of each conversation are context and which are trained."""
    from preceptor.study.page import check_page_file, write_page
    from preceptor.study.show import show_rows
    from preceptor.train.metrics import standard_console

    if html is not None:
        check_page_file(html, as_json)
    run = run_of(run_file, model, data, template)
    renderer, records = _open_data(run)
    console = standard_console()
    if html is not None:
        about = f"{', '.join(source.path for source in run.data.train)}, as {run.model.path} reads it"
        num_rows = write_page(html, records, renderer, about, row)
        console.print(f"rows in {html}: {num_rows}; open it in a browser", highlight=False)
    else:
        num_rows = show_rows(records, renderer, row, as_json, console)
    if not num_rows:
        raise errors.DataError("the data has no rows" if row is None else f"--row {row}: the data has fewer rows")


def check(
    run_file: OptionalRunFile = None,
    model: ModelPath = None,
    data: DataFile = None,
    template: TemplateName = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Prove every row of the data and count what is refused and why; exit code 3 unless the run file allows it."""
    from preceptor.data.sources import resolve

    run = run_of(run_file, model, data, template)
    tables = [table for source in (*run.data.train, *run.data.eval) for table in resolve(source)]
    from preceptor.study.check import check_data, to_json
    from preceptor.study.check_text import to_text
    from preceptor.study.progress import row_progress
    from preceptor.train.prepare import give_voice

    renderer = give_voice(run.model, run.data).renderer(run.data)
    with row_progress(tables, "checking") as on_row:
        found = to_json(check_data(run, renderer, on_row))
    print(json.dumps(found, indent=2, ensure_ascii=False) if as_json else to_text(found))
    if not found["passed"]:
        raise typer.Exit(REFUSED)


def template(
    name: Annotated[str, typer.Argument(help="`chatml`, `llama3`, a .jinja file, or a model with its own.")],
    model: Annotated[str | None, typer.Option(help="With a template's name or file: whose tokenizer to use.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show what a chat template can and cannot do, from the same proofs as training."""
    from preceptor.data.template import BUILTIN
    from preceptor.study.abilities import find_abilities, to_json
    from preceptor.study.abilities_text import to_text
    from preceptor.study.stand_in import stand_in_renderer

    is_template = name in BUILTIN or Path(name).suffix == ".jinja" or Path(name).is_file()
    if model is not None and not is_template:
        raise errors.ConfigError(
            f"--model goes with chatml, llama3 or a .jinja file; {name} is taken for a model itself"
        )
    if is_template and model is None:
        found = find_abilities(*stand_in_renderer(name))
    else:
        found = find_abilities(_renderer_of(model or name, name if is_template else "tokenizer"))
    print(json.dumps(to_json(found), indent=2, ensure_ascii=False) if as_json else to_text(to_json(found)))


def _renderer_of(model: str, template: str) -> Any:
    from preceptor import config
    from preceptor.train.prepare import give_voice

    tree = {"model": {"path": model}, "data": {"train": [{"path": "-"}], "template": template}, "out": "-"}
    run = config.build(tree, "command line")
    return give_voice(run.model, run.data).renderer(run.data)


def _open_data(run: Any) -> tuple[Any, Iterator[Any]]:
    from preceptor.data.sources import read_records, resolve
    from preceptor.train.prepare import give_voice

    for source in run.data.train:
        resolve(source)
    voice = give_voice(run.model, run.data)
    records = (record for source in run.data.train for record in read_records(source))
    return voice.renderer(run.data), records
