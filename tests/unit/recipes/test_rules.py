"""Rules as tables: what is said of those that a run breaks."""

from hpctrain.base.errors import Problem
from hpctrain.recipes.rules import Judge, Rule


def test_each_broken_rule_is_said_and_of_a_group_only_the_first():
    judge = Judge()
    judge.check(
        Rule(0, "holds", "run.yaml:1:1"),
        Rule([7], "broken", "run.yaml:2:1", why="limit", hint="do", level="warning"),
        (Rule("", "holds too"), Rule(True, "first", "a.yaml:3:1"), Rule(True, "follows from it")),
        (Rule(None, "holds"),),
    )
    assert judge.problems == [
        Problem("broken", "run.yaml:2:1", "limit", "do", "warning"),
        Problem("first", "a.yaml:3:1"),
    ]


def test_a_place_of_its_own_wins_over_that_of_the_key():
    judge = Judge()
    judge.check(Rule(True, "here", "run.yaml:1:1", where="profile.yaml:9:2"))
    assert [problem.where for problem in judge.problems] == ["profile.yaml:9:2"]
