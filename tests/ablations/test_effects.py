import itertools
from dataclasses import replace

import numpy as np
import pytest
from himalaya.scoring import r2_score_split

from ablations import sums
from ablations.effects import COLUMNS, effects, pooled
from chasm.errors import ConfigError, DataError
from chasm.evaluation.bootstrap import resample_counts

KEYS = ["encoder", "seed", "gate", "scale", "level", "region"]


def wide(frame, column="value"):
    """Quantities as columns, places as rows."""
    return frame.pivot(index=KEYS, columns="quantity", values=column)


def rows(frame, **wanted):
    """Values of some rows by region."""
    for key, value in wanted.items():
        frame = frame[frame[key] == value]
    return frame.set_index("region")


def cyclic(n):
    """Every other image as donor, once: (n − 1, n)."""
    return (np.arange(n) + np.arange(1, n)[:, None]) % n


def exchange(test, local, global_, donor):
    return test.train_mean + local + global_[donor], donor


def test_identities_hold_exactly(test_set, values_of):
    test = test_set()
    frame = effects([values_of(test, held=True), values_of(test, seed=1, held=True)], test).frame
    table = wide(frame[(frame["region"] != "early - higher") & (frame["scale"] != "share")])
    table = table[table["v_both"].notna()]
    assert len(table) == 3 * 2 * 3 * 6  # seeds and their pool, gate, scales, places
    close = {"rtol": 0, "atol": 1e-12}
    difference = table["shapley_local"] - table["shapley_global"]
    np.testing.assert_allclose(table["specialisation"], difference, **close)
    np.testing.assert_allclose(
        table["specialisation"], table["v_local"] - table["v_global"], **close
    )
    total = table["shapley_local"] + table["shapley_global"]
    np.testing.assert_allclose(total, table["v_both"] - table["v_none"], **close)
    for stream in ("local", "global"):
        mean = (table[f"necessity_{stream}"] + table[f"sufficiency_{stream}"]) / 2
        np.testing.assert_allclose(table[f"shapley_{stream}"], mean, **close)
    over = table["sufficiency_local"] - table["necessity_local"]
    np.testing.assert_allclose(table["redundancy"], over, **close)


def naive_value(prediction, test, region, images, scale):
    """v of one region on a list of images, in plain loops."""
    score = worth = 0.0
    for unit in np.flatnonzero(region.weights):
        nc = test.ceiling[unit]
        if scale == "ceiling" and not nc > test.nc_threshold:
            continue
        y, p = test.target[images, unit], prediction[images, unit]
        r2 = 1 - np.sum((y - p) ** 2) / np.sum((y - test.train_mean[unit]) ** 2)
        score += region.weights[unit] * r2
        worth += region.weights[unit] * (nc if scale == "ceiling" else 1)
    return score / worth


@pytest.mark.parametrize("scale", ["ceiling", "r2"])
def test_values_and_intervals_equal_a_naive_loop_over_resamples(test_set, values_of, scale):
    ceiling = np.random.default_rng(3).uniform(-0.1, 0.6, 24)
    ceiling[5] = np.nan
    test = test_set(ceiling=ceiling, nc_threshold=0.05, seed_of_bootstrap=4)
    weights = np.random.default_rng(5).integers(1, 9, 24) * test.regions[0].weights
    test = replace(test, regions=(replace(test.regions[0], weights=weights), *test.regions[1:]))
    one = values_of(test)
    table = rows(effects([one], test).frame, scale=scale, quantity="specialisation")
    counts = resample_counts(40, 100, 4).astype(int)
    samples = [np.arange(40), *(np.repeat(np.arange(40), count) for count in counts)]
    found = np.array([
        [
            naive_value(one.predictions["local"], test, region, images, scale)
            - naive_value(one.predictions["global"], test, region, images, scale)
            for region in test.regions
        ]
        for images in samples
    ])  # fmt: skip
    early, higher = found[:, :2].mean(axis=1), found[:, 2:].mean(axis=1)
    expected = np.column_stack([found, early, higher])
    names = ["R0", "R1", "R2", "R3", "early", "higher"]
    np.testing.assert_allclose(table.loc[names, "value"], expected[0])
    np.testing.assert_allclose(table.loc[names, "low"], np.quantile(expected[1:], 0.025, axis=0))
    np.testing.assert_allclose(table.loc[names, "high"], np.quantile(expected[1:], 0.975, axis=0))
    asymmetry = rows(effects([one], test).frame, scale=scale, quantity="asymmetry").iloc[0]
    assert asymmetry["value"] == pytest.approx(early[0] - higher[0])
    assert asymmetry["low"] == pytest.approx(np.quantile((early - higher)[1:], 0.025))


