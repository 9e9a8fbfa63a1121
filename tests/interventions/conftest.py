"""Small models of every kind, with random weights, and batches for them."""

import pytest
import torch

from chasm.data.datamodule import DataSizes
from chasm.models.linear_path import LinearPath
from chasm.models.published import PublishedEncoder
from chasm.models.stage1 import DualStreamEncoder
from chasm.models.stage2 import MambaVAE, MLPDecoder
from chasm.models.token_models import MLPEncoder
from chasm.parcellation import sequential
from chasm.training.linear_module import LinearModule
from chasm.training.modules import Stage1Module
from chasm.training.stage2 import Stage2Module

SIZES = DataSizes(n_cls=2, cls_width=6, n_patches=4, patch_width=5, n_voxels=21, n_parcels=4)
BLOCKS = {"d_state": 2, "dropout": 0.1}
STREAMS = {"d_model": 8, "global_blocks": 1, "local_blocks": 1, "d_embedding": 8} | BLOCKS
NARROW = STREAMS | {"d_head": 8, "d_gate": 8, "d_contrast": 8}


def stage1(encoder=DualStreamEncoder, options=NARROW, **settings):
    made = Stage1Module(lambda *sizes: encoder(*sizes, **options), **settings)
    made.build(SIZES, sequential(SIZES.n_voxels, 5))
    return made


def stage2(stage1_module, decoder, **settings):
    made = Stage2Module(decoder, **settings)
    made.take_stage1(stage1_module)
    made.build(SIZES, stage1_module.parcellation)
    return made


def vae(*sizes):
    return MambaVAE(*sizes, d_model=8, encoder_blocks=1, decoder_blocks=1, d_patch=6, d_latent=3,
                    d_variational=8, n_queries=2, d_hidden=8, d_residual=4, d_amplitude=4,
                    **BLOCKS)  # fmt: skip


RIDGE = {"linear": "banded_ridge"}
MODULES = {
    "stage 1": lambda: stage1(),
    "spatial": lambda: stage1(options=NARROW | {"readout": "spatial", "gate": "parcel"}),
    "published": lambda: stage1(PublishedEncoder, STREAMS),
    "stage 1 with ridge": lambda: stage1(**RIDGE),
    "stage 2": lambda: stage2(stage1(**RIDGE), vae, **RIDGE),
    "stage 2 (MLP)": lambda: stage2(stage1(), lambda *sizes: MLPDecoder(*sizes, d_hidden=8)),
    "banded ridge": lambda: LinearModule(stage1()),
    "one sequence": lambda: stage1(MLPEncoder, {"d_model": 8}),
}


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors are tiny here: threads only wait for each other, for a minute on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def module_of():
    """Make a model by its name, in eval mode; every part of it has an effect on what it gives."""

    def make(name):
        torch.manual_seed(3)
        made = MODULES[name]()
        with torch.no_grad():
            for parameter in made.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
            for part in made.modules():
                if isinstance(part, LinearPath):
                    part.fitted.fill_(True)
        return made.eval()

    return make


def make_batch(n=6, first=0):
    """Images `first` to `first + n`; the same image has the same tokens in every batch."""
    parts = {"cls": (2, 6), "patches": (4, 5)}
    images = torch.arange(first, first + n)

    def normal(image, shape, salt):
        generator = torch.Generator().manual_seed(7 * int(image) + salt)
        return torch.randn(shape, generator=generator) + 0.5

    return {
        name: torch.stack([normal(image, shape, salt) for image in images])
        for salt, (name, shape) in enumerate(parts.items())
    } | {"image_id": images}


@pytest.fixture
def batch_of():
    return make_batch
