"""Stores as fsspec sees them, kept in memory: each under a scheme of its own."""

from typing import Any, ClassVar

from fsspec.implementations.memory import MemoryFileSystem


class Store(MemoryFileSystem):
    """A subclass names its `protocol`, and has a `store` and `pseudo_dirs` of its own."""

    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix(f"{cls.protocol}://").strip("/")
