import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import nibabel
import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from chasm.errors import ConfigError, DataError
from chasm.evaluation import brain_maps, evaluate, figures, tables
from chasm.evaluation.catalogue import PUBLISHED
from chasm.evaluation.predictions import Draws, Membership, PredictionRow
from chasm.evaluation.report import write_report
from chasm.evaluation.scores import score
from chasm.evaluation.wording import summary

VOID = {"meta", "img", "br", "link", "path", "use", "rect", "input"}


class Page(HTMLParser):
    """Collects texts and sources, and checks that tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.sources, self.inner, self.ids = [], [], [], [], set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.inner += [value for name, value in attrs if name == "srcdoc"]
        self.ids |= {value for name, value in attrs if name == "id"}
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.ids |= {value for name, value in attrs if name == "id"}

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.texts))


@pytest.fixture
def volume():
    """Puts 40 units into a small volume."""
    mask = np.zeros((12, 14, 10), bool)
    mask[2:10, 3:11, 2:8] = True
    label = np.arange(mask.sum()) % 40

    def to_image(values):
        data = np.full(mask.shape, np.nan, np.float32)
        data[mask] = np.asarray(values)[label]
        return nibabel.Nifti1Image(data, np.diag([1.8, 1.8, 1.8, 1.0]))

    return to_image


@pytest.fixture
def metrics_csv(tmp_path):
    epochs = np.arange(6)
    frame = pd.DataFrame({"epoch": np.repeat(epochs, 2), "step": np.arange(12)})
    frame["train/loss"] = np.where(np.arange(12) % 2, np.nan, 1 / (1 + frame["epoch"]))
    frame["val/loss"] = np.where(np.arange(12) % 2, 1.2 / (1 + frame["epoch"]), np.nan)
    frame["val/pattern_correlation"] = np.where(np.arange(12) % 2, frame["epoch"] / 10, np.nan)
    frame.to_csv(tmp_path / "metrics.csv", index=False)
    return tmp_path / "metrics.csv"


def test_evaluate_writes_everything_once(tmp_path, predictions, volume, metrics_csv):
    path = predictions().write(tmp_path / "predictions.h5")
    out = tmp_path / "report"
    extra = {"seed": 7, "versions": {"torch": "2.15.0"}, "note": "<script>alert(1)</script>"}
    scores = evaluate(
        path, out, n_boot=100, metrics_csv=metrics_csv, provenance=extra, volume=volume
    )
    assert sorted(p.name for p in out.iterdir()) == [
        "report.html", "scores.csv", "scores.json", "table.md",
    ]  # fmt: skip
    page = Page((out / "report.html").read_text())
    for words in (
        "SIMULATED data", "weight-free", "noise ceiling", "mean pattern", "stage 1 − ridge",
        "target variance", "Against the model's own targets", "versions.torch 2.15.0",
        "d_model: 128", "<script>alert(1)</script>", *(row.system for row in PUBLISHED),
    ):  # fmt: skip
        assert words in page.text, words
    # Nothing is fetched: images are embedded, references stay inside the page.
    assert page.sources
    assert all(source.startswith(("data:", "#")) for source in page.sources)
    assert sum(source.startswith("data:image/png") for source in page.sources) >= 2

    csv = pd.read_csv(out / "scores.csv")
    assert csv["simulated"].all()
    assert len(csv) == len(scores.frame)
    np.testing.assert_allclose(csv["value"], scores.frame["value"].astype(float), rtol=1e-5)


def test_a_report_is_written_again_when_what_it_is_made_from_changed(
    tmp_path, predictions, metrics_csv
):
    small = {"n_images": 12, "n_units": 8, "membership": {}, "targets": {}, "rows": {}}
    path = predictions(**small).write(tmp_path / "predictions.h5")
    out = tmp_path / "report"
    given = {"n_boot": 100, "metrics_csv": metrics_csv, "provenance": {"seed": 7}}

    def written(**changes):
        """Whether a call wrote the four files again."""
        before = {p: p.stat().st_mtime_ns for p in out.iterdir()}
        evaluate(path, out, **{**given, **changes})
        after = {p: p.stat().st_mtime_ns for p in out.iterdir()}
        changed = {p.name for p, time in after.items() if before[p] != time}
        assert len(changed) in (0, 4)
        return bool(changed)

    evaluate(path, out, **given)
    assert not written()
    assert written(fresh=True)
    assert written(n_boot=101)
    assert written()
    assert written(provenance={"seed": 8})
    assert written()
    metrics_csv.write_text(metrics_csv.read_text() + "6,12,0.1,0.1,0.7\n")
    assert written()
    predictions(seed=1, **small).write(path)
    assert written()
    for garbage in (b"{", b"\xff\xfe\x00", b"null"):
        (out / "scores.json").write_bytes(garbage)
        assert written()
    assert not written()
    with pytest.raises(ConfigError, match="at least 100"):
        evaluate(path, out, n_boot=99)
    assert not written()


@pytest.fixture
def stage2_file(predictions):
    """Voxels with a stage before, draws, a gate per parcel and voxels without a parcel."""
    file = predictions(unit="voxel", targets={})
    rng = np.random.default_rng(1)
    model = file.rows["stage 1"].values
    rows = {
        "stage 2": PredictionRow(model, "model", 280),
        "ridge": file.rows["ridge"],
        "stage 1, expanded": PredictionRow(0.6 * model + 0.3 * rng.normal(size=model.shape),
                                           "component"),
    }  # fmt: skip
    share = rng.uniform(0.2, 0.8, (60, 6))
    drawn = Draws(20, 0, model, np.full(model.shape, 0.01))
    labels = np.repeat(np.arange(7), 6)[:40]
    return replace(
        file, rows=rows, draws=drawn, parcel_labels=np.where(labels == 6, -1, labels),
        gate=np.stack([share, 1 - share], axis=2),
    )  # fmt: skip


def pixels_of(image_ids):
    return [np.full((90, 120, 3), 128, np.uint8) for _ in image_ids]


def assert_self_contained(page):
    """No source of the page, or of a page inside it, is anywhere else."""
    for source in page.sources:
        assert source == "" or source.startswith(("data:", "#")), source[:80]
    assert not [source for source in page.sources if source.startswith("#") and
                source[1:] not in page.ids]  # fmt: skip
    for text in page.inner:
        assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//|@import|<link""", text)


