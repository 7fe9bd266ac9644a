"""The command `template`: what a chat template supports."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from preceptor import errors
from preceptor.commands.options import AsJson, check_models, large_imports, print_result

if TYPE_CHECKING:
    from preceptor.chat.render import Renderer


def template(
    name: Annotated[str, typer.Argument(help="`chatml`, `llama3`, a .jinja file, or a model that has a template.")],
    model: Annotated[str | None, typer.Option(help="The tokenizer's model, for a template's name or file.")] = None,
    kwargs: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="A template argument, such as enable_thinking=false; repeatable."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a chat template supports. It is found by the same proofs as in training."""
    from preceptor.chat.template import BUILTIN
    from preceptor.inspect.stand_in import stand_in_renderer
    from preceptor.inspect.template import find_abilities, to_text

    is_template = name in BUILTIN or Path(name).suffix == ".jinja" or Path(name).is_file()
    if model is not None and not is_template:
        raise errors.ConfigError(
            f"--model goes with chatml, llama3 or a .jinja file; {name} is taken for a model itself"
        )
    near = difflib.get_close_matches(name, BUILTIN, n=1, cutoff=0.8)
    if near and not is_template and not Path(name).exists():
        raise errors.ConfigError(f"{name}: no such model or template; did you mean {near[0]!r}? ({', '.join(BUILTIN)})")
    arguments = _template_kwargs(kwargs or [])
    assumed: tuple[str, ...] | None = None
    if is_template and model is None:
        renderer, assumed = stand_in_renderer(name, arguments)
    else:
        renderer = _model_renderer(model or name, name if is_template else "tokenizer", arguments)
    for unread in sorted(arguments.keys() - renderer.template.names_read):
        raise errors.ConfigError(f"--kwargs {unread}: the template {name} reads no argument of this name")
    print_result(find_abilities(renderer, assumed), as_json, to_text)


def _template_kwargs(pairs: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` with YAML values -> arguments of a template. Raises ConfigError."""
    import yaml

    from preceptor.config import build
    from preceptor.config.yaml_text import parse_yaml

    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise errors.ConfigError(f"--kwargs {pair}: give KEY=VALUE, such as --kwargs enable_thinking=false")
        try:
            found[key] = parse_yaml(text)
        except yaml.YAMLError as error:
            raise errors.ConfigError(f"--kwargs {pair}: {text!r} is not a YAML value ({error})") from error
    data = {"train": [{"path": "-"}], "chat_template_kwargs": found}
    return build({"model": {"path": "-"}, "data": data, "out": "-"}, "--kwargs").data.chat_template_kwargs


def _model_renderer(model: str, template: str, template_kwargs: dict[str, Any]) -> "Renderer":
    from preceptor import config

    check_models(model)
    with large_imports():
        from preceptor.chat.format import load_chat_format

    data = {"train": [{"path": "-"}], "chat_template": template, "chat_template_kwargs": template_kwargs}
    tree = {"model": {"path": model}, "data": data, "out": "-"}
    run = config.build(tree, "command line")
    return load_chat_format(run.model, run.data).renderer(run.data)
