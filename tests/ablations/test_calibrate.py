import json
from dataclasses import replace

import numpy as np
import pytest

import ablations.calibrate as command
from ablations.calibrate import calibrate, judge, main, path_of
from ablations.calibration_criteria import CRITERIA, Found, coverage, null_of
from ablations.calibration_runs import VARIANTS, population_effects, run
from ablations.calibration_table import BEGIN, END, criteria_rows, write_docs
from ablations.effects import effects
from ablations.rows import EARLY_LESS_HIGHER
from ablations.worlds import EARLY, HIGHER, Sizes, make_layout, make_world, region_keys
from ablations.worlds_encoders import coalition_values, fit_additive, world_test_set
from ablations.worlds_null import NullWorlds
from chasm.errors import ConfigError

SMALL = Sizes(
    n_train=150, n_test=150, n_population=300, n_repeated=300,
    n_categories=5, n_scenes=3, side=3, n_channels=2, n_voxels=16,
)  # fmt: skip


def small(name, **changes):
    fields = {"sizes": SMALL, "ceiling": (0.6, 0.5)} | changes
    return replace(VARIANTS[name], **fields)


def lines_of(variant, runs):
    found = CRITERIA[variant.name](variant.name, runs, null_of(runs))
    return {line.criterion: line for line in found}


# A small calibration.


@pytest.fixture(scope="module")
def confounded():
    variant = small("SNR-confounded null", null_worlds=5)
    return [run(variant, seed) for seed in range(4)]


@pytest.mark.parametrize(("name", "sign"), [("planted", 1), ("reversed", -1)])
def test_a_planted_dissociation_is_claimed(name, sign, confounded):
    variant = small(name, null_worlds=0)
    runs = [run(variant, seed) for seed in range(2)]
    assert [one["claim"] for one in runs] == ["double dissociation"] * 2
    assert [one["sign"] for one in runs] == [sign] * 2
    found = CRITERIA[name](name, runs, null_of(confounded))
    judged = [line for line in found if line.passed is not None]
    assert len(judged) == 4
    assert all(line.passed for line in judged)


def test_nothing_is_claimed_where_nothing_is_planted(confounded):
    assert sum(one["sign"] != 0 for one in confounded) <= 1
    lines = lines_of(VARIANTS["SNR-confounded null"], confounded)
    assert lines["asymmetry claimed, primary rule"].passed
    # Both rules look at the same numbers: the primary one never claims more.
    specified, primary = (
        lines[f"asymmetry claimed, {rule} rule"].rate for rule in ("specified", "primary")
    )
    assert primary <= specified


def test_an_interaction_is_synergy_and_noise_is_nothing():
    for name in ("interaction", "interaction (gain)"):
        runs = [run(small(name, ceiling=(0.7, 0.7)), 0)]
        assert lines_of(VARIANTS[name], runs)["synergy (redundancy < 0)"].rate == 1
    runs = [run(small("pure noise", ceiling=(0.0, 0.0)), seed) for seed in range(3)]
    lines = lines_of(VARIANTS["pure noise"], runs)
    assert lines["v_both (r2) is above 0"].rate == 0
    assert lines["asymmetry claimed"].rate == 0
    # What the encoder learned from noise is worse than the mean: not 0, and not a finding.
    assert lines["v_both (r2) is not 0, specified rule"].rate > 0.5
    assert lines["specialisation (r2) is not 0 and v_both above 0, primary rule"].rate == 0


def test_leaking_streams_are_redundant():
    variant = small("redundant", null_worlds=0, leak=1.0, ceiling=(0.4, 0.3))
    runs = [run(variant, seed) for seed in range(2)]
    assert lines_of(VARIANTS["redundant"], runs)["redundancy > 0"].rate == 1


def test_a_run_depends_on_its_variant_and_seed_only():
    variant = small("null", null_worlds=1)
    one, again, other = run(variant, 5), run(variant, 5), run(variant, 6)
    assert json.dumps(one) == json.dumps(again)
    assert one["asymmetry"] != other["asymmetry"]
    assert variant.digest != VARIANTS["null"].digest


