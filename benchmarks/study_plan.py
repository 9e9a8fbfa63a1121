"""What the largest realistic study costs, from unit costs that are measured here.

    python benchmarks/study_plan.py                      # measure, print the tables
    python benchmarks/study_plan.py --device cuda --write    # ... into docs/study_plan.md
    python benchmarks/study_plan.py --costs costs.json   # kept unit costs, not measured again

A training step has the size that the recipes of experiments/nsd and experiments/paper have on
NSD's subject 1 with DINOv2 tokens; weights and data are random, which costs the same. Every
measurement has a fresh process. On a CPU the time is that of the processor, so that what else runs
on the machine does not count: hours are those of one core. What is measured, what is arithmetic
and what is published is said in the tables.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import h5py
import numpy as np
import torch

from chasm.data.beta_files import SessionReader
from chasm.data.datamodule import DataSizes
from chasm.data.nsd_facts import NSD_SUBJECTS, TRIALS_PER_SESSION
from chasm.evaluation.cost import random_batch
from chasm.features.backbones import BackboneSpec, create_backbone
from chasm.io import write_json, write_text
from chasm.models.baselines import BANDS, LinearEncoder
from chasm.models.kernels import linear_kernels
from chasm.parcellation import sequential
from chasm.progress import track
from chasm.training.base import EncodingModule
from chasm.training.recipes import Recipe

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "study_plan.md"
MARK = "<!-- from here: python benchmarks/study_plan.py --write -->"
VOXELS = NSD_SUBJECTS[1].nsdgeneral_voxels
STEPS = {
    "Stage 1": "nsd/stage1", "Stage 2": "nsd/stage2",
    "Stage 1 as published": "paper/stage1", "Stage 2 as published": "paper/stage2",
    "MLP": "paper/mlp", "GRU": "paper/gru", "LSTM": "paper/lstm",
    "one-stream Mamba": "paper/one_stream", "Transformer": "paper/transformer",
    "Stage 2, MLP": "paper/stage2_mlp", "Stage 2, two decoders": "paper/stage2_dual",
}  # fmt: skip
"""Models whose training step is timed, and their recipes."""
BASELINES = tuple(STEPS)[4:]
OTHERS = {"tokens": "extraction", "session": "prepare", "kernel": "closed form"}
PUBLISHED_MS = {"Stage 1": 9.2, "Stage 2": 9.2 + 15.8, "Transformer": 12.3}
"""CHASMBrain's milliseconds per batch of 32 on an RTX 4090; Stage 2 runs Stage 1 first."""
PASSES = 3
"""Forward passes that a training step costs: the backward pass counts two."""
BATCH, SMALL = 32, 1000


