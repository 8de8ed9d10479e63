"""`python -m hpctrain.train.hf_sft`: the former name of `hpctrain.train.trl`."""

import sys

from hpctrain.train.core.program import main
from hpctrain.train.trl.__main__ import PROGRAM

if __name__ == "__main__":
    sys.exit(main(PROGRAM))
