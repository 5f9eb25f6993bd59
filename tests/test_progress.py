"""The one line on how far a piece of work is."""

import pytest

from savelib import progress
from savelib.progress import Progress, progress_line


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (("step", 3, 40), "step 3/40"),
        (("step", 3, 40, [(3, 9.0)], ["gold 0.412"]), "step 3/40  gold 0.412"),
        (("step", 3, 40, [(3, 9.0), (3, 12.0)]), "step 3/40"),  # nothing was done between: no speed
        (("step", 3, 40, [(1, 4.0), (3, 8.0)], ["gold 0.412"]), "step 3/40  gold 0.412  0:01:14 left"),
        (("step", 40, 40, [(1, 4.0), (40, 8.0)]), "step 40/40  0:00:00 left"),
    ],
)
def test_progress_line(arguments, expected):
    assert progress_line(*arguments) == expected


def test_a_line_every_few_seconds_and_at_the_end(monkeypatch):
    now, said = [0.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    work = Progress("games", 100, before=20, say=said.append)
    for now[0] in range(1, 9):  # 1 game per second, then the other 72 at once
        work.add(1)
    assert said == []
    now[0] = 12.0
    work.add(4, "3 tokens/s")
    assert said == ["games 32/100  3 tokens/s  0:01:08 left"]  # what was there before tells nothing of the speed
    work.add(68)
    assert said[1:] == ["games 100/100  0:00:00 left"]


def test_short_work_says_nothing(capsys):
    Progress("games", 2).add(2)
    assert capsys.readouterr() == ("", "")


def test_every_0_says_each(capsys):
    work = Progress("run", 2, every=0)
    work.add(1, "save, seed 1: done")
    work.add(1, "save, seed 2: done")
    assert [line[:28] for line in capsys.readouterr().err.splitlines()] == [
        "run 1/2  save, seed 1: done ",
        "run 2/2  save, seed 2: done ",
    ]
