from dataclasses import replace

import numpy as np
import pytest

from ablations.claims import SCALES, claim, combine
from ablations.effects import effects
from chasm.errors import ConfigError


@pytest.fixture
def base(test_set, values_of):
    """Effects whose numbers a test writes itself."""
    test = test_set()
    values = [
        values_of(test, seed=seed, encoder=encoder, model_class=model_class)
        for encoder, model_class, seeds in (
            ("banded ridge", "linear", [0]),
            ("stage 1", "model", [0, 1, 2]),
        )
        for seed in seeds
    ]
    return effects(values, test, permutations=0)


def write(effects_, quantity, numbers, region="early - higher", encoder="stage 1", status="ok"):
    """Set value, low, high of a row on each scale given, pooled over seeds."""
    frame = effects_.frame.copy()
    seed = "all" if encoder == "stage 1" else "0"
    for scale, number in numbers.items():
        chosen = (
            (frame["encoder"] == encoder)
            & (frame["seed"] == seed)
            & (frame["quantity"] == quantity)
            & (frame["region"] == region)
            & (frame["scale"] == scale)
        )
        assert chosen.sum() == 1
        frame.loc[chosen, ["value", "low", "high"]] = number
        frame.loc[chosen, "status"] = status
    return replace(effects_, frame=frame)


POSITIVE = dict.fromkeys(SCALES, (0.5, 0.4, 0.6))


def scene(base, asymmetry=POSITIVE, early=(0.3, 0.2, 0.4), higher=(-0.2, -0.3, -0.1)):
    found = write(base, "asymmetry", {**POSITIVE, **asymmetry})
    found = write(found, "asymmetry", {"ceiling": (0.1, -0.1, 0.3)}, encoder="banded ridge")
    found = write(found, "specialisation", {"ceiling": early}, "early")
    return write(found, "specialisation", {"ceiling": higher}, "higher")


def negated(number):
    value, low, high = number
    return -value, -high, -low


def test_a_double_dissociation_needs_both_signs(base):
    found = claim(scene(base))
    assert (found.kind, found.sign) == ("double dissociation", 1)
    assert found.sentence == (
        "SIMULATED data, subj01 (toy), stage 1 (3 seeds): double dissociation, early regions lean "
        "on the local stream and higher regions on the global stream: I = 0.500 [0.400, 0.600] in "
        "noise-ceiling units (early D = 0.300 [0.200, 0.400], higher D = -0.200 [-0.300, -0.100]), "
        "the same sign in share units and matched for noise ceiling, not compared with simulated "
        "null worlds (uncalibrated). In banded ridge, I = 0.100 [-0.100, 0.300] includes 0."
    )


def test_reversed_signs_are_a_double_dissociation_the_other_way(base):
    turned = {scale: negated(number) for scale, number in POSITIVE.items()}
    found = claim(scene(base, turned, negated((0.3, 0.2, 0.4)), negated((-0.2, -0.3, -0.1))))
    assert (found.kind, found.sign) == ("double dissociation", -1)
    assert "early regions lean on the global stream and higher regions on the local" in (
        found.sentence
    )


@pytest.mark.parametrize("higher", [(0.1, 0.05, 0.2), (-0.1, -0.3, 0.1)])
def test_one_sign_or_an_unclear_one_is_only_ordinal(base, higher):
    found = claim(scene(base, higher=higher))
    assert found.kind == "asymmetric (ordinal)"
    assert "early regions are more local than higher regions" in found.sentence
    assert "double dissociation" not in found.sentence


@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_must_exclude_zero(base, scale):
    found = claim(scene(base, {scale: (0.2, -0.01, 0.4)}))
    assert (found.kind, found.sign) == ("none", 0)
    expected = (
        f"no asymmetry can be claimed, I = 0.200 [-0.010, 0.400] in {SCALES[scale]} includes 0."
    )
    assert expected in found.sentence


@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_must_agree_in_sign(base, scale):
    found = claim(scene(base, {scale: (-0.5, -0.6, -0.4)}))
    assert found.kind == "none"
    assert "no asymmetry can be claimed, the scales disagree in sign" in found.sentence


def test_an_asymmetry_must_beat_the_simulated_null(base):
    assert claim(scene(base), null_p=0.05).kind == "double dissociation"
    assert "p = 0.05 against simulated null worlds" in claim(scene(base), null_p=0.05).sentence
    found = claim(scene(base), null_p=0.051)
    assert found.kind == "none"
    assert "no asymmetry can be claimed" in found.sentence
    assert "(p = 0.051)" in found.sentence
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="null_p"):
            claim(scene(base), null_p=wrong)


def test_a_scale_without_an_estimate_stops_the_claim(base):
    nothing = (np.nan, np.nan, np.nan)
    status = "not estimable: matching the noise ceilings leaves 2.0 units of FFA-1"
    found = claim(write(scene(base), "asymmetry", {"matched": nothing}, status=status))
    assert found.kind == "not estimable"
    assert "2.0 units of FFA-1" in found.sentence
    assert "nan" not in found.sentence.lower()


