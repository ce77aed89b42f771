"""Math problems for SFT and RL: what `apollo-sft prepare informal-math` does, from a checkout.

python3 -m examples.data_preprocess.prepare_informal_math [OPTION …]; --help shows the options.
"""

import sys

from apollo_sft.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["prepare", "informal-math", *sys.argv[1:]]))
