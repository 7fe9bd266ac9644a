"""The commands. The only place that catches errors, and that picks exit codes.

Exit codes: 0 done; 2 the command line or run file is wrong; 3 the data; 4 the chat template; 5 the model; 6 the run
directory or a checkpoint; 130 interrupted. Whatever else goes wrong is a defect of this program and shows a traceback.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from preceptor import __version__, errors

app = typer.Typer(
    name="preceptor",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Supervised fine-tuning: make an assistant of a base model.",
)

EXIT_CODES: dict[type[errors.PreceptorError], int] = {
    errors.ConfigError: 2,
    errors.DataError: 3,
    errors.TemplateError: 4,
    errors.ModelError: 5,
    errors.CheckpointError: 6,
}

RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values over the file's, such as train.seed=1.")
]
Replace = Annotated[bool, typer.Option("--replace", help="Replace an earlier run in the same folder.")]


def main() -> None:
    """Entry point: run a command, turn an error into its message and exit code."""
    # Threads that wait for one another sleep instead of spinning. On a machine with anything else to do, spinning made
    # small models 7 to 40 times slower (docs/decisions/2026-11-22-waiting-threads.md). Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except errors.PreceptorError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_CODES[type(error)])


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if show:
        print(__version__)
        raise typer.Exit


@app.command()
def train(
    run_file: RunFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's newest checkpoint.")] = False,
    replace: Replace = False,
) -> None:
    """Fine-tune a model as a run file says."""
    from preceptor import config
    from preceptor.train.folder import check_out
    from preceptor.train.metrics import standard_console

    run = config.load(run_file, overrides or [])
    if not resume:
        check_out(run.out, replace)
    console = standard_console()
    prepared = _prepare(run, console)
    from preceptor.train.execute import execute

    try:
        summary = execute(prepared, console, resume=resume, replace=replace)
    except KeyboardInterrupt:
        hint = "; --resume goes on from the newest checkpoint" if run.train.save_every else ""
        print(f"interrupted{hint}", file=sys.stderr)
        raise typer.Exit(130) from None
    console.print(f"done in {summary['seconds']:.0f} s; the model is in {run.out}/model", highlight=False)
    console.print(f"talk to it: preceptor chat {run.out}/model", highlight=False)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/demo"),
    questions: Annotated[int, typer.Option(min=1, help="Held-out questions to ask.")] = 300,
    replace: Replace = False,
) -> None:
    """Make an assistant of the scholar, the base model that ships with the package, and show the difference."""
    from preceptor.train.folder import check_out
    from preceptor.train.metrics import standard_console

    check_out(str(out), replace)
    from preceptor.demo import run_demo

    run_demo(out, questions, standard_console(), replace=replace)


@app.command()
def show(
    run_file: Annotated[Path | None, typer.Argument(metavar="[RUN.yaml]", help="The run file.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Instead of a run file: a model folder, Hub id or `scholar`.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="With --model: a data file.")] = None,
    template: Annotated[str | None, typer.Option(help="With --model: the chat template, as in a run file.")] = None,
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
    run = _run_of(run_file, model, data, template)
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


@app.command()
def check(
    run_file: Annotated[Path | None, typer.Argument(metavar="[RUN.yaml]", help="The run file.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Instead of a run file: a model folder, Hub id or `scholar`.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="With --model: a data file.")] = None,
    template: Annotated[str | None, typer.Option(help="With --model: the chat template, as in a run file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Prove every row of the data and count what is refused and why; exit code 3 unless the run file allows it."""
    from preceptor.data.sources import resolve

    run = _run_of(run_file, model, data, template)
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
        raise typer.Exit(EXIT_CODES[errors.DataError])


@app.command()
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


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="A model folder, Hub id or `scholar`.")],
    base: Annotated[str | None, typer.Option(help="A second model that answers too, for comparison.")] = None,
    system: Annotated[str | None, typer.Option(help="A system prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of an answer, in tokens.")] = 256,
) -> None:
    """Talk to a model in the terminal. An empty line does nothing, /new starts anew, Ctrl-D ends."""
    from preceptor.study.chat import converse, load_speaker
    from preceptor.train.metrics import standard_console

    speakers = [load_speaker(path, max_new_tokens) for path in ([base] if base else []) + [model]]
    console = standard_console()

    def write(name: str, text: str) -> None:
        label = f"[{name}] " if name and len(speakers) > 1 else ""
        console.print(f"{label}{text}", markup=False, highlight=False)

    converse(speakers, _lines_said(), system, write)


def _lines_said() -> Iterator[str]:
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(prompt)
        except EOFError:
            return


def _run_of(run_file: Path | None, model: str | None, data: str | None, template: str | None) -> Any:
    from preceptor import config

    if (run_file is None) == (model is None and data is None):
        raise errors.ConfigError("name either a run file, or --model and --data")
    if run_file is not None:
        if template is not None:
            raise errors.ConfigError("--template goes with --model; a run file has data.template")
        return config.load(run_file)
    if model is None or data is None:
        raise errors.ConfigError("--model and --data go together")
    tree = {"model": {"path": model}, "data": {"train": [{"path": data}], "template": template}, "out": "-"}
    return config.build(tree, "command line")


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


def _prepare(run: Any, console: Any) -> Any:
    from preceptor.data.sources import resolve
    from preceptor.study.check_text import format_line
    from preceptor.train.prepare import prepare

    for source in (*run.data.train, *run.data.eval):
        resolve(source)
    with console.status("reading and rendering the data") as status:
        prepared = prepare(run, on_row=_count_rows(status.update), num_processes=min(4, os.cpu_count() or 1))
    for name, formats in prepared.formats.items():
        console.print(format_line(name, formats), highlight=False, markup=False)
    return prepared


def _count_rows(update: Callable[[str], None]) -> Callable[[], None]:
    rows = 0

    def on_row() -> None:
        nonlocal rows
        rows += 1
        if rows % 500 == 0:
            update(f"reading and rendering the data: {rows:,} rows")

    return on_row
