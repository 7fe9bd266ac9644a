"""Parquet files and Hugging Face `datasets` -> rows, a batch at a time.

Both hold columns in Arrow's memory layout. Where a column is of structs, objects come back as `Struct`, since a null in
them may be padding (values.py); columns of Arrow's JSON type (`datasets.Json`) come back exactly as written.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from preceptor.data.formats.remote_files import RemoteFile
from preceptor.data.formats.values import Columns, Row, Struct, TableRows, Unreadable, check_names
from preceptor.errors import DataError, first_line, short

_BATCH_ROWS = 256  # a conversation can be long; pyarrow's own default holds 131,072 rows in memory

Convert = Callable[[Any], Any]


@contextmanager
def open_parquet(file: Path | RemoteFile, name: str) -> Iterator[Any]:
    """Raises DataError if it is no Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with ExitStack() as stack:
        try:
            if isinstance(file, RemoteFile):
                opened = pq.ParquetFile(stack.enter_context(file.open_seekable()))
            else:
                opened = pq.ParquetFile(file, memory_map=True, pre_buffer=False)
        except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a name that is no UTF-8
            raise _broken(name, error) from None
        yield stack.enter_context(opened)


def parquet_rows(file: Path | RemoteFile, name: str, wanted: Columns = None) -> TableRows:
    """Each row with its source, "file:row N", counted from 1; of `wanted` columns only, if given. Raises DataError."""
    try:
        with open_parquet(file, name) as parquet:
            check_names(parquet.schema_arrow.names, name)
            columns = [c for c in parquet.schema_arrow.names if wanted is None or c in wanted]
            yield from batch_rows(parquet.iter_batches(batch_size=_BATCH_ROWS, columns=columns), name)
    finally:
        if isinstance(file, RemoteFile):
            file.forget()


def batch_rows(batches: Iterable[Any], name: str) -> TableRows:
    """The rows of Arrow record batches or tables."""
    import pyarrow as pa

    number, converters = 0, None
    try:
        for batch in batches:
            if converters is None:
                check_names(batch.schema.names, name)
                converters = {field.name: _converter(field.type) for field in batch.schema}
            for row in _values_of(batch):
                number += 1
                yield f"{name}:row {number}", row if isinstance(row, Unreadable) else _converted(row, converters)
    except (pa.ArrowException, OSError) as error:
        raise _broken(f"{name}:row {number + 1}", error) from None


def _values_of(batch: Any) -> Iterator[Row]:
    """The rows as Python values; where some cannot be (invalid UTF-8, a date beyond all), each is tried by itself."""
    try:
        yield from batch.to_pylist(maps_as_pydicts="strict")
    except (ValueError, KeyError, OverflowError) as error:
        if batch.num_rows == 1:
            yield Unreadable("unreadable", f"it holds a value that cannot be read: {short(str(error))}")
        else:
            for index in range(batch.num_rows):
                yield from _values_of(batch.slice(index, 1))


def _converted(row: dict[str, Any], converters: Mapping[str, Convert | None]) -> Row:
    try:
        return {key: value if (c := converters[key]) is None else c(value) for key, value in row.items()}
    except ValueError as error:
        return Unreadable("unreadable", f"a JSON column holds what is no JSON: {short(str(error))}")


def _broken(where: str, error: Exception) -> DataError:
    return DataError(f"{where}: cannot be read: {first_line(error)}. Write or download the file again")


def _converter(kind: Any) -> Convert | None:
    """What makes of pyarrow's Python value our own; None where it is the same."""
    import pyarrow as pa

    if isinstance(kind, pa.JsonType):
        return lambda value: None if value is None else json.loads(value)
    if isinstance(kind, pa.BaseExtensionType):
        return _converter(kind.storage_type)
    if pa.types.is_struct(kind):
        fields = {field.name: _converter(field.type) for field in kind}
        return lambda value: (
            None if value is None else Struct((k, c(v) if (c := fields[k]) else v) for k, v in value.items())
        )
    if pa.types.is_map(kind):
        of_value = _converter(kind.item_type)
        return of_value and (lambda value: None if value is None else {k: of_value(v) for k, v in value.items()})
    if hasattr(kind, "value_type") and not pa.types.is_dictionary(kind):  # every kind of list
        of_item = _converter(kind.value_type)
        return of_item and (lambda value: None if value is None else [of_item(item) for item in value])
    return None


def saved_splits(folder: Path) -> list[str] | None:
    """Splits of a folder that `save_to_disk` wrote; [] if it has none; None if the folder is no such folder."""
    if (folder / "dataset_dict.json").is_file():
        return list(json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"])
    return [] if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file() else None


def load_saved(folder: Path, name: str) -> Any:
    """A `datasets.Dataset` from disk, memory-mapped. Raises DataError."""
    import datasets

    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:  # the library raises what its parts raise: Arrow's, JSON's and the system's errors
        raise _broken(name, error) from None


def load_hub(hub_id: str, config: str | None, split: str | None, revision: str | None) -> Any:
    """A `datasets.Dataset` from the Hub's cache, downloaded when it is not there yet. Raises DataError."""
    import datasets

    try:
        if split is None:
            splits = datasets.get_dataset_split_names(hub_id, config_name=config, revision=revision)
            if len(splits) > 1:
                raise DataError(f"{hub_id}: has the splits {', '.join(splits)}; name one with `split`")
            split = splits[0]
        return datasets.load_dataset(hub_id, config, split=split, revision=revision)
    except DataError:
        raise
    except Exception as error:  # as above, and the network's
        raise DataError(
            f"{hub_id}: no such file or folder here, and it cannot be loaded from the Hub: {first_line(error)}. Check "
            "the id, `name`, `split` and `revision`, and for a private data set that you are logged in"
        ) from None


def dataset_rows(dataset: Any, name: str, wanted: Columns = None) -> TableRows:
    """Each row of a `datasets.Dataset` with its source, "name:row N", counted from 1."""
    columns = [c for c in dataset.column_names if wanted is None or c in wanted]
    batches = dataset.select_columns(columns).with_format("arrow").iter(_BATCH_ROWS)
    yield from batch_rows(batches, name)
