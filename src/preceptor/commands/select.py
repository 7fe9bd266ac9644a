"""The command `select`: which conversations to train on."""

from pathlib import Path
from typing import Annotated

import typer

from preceptor import errors
from preceptor.commands.options import AsJson, check_models, print_result
from preceptor.console import example_progress
from preceptor.files import try_file


def select(
    data: Annotated[
        list[str], typer.Argument(metavar="DATA...", help="Data files, folders, Hub ids or `scholar:NAME`.")
    ],
    keep: Annotated[int, typer.Option(help="How many examples to keep.")],
    out: Annotated[Path, typer.Option(metavar="FILE.jsonl", help="Write the kept examples here, as JSON lines.")],
    model: Annotated[str | None, typer.Option(help="The base model: a folder, Hub id or `scholar`.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0,
    explain: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Write source, scores and reason of every example here.")
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(metavar="OURS=THEIRS", help="Name of a column in the data, as in a run file; repeatable."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="The split of a folder or Hub id.")] = None,
    quality_share: Annotated[
        float, typer.Option(help="Share of the distinct examples to choose from, the best first.")
    ] = 0.5,
    weight: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SIGNAL=WEIGHT",
            help="How much a signal can lower the quality, 0 (off) to 1; signals: refusal, formatting, repetition, "
            "length, difficulty, loss. Repeatable.",
        ),
    ] = None,
    diversity: Annotated[
        str, typer.Option(help="`facility-location`, `k-centre`, or `none`: quality alone.")
    ] = "facility-location",
    max_length: Annotated[
        int, typer.Option(min=64, help="Tokens of a forward pass; a longer conversation is rejected.")
    ] = 4096,
    replace: Annotated[bool, typer.Option("--replace", help="Replace FILE where it exists.")] = False,
    as_json: AsJson = False,
) -> None:
    """Select training data. Deduplicate, filter by quality, then choose a diverse subset."""
    _check_files(data, out, explain, replace)
    from preceptor.select.choice import Settings
    from preceptor.select.pool import open_pool
    from preceptor.select.quality import read_weights

    check_models(model)
    settings = Settings(keep, seed, read_weights(weight or []), quality_share, diversity)
    pool = open_pool(data, _columns_of(columns or []), split)
    from preceptor.select.select import load_scorer, needs_model, to_text
    from preceptor.select.select import select as select_examples

    tables = [table for source in pool.sources for table in source.tables]
    if model is None and needs_model(settings):
        raise errors.ConfigError(
            "--model: name the base model, which measures difficulty, loss and similarity; "
            "to select without a model, give --diversity none --weight difficulty=0 --weight loss=0"
        )
    scorer = None if model is None else load_scorer(model, max_length)
    with example_progress([*tables, *tables], "reading") as on_example:
        summary = select_examples(pool, scorer, settings, out, explain, on_example)
    print_result(summary, as_json, to_text)


def _check_files(data: list[str], out: Path, explain: Path | None, replace: bool) -> None:
    for name, file in (("--out", out), ("--explain", explain)):
        if file is None:
            continue
        if file.suffix not in (".jsonl", ".ndjson"):
            raise errors.ConfigError(f"{name} {file}: JSON lines are written there; give a name that ends in .jsonl")
        if any(Path(path).resolve() == file.resolve() for path in data) or (name == "--explain" and file == out):
            raise errors.ConfigError(f"{name} {file}: this file is named twice; give another name")
        if not file.parent.is_dir():
            raise errors.ConfigError(f"{name} {file}: there is no folder {file.parent}; make it first")
        if file.exists() and not replace:
            raise errors.ConfigError(f"{name} {file}: exists already; give another name, or --replace")
        try_file(file)


def _columns_of(given: list[str]) -> dict[str, str]:
    columns = {}
    for text in given:
        ours, equals, theirs = text.partition("=")
        if not (ours and equals and theirs):
            raise errors.ConfigError(f"--columns {text}: must be OURS=THEIRS, as in question=Frage")
        columns[ours] = theirs
    return columns
