"""Everything that `check` opens for a run, by what its recipe says of it."""

from __future__ import annotations

from collections.abc import Iterator

from hpctrain.base.errors import Problem
from hpctrain.plan.look import program
from hpctrain.plan.look.reading import Reader
from hpctrain.plan.make import Plan
from hpctrain.recipes.facts import Copy, Fact, Indexed, Model, Packages, Program, Rows


def look(plan: Plan, here: bool, reader: Reader) -> Iterator[Problem]:
    """What the files and folders that lie here contradict of the plan; those that do not lie here
    are told elsewhere. `here`: this machine is the site."""
    place = program.Place(here, _open_air(plan))
    for fact in plan.resolved.facts:
        if isinstance(fact, (Indexed, Rows, Model)):
            yield from _look_into(fact, reader)
        elif isinstance(fact, Program):
            yield from program.problems(fact, place, reader)
        elif isinstance(fact, Copy):
            yield from program.copy_problems(fact, reader)
        elif isinstance(fact, Packages):
            yield from program.package_problems(fact, place, reader)
    yield from program.package_problems(_needed(plan), place, reader)


def _look_into(fact: Fact, reader: Reader) -> Iterator[Problem]:
    """Data and models; what reads them is imported only where there is something to read, since
    `render` looks too."""
    if isinstance(fact, Indexed):
        if any(reader.size(f"{prefix}.idx") is not None for prefix, _ in fact.prefixes):
            from hpctrain.plan.look import indexed

            yield from indexed.problems(fact, reader)
    elif isinstance(fact, Rows):
        if any(reader.exists(path) for path, _ in fact.files):
            from hpctrain.plan.look import rows

            yield from rows.problems(fact, reader)
    elif isinstance(fact, Model) and reader.exists(fact.path):
        from hpctrain.plan.look import model

        yield from model.problems(fact, reader)


def _open_air(plan: Plan) -> bool:
    """Whether the step runs in the environment of a login shell, so that this one tells something:
    no container, no modules, nothing that is sourced."""
    spec, modules = plan.spec, plan.site.values["modules"]
    loads = modules["load"] or spec.modules or spec.setup or spec.task_setup
    sourced = plan.resolved.template.get("activate")
    own_path = {"PATH", "PYTHONPATH", "VIRTUAL_ENV"} & set(spec.env)
    return not (spec.container or loads or sourced or own_path)


def _needed(plan: Plan) -> Packages:
    """What the recipe itself imports, by its `environment` block, as `doctor` reads it."""
    packages = plan.recipe.values["environment"]["packages"]
    python = str(plan.resolved.argv[0]) if plan.resolved.argv else "python3"
    where = plan.spec.where("recipe_options", "python")
    wanted = {
        name: (about["why"] or f"recipe {plan.recipe.name} needs it", where)
        for name, about in packages.items()
        if about["required"] and not about.get("from_copy")
    }
    return Packages(python, where, wanted)
