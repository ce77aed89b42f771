"""Run chat templates. They come with models, so they are foreign code.

They run in transformers' own jinja sandbox, which also makes the text identical to
`tokenizer.apply_chat_template(tokenize=False)`, and within the limits of `limits.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers.utils import chat_template_utils

from apollo_sft.data.render import limits
from apollo_sft.data.render.limits import Limits, TimeUpError
from apollo_sft.data.render.quick_lookup import JsonCache, quick_environment
from apollo_sft.data.render.template import ChatTemplate
from apollo_sft.errors import DataError
from apollo_sft.types import RESERVED_ARGUMENTS, Message

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
MAX_CHARACTERS = 1 << 25
"""Length of one rendering."""


class RenderError(Exception):
    """A template failed on one conversation."""


class RunawayError(Exception):
    """A template exceeded its limits, and would do so for the rows that follow too."""


class Sandbox:
    """The compiled template. `kwargs` are template arguments: the tokenizer's special tokens and the user's own.

    Raises: DataError for a template that does not compile or an argument that the trainer sets.
    """

    def __init__(self, template: ChatTemplate, kwargs: dict[str, Any]) -> None:
        for name in RESERVED_ARGUMENTS:
            if name in kwargs:
                raise DataError(f"data.apply_chat_template_kwargs: {name} is set by the trainer")

        self.kwargs = kwargs
        self.template = template
        self._limits = Limits()
        self._json = JsonCache()
        self._row: _RowArguments | None = None

        with self.bounded():
            self._plain = self._compile(template.text, template.source)
            self._with_tools = self._plain
            if template.text_for(True) != template.text:
                self._with_tools = self._compile(template.text_for(True), template.source)

    def render(
        self,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None,
        row_kwargs: dict[str, Any],
        add_generation_prompt: bool,
    ) -> str:
        """Return the text of the messages. Call it inside of `bounded`.

        Raises: RenderError, RunawayError.
        """
        compiled = self._plain if tools is None else self._with_tools
        # One row is rendered several times with the same objects, so its arguments are put together once.
        if self._row is None or self._row.tools is not tools or self._row.kwargs is not row_kwargs:
            own = self.kwargs | row_kwargs
            given = compiled.globals | {"tools": tools, "documents": None} | own
            self._row = _RowArguments(tools, row_kwargs, given)

        given = self._row.given | {"messages": messages, "add_generation_prompt": add_generation_prompt}
        text: str = self._run(compiled.render, given)
        return text

    def marks_generation(self, has_tools: bool) -> bool:
        """Return whether the template marks by `{% generation %}` tags what the model writes."""
        return GENERATION_TAG.search(self.template.text_for(has_tools)) is not None

    def generated(
        self,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None,
        row_kwargs: dict[str, Any],
        add_generation_prompt: bool,
    ) -> list[tuple[int, int]]:
        """Return the ranges of characters of `render` that generation tags mark. Raises: RenderError."""
        compiled = chat_template_utils._compile_jinja_template(self.template.text_for(tools is not None))
        given = self.kwargs | row_kwargs
        render = chat_template_utils._render_with_assistant_indices

        def marked_ranges(_: None) -> Any:
            return render(compiled, messages, tools, None, add_generation_prompt, **given)[1]

        ranges: list[tuple[int, int]] = self._run(marked_ranges, None)
        return ranges

    @contextmanager
    def bounded(self) -> Iterator[None]:
        """Limit what templates use while the context is open, see `Limits.bounded`. Main thread only."""
        with self._limits.bounded():
            self._json.clear()
            yield

    def _run(self, work: Callable[[Any], Any], argument: Any) -> Any:
        try:
            result = self._limits.call(work, argument)
        except (MemoryError, TimeUpError) as error:
            raise RunawayError(_cause(error)) from error
        except Exception as error:  # foreign code may raise anything
            raise RenderError(_cause(error)) from error

        if len(result) > MAX_CHARACTERS:
            raise RenderError(f"the rendering has {len(result):,} characters; at most {MAX_CHARACTERS:,} are allowed")
        return result

    def _compile(self, text: str, source: str) -> _Compiled:
        try:
            compiled = self._limits.call(chat_template_utils._compile_jinja_template, text)
            quick = quick_environment(compiled.environment, self._json)
            return _Compiled(self._limits.call(quick.from_string, text))
        except (Exception, TimeUpError) as error:  # the parser of jinja and that of Python have limits of their own
            found = _cause(error)
            if isinstance(error, jinja2.TemplateSyntaxError):
                found = f"line {error.lineno}: {error.message}"
            raise DataError(f"the chat template does not compile ({source})", found=found) from error


class _Compiled:
    """A template that is given its globals with its arguments: jinja would merge them for every rendering."""

    def __init__(self, template: jinja2.Template) -> None:
        self.template = template
        self.globals = dict(template.globals)

    def render(self, given: dict[str, Any]) -> str:
        return "".join(self.template.root_render_func(self.template.new_context(given, shared=True)))


@dataclass(frozen=True, slots=True)
class _RowArguments:
    """The template arguments of one row besides its messages."""

    tools: list[dict[str, Any]] | None
    kwargs: dict[str, Any]

    given: dict[str, Any]
    """All of them, with the globals of the template and the arguments that all rows have."""


def _cause(error: BaseException) -> str:
    if isinstance(error, TimeUpError):
        return f"it was still running after {limits.MAX_SECONDS} seconds"
    if isinstance(error, MemoryError):
        return f"it needs more than {limits.MAX_MEMORY_BYTES >> 20:,} MiB of memory"
    return f"{type(error).__name__}: {error}"