def test_the_page_of_a_stage_2_has_every_section(tmp_path, stage2_file, volume, metrics_csv):
    path = stage2_file.write(tmp_path / "predictions.h5")
    out = tmp_path / "report"
    scores = evaluate(
        path, out, n_boot=100, metrics_csv=metrics_csv, volume=volume, pixels=pixels_of
    )
    text = (out / "report.html").read_text()
    page = Page(text)
    assert_self_contained(page)
    sections = {"scores", "brain", "images", "draws", "gate", "training", "published"}
    assert sections <= page.ids
    assert {f"#{name}" for name in sections} <= set(page.sources)
    gain = scores.gains.set_index(["metric", "region"]).loc[("noise_normalised_r2", "all")]
    for words in (
        f"Stage 2 minus stage 1, expanded: {100 * gain['difference']:+.1f} points",
        "stage 2 − stage 1, expanded", "Share of the global stream",
        f"variance of draws is {100 * scores.spreads['ratio'].iloc[0]:.3g} % of that of",
        "R² of stage 2 minus that of the best baseline, ridge", "Voxelwise",
    ):  # fmt: skip
        assert words in page.text, words
    assert len(page.inner) == 3
    assert sum(source.startswith("data:image/jpeg") for source in page.sources) == 8
    assert len(text) < 3_000_000
    draws = pd.read_csv(out / "draws.csv")
    np.testing.assert_allclose(draws["ratio"], scores.spreads["ratio"], rtol=1e-5)
    csv = pd.read_csv(out / "scores.csv")
    facts = {"subject": "subj01", "dataset": "nsd", "simulated": True, "unit": "voxel",
             "split": "clean", "weights": "weight-free"}  # fmt: skip
    for frame in (draws, csv):
        assert list(frame.columns[:6]) == list(facts)
        assert (frame[list(facts)] == list(facts.values())).all(axis=None)
    lines = csv[csv["kind"] == "difference"]
    assert set(lines["row"]) == {"stage 2 − stage 1, expanded"}
    np.testing.assert_allclose(lines["value"], scores.gains["difference"], rtol=1e-5)


