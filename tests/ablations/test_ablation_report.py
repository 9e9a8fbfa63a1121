import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import nibabel
import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from scipy.stats import false_discovery_control

from ablations import figures, tables, wording
from ablations.effects import effects
from ablations.findings import Findings, judged, pattern_frame, planted_shares
from ablations.region_tables import scale_grid, value_grid
from ablations.report import FILES, show, write_report
from chasm.errors import ConfigError
from chasm.evaluation.page import Surroundings

SHARES = {"a:R0": 0.9, "a:R1": 0.8, "a:R2": 0.2, "a:R3": 0.1}


def place(values):
    return nibabel.Nifti1Image(np.asarray(values, np.float32).reshape(2, 3, 4), np.eye(4))


@pytest.fixture
def subject(test_set, additive_values, region):
    def make(name="subj01", shares=(0.9, 0.8, 0.2, 0.1), linear=True, seed=0, **changes):
        rng = np.random.default_rng(seed)
        base = test_set(subject=name, train_mean=np.zeros(24))
        share = np.repeat(shares, 6)
        local = rng.normal(size=(40, 24)) * np.sqrt(share)
        global_ = rng.normal(size=(40, 24)) * np.sqrt(1 - share)
        noise = rng.normal(size=(40, 24)) * np.sqrt(1 / base.ceiling - 1)
        groups = [region("Early", range(12), 24, "streams", "group")]
        groups += [region("Higher", range(12, 24), 24, "streams", "group")]
        groups = [region("all", range(24), 24, "", "all"), *groups]
        fields = {
            "target": local + global_ + noise,
            "regions": (*groups, *base.regions, region("R4", [], 24)),
        }
        test = replace(base, **(fields | changes))
        extra = {"swapped": 0.5 * local}
        values = [additive_values(test, local, global_, extra=extra)]
        if linear:
            ridge = {"encoder": "banded ridge", "model_class": "linear"}
            values.append(additive_values(test, 0.5 * local, 0.5 * global_, **ridge))
        return Findings("standard", effects(values, test, permutations=99), values)

    return make


class Page(HTMLParser):
    """What a reader sees: text, titles, number of figures; and ids and links."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.ids, self.links = [], "", [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append(tag)
        if "id" in found and tag.startswith("h"):
            self.ids.append(found["id"])
        if tag == "a":
            self.links.append(found["href"])

    def handle_data(self, data):
        self.text += data


def test_the_report_is_three_files_with_claims_tables_and_figures(tmp_path, subject):
    one = subject(linear=False)
    given = Surroundings(volume=place, provenance={"run": {"seed": 3}})
    one = replace(one, planted=SHARES, recipe="title: x <y>", surroundings=given)
    out = write_report(tmp_path / "report", [one, subject("subj02", seed=1)])
    assert sorted(path.name for path in out.parent.iterdir()) == sorted(FILES)

    text = out.read_text()
    page = Page(text)
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//|@import|<link""", text)
    assert page.links == [f"#{name}" for name in page.ids]
    assert "SIMULATED data: nothing on this page" in page.text
    assert page.text.count("double dissociation") >= 2
    assert "in 2 of 2 subjects" in page.text
    assert "run.seed" in page.text
    assert "title: x <y>" in page.text
    assert text.count("<svg") == 5 + 3  # the planted D of one subject; a figure of each encoder
    assert text.count("data:image/png") >= 1
    assert page.tags.count("iframe") == 1

    markdown = (out.parent / "table.md").read_text()
    titles = re.findall(r"^##? (.*)$", markdown, re.MULTILINE)
    unmarked = [t for t in titles if "SIMULATED" not in t]
    assert set(unmarked) == {"What the numbers do not show", "Replication"}

    rows = pd.read_csv(out.parent / "effects.csv")
    assert set(rows["subject"]) == {"subj01", "subj02"}
    assert rows["simulated"].all()
    assert rows["quantity"].str.startswith("pattern_correlation:").any()
    assert rows["q"].notna().any()


def test_q_is_adjusted_over_all_subjects(subject):
    one, two = subject(), subject("subj02", (0.5,) * 4, seed=1)
    frames = [found.effects.frame for found in judged([one, two])]
    rows = pd.concat(frames).query(
        "encoder == 'stage 1' and quantity == 'specialisation' and scale == 'ceiling' "
        "and level == 'roi' and p == p"
    )
    assert len(rows) == 8
    np.testing.assert_allclose(rows["q"], false_discovery_control(rows["p"]))
    assert not np.allclose(rows["q"][:4], false_discovery_control(rows["p"][:4]))


def test_null_worlds_decide_over_the_claim_and_are_told(subject):
    one = subject()
    bare = judged([one])[0]
    assert bare.claims["stage 1"].kind == "double dissociation"
    assert "uncalibrated" in bare.claims["stage 1"].sentence
    assert "exploratory" in " ".join(wording.limits(bare))

    ridge = {"stage 1": 0.4, "banded ridge": 0.01}
    told = judged([replace(one, null_p=ridge)])[0]
    assert told.claims["stage 1"].kind == "none"
    assert told.claims["banded ridge"].kind == "double dissociation"
    assert "p = 0.4 for stage 1, p = 0.01 for banded ridge" in wording.calibration(told)
    assert "exploratory" not in " ".join(wording.limits(told))

    partly = judged([replace(one, null_p={"stage 1": 0.04, "banded ridge": None})])[0]
    assert "asymmetry of banded ridge was not compared" in wording.calibration(partly)


