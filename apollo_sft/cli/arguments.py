"""The parser of a command's own options: errors in them are refused like those in keys."""

from __future__ import annotations

import argparse
from typing import NoReturn

from apollo_sft.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Raises ConfigError where argparse would end the process."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError with the message."""
        raise ConfigError(f"{self.prog}: {message}", fix=f"{self.prog} --help")
