"""Templates come with models, so they are foreign code: they run in transformers' own jinja sandbox, which also makes
the text identical to `tokenizer.apply_chat_template(tokenize=False)`."""

from __future__ import annotations

import faulthandler
import json
import math
import os
import re
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import BuiltinMethodType, FrameType
from typing import Any

import jinja2
from jinja2.runtime import LoopContext
from transformers.utils import chat_template_utils

from apollo_sft.data.render.template import ChatTemplate
from apollo_sft.errors import DataError
from apollo_sft.types import Message

OURS = ("messages", "tools", "documents", "add_generation_prompt")
GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
DICT_METHODS = frozenset(dir(dict))
LOOP_NAMES = frozenset(name for name in dir(LoopContext) if not name.startswith("_"))
STR_METHODS = frozenset(name for name in dir(str) if not name.startswith("_")) - {"format", "format_map"}
QUICK_CALLS = STR_METHODS - {"join"}
"""`join` runs over what the template hands to it."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""The names that templates know for it."""
JINJA_ARGUMENTS = frozenset({"_loop_vars", "_block_vars"})
"""What compiled templates add to a call inside of a loop, for functions that ask for it."""
PLAIN = frozenset({str, int, bool, list, dict})
KEPT_JSON = 512
MAX_SECONDS = 5
"""CPU time of one rendering, and of compiling the template; an honest one takes microseconds."""
MAX_MEMORY_BYTES = 2 << 30
"""Address space that the renderings of one call of `bounded` may add to the process."""
MAX_CHARACTERS = 1 << 25
"""Length of one rendering."""
KILL_SECONDS = 20
"""CPU time after which the system ends the process: a C loop that looks at no signal cannot be left otherwise. A
traceback of the template is the last that is seen of it."""
STDERR = 2
WAYS = ((False, False), (True, False), (False, True), (True, True))
"""How a tool-calling turn is handed over: (empty content as null, arguments as JSON text). The first is what most
templates want; the others are tried where a template refuses it, or leaves the calls out."""


class _Compiled:
    """A template that is given its globals with its arguments: jinja would put them together for every rendering."""

    def __init__(self, template: jinja2.Template) -> None:
        self.template = template
        self.globals = dict(template.globals)

    def render(self, given: dict[str, Any]) -> str:
        return "".join(self.template.root_render_func(self.template.new_context(given, shared=True)))


class RenderError(Exception):
    """A template that failed on one conversation."""


class RunawayError(Exception):
    """A template that takes what it may take, and would do so for the rows that follow too."""


class _TimeUp(BaseException):
    """No Exception: what a template calls may swallow those."""


