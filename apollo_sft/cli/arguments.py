"""The parser of a command's own options: what is wrong with them is refused like everything else."""

from __future__ import annotations

import argparse
from typing import NoReturn

from apollo_sft.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Raises: ConfigError where argparse would end the process."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}", fix=f"{self.prog} --help")
