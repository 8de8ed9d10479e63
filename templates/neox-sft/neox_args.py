"""Prints the four arguments that NeoX's train.py needs on every rank, one a line. Runs inside the
container at job start.

    python neox_args.py CONFIG.yml NEOX_DIR TRAIN_SCRIPT

NeoX hands its configuration to the ranks as `--deepspeed_config BASE64 --megatron_config BASE64`.
This asks NeoX itself for that encoding (NeoXArgs.get_deepspeed_main_args), so that srun can start
train.py without NeoX's own launcher. Nothing else goes to standard output: what NeoX prints while
it reads the configuration goes to standard error.
"""

import os
import sys

# The longest single argument Linux passes on: MAX_ARG_STRLEN, 32 pages of 4 KiB.
MAX_ARGUMENT = 131072
# What a batch script inherits and NeoX would take for a rank's own values or for a list of hosts.
STALE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "DLTS_HOSTFILE")


def main(argv):
    if len(argv) != 4:
        sys.exit("usage: neox_args.py CONFIG.yml NEOX_DIR TRAIN_SCRIPT")
    config, neox_dir, train_script = argv[1:]
    answer = os.dup(1)
    os.dup2(2, 1)
    for name in STALE:
        os.environ.pop(name, None)
    os.environ.setdefault("MASTER_ADDR", "localhost")
    sys.path.insert(0, neox_dir)
    os.chdir(neox_dir)
    from megatron.neox_arguments import NeoXArgs

    args = NeoXArgs.from_ymls([config], overwrite_values={"user_script": train_script})
    encoded = args.get_deepspeed_main_args()[-4:]
    if len(encoded) != 4 or encoded[0] != "--deepspeed_config" or encoded[2] != "--megatron_config":
        sys.exit(
            "neox_args.py: this NeoX encodes its arguments in another way:"
            f" {[word[:40] for word in encoded]}"
        )
    for word in encoded:
        if len(word) >= MAX_ARGUMENT:
            sys.exit(
                f"neox_args.py: the configuration takes {len(word)} bytes as one argument, and"
                f" Linux passes at most {MAX_ARGUMENT - 1}"
            )
        if "\n" in word:
            sys.exit("neox_args.py: an argument holds a line break")
    sys.stdout.flush()
    text = "".join(word + "\n" for word in encoded).encode("ascii")
    while text:
        text = text[os.write(answer, text) :]


if __name__ == "__main__":
    main(sys.argv)