def test_shares_divide_each_region_by_what_both_streams_predict(test_set, values_of):
    test = test_set()
    frame = effects([values_of(test)], test).frame
    ceiling = wide(rows(frame, scale="ceiling").reset_index()).droplevel(KEYS[:-1])
    share = wide(rows(frame, scale="share").reset_index()).droplevel(KEYS[:-1])
    regions = ["R0", "R1", "R2", "R3"]
    expected = ceiling["specialisation"] / (ceiling["v_both"] - ceiling["v_none"])
    np.testing.assert_allclose(share["specialisation"][regions], expected[regions])
    early, higher = expected[regions[:2]].mean(), expected[regions[2:]].mean()
    assert share["asymmetry"]["early - higher"] == pytest.approx(early - higher)


def test_shapley_equals_the_product_measure_of_himalaya(test_set, additive_values):
    """Both split the R² of a sum of frozen streams, and himalaya knows nothing of coalitions."""
    rng = np.random.default_rng(2)
    test = test_set(n_images=60)
    target = test.target - test.target.mean(axis=0)
    test = replace(test, target=target, train_mean=np.zeros(24))
    local = 0.3 * target + 0.4 * rng.normal(size=target.shape)
    global_ = 0.2 * local + 0.3 * rng.normal(size=target.shape)
    found = effects([additive_values(test, local, global_)], test, permutations=0)
    split = r2_score_split(target, np.stack([local, global_]))
    table = wide(found.frame[found.frame["scale"] == "r2"]).droplevel(KEYS[:-1])
    for index, region in enumerate(test.regions):
        expected = split[:, region.members].mean(axis=1)
        got = table.loc[f"R{index}", ["shapley_local", "shapley_global"]]
        np.testing.assert_allclose(got.astype(float), expected, rtol=0, atol=1e-10)
    unit = found.unit_r2["stage 1"]
    np.testing.assert_allclose(unit["local"] - unit["global"], split[0] - split[1], atol=1e-10)