class Sandbox:
    """The compiled template. `kwargs` are template arguments: the tokenizer's special tokens and the user's own.

    Raises: DataError for a template that does not compile or an argument that is not the user's to give.
    """

    def __init__(self, template: ChatTemplate, kwargs: dict[str, Any]) -> None:
        for name in OURS:
            if name in kwargs:
                raise DataError(f"data.apply_chat_template_kwargs: {name} is set by the trainer")
        self.kwargs = kwargs
        self.template = template
        self._json: dict[Any, tuple[Any, str]] = {}
        self._of: tuple[Any, Any, dict[str, Any]] | None = None
        """What templates are given besides messages, for the last tools and arguments of a row."""
        self._events = 0
        """Beginnings and ends of what a template does: odd while one runs."""
        with self.bounded():
            self.plain = self._compile(template.text, template.source)
            same = template.text_for(True) == template.text
            self.with_tools = self.plain if same else self._compile(template.text_for(True), template.source)

    def render(
        self,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None,
        row_kwargs: dict[str, Any],
        add_generation_prompt: bool,
    ) -> str:
        """Call it inside of `bounded`. Raises: RenderError, RunawayError."""
        compiled = self.plain if tools is None else self.with_tools
        if self._of is None or self._of[0] is not tools or self._of[1] is not row_kwargs:
            own = self.kwargs | row_kwargs
            self._of = tools, row_kwargs, compiled.globals | {"tools": tools, "documents": None} | own
        given = self._of[2] | {"messages": messages, "add_generation_prompt": add_generation_prompt}
        text: str = self._run(compiled.render, given)
        return text

    def marks_generation(self, has_tools: bool) -> bool:
        """Whether the template says by `{% generation %}` tags what the model writes."""
        return GENERATION_TAG.search(self.template.text_for(has_tools)) is not None

    def generated(
        self, messages: Sequence[Message], tools: list[dict[str, Any]] | None, row_kwargs: dict[str, Any]
    ) -> list[tuple[int, int]]:
        """The stretches of characters of `render` that generation tags mark. Raises: RenderError."""
        compiled = chat_template_utils._compile_jinja_template(self.template.text_for(tools is not None))
        given = self.kwargs | row_kwargs

        def render(_: None) -> Any:
            return chat_template_utils._render_with_assistant_indices(compiled, messages, tools, None, False, **given)[
                1
            ]

        stretches: list[tuple[int, int]] = self._run(render, None)
        return stretches

    def _run(self, work: Callable[[Any], Any], argument: Any) -> Any:
        self._events += 1
        try:
            result = work(argument)
        except (MemoryError, _TimeUp) as error:
            raise RunawayError(_said_by(error)) from error
        except Exception as error:  # foreign code may raise anything
            raise RenderError(_said_by(error)) from error
        finally:
            self._events += 1
        if len(result) > MAX_CHARACTERS:
            raise RenderError(f"the rendering has {len(result):,} characters; at most {MAX_CHARACTERS:,} are allowed")
        return result

    def _compile(self, text: str, source: str) -> Any:
        try:
            compiled = self._timed(chat_template_utils._compile_jinja_template, text)
            quick = self._timed(self._quick(compiled.environment).from_string, text)
            return _Compiled(quick)
        except (Exception, _TimeUp) as error:  # the parser of jinja and that of Python have limits of their own
            line = f"line {error.lineno}: {error.message}" if isinstance(error, jinja2.TemplateSyntaxError) else None
            raise DataError(f"the chat template does not compile ({source})", found=line or _said_by(error)) from error

    def _quick(self, environment: Any) -> Any:
        """The same environment, quicker: what it says of the usual values is said at once, JSON is written once.

        Jinja looks for an attribute first, which plain dicts have only for their methods; and the sandbox asks whether
        a template may see an attribute and call it, which holds for all public ones of `loop`, of texts (but for those
        that format), and for what a namespace was given.
        """
        quick = environment.overlay()
        slow_getattr, slow_call = quick.getattr, quick.call
        namespace = environment.globals["namespace"]

        def quick_getattr(value: Any, name: str) -> Any:
            kind = type(value)
            if kind is dict and name not in DICT_METHODS:
                return value[name] if name in value else quick.undefined(obj=value, name=name)
            if (kind is LoopContext and name in LOOP_NAMES) or (kind is str and name in STR_METHODS):
                return getattr(value, name)
            if kind is namespace and name[:1] != "_":
                given = object.__getattribute__(value, "_Namespace__attrs").get(name)
                if type(given) in PLAIN:
                    return given
            return slow_getattr(value, name)

        def quick_call(context: Any, called: Any, *args: Any, **kwargs: Any) -> Any:
            if type(called) is BuiltinMethodType and type(called.__self__) is str and called.__name__ in QUICK_CALLS:
                for name in JINJA_ARGUMENTS & kwargs.keys():
                    del kwargs[name]
                return called(*args, **kwargs)
            return slow_call(context, called, *args, **kwargs)

        quick.getattr, quick.call = quick_getattr, quick_call
        quick.filters = {**quick.filters, "tojson": self._quick_tojson(quick.filters["tojson"])}
        return quick

    def _quick_tojson(self, slow_tojson: Callable[..., Any]) -> Callable[..., str]:
        """As `slow_tojson`. A template can change no object, so what is kept alive is written as it was before."""

        def quick_tojson(value: Any, **how: Any) -> str:
            key = (id(value), *sorted(how.items())) if how else id(value)
            kept = self._json.get(key)
            if kept is not None:
                return kept[1]
            text = str(slow_tojson(value, **how))
            if type(value) is dict:
                if len(self._json) >= KEPT_JSON:
                    self._json.clear()
                self._json[key] = value, text
            return text

        return quick_tojson

    def _timed(self, work: Callable[[Any], Any], argument: Any) -> Any:
        self._events += 1
        try:
            return work(argument)
        finally:
            self._events += 1

    @contextmanager
    def bounded(self) -> Iterator[None]:
        """Inside, templates may use only so much memory, and each rendering only so much time. Main thread only.

        Source: setrlimit(2), setitimer(2). The clock counts CPU time, so that a busy machine fails no honest template.
        """
        memory, cpu = resource.getrlimit(resource.RLIMIT_AS), resource.getrlimit(resource.RLIMIT_CPU)
        handler = signal.signal(signal.SIGPROF, self._ticks(cpu))
        faulthandler.register(signal.SIGXCPU, file=STDERR, all_threads=False, chain=True)
        try:
            resource.setrlimit(resource.RLIMIT_AS, _at_most(_address_space_bytes() + MAX_MEMORY_BYTES, memory))
            _postpone_the_kill(cpu)
            self._json.clear()
            signal.setitimer(signal.ITIMER_PROF, 1, 1)
            yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, handler)
            resource.setrlimit(resource.RLIMIT_AS, memory)
            resource.setrlimit(resource.RLIMIT_CPU, cpu)
            faulthandler.unregister(signal.SIGXCPU)

    def _ticks(self, cpu: tuple[int, int]) -> Callable[[int, FrameType | None], None]:
        """What happens every second: a rendering that is met too often is ended."""
        seen, count = 0, 0

        def tick(number: int, frame: FrameType | None) -> None:
            del number, frame
            nonlocal seen, count
            _postpone_the_kill(cpu)
            count = count + 1 if seen == self._events else 1
            seen = self._events
            if count > MAX_SECONDS and seen % 2:
                raise _TimeUp

        return tick


