"""GSM8K for SFT and RL: what `apollo-sft prepare gsm8k` does, from a checkout.

python3 -m examples.data_preprocess.gsm8k [OPTION …]; --help shows the options.
"""

import sys

from apollo_sft.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["prepare", "gsm8k", *sys.argv[1:]]))
