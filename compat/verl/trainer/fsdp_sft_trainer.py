"""The name under which scripts of verl and AlphaApollo start a training."""

from apollo_sft.__main__ import run
from verl import nothing_else

__getattr__ = nothing_else(__name__)

if __name__ == "__main__":
    run()
