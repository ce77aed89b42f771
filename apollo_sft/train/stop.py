"""A polite end: a signal sets a flag, the loop looks at it between steps. A second signal ends the process at once."""

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopFlag:
    """Catches `SIGNALS` while it is in use as a context manager; `name` is the signal that came, or None."""

    def __init__(self) -> None:
        self.name: str | None = None

    def __enter__(self) -> "StopFlag":
        self._previous = {number: signal.signal(number, self._catch) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.name = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)
