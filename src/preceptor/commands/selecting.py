"""`select`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from preceptor import errors


def select(
    data: Annotated[list[str], typer.Argument(metavar="DATA...", help="Data files, folders, Hub ids, `scholar:NAME`.")],
    keep: Annotated[int, typer.Option(help="How many rows to keep.")],
    out: Annotated[Path, typer.Option(metavar="FILE.jsonl", help="Where the kept rows are written, as JSON lines.")],
    model: Annotated[str | None, typer.Option(help="The base model: a folder, Hub id or `scholar`.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of what is drawn.")] = 0,
    explain: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Write every row's place, scores and reason there.")
    ] = None,
    columns: Annotated[
        list[str] | None, typer.Option(metavar="OURS=THEIRS", help="A column's name in the data, as in a run file.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="The split of a folder or Hub id.")] = None,
    quality_share: Annotated[
        float, typer.Option(help="Share of the distinct rows, the best, that the choice is made from.")
    ] = 0.5,
    weight: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SIGNAL=WEIGHT",
            help="Most that a signal takes from the quality, 0 (off) to 1: refusal, formatting, repetition, length, "
            "difficulty, loss.",
        ),
    ] = None,
    diversity: Annotated[
        str, typer.Option(help="`facility-location`, `k-centre`, or `none`: the best rows, whatever they are like.")
    ] = "facility-location",
    max_length: Annotated[
        int, typer.Option(min=64, help="Tokens of a forward pass; a longer conversation is rejected.")
    ] = 4096,
    replace: Annotated[bool, typer.Option("--replace", help="Replace FILE where it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Choose the conversations to train on: no repeats, the good ones, and of these such as cover all."""
    _check_files(data, out, explain, replace)
    from preceptor.select.choice import Settings
    from preceptor.select.pool import open_pool
    from preceptor.select.quality import read_weights

    settings = Settings(keep, seed, read_weights(weight or []), quality_share, diversity)
    pool = open_pool(data, _columns_of(columns or []), split)
    from preceptor.console import example_progress
    from preceptor.select.select import load_reader, needs_model, to_text
    from preceptor.select.select import select as select_rows

    tables = [table for source in pool.sources for table in source.tables]
    if model is None and needs_model(settings):
        raise errors.ConfigError(
            "--model: name the base model, which tells how well the prompts help and how rows are alike; "
            "to do without, give --diversity none --weight difficulty=0 --weight loss=0"
        )
    reader = None if model is None else load_reader(model, max_length)
    with example_progress([*tables, *tables], "reading") as on_row:
        summary = select_rows(pool, reader, settings, out, explain, on_row)
    print(json.dumps(summary, indent=2, ensure_ascii=False) if as_json else to_text(summary))


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


def _columns_of(given: list[str]) -> dict[str, str]:
    columns = {}
    for text in given:
        ours, equals, theirs = text.partition("=")
        if not (ours and equals and theirs):
            raise errors.ConfigError(f"--columns {text}: must be OURS=THEIRS, as in question=Frage")
        columns[ours] = theirs
    return columns
