"""Suites: what is shipped reads, and what is wrong is named with file, key and remedy."""

from pathlib import Path

import pytest

from ablations.run import find_suite
from ablations.suite import EARLY, HIGHER, read_suite
from chasm.errors import ConfigError

SUITES = sorted((Path(__file__).parents[2] / "ablations" / "suites").glob("*.yaml"))


@pytest.mark.parametrize("path", SUITES, ids=lambda p: p.stem)
def test_a_shipped_suite_reads_and_says_how_it_is_run(path):
    suite = read_suite(path)
    assert find_suite(suite.name) == path
    assert (suite.operation, suite.early, suite.higher) == ("mean", EARLY, HIGHER)
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(line.startswith("#   make ablate") for line in header)


def test_all_suites_of_the_specification_are_there():
    names = {path.stem for path in SUITES}
    assert names >= {"cls", "patches", "swap", "gate", "latent", "decoders", "layers"}


BROKEN = {
    "titel: x": "titel: no such key",
    "- x": "it is no mapping",
    "title: [": "cannot be read",
    "stage: any": "title: it is missing",
    "title: x\noperation: blur": "operation: found 'blur'",
    "title: x\nlocal: [a]": "only one of them is given",
    "title: x\ndonors: 0": "donors: found 0",
    "title: x\ninterchange: maybe": "interchange: found 'maybe'",
    "title: x\nearly: V1": "early: found 'V1'",
    "title: x\nconditions: {a: b}": "conditions: it is no list",
    "title: x\nconditions: [{name: a}]": r"conditions\[0\]: it has both or none",
    "title: x\nconditions: [{name: a, stream: middle}]": r"stream: found 'middle'",
    "title: x\nconditions: [{stream: local}]": r"name: it is missing",
    "title: x\nconditions: [{name: a, stream: local}, {name: a, stream: global}]": "twice",
    "title: x\nconditions: [{name: a, interventions: [{site: gate, operation: blur}]}]": (
        r"interventions\[0\].operation: found 'blur'"
    ),
}


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_suite_is_refused_by_file_and_key(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=BROKEN[text]) as caught:
        read_suite(path)
    assert "mine.yaml" in str(caught.value)


def test_an_unknown_suite_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"Suites here: cls, decoders, gate"):
        read_suite(find_suite("clss"))