def test_population_effects_are_the_effects_where_nothing_is_sampled():
    rng = np.random.default_rng(0)
    world = make_world(make_layout((0.7, 0.4), (0.5, 0.4), 24, 3, rng), SMALL, rng)
    test = world_test_set(world, region_keys(EARLY), region_keys(HIGHER), n_boot=0, seed=0)
    found = effects([coalition_values(fit_additive(world, 0, rng))], test, permutations=0)
    truth = population_effects(test, found.unit_r2["banded ridge"], test.ceiling)
    rows = found.frame[found.frame["status"].str.startswith("ok")]
    compared = 0
    for row in rows.itertuples():
        key = (row.quantity, row.region, row.scale, "")
        if key in truth:
            assert truth[key] == pytest.approx(row.value, abs=1e-9), key
            compared += 1
    assert compared > 300


# The criteria, on made-up runs.


def record(sign=0, claim="none", asymmetry=0.0, rows=(), **changes):
    scales = ("ceiling", "share", "matched")
    base = [["asymmetry", EARLY_LESS_HIGHER, s, "", asymmetry, sign - 0.5, sign + 0.5, 0.0]
            for s in scales]  # fmt: skip
    known = {"variant": "null", "claim": claim, "sign": sign, "level": 0.0,
             "asymmetry": dict.fromkeys(scales, asymmetry), "rows": [*base, *rows]}  # fmt: skip
    return known | changes


def null_spread(spread=1.0):
    rng = np.random.default_rng(0)
    scales = ("ceiling", "share", "matched")
    return NullWorlds(rng.uniform(-1, 1, 60), {s: spread * rng.normal(size=60) for s in scales})


def rates(name, runs, null):
    return {line.criterion: line for line in CRITERIA[name](name, runs, null)}


def test_too_many_false_claims_fail_and_null_worlds_cure_them():
    false = [record(1, "asymmetric (ordinal)", 0.5)] * 10 + [record()] * 40
    lines = rates("null", false, null_spread())
    assert lines["asymmetry claimed, specified rule"].rate == 0.2
    assert lines["asymmetry claimed, specified rule"].passed is False
    assert lines["asymmetry claimed, primary rule"].rate == 0
    assert lines["asymmetry claimed, primary rule"].passed
    assert rates("null", false, null_spread(0.01))["asymmetry claimed, primary rule"].rate == 0.2
    few = [record(1, "asymmetric (ordinal)", 0.5)] * 2 + [record()] * 48
    assert rates("null", few, null_spread(0.01))["asymmetry claimed, specified rule"].passed


def test_a_claim_that_null_worlds_cannot_judge_does_not_count():
    none = NullWorlds(np.zeros(3), dict.fromkeys(("ceiling", "share", "matched"), np.zeros(3)))
    line = rates("null", [record(1, "asymmetric (ordinal)", 0.5)] * 5, none)
    assert line["asymmetry claimed, primary rule"].n == 0
    assert line["asymmetry claimed, primary rule"].passed is False


def dissociated(early, higher):
    return [["specialisation", key, "ceiling", "", value, value - 0.1, value + 0.1, value]
            for key, value in (("early", early), ("higher", higher))]  # fmt: skip


def test_power_needs_the_right_signs():
    right = record(1, "double dissociation", 5.0, dissociated(0.5, -0.5))
    for found, passed in ((right, True), (right | {"sign": -1}, False)):
        lines = rates("planted", [found] * 10, null_spread())
        assert lines["double dissociation claimed, primary rule"].passed is passed
    assert not rates("reversed", [right] * 10, null_spread())["D_early < 0"].passed
    ordinal = right | {"claim": "asymmetric (ordinal)"}
    assert not rates("planted", [ordinal] * 10, null_spread())[
        "double dissociation claimed, specified rule"
    ].passed


