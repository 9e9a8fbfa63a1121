"""The benchmarks: rows, ratios and goals, the published way beside ours, a quick run of each."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def as_scripts(monkeypatch):
    """Import them as the scripts do each other; leave nothing behind."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in set(sys.modules) - before:
        if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


@pytest.fixture(scope="module")
def toy_subject(tmp_path_factory):
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from subject import TOY, make_subject

        return make_subject(tmp_path_factory.mktemp("subject") / "toy", 64, TOY)
    finally:
        sys.path.remove(str(BENCHMARKS))


def some_rows():
    from measure import Row

    return [
        Row("scan", "stage1", "reference", 3.0, 4200.0, flops=2e9, bytes=1e9),
        Row("scan", "stage1", "numba", 0.15, 160.0, "reference", flops=2e9, bytes=1e9, note="x"),
        Row("scan", "stage1", "torch", 1.0, None, "reference"),
    ]


# Rows.


def test_rows_come_back_from_their_file(tmp_path):
    from measure import read_rows, write_rows

    write_rows(some_rows(), tmp_path / "rows.json")
    assert read_rows(tmp_path / "rows.json") == some_rows()


def test_ratios_are_to_the_named_way_of_the_same_case():
    from measure import Row, ratios

    rows = [*some_rows(), Row("scan", "demo", "torch", 1.0, 1.0, "reference")]
    found = ratios(rows)
    assert found["scan", "stage1", "numba"] == (pytest.approx(20), pytest.approx(26.25))
    assert found["scan", "stage1", "torch"] == (3.0, None)
    assert found["scan", "stage1", "reference"] == (None, None)
    assert found["scan", "demo", "torch"] == (None, None)


def test_numbers_are_written_with_three_digits_and_a_unit():
    from measure import digits, duration, factor, megabytes

    assert [duration(v) for v in (12.345, 0.0123, 4.2e-5)] == ["12.3 s", "12.3 ms", "42 µs"]
    assert [duration(math.nan), factor(None), megabytes(None)] == ["", "", ""]
    assert [megabytes(163.2), megabytes(4210)] == ["163 MB", "4.21 GB"]
    assert [digits(1234.5), factor(20.04)] == ["1234", "20x"]


def test_the_peak_of_memory_is_seen_after_it_is_over(tmp_path):
    from measure import apart

    script = tmp_path / "worker.py"  # in this process, memory that a test before freed may be kept
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "import numpy as np\n"
        "from measure import extra_memory, say\n"
        "say(extra_memory(lambda: bool(np.ones(40_000_000, np.uint8).any())))\n"
    )
    assert apart(script) == pytest.approx(40, abs=8)


