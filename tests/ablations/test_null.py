"""A subject's null worlds: simulated over processes, kept, and found again."""

from dataclasses import replace

import numpy as np

from ablations import null
from ablations.claims import SCALES
from ablations.worlds_null import NullWorlds


def test_null_worlds_are_kept_and_depend_on_the_ceilings(test_set, tmp_path, monkeypatch):
    asked = []

    def simulated(chunks):
        asked.append([chunk[2:] for chunk in chunks])
        for place, (_, _, n, seed) in reversed(list(enumerate(chunks))):
            values = np.array([float(seed), *[np.nan] * (n - 1)])
            yield place, NullWorlds(values, dict.fromkeys(SCALES, values))

    monkeypatch.setattr(null, "_simulated", simulated)
    test, sizes = test_set(), null.Sizes()
    found = null.subject_null(test, sizes, 6, tmp_path)
    again = null.subject_null(test, sizes, 6, tmp_path)
    assert asked == [[(4, 0), (2, 4)]]
    np.testing.assert_equal(found.level, [0, np.nan, np.nan, np.nan, 4, np.nan])
    np.testing.assert_equal(again.level, found.level)
    np.testing.assert_equal(dict(again.asymmetry), dict(found.asymmetry))
    null.subject_null(replace(test, ceiling=test.ceiling / 2), sizes, 6, tmp_path)
    assert len(asked) == 2


def test_without_sets_or_ceilings_there_are_no_null_worlds(test_set, tmp_path):
    for changes in ({"early": ()}, {"ceiling": np.full(24, np.nan)}):
        assert null.subject_null(test_set(**changes), null.Sizes(), 6, tmp_path) is None
    assert null.subject_null(test_set(), null.Sizes(), 0, tmp_path) is None
