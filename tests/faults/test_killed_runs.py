"""A run that is killed at any moment goes on to what the undisturbed one leaves."""

import kill_runs


def test_killed_runs_go_on_to_the_bit(capsys):
    """A few kills, the same every time; `python tests/faults/kill_runs.py --kills 50` makes more."""
    with capsys.disabled():
        kills = kill_runs.kill_runs(kill_runs.KillOptions(kills=3, seed=1), tell=lambda line: None)
    assert len(kills) == 3
    assert [(kill, kill.problems) for kill in kills if kill.problems] == []


def test_the_comparison_sees_a_difference(tmp_path):
    """Without it no kill above would mean anything."""
    for name, content in (("one", "a"), ("other", "b")):
        (tmp_path / name / "samples").mkdir(parents=True)
        (tmp_path / name / "samples" / "iter_0000002.png").write_text(content)
        for log in ("metrics.jsonl", "evaluations.jsonl"):
            (tmp_path / name / log).write_text('{"iteration": 1, "milliseconds": ' + str(len(name)) + "}\n")
    ours, theirs = (kill_runs._left(tmp_path / name) for name in ("one", "other"))
    assert kill_runs._differences(ours, ours) == []
    assert kill_runs._differences(ours, theirs) == ["samples/iter_0000002.png differs"]
