"""The first cases of every kind of mutated file end as they must, so that the command that runs many stays runnable."""

import sys

from tests import fuzz


def test_the_first_cases_of_every_kind_are_read_or_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fuzz", "--cases=48", "--seed=1"])
    status, printed = fuzz.main(), capsys.readouterr().out
    assert status == 0, printed
    counts = {line.split()[0]: line.split()[1::2] for line in printed.splitlines()[:-1]}
    assert {"manifest", "captions", "video"} <= counts.keys()
    assert all(int(read) + int(refused) >= 3 and fault == "0" for read, refused, fault in counts.values()), printed
