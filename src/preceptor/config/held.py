"""A model and data that a program holds, as sections of a run: what no run file can name. No torch here."""

from typing import Any

from pydantic import Field

from preceptor.config.sections import Model, Source


class LiveModel(Model):
    """held: a `preceptor.model.held.HeldModel`."""

    held: Any = Field(exclude=True, repr=False)

    @property
    def place(self) -> str:
        """A folder with its configuration and tokenizer."""
        return str(self.held.folder)


class LiveSource(Source):
    """table: a `preceptor.data.formats.tables.DataTable`."""

    table: Any = Field(exclude=True, repr=False)