def test_ways_take_turns():
    from measure import in_turns

    seen = []
    found = in_turns({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 2, warm=1)
    assert "".join(seen) == "ababab"
    assert [len(times) for times in found.values()] == [2, 2]


def test_a_fresh_process_answers_or_says_why_not(tmp_path):
    from measure import apart, apart_in_turns

    script = tmp_path / "worker.py"
    script.write_text(
        "import json, sys\n"
        "print('words')\n"
        "if sys.argv[1] == 'bad': raise ValueError('no such way')\n"
        "print(json.dumps({'seconds': float(sys.argv[1]), 'memory_mb': None}))\n"
    )
    assert apart(script, 2) == {"seconds": 2.0, "memory_mb": None}
    with pytest.raises(RuntimeError, match="no such way"):
        apart(script, "bad")
    found = apart_in_turns(script, {"a": [1], "b": [3]}, rounds=2)
    assert found["b"] == {"seconds": 3.0, "memory_mb": None}


def test_ways_may_take_more_turns_than_others(monkeypatch):
    import measure

    seen = []

    def answer(script, way):
        seen.append(way)
        return {"seconds": float(len(seen)), "memory_mb": len(seen)}

    monkeypatch.setattr(measure, "apart", answer)
    found = measure.apart_in_turns("script", {"a": "a", "b": "b"}, {"a": 1, "b": 3})
    assert "".join(seen) == "abbb"
    assert found["b"] == {"seconds": 3.0, "memory_mb": 4}
    assert measure.apart_in_turns("script", {}, 2) == {}


# The published way.


def pair(toy_subject):
    """The published training and our module on the same trials, weights and no dropout."""
    from published import PublishedStage1, SingleTrials, make_encoder
    from steps import make_ours

    recipe, module = make_ours(1, toy_subject, True, "torch")
    data = recipe.make_data()
    module.build(data.sizes, data.parcellation)
    trials = SingleTrials(data.dataset("train", "trials"), data.parcels.size, noise=0.0)
    options = {"d_model": 16, "global_blocks": 1, "local_blocks": 1}
    training = PublishedStage1(trials, make_encoder(data.sizes, **options), 4)
    module.encoder.load_state_dict(training.network.state_dict())
    for network in (module, training.network):
        network.eval()  # no dropout, no noise
    return data, trials, training, module


def test_the_published_parcels_are_ours(toy_subject):
    from published import top_p_parcels

    data, trials, _, _ = pair(toy_subject)
    betas = torch.from_numpy(trials.betas[:3])
    ours = data.parcellation.aggregate(betas, "top_p", 0.7)
    loop = [top_p_parcels(row, data.parcels.size) for row in trials.betas[:3]]
    np.testing.assert_allclose(ours.numpy(), loop, rtol=1e-5)


def test_the_published_stage_1_has_our_loss_and_gradients(toy_subject):
    _, trials, training, module = pair(toy_subject)
    chosen = np.unique(trials.row, return_index=True)[1][:4]  # of four images
    batch = torch.utils.data.default_collate([trials[int(i)] for i in chosen])
    theirs, _, _ = training.losses(batch)
    ours = module.terms(batch | {"image_id": torch.arange(4)})[1]["total"]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    theirs.backward()
    ours.backward()
    wanted = dict(training.network.named_parameters())
    for name, weight in module.encoder.named_parameters():
        torch.testing.assert_close(weight.grad, wanted[name].grad, rtol=1e-3, atol=1e-6)


def test_the_published_stage_2_has_our_loss_and_trains(toy_subject):
    from steps import make_published

    from chasm.losses import Stage2Loss

    training = make_published(2, toy_subject, True, 4, "cpu")
    batch = next(iter(training.loader))
    before = {name: value.clone() for name, value in training.network.state_dict().items()}
    torch.manual_seed(1)
    _, voxels, betas = training.losses(batch)
    torch.manual_seed(1)
    loss, again, _ = training.losses(batch)
    torch.testing.assert_close(voxels, again)
    tokens = batch["cls"], batch["patches"]
    torch.manual_seed(1)
    output = training.network(*tokens, training.encoder(*tokens).parcels)
    ours = Stage2Loss(pearson_weight=0.3, std_weight=0.2, kl_weight=1e-3)
    total = ours(output.voxels, betas, output.mean, output.log_variance)["total"]
    torch.testing.assert_close(total, loss, rtol=1e-5, atol=1e-6)
    found = training.step(batch)
    assert math.isfinite(found["loss"])
    assert -1 <= found["correlation"] <= 1
    assert any((training.network.state_dict()[k] != v).any() for k, v in before.items())


def test_correlations_are_those_of_the_rows():
    from published import correlation

    a, b = torch.randn(3, 7), torch.randn(3, 7)
    wanted = np.mean([np.corrcoef(x, y)[0, 1] for x, y in zip(a.numpy(), b.numpy(), strict=True)])
    assert correlation(a, b) == pytest.approx(wanted, abs=1e-6)


# Our way, as it is timed.


def test_a_removed_scan_leaves_every_gradient(toy_subject, monkeypatch):
    from steps import make_ours, removed_scan

    recipe, module = make_ours(1, toy_subject, True, "torch")
    data = recipe.make_data()
    module.build(data.sizes, data.parcellation)
    calls = []

    def counted(*given, **named):
        calls.append(given)
        return removed_scan(*given, **named)

    monkeypatch.setattr("chasm.models.mamba.selective_scan", counted)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    batch = data.on_after_batch_transfer(batch, 0)
    module.terms(batch)[1]["total"].backward()
    assert len(calls) == 2
    layer = module.encoder.local_stream.blocks[0].mamba
    assert all(weight.grad is not None for weight in layer.parameters())
    assert layer.dt_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("stage", [1, 2])
def test_a_few_steps_are_timed(toy_subject, stage):
    from steps import make_ours, run_ours

    clock, trainer = run_ours(*make_ours(stage, toy_subject, True, "torch"), 3)
    assert trainer.global_step == 3
    assert len(clock.seconds) == 2
    assert clock.memory_mb is None or clock.memory_mb >= 0
    assert all(loss.isfinite() for loss in clock.losses)


def test_operations_and_bytes_of_a_step(toy_subject):
    from steps import PASSES_OVER_WEIGHTS, make_ours, work_of

    flops, moved = work_of(1, toy_subject, True)
    recipe, module = make_ours(1, toy_subject, True, "torch")
    data = recipe.make_data()
    module.build(data.sizes, data.parcellation)
    weights = sum(p.numel() for p in module.encoder.parameters())
    assert moved == 4 * PASSES_OVER_WEIGHTS * weights
    assert flops > 3 * 32 * 2 * weights  # every weight at least once per trial


# Lengths.


def test_exponents_of_powers(tmp_path):
    from length import OURS, THEIRS, draw, exponents
    from measure import Row

    rows = [
        Row("length", f"{n} tokens", way, 1e-3 * n**power)
        for n in (64, 128, 256)
        for way, power in ((OURS, 1.0), (THEIRS, 1.5))
    ]
    assert exponents(rows) == {OURS: pytest.approx(1), THEIRS: pytest.approx(1.5)}
    draw(rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


# The page and the goals.


def test_goals_are_judged_from_rows():
    from goals import met
    from measure import Row

    fast = {goal.text: goal for goal in met(some_rows())}
    scan = fast["scan at paper size: numba against the reference"]
    assert (scan.found, scan.met) == ("20x", True)
    assert fast["scan at paper size: torch against the reference"].met is False
    assert fast["scan at paper size: extra memory of numba"].met is True
    assert fast["scan at paper size: extra memory of torch"].met is None
    assert fast["scan at paper size: gradients of numba beside float64"].met is None
    noted = [Row("scan", "stage1", "numba", 0.1, note="gradients within 2e-05")]
    told = {goal.text: goal for goal in met(noted)}
    assert told["scan at paper size: gradients of numba beside float64"].met is False
    assert fast["Stage 1 from 64 to 1024 tokens"].met is None
    steps = [
        Row("steps", "stage 1, batch 32", "published", 10.0, 9000.0),
        Row("steps", "stage 1, batch 32", "numba", 2.5, 900.0, "published"),
        Row("steps", "stage 1, batch 32", "scan removed", 2.0, 800.0, "published"),
        *(Row("prepare", f"{n} sessions", "ours", 3.0 * n, 900.0 + 30 * n) for n in (2, 8, 40)),
        Row("prepare", "1 session, .nii.gz", "ours", 30.0, 5000.0),
        Row("prepare", "40 sessions", "needed bytes", 85.0),
    ]
    found = {goal.text: goal for goal in met(steps)}
    assert found["step of Stage 1 against the published way"].found == "4x"
    assert found["step of Stage 1 against the same with the scan removed"].met is False
    assert found["step of Stage 1: memory beside the published way"].met is True
    assert found["prepare: peak memory of 8 sessions"].found == "1140 MB"
    assert found["prepare: growth of the peak from 2 to 8 sessions"].met is False
    assert found["prepare: time of a whole subject beside reading the needed bytes"].met is True


def test_the_page_is_made_from_rows_that_are_kept(tmp_path):
    from measure import Row
    from run import Recorded, read_csv, save

    rates = [
        Row("machine", "matrix product", "float32", 0.01, flops=1e9),
        Row("machine", "copy", "float32", 0.1, bytes=1e9),
    ]
    rows = [Recorded(row, "2026-01-02", "abc", "a processor", 4) for row in (*rates, *some_rows())]
    here = {
        "processor": "a processor", "cores": 4, "memory_gb": 8.0, "system": "Linux",
        "versions": {"torch": "2"},
    }  # fmt: skip
    save(rows, tmp_path, here)
    assert read_csv(tmp_path / "benchmarks.csv") == rows
    text = (tmp_path / "benchmarks.md").read_text()
    assert "100 GFLOP/s" in text
    assert "| scan at paper size: numba against the reference | at least 15x | 20x | met |" in text
    assert (
        "| stage1 | numba | 150 ms | 160 MB | 20x | 26.2x | reference | 2 | 1 | 67 % | x |" in text
    )
    assert "Not measured yet." in text
    with (tmp_path / "benchmarks.csv").open() as stream:
        assert [line["times_faster"] for line in csv.DictReader(stream)][3:4] == ["20.0"]


def test_parity_tells_a_wrong_back_end(monkeypatch):
    from gpu import compare

    inputs = {"u": torch.randn(3, 4)}
    right = compare("x", "a", torch.float32, (lambda x: x["u"] ** 2,) * 2, inputs, (), "cpu")
    assert right.good
    wrong = compare(
        "x", "a", torch.float32, (lambda x: x["u"] ** 2 * 1.001, lambda x: x["u"] ** 2), inputs, (),
        "cpu",
    )  # fmt: skip
    assert not wrong.good
    assert wrong.value == pytest.approx(1e-3, rel=0.1)


def test_without_a_gpu_the_page_stays(tmp_path, monkeypatch, capsys):
    from gpu import main

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--folder", str(tmp_path), "--threads", "1"])
    (tmp_path / "benchmarks_gpu.md").write_text("as it was")
    assert main() == 1
    said = capsys.readouterr().err
    assert "no CUDA device" in said
    assert len(said.strip().splitlines()) == 1
    assert (tmp_path / "benchmarks_gpu.md").read_text() == "as it was"


def run(script, *arguments):
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


# Whole scripts, at toy size.


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", ["scan", "steps", "length", "loading", "prepare", "extract", "ridge", "ablations"]
)
def test_quick_mode_writes_rows(script, tmp_path):
    out = tmp_path / "rows.json"
    done = run(f"{script}.py", "--quick", "--json", out, "--threads", 1, "--repeats", 1)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())
    assert {row["part"] for row in rows} == {script}
    assert all(row["seconds"] > 0 for row in rows)


@pytest.mark.slow
def test_parts_run_one_by_one_and_are_kept(tmp_path):
    first = run("run.py", "--quick", "--threads", 1, "--folder", tmp_path, "--only", "ablations")
    assert first.returncode == 0, first.stderr
    second = run("run.py", "--quick", "--threads", 1, "--folder", tmp_path, "--only", "length")
    assert second.returncode == 0, second.stderr
    with (tmp_path / "benchmarks.csv").open() as stream:
        parts = [line["part"] for line in csv.DictReader(stream)]
    assert set(parts) == {"machine", "length", "ablations"}
    assert (tmp_path / "benchmarks_length.png").is_file()
    assert "Time grows as tokens" in (tmp_path / "benchmarks.md").read_text()


@pytest.mark.slow
def test_the_gpu_script_runs_without_one(tmp_path):
    done = run(
        "gpu.py", "--device", "cpu", "--quick", "--repeats", 1, "--threads", 1, "--folder", tmp_path
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "benchmarks_gpu.md").read_text()
    assert "NOT FINITE" not in text
    assert "| scan | torch | float32 |" in text
    assert "0 of" in text