def written_literals(text: str) -> Iterator[str]:
    """The pieces of text in a template that compiles, in their order, without those that it only compares with or hands
    to a function."""
    waiting: list[jinja2.nodes.Node] = [chat_template_utils._compile_jinja_template(text).environment.parse(text)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, jinja2.nodes.TemplateData):
            yield node.data
        elif isinstance(node, jinja2.nodes.Const) and isinstance(node.value, str):
            yield node.value
        if isinstance(node, jinja2.nodes.Filter):
            waiting += [] if node.node is None else [node.node]
        elif not isinstance(node, jinja2.nodes.Compare | jinja2.nodes.Call | jinja2.nodes.Test):
            waiting += reversed(list(node.iter_child_nodes()))


def _postpone_the_kill(limits: tuple[int, int]) -> None:
    end = math.ceil(time.process_time()) + KILL_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, _at_most(end, limits))


def _said_by(error: BaseException) -> str:
    if isinstance(error, _TimeUp):
        return f"it was still running after {MAX_SECONDS} seconds"
    if isinstance(error, MemoryError):
        return f"it needs more than {MAX_MEMORY_BYTES >> 20:,} MiB of memory"
    return f"{type(error).__name__}: {error}"


def _at_most(soft: int, limits: tuple[int, int]) -> tuple[int, int]:
    """`soft` as (soft, hard), but no limit that is there already is raised."""
    return min([soft, *(limit for limit in limits if limit != resource.RLIM_INFINITY)]), limits[1]


def _address_space_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def with_reasoning_names(messages: Sequence[Message]) -> list[Message]:
    """Messages whose reasoning stands under every name that templates read.

    Source: what `apply_chat_template` of transformers 5.23 hands to a template.
    """
    return [_with_reasoning(message) for message in messages]


def _with_reasoning(message: Message) -> Message:
    if message.keys().isdisjoint(REASONING):
        return message
    reasoning = next((message[name] for name in REASONING if message.get(name) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning} | message | {"reasoning_content": reasoning}


def handed_over(message: Message, null_content: bool, json_arguments: bool) -> Message:
    """A message in one of WAYS."""
    if "tool_calls" not in message or not (null_content or json_arguments):
        return message
    message = dict(message)
    if null_content and not message["content"]:
        message["content"] = None
    if json_arguments:
        message["tool_calls"] = [_with_json_arguments(call) for call in message["tool_calls"]]
    return message


def _with_json_arguments(call: dict[str, Any]) -> dict[str, Any]:
    inner = call.get("function", call)
    inner = inner | {"arguments": json.dumps(inner["arguments"], ensure_ascii=False)}
    return call | {"function": inner} if "function" in call else inner


def call_names(message: Message) -> list[str]:
    return [call.get("function", call)["name"] for call in message.get("tool_calls", ())]