def test_a_report_is_made_again_when_pixels_or_draws_go(tmp_path, stage2_file):
    small = replace(stage2_file, membership={})
    path, out = tmp_path / "predictions.h5", tmp_path / "report"
    evaluate(small.write(path), out, n_boot=0, pixels=pixels_of)
    (out / "draws.csv").unlink()
    evaluate(path, out, n_boot=0, pixels=pixels_of)
    assert (out / "draws.csv").is_file()
    assert "image/jpeg" in (out / "report.html").read_text()
    evaluate(path, out, n_boot=0)
    assert "image/jpeg" not in (out / "report.html").read_text()
    evaluate(replace(small, draws=None).write(path), out, n_boot=0)
    assert not (out / "draws.csv").exists()
    assert "#draws" not in Page((out / "report.html").read_text()).sources


def test_units_of_a_recording_are_not_called_voxels(tmp_path, predictions):
    file = predictions(unit="voxel", targets={})
    file = replace(file, info=replace(file.info, unit="unit", simulated=False))
    scores = score(file, n_boot=100)
    out = write_report(file.write(tmp_path / "p.h5"), tmp_path / "r.html", scores=scores)
    page, table = Page(out.read_text()).text, tables.markdown(scores)
    # Published numbers keep their own words.
    for ours in (
        page.split("Published numbers, for orientation")[0],
        table.split("## Published")[0],
    ):
        assert "oxel" not in ours, ours[ours.index("oxel") - 60 :][:120]
        assert "Unitwise" in ours
    assert "Unit by unit" not in page  # there are areas
    alone = replace(file, membership={}, repeat_targets=None)
    out = write_report(
        alone.write(tmp_path / "a.h5"), tmp_path / "a.html", scores=score(alone, n_boot=0)
    )
    text = Page(out.read_text()).text
    assert "Unit by unit" in text
    assert "Where in the brain" not in text


def test_a_page_without_atlas_ceiling_model_or_map(tmp_path, predictions):
    file = predictions(membership={}, targets={}, repeat_targets=None)
    rows = {name: row for name, row in file.rows.items() if row.kind == "baseline"}
    units = replace(file.units, ncsnr=np.full(40, np.nan))
    info = replace(file.info, simulated=False, weights_label="UNTRAINED", config="")
    file = replace(file, rows=rows, units=units, info=info)
    out = write_report(
        file.write(tmp_path / "p.h5"), tmp_path / "r.html", scores=score(file, n_boot=100)
    )
    page = Page(out.read_text())
    assert "SIMULATED" not in page.text
    assert "UNTRAINED backbone" in page.text
    assert "holds no model" in page.text


def test_only_simulated_scores_are_called_simulated(predictions):
    file = predictions()
    simulated = score(file, n_boot=0)
    real = score(replace(file, info=replace(file.info, simulated=False)), n_boot=0)
    for scores, expected in ((simulated, True), (real, False)):
        buffer = io.StringIO()
        tables.show(scores, Console(file=buffer, width=120))
        assert ("SIMULATED" in buffer.getvalue()) is expected
        assert ("SIMULATED" in tables.markdown(scores)) is expected
        assert "weight-free" in buffer.getvalue()


def test_markdown_tables_are_rectangular_and_hold_the_numbers(predictions):
    scores = score(predictions(), n_boot=100)
    text = tables.markdown(scores)
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        assert len({line.count("|") for line in block.splitlines()}) == 1
    frame = scores.frame
    line = frame[
        (frame["row"] == "stage 1")
        & (frame["metric"] == "noise_normalised_r2")
        & (frame["region"] == "hV4")
    ].iloc[0]
    assert f"{line['value']:.3f} [{line['low']:.2f}, {line['high']:.2f}]" in text
    assert "| noise ceiling | 1.000 |" in text
    assert "Constant, so without a correlation and left out: mean pattern: 40 parcels" in text


