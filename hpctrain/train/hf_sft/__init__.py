"""The former name of `hpctrain.train.trl`, which run directories made by earlier versions call."""
