"""Read rows from a class of the user's (`data.custom_cls`): conversations, or samples that are ready."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from apollo_sft.config.schema import DataConfig
from apollo_sft.errors import ApolloError, DataError
from apollo_sft.types import IGNORE_INDEX, Conversation, RowRef, Sample

KEY = "data.custom_cls"


def custom_rows(
    files: Sequence[str], tokenizer: Any, data: DataConfig, max_rows: int = -1
) -> Iterator[tuple[RowRef, Conversation | Sample]]:
    """Yield the rows that the class yields, at most `max_rows` (-1: all).

    Raises: DataError for a file or class that cannot be used, for an exception of the class, and for a value that is
    no row.
    """
    name = f"{data.custom_cls.name} in {data.custom_cls.path}"
    try:
        rows = iter(_load(data)(list(files), tokenizer, data))
        count = 0
        while count != max_rows:
            row = next(rows, None)
            if row is None:
                return
            _check(row, name, count)
            yield row.ref, row
            count += 1
    except ApolloError:
        raise
    except Exception as error:  # it is the user's code
        raise DataError(f"{KEY}: {name} fails", found=f"{type(error).__name__}: {error}") from error


def _load(data: DataConfig) -> Any:
    path = data.custom_cls.path
    name = data.custom_cls.name
    spec = importlib.util.spec_from_file_location("apollo_sft_custom_cls", str(path))
    if spec is None or spec.loader is None or name is None:
        raise DataError(f"{KEY} is not a class in a Python file", found=f"path {path}, name {name}", fix="set both")

    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise DataError(f"{KEY}.name: {path} has no class {name!r}")
    return getattr(module, name)


def _check(row: Any, name: str, number: int) -> None:
    """Refuse what is no row. A conversation is checked later, with those of files."""
    if isinstance(row, Sample):
        _check_sample(row)
    elif not isinstance(row, Conversation):
        raise DataError(
            f"{KEY}: {name} yields an object that is no row (number {number})",
            found=type(row).__name__,
            expected="apollo_sft.types.Conversation or Sample",
        )


def _check_sample(sample: Sample) -> None:
    """Check the contract of `Sample`: the labels of a ready sample are shifted once, already."""
    ids = sample.input_ids
    labels = sample.labels
    for array in (ids, labels):
        if not isinstance(array, np.ndarray) or array.dtype != np.int32:
            raise DataError(f"{sample.ref}: input_ids and labels must be int32 arrays of numpy")

    if ids.ndim != 1 or ids.shape != labels.shape:
        raise DataError(
            f"{sample.ref}: input_ids and labels must be 1-D arrays of equal length", found=(ids.shape, labels.shape)
        )
    if not len(ids) or ids.min() < 0:
        found = "no token" if not len(ids) else f"token id {ids.min()}"
        raise DataError(f"{sample.ref}: input_ids must be one token or more, none below 0", found=found)

    # Labels that are not shifted, or shifted twice, train the model to repeat a token or to skip one.
    trained = labels[:-1] != IGNORE_INDEX
    if labels[-1] != IGNORE_INDEX or (labels[:-1][trained] != ids[1:][trained]).any():
        raise DataError(
            f"{sample.ref}: labels are not the tokens that follow",
            expected=f"labels[t] == input_ids[t + 1], or {IGNORE_INDEX}; the last one {IGNORE_INDEX}",
            fix="shift them once: labels[:-1] = input_ids[1:] at targets",
        )
