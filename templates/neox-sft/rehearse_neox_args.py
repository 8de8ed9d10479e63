"""In a rehearsal, in the place of neox_args.py: prints its four words, with the configuration
itself where NeoX's encoding of it would stand. Standard library only.

    rehearse_neox_args.py DIR [OPTION…] neox_args.py CONFIG.yml NEOX_DIR TRAIN_SCRIPT
"""

import base64
import os
import sys


def main(argv):
    config, neox_dir, train_script = argv[-3:]
    os.chdir(neox_dir)
    if not os.access(train_script, os.R_OK):
        sys.exit(f"neox_args.py: there is no {train_script}")
    with open(config, "rb") as stream:
        encoded = base64.b64encode(stream.read()).decode()
    print("--deepspeed_config", encoded, "--megatron_config", encoded, sep="\n")


if __name__ == "__main__":
    main(sys.argv)