def sizes_of(recipe: Recipe) -> DataSizes:
    """Give the sizes that NSD's subject 1 and DINOv2 ViT-B/14 give a recipe."""
    data = recipe.settings()["data"]
    layers = data["backbone"]["cls_layers"]
    parcels = -(-VOXELS // data["parcels"]["size"])
    parcels -= VOXELS % data["parcels"]["size"] > 0
    return DataSizes(len(layers), 768, 256, 768, VOXELS, parcels)


def build(path: Path) -> EncodingModule:
    """Make the model of a recipe, of NSD's size, with a random Stage 1 where it builds on one."""
    recipe = Recipe(["-c", str(path)])
    model, sizes = recipe.make_model(), sizes_of(recipe)
    if model.needs_stage1:
        assert recipe.stage1 is not None
        model.take_stage1(build(recipe.stage1))
    model.build(sizes, sequential(VOXELS, recipe.settings()["data"]["parcels"]["size"]))
    return model


def tensor_bytes(module: torch.nn.Module, trained: bool = False) -> int:
    """Add up the state of a module, or its trained parameters alone."""
    found = module.parameters() if trained else module.state_dict().values()
    return sum(t.nbytes for t in found if not trained or t.requires_grad)


def seconds(call: Callable[[], object], device: str, repeats: int) -> float:
    """Give the median time of some calls after one that is not counted; on a CPU, its own time."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    times = []
    for _ in range(repeats + 1):
        start = clock()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - start)
    return median(times[1:])


def measure_step(name: str, device: str, repeats: int) -> dict[str, float]:
    """Time a training step: forward, backward, clipping, AdamW."""
    model = build(ROOT / "experiments" / f"{STEPS[name]}.yaml").to(device)
    assert model.sizes is not None
    batch = random_batch(model.sizes, BATCH, torch.device(device))
    batch["betas"] = torch.randn_like(batch["betas"])
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def step() -> None:
        found = model.terms(batch)[1]["total"]  # type: ignore[operator]
        optimizer.zero_grad()
        found.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    per_image = seconds(step, device, repeats) / BATCH
    # Weights twice, as best and as last, each with AdamW's two moments.
    checkpoint = tensor_bytes(model) + 2 * tensor_bytes(model, trained=True)
    n_trained = sum(p.numel() for p in trained)
    return {"seconds": per_image, "bytes": 2 * checkpoint, "parameters": n_trained}


def measure_tokens(device: str, repeats: int) -> dict[str, float]:
    """Time the backbone of experiments/nsd, with random weights."""
    options = Recipe(["-c", str(ROOT / "experiments/nsd/stage1.yaml")]).make_data().backbone
    spec = BackboneSpec(options.model, "untrained", options.image_size, options.cls_layers)
    backbone = create_backbone(spec).eval().to(device)
    images = list(np.random.default_rng(0).integers(0, 256, (8, 425, 425, 3), dtype=np.uint8))
    sizes = sizes_of(Recipe(["-c", str(ROOT / "experiments/nsd/stage1.yaml")]))
    with torch.inference_mode():
        taken = seconds(
            lambda: backbone(backbone.preprocess(images).to(device)), device, repeats
        ) / len(images)
    features = sizes.n_cls * sizes.cls_width + sizes.n_patches * sizes.patch_width
    return {"seconds": taken, "bytes": 2 * features}


def measure_session(device: str, repeats: int) -> dict[str, float]:
    """Time the reading of a session's betas of subject 1, of NSD's form, from the page cache."""
    shape = NSD_SUBJECTS[1].volume_shape
    mask = np.zeros(shape, bool)
    mask.flat[np.random.default_rng(0).choice(mask.size, VOXELS, replace=False)] = True
    values = np.random.default_rng(1).integers(-900, 900, TRIALS_PER_SESSION, dtype=np.int16)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "betas_session01.hdf5"
        with h5py.File(path, "w") as file:  # as NSD's: a chunk for every voxel
            betas = file.create_dataset(
                "betas", (TRIALS_PER_SESSION, *shape[::-1]), np.int16,
                chunks=(TRIALS_PER_SESSION, 1, 1, 1),
            )  # fmt: skip
            for x, y, z in np.argwhere(mask).tolist():
                betas.id.write_direct_chunk((0, z, y, x), values.tobytes())
        reader = SessionReader(mask, TRIALS_PER_SESSION)
        taken = seconds(lambda: reader.read(path), "cpu", repeats)
    return {"seconds": taken, "bytes": 2 * TRIALS_PER_SESSION * VOXELS}


def measure_kernel(device: str, repeats: int) -> dict[str, float]:
    """Time the two parts of the closed form on the CPU at `SMALL` images."""
    tokens = np.random.default_rng(0).normal(size=(SMALL, 256, 768)).astype(np.float16)
    rows = np.arange(SMALL)
    kernels = {"cls": linear_kernels(tokens[:, :4], rows), "patches": linear_kernels(tokens, rows)}
    targets = np.random.default_rng(1).normal(size=(SMALL, 524)).astype(np.float32)
    kernel = seconds(lambda: linear_kernels(tokens, rows), "cpu", 1)
    solve = seconds(
        lambda: LinearEncoder(tuple(kernels), shares=BANDS).fit(kernels, targets), "cpu", 1
    )
    return {"seconds": kernel, "solve": solve, "bytes": 0}


def measure(name: str, device: str, repeats: int) -> dict[str, float]:
    """Measure one unit cost in this process, with the memory it takes at most."""
    other = {"tokens": measure_tokens, "session": measure_session, "kernel": measure_kernel}
    found = other[name](device, repeats) if name in other else measure_step(name, device, repeats)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device == "cuda":
        memory = torch.cuda.max_memory_allocated()
    return found | {"memory": memory}


def measure_apart(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Measure in a fresh process."""
    command = [sys.executable, __file__, "--worker", name, "--device", options.device]
    command += ["--threads", str(options.threads), "--repeats", str(options.repeats)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


# Arithmetic.

SUBJECTS, SEEDS, EPOCHS = 8, 5, 60
IMAGES = {"all": 73_000, "train": 9_000, "test": 515}
SWEEP_TRIALS = 100
SHOTS, DRAWS, ARMS = (20, 100, 200, 300, 750, 1500, 3000, 9000), 3, 3
RETRAINED = {"Stage 1": 5, "Stage 2": 2}
"""Variants of ablations/retrain: five of parcels and two of voxels, both counted at full size."""

Costs = dict[str, dict[str, float]]


def fits() -> list[tuple[str, str, int, float]]:
    """List the trainings of the study: what, model whose step it takes, how many, images each."""
    whole, each = float(EPOCHS * IMAGES["train"]), SUBJECTS * SEEDS
    few = EPOCHS * float(np.mean(SHOTS))
    return [
        ("Stage 1, every subject and seed", "Stage 1", each, whole),
        ("Stage 2, every subject and seed", "Stage 2", each, whole),
        *((f"baseline: {name}", name, each, whole) for name in BASELINES),
        *(
            (f"sweep of {SWEEP_TRIALS} trials a subject, none pruned: {name}", name,
             SUBJECTS * SWEEP_TRIALS, whole)
            for name in ("Stage 1", "Stage 2")
        ),
        *(
            (f"retrained without a part: {n} variants of {name}", name, n * each, whole)
            for name, n in RETRAINED.items()
        ),
        ("sources: 7 subjects together, each subject left out once", "Stage 1", SUBJECTS,
         (SUBJECTS - 1) * whole),
        (f"few-shot: {len(SHOTS)} numbers of images, {DRAWS} draws, {ARMS} trained arms", "Stage 1",
         SUBJECTS * len(SHOTS) * DRAWS * ARMS, few),
    ]  # fmt: skip


def solve_hours(costs: Costs) -> float:
    """Scale the closed form to all train images: kernels by n squared, the solution by n cubed."""
    grown = IMAGES["train"] / SMALL
    kernel, solve = costs["kernel"]["seconds"], costs["kernel"]["solve"]
    return (kernel * grown**2 + solve * grown**3) / 3600


def unit_table(costs: Costs) -> list[list[str]]:
    """Give the rows of the table of unit costs."""
    rows = []
    for name in STEPS:
        cost = costs[name]
        ms = PUBLISHED_MS.get(name)
        published = "–" if ms is None else f"{ms * PASSES / BATCH:.2f}"
        rows.append([
            f"training step, {name} (`{STEPS[name]}.yaml`)", f"{1000 * cost['seconds']:.0f}",
            published, f"{cost['parameters'] / 1e6:.1f} M", gigabytes(cost["memory"]),
            gigabytes(cost["bytes"]),
        ])  # fmt: skip
    tokens, session, kernel = costs["tokens"], costs["session"], costs["kernel"]
    others = [
        ("image to tokens, DINOv2 ViT-B/14 at 224 px", f"{1000 * tokens['seconds']:.0f}", tokens,
         f"{tokens['bytes'] / 1e3:.0f} kB an image"),
        ("a session's betas, read from the page cache (ms a session)",
         f"{1000 * session['seconds']:.0f}", session, gigabytes(session["bytes"])),
        (f"closed form of {SMALL} images (ms in all): kernel + solution",
         f"{1000 * kernel['seconds']:.0f} + {1000 * kernel['solve']:.0f}", kernel, "–"),
    ]  # fmt: skip
    for what, ms, cost, disk in others:
        rows.append([what, ms, "–", "–", gigabytes(cost["memory"]), disk])
    return rows


def study_table(costs: Costs) -> tuple[list[list[str]], list[float]]:
    """Give the rows of the study, and its hours here, hours by published figures, and bytes."""
    rows, total = [], [0.0, 0.0, 0.0]
    sessions = sum(facts.sessions for facts in NSD_SUBJECTS.values())
    voxels = sum(facts.nsdgeneral_voxels for facts in NSD_SUBJECTS.values())
    solved = 2 * SUBJECTS * SEEDS + sum(n for what, _, n, _ in fits() if "sweep" in what)
    rows_kept = 11  # predictions, target and repeats of a Stage-2 run
    entries: list[tuple[str, int, float, float | None, float]] = [
        ("reading every session of every subject, stores", sessions,
         sessions * costs["session"]["seconds"] / 3600, None,
         2.0 * TRIALS_PER_SESSION * sum(
             f.sessions * f.nsdgeneral_voxels for f in NSD_SUBJECTS.values())),
        ("extraction: every image once", IMAGES["all"],
         IMAGES["all"] * costs["tokens"]["seconds"] / 3600, None,
         IMAGES["all"] * costs["tokens"]["bytes"]),
        ("closed form of both stages: every subject and seed, every trial of a sweep", solved,
         solved * solve_hours(costs), None, 0.0),
    ]  # fmt: skip
    for what, model, n, images in fits():
        ms = PUBLISHED_MS.get(model, PUBLISHED_MS["Stage 2" if "Stage 2" in model else "Stage 1"])
        kept = 0 if "sweep" in what else n
        here = n * images * costs[model]["seconds"] / 3600
        there = n * images * ms * PASSES / BATCH / 3.6e6
        entries.append((what, n, here, there, kept * costs[model]["bytes"]))
    runs = SUBJECTS * SEEDS * (2 + len(BASELINES) + sum(RETRAINED.values()))
    entries.append(("predictions of every run that is kept", runs, 0.0, None,
                    4.0 * rows_kept * IMAGES["test"] * runs * voxels / SUBJECTS))  # fmt: skip
    for what, n, here, published, size in entries:
        shown = "–" if published is None else f"{published:,.0f}"
        own = f"{here:,.0f}" if here >= 1 else f"{here:.2f}" if here else "not measured"
        rows.append([what, f"{n:,}", own, shown,
                     gigabytes(size) if size else "–"])  # fmt: skip
        total = [total[0] + here, total[1] + (published or 0.0), total[2] + size]
    rows.append(["**all**", "", f"**{total[0]:,.0f}**", f"**{total[1]:,.0f}**",
                 f"**{gigabytes(total[2])}**"])  # fmt: skip
    return rows, total


def gigabytes(n: float) -> str:
    """Write bytes as GB, MB below one."""
    return f"{n / 1e9:,.1f} GB" if n >= 1e9 else f"{n / 1e6:.0f} MB"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """Write a table."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(costs: Costs, where: str) -> str:
    """Write the measured part of docs/study_plan.md."""
    rows, (here, published, disk) = study_table(costs)
    units = markdown(
        ["unit", f"ms an image, measured on {where}", "ms an image, from the published RTX 4090 "
         "figure × 3", "trained parameters", "memory at most", "disk"],
        unit_table(costs),
    )  # fmt: skip
    study = markdown(
        ["part of the study", "number", f"hours, {where}", "hours, RTX 4090 (published × 3)",
         "disk kept"],
        rows,
    )  # fmt: skip
    closed = (
        f"The closed form at {IMAGES['train']:,} images is {solve_hours(costs):.1f} hours: the "
        f"measured {SMALL} images scaled by n² (kernel) and n³ (solution, an upper bound)."
    )
    sum_up = (
        f"In all {here:,.0f} hours on {where}, or {published:,.0f} hours on an RTX 4090 for the "
        f"trainings alone ({published / 24:,.0f} days on one, {published / 24 / 16:,.1f} on 16), "
        f"and {gigabytes(disk)} of disk."
    )
    return f"\n## Unit costs\n\n{units}\n\n{closed}\n\n## The study\n\n{study}\n\n{sum_up}\n"


def main() -> None:
    """Measure what is not known, and show or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--costs", type=Path, default=None, help="JSON of unit costs, kept")
    parser.add_argument("--write", action="store_true", help=f"write into {PAGE.name}")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.worker:
        found = measure(options.worker, options.device, options.repeats)
        sys.stdout.write("\n" + json.dumps(found) + "\n")
        return
    name = torch.cuda.get_device_name() if options.device == "cuda" else processor()
    where = name if options.device == "cuda" else f"a core of {name}"
    known = (
        json.loads(options.costs.read_text()) if options.costs and options.costs.exists() else {}
    )
    if known.get("where", where) != where:
        raise SystemExit(f"error: {options.costs}: measured on {known['where']}, this is {where}")
    costs: Costs = known.get("costs", {})
    missing = [unit for unit in (*OTHERS, *STEPS) if unit not in costs]
    for unit in track(missing, "unit costs", len(missing)) if missing else ():
        costs[unit] = measure_apart(unit, options)
        if options.costs:
            write_json(options.costs, {"where": where, "costs": costs})
    text = page(costs, where)
    if options.write:
        kept = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
        write_text(PAGE, f"{kept}{MARK}\n{text}")
    sys.stdout.write(text)


def processor() -> str:
    """Name the processor (Linux)."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()} ({os.cpu_count()} visible)"


if __name__ == "__main__":
    main()
