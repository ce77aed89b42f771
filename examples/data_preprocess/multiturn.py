"""Conversations of several turns for SFT: what `apollo-sft prepare multiturn` does, from a checkout.

python3 -m examples.data_preprocess.multiturn [OPTION …]; --help shows the options.
"""

import sys

from apollo_sft.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["prepare", "multiturn", *sys.argv[1:]]))
