"""Make a template environment of transformers quicker without changing a result.

Most of the time of a rendering goes into three things that jinja does for every value, whatever it is: it looks for an
attribute before it looks for a key, its sandbox checks whether a template may read an attribute, and whether it may
call one. For the usual values (dicts, texts, `loop`, namespaces) the answers are known.
"""

from __future__ import annotations

from collections.abc import Callable
from types import BuiltinMethodType
from typing import Any

from jinja2.runtime import LoopContext

DICT_METHODS = frozenset(dir(dict))
LOOP_NAMES = frozenset(name for name in dir(LoopContext) if not name.startswith("_"))
TEXT_METHODS = frozenset(name for name in dir(str) if not name.startswith("_")) - {"format", "format_map"}
"""The public ones, but for those that format: they would give a template access to attributes of objects."""

QUICK_CALLS = TEXT_METHODS - {"join"}
"""Without `join`, which iterates over an argument of the template's."""

JINJA_ARGUMENTS = frozenset({"_loop_vars", "_block_vars"})
"""Arguments that compiled templates add to a call inside of a loop, for functions that ask for them."""

PLAIN_TYPES = frozenset({str, int, bool, list, dict})
CACHED_JSON = 512
"""Objects whose JSON text is kept."""


def quick_environment(environment: Any, json_cache: JsonCache) -> Any:
    """Return an overlay of `environment` that looks up the usual values quickly and writes JSON once."""
    quick = environment.overlay()
    quick.getattr = _quick_getattr(quick, environment.globals["namespace"])
    quick.call = _quick_call(quick.call)
    quick.filters = {**quick.filters, "tojson": json_cache.cached(quick.filters["tojson"])}
    return quick


class JsonCache:
    """The JSON text of objects that a template has written. No template can change an object."""

    def __init__(self) -> None:
        self._texts: dict[Any, tuple[Any, str]] = {}
        """(object, text) by the id of the object: the reference keeps the id from being used again."""

    def clear(self) -> None:
        """Forget all texts: outside of renderings, objects may change."""
        self._texts.clear()

    def cached(self, tojson: Callable[..., Any]) -> Callable[..., str]:
        """Return `tojson` with this cache before it."""

        def quick_tojson(value: Any, **options: Any) -> str:
            # Options such as indent change the text, so they belong to the key.
            key: Any = id(value)
            if options:
                key = (id(value), *sorted(options.items()))

            kept = self._texts.get(key)
            if kept is not None:
                return kept[1]

            text = str(tojson(value, **options))
            if type(value) is dict:
                if len(self._texts) >= CACHED_JSON:
                    self._texts.clear()
                self._texts[key] = value, text
            return text

        return quick_tojson


def _quick_getattr(environment: Any, namespace: type) -> Callable[[Any, str], Any]:
    slow_getattr = environment.getattr

    def quick_getattr(value: Any, name: str) -> Any:
        # Exactly these types: a subclass may have attributes of its own.
        kind = type(value)
        if kind is dict and name not in DICT_METHODS:
            return value[name] if name in value else environment.undefined(obj=value, name=name)

        is_loop_name = kind is LoopContext and name in LOOP_NAMES
        if is_loop_name or (kind is str and name in TEXT_METHODS):
            return getattr(value, name)

        if kind is namespace and name[:1] != "_":
            given = object.__getattribute__(value, "_Namespace__attrs").get(name)
            if type(given) in PLAIN_TYPES:
                return given
        return slow_getattr(value, name)

    return quick_getattr


def _quick_call(slow_call: Callable[..., Any]) -> Callable[..., Any]:
    def quick_call(context: Any, called: Any, *args: Any, **kwargs: Any) -> Any:
        if type(called) is BuiltinMethodType and type(called.__self__) is str and called.__name__ in QUICK_CALLS:
            for name in JINJA_ARGUMENTS & kwargs.keys():
                del kwargs[name]
            return called(*args, **kwargs)
        return slow_call(context, called, *args, **kwargs)

    return quick_call