def test_a_table_says_what_its_rows_were_trained_on_and_how_the_baseline_is_chosen(predictions):
    file = predictions()
    own = replace(file.rows["ridge"], values=file.rows["ridge"].values + 0.2, trained_on="top_p")
    model = replace(file.rows["stage 1"], trained_on="top_p")
    plain = tables.markdown(score(file, n_boot=0))
    file = replace(
        file,
        rows={**file.rows, "stage 1": model},
        targets={"top_p": replace(file.targets["top_p"], rows={"ridge": own})},
    )
    text = tables.markdown(score(file, n_boot=0))
    mixed = "Trained on plain parcel means: ridge, linear probe (CLS); on top-p parcel means: "
    assert f"{mixed}stage 1." in text
    tail = text[text.index("Scores against top-p parcel means") :]
    assert (
        "Trained on top-p parcel means: ridge, stage 1; on plain parcel means: linear probe (CLS)."
    ) in tail
    # Nothing to say where every row was trained on what it is scored against.
    assert "Trained on" not in plain[: plain.index("Scores against top-p")]
    assert plain.count("the intervals do not include that choice") == 1


def test_terminal_table_is_not_cut(predictions):
    buffer = io.StringIO()
    tables.show(score(predictions(), n_boot=100), Console(file=buffer, width=80))
    text = buffer.getvalue()
    assert "…" not in text
    assert re.search(r"stage 1 .*0\.\d{3}", text)


def test_summary_says_when_the_test_does_not_decide(predictions):
    file = predictions()
    clear = summary(score(file, n_boot=100))
    assert len(clear) == 1
    assert clear[0].startswith("Stage 1 explains")
    assert "does not include 0" in clear[0]
    twin = replace(file.rows["stage 1"], values=file.rows["ridge"].values)
    file = replace(file, rows={**file.rows, "stage 1": twin})
    again = summary(score(file, n_boot=100))[0]
    assert "the difference is +0.0 points" in again
    assert "do not tell the two apart" in again


def test_areas_of_two_atlases_stand_under_their_atlas(predictions):
    file = predictions()
    membership = {**file.membership, "Kastner2015": file.membership["prf-visualrois"]}
    membership["nsdgeneral"] = Membership(file.units.size[:, None], ("nsdgeneral",))
    scores = score(replace(file, membership=membership), n_boot=0)
    axes = figures.region_figure(scores).axes[0]
    regions = {height: tick.get_text() for height, tick in zip(
        axes.get_yticks(), axes.get_yticklabels(), strict=True)}  # fmt: skip
    headings = {text.get_text(): text.xy[1] for text in axes.texts}
    assert list(headings) == ["streams", "prf-visualrois", "Kastner2015"]
    for atlas in ("prf-visualrois", "Kastner2015"):
        below = sorted(height for height in regions if height > headings[atlas])
        assert [regions[h] for h in below][:7] == ["V1v", "V1d", "V2v", "V2d", "V3v", "V3d", "hV4"]
    grid = tables.region_grid(scores, "noise_normalised_r2")
    v1 = [line.cells[0] for line in grid.lines if line.label == "V1v"]
    assert (grid.columns[0], v1) == ("Atlas", ["prf-visualrois", "Kastner2015"])
    assert "nsdgeneral" not in {*regions.values(), *(line.label for line in grid.lines)}


def test_figures_show_what_is_there(predictions, metrics_csv, tmp_path, volume):
    scores = score(predictions(), n_boot=100)
    assert list(figures.compared_rows(scores)) == ["ridge", "stage 1"]
    axes = figures.region_figure(scores).axes[0]
    labels = [tick.get_text() for tick in axes.get_yticklabels()]
    assert labels[:4] == ["all", "Early", "Mid", "Higher"]
    assert {"V1v", "hV4", "parietal"} <= set(labels)
    headings = [text.get_text() for text in axes.texts]
    assert headings == ["streams", "prf-visualrois"]
    names = [
        axis.get_title(loc="left") for f in figures.training_figures(metrics_csv) for axis in f.axes
    ]
    assert names == ["loss", "pattern correlation"]
    with pytest.raises(DataError, match="no such file"):
        figures.training_figures(tmp_path / "none.csv")
    (tmp_path / "empty.csv").write_text("step,x\n1,2\n")
    with pytest.raises(DataError, match="epoch"):
        figures.training_figures(tmp_path / "empty.csv")
    first, second = (figures.to_svg(figures.ceiling_figure(scores)) for _ in range(2))
    assert first == second
    png = figures.to_png(brain_maps.brain_figure(scores.unit_r2["stage 1"], volume, "R²"))
    assert png.startswith(b"\x89PNG")
