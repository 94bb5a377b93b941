"""The suite finds wrong code: a sample of the mutants of transformations, methods and schedules."""

import pytest

from . import mutation


@pytest.mark.slow
def test_argued_mutants_exist():
    """Because a line of the table that fits no mutant argues about code that is gone."""
    files = [mutation.PACKAGE / name for name in mutation.TESTS]
    keys = {mutant.key for path in files for mutant in mutation.mutants_of(path)}
    assert set(mutation.ARGUED) <= keys


@pytest.mark.slow
def test_the_suite_finds_mutants():
    chosen = mutation.sample_of(mutation.all_mutants(), 300)
    survivors = mutation.survivors_of(chosen)
    listed = "\n".join(map(str, survivors))
    assert len(survivors) <= 0.03 * len(chosen), listed
