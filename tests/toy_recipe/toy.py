"""A recipe as somebody would add it: what hpctrain/recipes/toy.py would be."""

from __future__ import annotations

from hpctrain.config.decision import Decision
from hpctrain.recipes.contract import Cadence, Context, Guard, Resolved

LOOK = "import toyframework\n"


def resolve(context: Context) -> Resolved:
    """Ten steps between two checkpoints of the plain kind, and none of them sharded."""
    spec, steps = context.spec, context.options["steps"]
    return Resolved(
        argv=("python3", "-m", "toyframework.train", str(steps)),
        workdir=spec.base_dir,
        configs={"config.json": "{}\n"},
        config_for=dict.fromkeys(("scratch", "finetune", "resume"), "config.json"),
        files={"toy_look.py": LOOK},
        guard=Guard(layout="deepspeed", target=steps, zero_stage=0),
        cadence=Cadence(steps, 4),
        template={"steps": steps},
        decisions=(
            Decision("steps", steps, "as the run says", spec.where("recipe_options", "steps")),
        ),
    )
