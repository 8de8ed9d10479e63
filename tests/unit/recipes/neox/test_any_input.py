"""Whatever a config holds: problems or a config, never a traceback; and what is accepted survives
NeoX's own type check."""

import sys
import tempfile
from pathlib import Path

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpctrain.base.errors import UsageError
from hpctrain.plan.load import load_plan
from hpctrain.recipes.neox.keys import FLAVORS, table

from .conftest import BASE

sys.path.insert(0, str(Path(__file__).parents[3]))
from hostile import HOSTILE  # noqa: E402

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-2, 1000)
    | st.floats()
    | st.sampled_from([*HOSTILE, "8e-6", "Adam", "fp16"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["stage", "params", "type", "lr", "enabled", "x y"])
            | st.integers(0, 3),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)
CONFIGS = st.dictionaries(
    st.sampled_from(sorted({*table("tilde"), *table("upstream"), "log-interval", "nonsense"})),
    VALUES,
    max_size=4,
)
START = [None, "/s/global_step5", "/s/_global_step_99_backup", "/s/x"]


@settings(
    deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from(FLAVORS),
    CONFIGS,
    CONFIGS,
    st.sampled_from(START),
    st.integers(1, 3),
    st.sampled_from(["srun", "deepy"]),
)
def test_any_config_gives_problems_or_a_config(flavor, config, base, start, nodes, launch):
    with tempfile.TemporaryDirectory() as folder:
        base_path, run_path = Path(folder, "base.yml"), Path(folder, "run.yaml")
        shape = {name: yaml.safe_load(raw) for name, raw in BASE.items()}
        base_path.write_text(yaml.safe_dump({**shape, **base}, allow_unicode=False))
        run = {
            "name": "x",
            "site": "generic-cuda",
            "recipe": "neox-sft",
            "nodes": nodes,
            "time": "1:00:00",
            "config": config,
            "checkpoint": {"dir": "/run", **({"start": start} if start else {})},
            "data": {"train": ["/d"]},
            "recipe_options": {
                "dir": "/neox",
                "flavor": flavor,
                "launch": launch,
                "base_config": ["base.yml"],
            },
        }
        run_path.write_text(yaml.safe_dump(run, allow_unicode=False))
        try:
            plan = load_plan(str(run_path), (), "/out").plan
        except UsageError as error:
            assert error.problems
            return
    assert bool(plan.resolved.configs) == (
        not [p for p in plan.resolved.problems if p.level == "error"]
    )
    for text in plan.resolved.configs.values():
        assert text.isprintable() or all(char.isprintable() or char == "\n" for char in text)
        for name, value in yaml.load(text, Loader=yaml.FullLoader).items():  # noqa: S506
            kind = table(flavor)[name].kind.split("|")
            accepted = (
                type(value).__name__ in kind
                or (type(value) is int and "float" in kind)
                or kind[0] in ("choice", "any")
            )
            assert accepted, (name, value)
