"""What an intervention is, as a value and as YAML."""

import pytest
import yaml

from chasm.errors import ConfigError
from chasm.interventions import OPERATIONS, Intervention, on_stream
from chasm.interventions.operations import _MAKERS


@pytest.mark.parametrize(
    "intervention",
    [
        Intervention("local.out", "mean"),
        Intervention("features.cls", "noise", seed=3),
        Intervention("features.cls", "route_swap", tokens=(0, 2), seed=1),
        Intervention("features.patches", "residualise"),
    ],
)
def test_it_survives_yaml(intervention):
    text = yaml.safe_dump(intervention.to_dict())
    assert Intervention.from_dict(yaml.safe_load(text)) == intervention


def test_defaults_are_not_written():
    assert Intervention("gate", "clean").to_dict() == {"site": "gate", "operation": "clean"}


def test_every_operation_has_a_function():
    assert OPERATIONS.keys() == _MAKERS.keys()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"site": "a", "operation": "meen"}, r"s\.yaml:c\.operation.*'meen'.*mean, zero"),
        ({"site": "a", "operation": ["mean"]}, r"s\.yaml:c\.operation.*\['mean'\]"),
        ({"site": 3, "operation": "mean"}, r"s\.yaml:c\.site.*found 3"),
        ({"operation": "mean"}, r"s\.yaml:c\.site.*missing"),
        ({"site": "a"}, r"s\.yaml:c\.operation.*missing"),
        ({"site": "a", "operation": "mean", "sede": 1}, r"s\.yaml:c\.sede.*no such key.*seed"),
        ({"site": "a", "operation": "mean", "where": "x"}, r"s\.yaml:c\.where.*no such key"),
        ({"site": "a", "operation": "mean", "seed": -1}, r"s\.yaml:c\.seed.*-1"),
        ({"site": "a", "operation": "mean", "seed": True}, r"s\.yaml:c\.seed.*True"),
        ({"site": "a", "operation": "mean", "tokens": 0}, r"s\.yaml:c\.tokens.*found 0"),
        ({"site": "a", "operation": "mean", "tokens": []}, r"s\.yaml:c\.tokens"),
        ({"site": "a", "operation": "mean", "tokens": [1, 1]}, r"s\.yaml:c\.tokens"),
        ({"site": "a", "operation": "mean", "tokens": [-1]}, r"s\.yaml:c\.tokens"),
        ({"site": "a", "operation": "shuffle_space", "tokens": [1]}, r"s\.yaml:c\.tokens"),
        ({"site": "gate", "operation": "route_swap"}, r"c\.site.*features\.cls or features\.pat"),
        ({"site": "features.cls", "operation": "residualise"}, r"c\.site.*features\.patches"),
        ("mean", r"s\.yaml:c: .*'mean'.*site, operation, tokens, seed"),
    ],
)
def test_errors_name_file_field_and_remedy(raw, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Intervention.from_dict(raw, "s.yaml:c")
    assert "\n" not in str(caught.value)


def test_a_stream_is_all_of_its_sites(module_of):
    model = module_of("stage 2")
    found = on_stream(model, "local", "noise", seed=2)
    sites = ["linear.patches", "local.out", "stage2.linear.patches", "stage2.patches"]
    assert sorted(part.site for part in found) == sites
    assert {(part.operation, part.seed) for part in found} == {("noise", 2)}
    with pytest.raises(ConfigError, match=r"global stream.*no site of it"):
        on_stream(module_of("one sequence"), "global", "mean")
