"""`python -m hpctrain.train.hf_sft.validate`: the former name of `hpctrain.train.trl.validate`."""

from hpctrain.train.trl.validate import command

if __name__ == "__main__":
    command()
