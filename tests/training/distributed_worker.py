"""One of several processes, started as torchrun does; what it finds goes to FOLDER/<rank>.pt.

python distributed_worker.py FOLDER    # RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from chasm import processes
from chasm.losses import Stage1Loss
from chasm.metrics import EncodingMetrics

N, UNITS, WIDTH = 11, 5, 4
BATCHES = (range(5), range(5, 8), range(8, 11))


def pieces():
    """Seeded tokens, targets and image ids of which two are there twice, and three matrices."""
    rng = torch.Generator().manual_seed(3)
    tokens, target = torch.randn(N, WIDTH, generator=rng), torch.randn(N, UNITS, generator=rng)
    ids = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 1, 5])
    sizes = ((WIDTH, UNITS), (WIDTH, 3), (UNITS, 3))
    return tokens, target, ids, [torch.randn(*s, generator=rng).requires_grad_() for s in sizes]


def gradients(rows):
    """Gradients of every term of Stage 1's loss over some images, as DDP averages them."""
    tokens, target, ids, weights = pieces()
    tokens, target, ids = tokens[rows], target[rows], ids[rows]
    terms = Stage1Loss("peak", 1.0, 0.5, 0.5, 0.5, peak_tau=0.0)(
        tokens @ weights[0], target, tokens @ weights[1], target @ weights[2], ids
    )
    found = torch.autograd.grad(processes.weigh(terms["total"], len(tokens)), weights)
    if processes.n_processes() > 1:
        for gradient in found:
            dist.all_reduce(gradient)
            gradient /= processes.n_processes()
    return list(found)


def scores(share):
    """Streaming metrics over batches, of each of which this process sees a share."""
    tokens, target, _, weights = pieces()
    metrics = EncodingMetrics(UNITS)
    for batch in BATCHES:
        rows = share(batch)
        metrics.update((tokens @ weights[0]).detach()[rows], target[rows])
    return {name: value.item() for name, value in metrics.compute().items()}


def own(rows):
    return np.array_split(rows, dist.get_world_size())[dist.get_rank()].tolist()


def main(folder):
    first = processes.will_be_first()
    alone = {"gradients": gradients(list(range(N))), "scores": scores(list)}
    dist.init_process_group("gloo")
    assert first == processes.is_first() == (dist.get_rank() == 0)
    rows = torch.tensor(own(range(N)))
    kept = torch.full((2, 2), float(dist.get_rank()))
    processes.take_from_first([kept])
    found = {
        "alone": alone,
        "gradients": gradients(own(range(N))),
        "scores": scores(own),
        "gathered": processes.gather(rows).tolist(),
        "own": torch.arange(N)[processes.own_rows(rows)].tolist() == rows.tolist(),
        "any": [processes.any_of(v) for v in (False, not first)],
        "taken": kept.tolist(),
    }
    torch.save(found, folder / f"{dist.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