def test_no_subject_or_the_same_twice_is_refused(tmp_path, subject):
    with pytest.raises(ConfigError, match="no subject"):
        write_report(tmp_path, [])
    one = subject(early=(), higher=())
    with pytest.raises(ConfigError, match="twice"):
        write_report(tmp_path, [one, one])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"early": (), "higher": ()}, "no early regions were given"),
        ({"ceiling": np.full(24, np.nan)}, "noise ceiling unknown"),
        ({"n_boot": 0}, "No intervals were computed"),
    ],
)
def test_what_is_missing_is_said_and_nothing_is_nan(tmp_path, subject, changes, text):
    out = write_report(tmp_path, [subject(linear=False, simulated=False, **changes)])
    page = Page(out.read_text()).text
    assert text in page
    assert "SIMULATED" not in page
    assert "No second model class" in page
    assert not re.search(r"\bnan\b", page + (tmp_path / "table.md").read_text(), re.IGNORECASE)


def test_values_without_a_ceiling_are_mean_r2_of_all_units(subject):
    one = subject(ceiling=np.full(24, np.nan))
    line = value_grid(one, "stage 1").lines[0]
    assert line.cells[:2] == ("24", "–")
    prediction, target = one.values[0].predictions["both"], one.test.target
    r2 = 1 - np.square(target - prediction).sum(0) / np.square(target).sum(0)
    assert line.cells[-1].value == pytest.approx(r2.mean())


def test_patterns_are_the_mean_correlation_of_each_condition(subject):
    one = subject()
    frame = pattern_frame(one).set_index(["encoder", "region", "quantity"])
    for label, made in (("full", "both"), ("patches only", "local"), ("CLS only", "global")):
        expected = np.mean(
            [
                np.corrcoef(x, y)[0, 1]
                for x, y in zip(
                    one.values[0].predictions[made][:, :12], one.test.target[:, :12], strict=True
                )
            ]
        )
        row = frame.loc[("stage 1", "Early", f"pattern_correlation:{label}")]
        assert row["value"] == pytest.approx(expected, abs=1e-6)
        assert row["low"] < row["value"] < row["high"]
    assert ("banded ridge", "Early", "pattern_correlation:swapped") not in frame.index

    grid = tables.pattern_grid(one, "stage 1")
    lines = {line.label: line.cells for line in grid.lines}
    assert grid.columns == ("Early", "Higher", "all")
    assert lines["full, published"] == (".512", ".625", ".585")
    assert "never to be ranked" in grid.note
    assert "simulated" in grid.note


def test_planted_shares_stand_beside_what_was_found(subject):
    one = replace(subject(), planted=SHARES)
    lines = {line.label: line.cells for line in scale_grid(one, "stage 1").lines}
    assert lines["R0"][-1] == "+0.80"
    assert lines["R3"][-1] == "-0.80"
    assert lines["Early"][-1] == "–"
    figure = figures.specialisation_figure(one, "share")
    drawn = {line.get_label(): line.get_xdata() for line in figure.axes[0].get_lines()}
    known = drawn["planted"][~np.isnan(drawn["planted"])]
    assert known == pytest.approx([0.8, 0.6, -0.6, -0.8])
    rois = {"a": {"R0": {"local_share": 0.9}}, "groups": {"Early": {"local_share": 0.7}}}
    assert planted_shares(rois) == {"a:R0": 0.9, "streams:Early": 0.7}


def test_the_plane_has_early_above_higher(subject):
    one = subject()
    figure = figures.plane_figure(one)
    drawn = {line.get_label(): line.get_xydata() for line in figure.axes[0].get_lines()}
    rows = one.rows("stage 1")
    rows = rows[(rows["quantity"] == "specialisation") & (rows["scale"] == "ceiling")]
    rows = rows[rows["level"] == "set"].set_index("region")["value"]
    assert drawn["stage 1"][0] == pytest.approx([rows["higher"], rows["early"]])
    assert rows["early"] > 0 > rows["higher"]
    assert figures.plane_figure(subject(early=(), higher=())) is None


def test_encoders_that_disagree_are_named(subject):
    one = subject()
    assert "same sign in 4 of 4 ROIs" in tables.agreement_grid(one).note
    frame = one.effects.frame.copy()
    turned = (frame["encoder"] == "banded ridge") & (frame["quantity"] == "specialisation")
    turned &= frame["region"] == "R0"
    frame.loc[turned, ["value", "low", "high"]] *= -1
    frame.loc[turned, ["low", "high"]] = frame.loc[turned, ["high", "low"]].to_numpy()
    note = tables.agreement_grid(replace(one, effects=replace(one.effects, frame=frame))).note
    assert "same sign in 3 of 4 ROIs" in note
    assert "opposed" in note
    assert "R0" in note


def test_the_terminal_shows_regions_claims_and_replication(subject):
    stream = io.StringIO()
    show([subject()], Console(file=stream, width=160))
    text = stream.getvalue()
    assert "R3" in text
    assert "double dissociation" in text
    assert "1 of 1 subjects" in text
    assert "SIMULATED · Value of each coalition: stage 1" in text


def test_without_an_asymmetry_nothing_is_said_to_replicate(subject):
    one, two = subject(shares=(0.5,) * 4), subject("subj02", (0.5,) * 4, seed=1)
    for found, whom in (([one], "in the one subject"), ([one, two], "in any of 2 subjects")):
        rows = found[0].effects.frame.query("quantity == 'asymmetry' and scale == 'ceiling'")
        assert (rows["low"] < 0).all()
        assert (rows["high"] > 0).all()
        told = wording.replication_sentences(judged(found)[0])
        assert len(told) == 2
        assert all("more local" not in text and whom in text for text in told)
