"""The command `schema`: the JSON schema of the run file."""

from preceptor.console import print_json


def schema() -> None:
    """Print the JSON schema of the run file, for editors."""
    from preceptor.config.run import json_schema

    print_json(json_schema())
