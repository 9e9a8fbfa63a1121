"""Sites: where interventions act, and the cut of a forward pass at the streams."""

import pytest
import torch

from chasm.models.linear_path import LinearPath
from chasm.models.published import PublishedEncoder
from chasm.models.sites import Site, sites_of
from chasm.models.stage1 import DualStreamEncoder
from chasm.models.stage2 import MambaVAE
from chasm.models.token_models import MLPEncoder
from chasm.parcellation import make_parcellation

SIZES = (10, 2, 7, 12, 5)
SMALL = {"d_model": 8, "global_blocks": 1, "local_blocks": 1, "d_state": 2}


def tokens(images=3):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(images, *s, generator=generator) for s in ((2, 10), (12, 7)))


def test_a_site_has_no_state_and_changes_nothing():
    site, value = Site("here"), torch.randn(3)
    assert site(value) is value
    assert not site.state_dict()


def test_of_equal_names_the_outermost_is_found():
    outer, inner = Site("a"), Site("a")
    model = torch.nn.Sequential(outer, torch.nn.Sequential(inner, Site("b", "local")))
    assert sites_of(model)["a"] is outer
    assert {name: site.stream for name, site in sites_of(model).items()} == {
        "a": None, "b": "local",
    }  # fmt: skip


@pytest.mark.parametrize(
    "make",
    [
        lambda: DualStreamEncoder(*SIZES, **SMALL),
        lambda: DualStreamEncoder(*SIZES, **SMALL, readout="spatial", gate="parcel"),
        lambda: PublishedEncoder(*SIZES, **SMALL),
        lambda: MLPEncoder(*SIZES, d_model=8),
    ],
)
def test_a_pass_can_be_cut_at_the_streams(make):
    model, (cls, patches) = make().eval(), tokens()
    streams = model.streams(cls, patches)
    whole, rest = model(cls, patches).parcels, model.from_streams(streams).parcels
    assert torch.equal(whole, rest)
    # Each stream depends on its own tokens alone.
    other = model.streams(cls, patches.flip(0))
    changed = {name for name in streams if not torch.equal(streams[name], other[name])}
    assert changed == ({"local.out"} if model.separable else {"features.patches"})
    if model.separable:
        assert {n: s.stream for n, s in sites_of(model).items()} == {
            "global.out": "global", "local.out": "local", "gate": None,
        }  # fmt: skip


def test_a_stage_2_has_the_sites_of_its_parts_only():
    parcellation = make_parcellation("sequential", n_voxels=12, size=4)
    small = {"d_model": 8, "encoder_blocks": 0, "decoder_blocks": 0, "n_queries": 2}
    whole = sites_of(MambaVAE(*SIZES[:4], parcellation, **small, head="query"))
    bare = sites_of(MambaVAE(*SIZES[:4], parcellation, **small, head="none", d_latent=0))
    assert set(whole) - set(bare) == {"stage2.latent", "stage2.holistic"}
    assert {"stage2.cls", "stage2.patches", "stage2.visual", "stage2.residual"} == set(bare)


def test_the_closed_form_is_cut_into_its_two_parts():
    path = LinearPath(20, 84, 5, name="stage2.linear")
    path.bias.data.normal_()
    cls, patches = tokens()
    streams = path.streams(cls, patches)
    assert list(streams) == ["stage2.linear.cls", "stage2.linear.patches"]
    torch.testing.assert_close(path(cls, patches), path.bias + sum(path.parts(cls, patches)))
    sites = sites_of(path)
    handle = sites["stage2.linear.cls"].register_forward_hook(lambda *given: given[2] * 0)
    without = path(cls, patches)
    handle.remove()
    assert torch.equal(without, path.bias + path.parts(cls, patches)[1])