def test_interchange_is_the_specialisation_of_an_additive_encoder(test_set, additive_values):
    """Exactly so on its own clean output, with every image as donor of every other."""
    rng = np.random.default_rng(4)
    local, global_ = rng.normal(size=(2, 40, 24)) * rng.uniform(0.2, 1, (2, 1, 24))
    local, global_ = local - local.mean(axis=0), global_ - global_.mean(axis=0)
    mean = rng.normal(size=24)
    test = test_set(target=mean + local + global_, train_mean=mean)
    values = additive_values(
        test, local, global_, interchange=exchange(test, local, global_, cyclic(40))
    )
    table = wide(effects([values], test, permutations=0).frame)
    table = table[table["interchange"].notna()]
    assert len(table) == 4 * 6  # scales, places
    np.testing.assert_allclose(table["interchange"], table["specialisation"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(table["interchange - specialisation"], 0, rtol=0, atol=1e-12)


def test_interchange_equals_a_loop_over_pairs(test_set, values_of):
    test = test_set(n_images=12)
    rng = np.random.default_rng(0)
    donor = cyclic(12)[[0, 3, 7]]
    predictions = rng.normal(size=(3, 12, 24))
    values = values_of(test, interchange=(predictions, donor))
    table = rows(effects([values], test).frame, scale="r2", quantity="interchange")
    total = np.square(test.target - test.train_mean).sum(axis=0)
    expected = np.zeros(24)
    for k in range(3):
        patches = 1 - np.square(test.target - predictions[k]).sum(axis=0) / total
        cls = 1 - np.square(test.target[donor[k]] - predictions[k]).sum(axis=0) / total
        expected += (patches - cls) / 2 * 11 / 12 / 3
    for index, region in enumerate(test.regions):
        assert table.loc[f"R{index}", "value"] == pytest.approx(expected[region.members].mean())


def test_intervals_of_the_interchange_have_the_width_of_its_sampling(test_set, additive_values):
    """Pairs of images are no independent sample; the resamples must know it."""
    values, widths = [], []
    for run in range(60):
        rng = np.random.default_rng(run)
        local, global_, noise = rng.normal(size=(3, 60, 4))
        target = 0.6 * local + 0.6 * global_ + 0.7 * noise
        test = test_set(
            n_images=60, n_units=4, n_regions=1, target=target, train_mean=np.zeros(4), early=(),
            higher=(), n_boot=150, seed_of_bootstrap=run,
        )  # fmt: skip
        donor = cyclic(60)[rng.permutation(59)[:20]]
        one = additive_values(
            test, local, global_, interchange=exchange(test, local, global_, donor)
        )
        frame = effects([one], test, permutations=0).frame
        row = rows(frame, scale="r2", quantity="interchange").loc["R0"]
        values.append(row["value"])
        widths.append((row["high"] - row["low"]) / 3.92)
    # The standard deviation of 60 runs is known to 9 %.
    assert np.mean(widths) == pytest.approx(np.std(values), rel=0.3)


def test_compensation_and_further_conditions(test_set, values_of):
    test = test_set()
    swapped = test.train_mean + np.random.default_rng(9).normal(size=test.target.shape)
    one = values_of(test, held=True, extra={"swapped": swapped, "both": 0 * swapped})
    frame = rows(effects([one], test).frame, scale="ceiling").reset_index()
    at = {
        (quantity, gate): rows(frame, quantity=quantity, gate=gate)["value"]
        for quantity, gate in set(zip(frame["quantity"], frame["gate"], strict=True))
    }
    for stream in ("local", "global"):
        direct, total = (at[f"necessity_{stream}", gate] for gate in ("held", "free"))
        np.testing.assert_allclose(at[f"compensation_{stream}", ""], direct - total)
    change = at["v:swapped", "free"] - at["v_both", "free"]
    np.testing.assert_allclose(at["change:swapped", "free"], change)
    assert not np.allclose(at["v:both", "free"], at["v_both", "free"])


def test_rows_say_where_they_come_from(test_set, values_of):
    test = test_set()
    frame = effects([values_of(test)], test, permutations=200).frame
    assert list(frame) == COLUMNS
    assert not frame.duplicated([*KEYS, "quantity"]).any()
    assert frame["simulated"].all()
    assert (frame["status"] == "ok").all()
    tested = frame[frame["p"].notna()]
    names = {"necessity_local", "necessity_global", "specialisation", "asymmetry"}
    assert set(tested["quantity"]) == names
    assert tested["p"].between(1 / 201, 1).all()
    assert set(frame[frame["q"].notna()]["level"]) == {"roi"}


def test_seeds_are_averaged_and_widen_the_intervals(test_set, values_of, additive_values):
    test = test_set(n_images=200, n_boot=400)
    signal = test.target - test.train_mean
    values = [
        additive_values(test, strength * signal, 0.1 * signal, seed=seed)
        for seed, strength in enumerate((0.1, 0.2, 0.45))
    ]
    frame = effects(values, test, permutations=0).frame
    table = rows(frame, scale="r2", quantity="v_local", region="R0").set_index("seed")
    assert list(table.index) == ["0", "1", "2", "all"]
    assert table["value"]["all"] == pytest.approx(table["value"][["0", "1", "2"]].mean())
    # Each seed's score is the same in every image, so that all spread is between seeds.
    np.testing.assert_allclose(table["high"][:3], table["low"][:3], atol=1e-9)
    draws = np.array(list(itertools.product(table["value"][:3], repeat=3))).mean(axis=1)
    spread = (draws.min(), draws.max())
    assert spread[0] - 1e-9 <= table["low"]["all"] < table["value"]["all"] - 0.05
    assert spread[1] + 1e-9 >= table["high"]["all"] > table["value"]["all"] + 0.05
    assert table["status"]["all"] == "ok"
    two = effects(values[:2], test, permutations=0).frame
    assert set(two[two["seed"] == "all"]["status"]) == {"ok: 2 seeds"}
    assert set(pooled(frame)["seed"]) == {"all"}
    assert set(pooled(effects(values[:1], test, permutations=0).frame)["seed"]) == {"0"}


def test_results_do_not_depend_on_blocks_or_on_other_encoders(test_set, values_of, monkeypatch):
    test = test_set()
    one, other = values_of(test), values_of(test, seed=1, encoder="other", model_class="linear")
    whole = effects([one], test, permutations=50).frame
    monkeypatch.setattr(sums, "_BLOCK_VALUES", 700)
    parts = effects([other, one], test, permutations=50).frame
    parts = parts[parts["encoder"] == "stage 1"].reset_index(drop=True)
    numbers = ["value", "low", "high", "p", "q"]
    np.testing.assert_allclose(parts[numbers], whole[numbers], rtol=0, atol=1e-12)
    assert parts.drop(columns=numbers).equals(whole.drop(columns=numbers))


def test_a_stream_that_changes_nothing_has_no_effect(test_set, additive_values):
    test = test_set()
    signal = 0.3 * (test.target - test.train_mean)
    frame = effects([additive_values(test, signal, 0 * signal)], test).frame
    part = frame[frame["quantity"].isin(["necessity_global", "v_none", "redundancy"])]
    part = part[part["scale"] != "share"]
    assert (part[["value", "low", "high"]].abs() < 1e-12).all(axis=None)
    assert (part.loc[part["quantity"] == "necessity_global", "p"] == 1).all()


def not_estimable(frame, **wanted):
    """The one reason that rows have, none of them with a number."""
    for key, value in wanted.items():
        frame = frame[frame[key] == value]
    assert len(frame)
    assert frame[["value", "low", "high", "p", "q"]].isna().all(axis=None)
    (status,) = set(frame["status"])
    return status.removeprefix("not estimable: ")


def test_what_cannot_be_estimated_says_why(test_set, values_of, region):
    base = test_set()
    ceiling = base.ceiling.copy()
    ceiling[:6] = 0
    ceiling[6:12] = np.nan
    regions = (*base.regions, region("none", [], 24))
    test = test_set(ceiling=ceiling, regions=regions, early=("a:R0", "a:none", "a:missing"))
    frame = effects([values_of(test)], test).frame
    roi = frame[frame["level"] == "roi"]
    assert not_estimable(roi, scale="ceiling", region="R0") == "no unit has a noise ceiling above 0"
    assert not_estimable(roi, scale="share", region="R1") == "noise ceiling unknown (no repeats)"
    assert not_estimable(roi, scale="r2", region="none") == "no voxels"
    assert (roi[(roi["scale"] == "r2") & (roi["region"] != "none")]["status"] == "ok").all()
    why = not_estimable(frame, quantity="asymmetry")
    assert why == (
        "no early region can be scored (no such region; no unit has a noise ceiling above 0; "
        "no voxels)"
    )
    assert frame.loc[frame["status"].str.startswith("ok"), "value"].notna().all()


def test_regions_without_units_are_left_out_of_their_set(test_set, values_of):
    test = test_set(early=("a:R0", "a:gone", "a:R1"))
    with_gone, without = (
        effects([values_of(test)], one).frame.set_index(["quantity", "scale", "region"])
        for one in (test, test_set())
    )
    chosen = ("asymmetry", "ceiling", "early - higher")
    assert with_gone.loc[chosen, "value"] == without.loc[chosen, "value"]
    assert with_gone.loc[chosen, "status"] == "ok: without a:gone"


@pytest.mark.parametrize("n_images", [1, 5])
def test_a_few_images_estimate_nothing(test_set, values_of, n_images):
    test = test_set(n_images=n_images)
    frame = effects([values_of(test)], test).frame
    number = "one test image" if n_images == 1 else "5 test images"
    roi = frame[(frame["level"] == "roi") & (frame["scale"] != "matched")]
    assert not_estimable(roi) == f"{number}, at least 6 are needed"
    assert frame["value"].isna().all()


def test_unknown_ceilings_leave_r2_and_shares(test_set, values_of):
    test = test_set(ceiling=np.full(24, np.nan))
    frame = effects([values_of(test)], test).frame
    assert not_estimable(frame, scale="ceiling", level="roi").startswith("noise ceiling unknown")
    assert not_estimable(frame, scale="matched", level="set").startswith("noise ceiling unknown")
    for scale in ("r2", "share"):
        assert (frame.loc[frame["scale"] == scale, "status"] == "ok").all()


def test_no_share_of_a_prediction_that_is_no_better_than_the_mean(test_set, values_of):
    test = test_set()
    bad = {
        name: test.train_mean + np.random.default_rng(0).normal(size=test.target.shape)
        for name in ("none", "local", "global", "both")
    }
    frame = effects([values_of(test, predictions=bad)], test).frame
    why = "what both streams predict is not above 0"
    assert not_estimable(frame, scale="share", level="roi") == why
    assert not_estimable(frame, scale="share", quantity="asymmetry") == why
    compared = frame["quantity"].isin(["specialisation", "asymmetry"])
    assert not_estimable(frame[compared & (frame["level"] == "roi")], scale="ceiling") == why
    assert (frame.loc[~compared & (frame["scale"] == "ceiling"), "status"] == "ok").all()


def test_constant_units_are_left_out_where_they_are_constant(test_set, values_of):
    test = test_set()
    target = test.target.copy()
    target[:, 0] = test.train_mean[0]
    target[:-1, 6:12] = test.train_mean[6:12]  # R1 responds to one image only
    test = replace(test, target=target)
    one = values_of(test)
    found = effects([one], test)
    assert np.flatnonzero(np.isnan(found.unit_r2["stage 1"]["both"])).tolist() == [0]
    frame = found.frame[found.frame["scale"] == "r2"]
    expected = np.mean([found.unit_r2["stage 1"]["local"][unit] for unit in range(1, 6)])
    row = rows(frame, quantity="v_local").loc["R0"]
    assert row["value"] == pytest.approx(expected)
    assert row["status"] == "ok"
    assert not_estimable(frame, region="R1") == "the responses are constant in some resamples"


def test_no_resamples_no_intervals(test_set, values_of):
    test = test_set(n_boot=0)
    frame = effects([values_of(test), values_of(test, seed=1)], test, permutations=0).frame
    assert frame[["low", "high", "p", "q"]].isna().all(axis=None)
    assert frame.loc[frame["scale"] == "r2", "value"].notna().all()


def test_what_does_not_fit_together_is_refused(test_set, values_of):
    test = test_set()
    one = values_of(test)
    less = {name: values[:, 1:] for name, values in one.predictions.items()}
    part = {name: one.predictions[name] for name in ("none", "both")}
    hole = {**one.predictions, "local": np.full_like(test.target, np.nan)}
    own = (np.zeros((1, 40, 24)), np.arange(40)[None])
    cases = [
        ([one, one], "stage 1, seed 0: given twice"),
        ([replace(one, predictions=less)], "seed 0: none: predictions of shape"),
        ([replace(one, predictions=part)], "no predictions of local, global"),
        ([replace(one, extra=hole)], "local: not every prediction is finite"),
        ([replace(one, interchange=own)], "an image is its own donor"),
        ([replace(one, interchange=(own[0], own[1] * 0))], "no permutations"),
        ([one, values_of(test, seed=1, held=True)], "seeds differ in model class or gate"),
    ]
    for values, message in cases:
        with pytest.raises(DataError, match=message):
            effects(values, test)
    with pytest.raises(DataError, match="ceiling: 3 units, the target has 24"):
        effects([one], replace(test, ceiling=test.ceiling[:3]))
    with pytest.raises(DataError, match="target: it is not a finite table"):
        effects([one], replace(test, target=np.full_like(test.target, np.inf)))
    with pytest.raises(DataError, match="no images or no regions"):
        effects([one], replace(test, regions=()))
    with pytest.raises(ConfigError, match="a:R0 is in both sets"):
        effects([one], replace(test, higher=("a:R0",)))
    with pytest.raises(ConfigError, match="at least 100"):
        effects([one], replace(test, n_boot=10))