def test_coverage_is_judged_over_all_variants():
    inside, outside = record(), record(3)
    for n, passed in ((5, True), (0, False), (20, False)):
        table = coverage({"null": [inside] * (100 - n) + [outside] * n})
        assert table["all"]["I, ceiling"].rate == 1 - n / 100
        assert table["all"]["I, ceiling"].passed is passed
        assert table["null"]["I, ceiling"].passed is None
    assert coverage({"pure noise": [inside]})["all"]["I, ceiling"].n == 0
    unknown = Found(record(rows=[["v", "early", "r2", "", 1.0, np.nan, np.nan, 1.0]]))
    assert unknown.covers("v", "early", "r2") is None


# The command.


def counted(monkeypatch):
    calls = []

    def fake(variant, seed):
        calls.append((variant.name, seed))
        null = {"level": [], "ceiling": [], "share": [], "matched": []}
        return record(variant=variant.name, digest=variant.digest, seed=seed, null=null)

    monkeypatch.setattr(command, "run", fake)
    return calls


def test_a_calibration_that_was_killed_goes_on(tmp_path, monkeypatch):
    calls = counted(monkeypatch)
    null = VARIANTS["null"]
    first = calibrate([null], {"null": 3}, 0, tmp_path, 1)
    assert [one["seed"] for one in first["null"]] == [0, 1, 2]
    path = path_of(tmp_path, "null")
    path.write_text(path.read_text() + '{"variant": "null", "se')
    calls.clear()
    second = calibrate([null], {"null": 5}, 0, tmp_path, 1)
    assert calls == [("null", 3), ("null", 4)]
    assert len(second["null"]) == 5
    assert len(path.read_text().splitlines()) == 5
    assert [one["seed"] for one in calibrate([null], {"null": 2}, 1, tmp_path, 1)["null"]] == [1, 2]


def test_runs_of_another_version_of_a_variant_are_done_again(tmp_path, monkeypatch):
    calls = counted(monkeypatch)
    calibrate([replace(VARIANTS["null"], leak=0.1)], {"null": 2}, 0, tmp_path, 1)
    calls.clear()
    calibrate([VARIANTS["null"]], {"null": 2}, 0, tmp_path, 1)
    assert calls == [("null", 0), ("null", 1)]
    assert len(path_of(tmp_path, "null").read_text().splitlines()) == 2


def test_two_processes_give_what_one_gives(tmp_path):
    tiny = replace(SMALL, n_train=40, n_test=40, n_population=40, n_repeated=40)
    variant = replace(VARIANTS["pure noise"], sizes=tiny)
    found = [
        calibrate([variant], {variant.name: 2}, 0, tmp_path / str(jobs), jobs) for jobs in (1, 2)
    ]
    assert json.dumps(found[0]) == json.dumps(found[1])


def test_the_table_goes_between_its_marks(tmp_path, monkeypatch):
    counted(monkeypatch)
    result = judge(calibrate([VARIANTS["null"]], {"null": 4}, 0, tmp_path, 1))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_docs(result, "the command", page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert "`the command` gave" in text
    assert "SIMULATED" in text
    for row in criteria_rows(result):
        assert f"| {' | '.join(row)} |" in text
    page.write_text("no marks")
    with pytest.raises(ConfigError, match=r"page\.md"):
        write_docs(result, "", page)


def test_the_documentation_has_the_marks():
    text = command.DOCS.read_text(encoding="utf-8")
    assert text.index(BEGIN) < text.index(END)


def test_the_command_says_whether_all_passed(tmp_path, monkeypatch, capsys):
    counted(monkeypatch)
    options = ["--out", str(tmp_path), "--jobs", "1", "--variants", "null"]
    assert main([*options, "--runs", "3"]) == 1  # coverage of 1 is not .93 to .97
    assert "SIMULATED" in capsys.readouterr().out
    assert main([*options, "--runs", "0"]) == 2
    assert "--runs: found 0. Use 1 or more." in capsys.readouterr().err
