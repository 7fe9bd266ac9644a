"""The command `export`: a trained model for other programs."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from preceptor import errors
from preceptor.commands.options import AnyModel, AsJson, TrustCode, large_imports
from preceptor.console import print_json, say


def export(
    model: AnyModel,
    to: Annotated[
        Literal["hf", "adapter", "gguf", "ollama", "hub"],
        typer.Option(help="A Hugging Face folder, the adapter, a GGUF file, that with a Modelfile, or the Hub."),
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The folder to write. Default: MODEL-hf, MODEL-gguf, ...")
    ] = None,
    gguf_type: Annotated[
        Literal["auto", "f32", "f16", "bf16", "q8_0"], typer.Option(help="Type of a GGUF file's weights.")
    ] = "auto",
    licence: Annotated[str | None, typer.Option("--license", help="For the model card, such as apache-2.0.")] = None,
    repo: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="With `--to hub`: the model there.")] = None,
    public: Annotated[bool, typer.Option("--public", help="With `--to hub`: for all to see.")] = False,
    skip_proof: Annotated[
        bool, typer.Option("--skip-proof", help="Write it even where it is not proved to read what was trained.")
    ] = False,
    trust_remote_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    """Export a model to transformers, peft, GGUF, Ollama or the Hub.

    What is written is proved to read what was trained (docs/export.md).
    """
    from preceptor.export.source import ExportSource

    source = ExportSource.of(model, trust_remote_code)
    if repo is not None and to != "hub":
        raise errors.ConfigError("--repo goes with --to hub")
    place = out or Path(f"{source.title}-{to}")
    with large_imports():
        from preceptor.export.export import Export
        from preceptor.export.export import export as export_model

    wanted = Export(to, place, gguf_type, licence, skip_proof, repo, not public)
    found = export_model(source, wanted, lambda line: say(line, error=as_json))
    if as_json:
        print_json(found)
    else:
        say(found.get("address") or f"{place}: written")