def test_a_second_class_that_disagrees_is_said(base):
    opposite = write(
        scene(base), "asymmetry", {"ceiling": (-0.3, -0.4, -0.2)}, encoder="banded ridge"
    )
    found = claim(opposite)
    assert found.kind == "double dissociation"
    assert found.sentence.endswith(
        "But in banded ridge, I = -0.300 [-0.400, -0.200] has the opposite sign."
    )
    same = write(scene(base), "asymmetry", {"ceiling": (0.3, 0.2, 0.4)}, encoder="banded ridge")
    assert claim(same).sentence.endswith("In banded ridge, I = 0.300 [0.200, 0.400] agrees.")


def test_the_linear_encoder_can_be_asked_too(base):
    found = claim(scene(base), encoder="banded ridge")
    assert found.kind == "none"
    assert "banded ridge: no asymmetry can be claimed" in found.sentence
    assert "In stage 1, I = 0.500 [0.400, 0.600] excludes 0." in found.sentence
    with pytest.raises(ConfigError, match="Choose one of banded ridge, stage 1"):
        claim(base, encoder="stage 3")


def test_subjects_are_counted_by_sign(base):
    numbers = [(0.5, 0.4, 0.6), (0.2, 0.1, 0.3), (0.1, -0.1, 0.3), (-0.2, -0.3, -0.1)]
    frames = [
        write(base, "asymmetry", {"ceiling": number}).frame.assign(subject=f"subj0{index}")
        for index, number in enumerate(numbers)
    ]
    found = combine(frames)
    assert (found.positive, found.negative) == (("subj00", "subj01"), ("subj03",))
    assert found.subjects == ("subj00", "subj01", "subj02", "subj03")
    assert "in 2 of 4 subjects; 4 subjects cannot give p < 0.125 by sign flips." in found.sentence
    assert claim(scene(base), replication=found).sentence.endswith(found.sentence)
    assert combine(frames[3:]).sentence.startswith("Early regions are less local")
    assert "one subject says nothing of others" in combine(frames[:1]).sentence
    with pytest.raises(ConfigError, match="given twice"):
        combine([frames[0], frames[0]])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"early": ()}, "no early regions were given"),
        ({"higher": ("a:missing",)}, "no higher region can be scored (no such region)"),
        ({"ceiling": np.full(24, np.nan)}, "noise ceiling unknown (no repeats)"),
        ({"ceiling": np.zeros(24)}, "no unit has a noise ceiling above 0"),
        ({"n_images": 1}, "one test image, at least 6 are needed"),
        ({"n_boot": 0}, "no resamples were drawn"),
    ],
)
def test_what_cannot_be_estimated_is_not_claimed(test_set, values_of, changes, reason):
    test = test_set(**changes)
    found = claim(effects([values_of(test)], test, permutations=0))
    assert found.kind == "not estimable"
    assert reason in found.sentence
    assert "nan" not in found.sentence.lower()


def world(test_set, additive_values, share, seed):
    """Responses of which each region has a share that the local stream predicts, and noise."""
    rng = np.random.default_rng(seed)
    n_images, n_units = 150, 96
    local, global_, noise = rng.normal(size=(3, n_images, n_units))
    share = np.repeat(share, n_units // len(share))
    ceiling = rng.uniform(0.3, 0.6, n_units)
    local, global_ = np.sqrt(ceiling * share) * local, np.sqrt(ceiling * (1 - share)) * global_
    test = test_set(
        n_images=n_images, n_units=n_units, ceiling=ceiling, train_mean=np.zeros(n_units),
        target=local + global_ + np.sqrt(1 - ceiling) * noise, n_boot=400,
    )  # fmt: skip
    return effects([additive_values(test, local, global_)], test, permutations=0)


def test_a_simulated_null_claims_nothing(test_set, additive_values):
    kinds = []
    for seed in range(20):
        found = claim(world(test_set, additive_values, [0.5] * 4, seed))
        kinds.append(found.kind)
        if found.kind == "none":
            assert "no asymmetry can be claimed" in found.sentence
    # Each of the three intervals excludes 0 in 5 % of null worlds: 4 of 20 has p < .02.
    assert kinds.count("none") >= 17
    assert set(kinds) <= {"none", "asymmetric (ordinal)", "double dissociation"}


@pytest.mark.parametrize(
    ("share", "kind", "sign"),
    [
        ([0.9, 0.9, 0.2, 0.2], "double dissociation", 1),
        ([0.1, 0.1, 0.8, 0.8], "double dissociation", -1),
        ([0.95, 0.95, 0.65, 0.65], "asymmetric (ordinal)", 1),
        ([0.75, 0.75, 0.75, 0.75], "none", 0),
    ],
)
def test_what_is_planted_is_claimed(test_set, additive_values, share, kind, sign):
    found = claim(world(test_set, additive_values, share, 0))
    assert (found.kind, found.sign) == (kind, sign)
