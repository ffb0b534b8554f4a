"""The mutants of tools/mutants.py fit the source and the tests; running them is another matter."""

import re
from pathlib import Path

import mutants
import pytest

TESTS = Path(__file__).parent


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_applies(mutant):
    """Its text is there exactly once, the change is one and is Python, and its tests exist."""
    changed = mutant.source()
    assert changed != (mutants.ROOT / "idefics_qlora" / mutant.file).read_text(encoding="utf-8")
    compile(changed, mutant.file, "exec")
    for test in mutant.tests:
        file, _, name = test.partition("::")
        source = (TESTS / file).read_text(encoding="utf-8")
        assert not name or re.search(rf"^def {name.split('[')[0]}\(", source, re.MULTILINE), test


def test_mutants_are_told_apart():
    """Each has a name of its own, there are enough of them, and what is accepted is one of them."""
    names = [mutant.name for mutant in mutants.MUTANTS]
    assert len(set(names)) == len(names) >= 30
    assert mutants.ACCEPTED.keys() <= set(names)


def test_a_mutant_that_does_not_fit_is_named(capsys, monkeypatch):
    """Source that has moved on under a mutant stops the tool before anything is run."""
    gone = mutants.Mutant("a gone line", "model/loss.py", "no such line", "", ())
    monkeypatch.setattr(mutants, "MUTANTS", (gone,))
    assert mutants.main([]) == 2
    assert "'a gone line': 'no such line' is 0 times in model/loss.py" in capsys.readouterr().err
