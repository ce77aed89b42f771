"""GSM8K for SFT and RL: `python3 -m examples.data_preprocess.gsm8k`; the same as `apollo-sft prepare gsm8k`."""

import sys

from apollo_sft.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["prepare", "gsm8k", *sys.argv[1:]]))
