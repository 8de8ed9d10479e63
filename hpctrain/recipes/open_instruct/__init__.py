"""Fine-tuning with open-instruct (finetune.py, dpo_tune_cache.py): `resolve` puts the rules of this
package in order."""

from hpctrain.recipes.open_instruct.resolve import resolve

__all__ = ["resolve"]
