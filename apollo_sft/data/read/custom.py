"""Rows from a class of the user's (`data.custom_cls`): conversations, or samples that are ready."""

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
    """What the class yields, at most `max_rows` (-1: all).

    Raises: DataError for a file or class that cannot be used, and for what it raises or yields that is no row.
    """
    name = f"{data.custom_cls.name} in {data.custom_cls.path}"
    try:
        rows = iter(_load(data)(list(files), tokenizer, data))
        count = 0
        while count != max_rows and (row := next(rows, None)) is not None:
            if not isinstance(row, Conversation | Sample):
                raise DataError(
                    f"{KEY}: {name} yields what is no row (number {count})",
                    found=type(row).__name__,
                    expected="apollo_sft.types.Conversation or Sample",
                )
            if isinstance(row, Sample):
                _check(row)
            yield row.ref, row
            count += 1
    except ApolloError:
        raise
    except Exception as error:  # it is the user's code
        raise DataError(f"{KEY}: {name} fails", found=f"{type(error).__name__}: {error}") from error


def _load(data: DataConfig) -> Any:
    path, name = data.custom_cls.path, data.custom_cls.name
    spec = importlib.util.spec_from_file_location("apollo_sft_custom_cls", str(path))
    if spec is None or spec.loader is None or name is None:
        raise DataError(f"{KEY} is not a class in a Python file", found=f"path {path}, name {name}", fix="set both")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise DataError(f"{KEY}.name: {path} has no class {name!r}")
    return getattr(module, name)


def _check(sample: Sample) -> None:
    """A ready sample keeps the contract of `Sample`: labels are shifted once, already."""
    ids, labels = sample.input_ids, sample.labels
    if not all(isinstance(array, np.ndarray) and array.dtype == np.int32 for array in (ids, labels)):
        raise DataError(f"{sample.ref}: input_ids and labels must be int32 arrays of numpy")
    if ids.ndim != 1 or ids.shape != labels.shape or not len(ids) or ids.min() < 0:
        raise DataError(
            f"{sample.ref}: input_ids and labels are no two rows of one length", found=(ids.shape, labels.shape)
        )
    trained = labels[:-1] != IGNORE_INDEX
    if labels[-1] != IGNORE_INDEX or (labels[:-1][trained] != ids[1:][trained]).any():
        raise DataError(
            f"{sample.ref}: labels are not the tokens that follow",
            expected=f"labels[t] == input_ids[t + 1], or {IGNORE_INDEX}; the last one {IGNORE_INDEX}",
            fix="shift them once: labels[:-1] = input_ids[1:] at targets",
        )
