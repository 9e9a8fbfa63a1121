"""Shared backbones, features, ridge heads and LoRA, in plain torch."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn

from chasm.models.adapters import (
    HEAD_SPACES,
    RidgeEncoder,
    SourceFeatures,
    add_lora,
    backbone_state,
    belongs,
    copy_backbone,
    freeze,
    lora_targets,
    merge_lora,
    share_backbone,
)
from chasm.models.sites import sites_of
from chasm.models.stage1 import DualStreamEncoder
from chasm.models.token_models import (
    MLPEncoder,
    OneStreamMamba,
    RecurrentEncoder,
    TransformerEncoder,
)

SIZES = (7, 2, 5, 6)
"""CLS width, CLS tokens, patch width, patches."""
SMALL = {"d_model": 8, "d_head": 6}
MAMBA = {"d_state": 3}
DUAL = {"global_blocks": 1, "local_blocks": 2, "d_gate": 5, "d_contrast": 5, "d_embedding": 4}
FACTORIES = {
    "dual": partial(DualStreamEncoder, *SIZES, **SMALL, **MAMBA, **DUAL, block_norm=True),
    "dual spatial": partial(
        DualStreamEncoder, *SIZES, **SMALL, **MAMBA, **DUAL, readout="spatial", gate="parcel"
    ),
    "one stream": partial(OneStreamMamba, *SIZES, **SMALL, **MAMBA, blocks=2, readout="spatial"),
    "mlp": partial(MLPEncoder, *SIZES, **SMALL, d_feedforward=9),
    "gru": partial(RecurrentEncoder, *SIZES, **SMALL),
    "transformer": partial(TransformerEncoder, *SIZES, **SMALL, layers=2, heads=2),
}


@pytest.fixture(params=FACTORIES)
def factory(request):
    return FACTORIES[request.param]


@pytest.fixture
def tokens():
    return torch.randn(9, 2, 7), torch.randn(9, 6, 5)


def shapes_differ(one, other):
    return {
        name
        for name, value in one.state_dict().items()
        if value.shape != other.state_dict()[name].shape
    }


def test_whatever_depends_on_the_number_of_parcels_is_a_head(factory):
    one, other = factory(4), factory(11)
    heads = shapes_differ(one, other)
    assert heads
    assert all(belongs(name, one.head_names) for name in heads)
    assert all(one.get_submodule(name) is not None for name in one.head_names)


def test_a_shared_backbone_is_one_and_the_heads_are_not(factory, tokens):
    one, other = factory(4).eval(), factory(11).eval()
    before = other(*tokens).parcels
    share_backbone([one, other])
    own = [n for n, p in other.named_parameters() if p not in set(one.parameters())]
    assert own
    assert all(belongs(name, other.head_names) for name in own)
    for name, value in backbone_state(other).items():
        assert value.data_ptr() == one.state_dict()[name].data_ptr(), name
    assert not torch.equal(other(*tokens).parcels, before)
    both = nn.ModuleList([one, other])
    assert len(list(both.parameters())) == len(list(one.parameters())) + len(own)
    # A step on the one moves the other's backbone.
    one(*tokens).parcels.square().mean().backward()
    with torch.no_grad():
        moved = other(*tokens).parcels
        for parameter in one.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
        assert not torch.equal(other(*tokens).parcels, moved)


def test_a_copied_backbone_gives_the_same_features_and_is_another(factory, tokens):
    source, target = factory(4).eval(), factory(11).eval()
    copy_backbone(source, target)
    for space, values in source.features(*tokens).items():
        torch.testing.assert_close(target.features(*tokens)[space], values, rtol=0, atol=0)
    assert not set(source.parameters()) & set(target.parameters())


def test_features_are_normalised_without_a_subjects_weights(factory, tokens):
    encoder = factory(4).eval()
    before = encoder.features(*tokens)
    for name, parameter in encoder.named_parameters():
        if belongs(name, encoder.head_names):
            parameter.data.add_(torch.randn_like(parameter))
    for space, values in encoder.features(*tokens).items():
        assert torch.equal(values, before[space])
        blocks = values.view(len(values), -1, 8)
        torch.testing.assert_close(
            blocks.mean(-1), torch.zeros(blocks.shape[:2]), atol=1e-5, rtol=0
        )


def test_reading_out_the_backbone_is_the_prediction(factory, tokens):
    encoder = factory(4).eval()
    backbone = encoder.backbone(encoder.streams(*tokens))
    assert torch.equal(encoder.read_out(backbone).parcels, encoder(*tokens).parcels)


def test_freezing_trains_what_is_named(factory):
    encoder = factory(4)
    freeze(encoder, encoder.head_names)
    for name, parameter in encoder.named_parameters():
        assert parameter.requires_grad == belongs(name, encoder.head_names), name


# LoRA.


def lora_parameters(encoder):
    return {n: p for n, p in encoder.named_parameters() if ".lora_" in n}


@pytest.mark.parametrize("context", [torch.enable_grad, torch.inference_mode])
def test_every_wrapped_layer_changes_the_prediction(factory, tokens, context):
    encoder = factory(4).eval()
    targets = lora_targets(encoder)
    with context():
        before = encoder(*tokens).parcels.clone()
    add_lora(encoder, 2, 4.0)
    with context():
        torch.testing.assert_close(encoder(*tokens).parcels, before, rtol=1e-5, atol=1e-6)
    assert targets
    for name in targets:
        wrapped = encoder.get_submodule(name)
        with torch.no_grad():
            wrapped.lora_B["default"].weight.normal_()
        with context():
            changed = encoder(*tokens).parcels
            assert not torch.allclose(changed, before, rtol=1e-4, atol=1e-5), name
        with torch.no_grad():
            wrapped.lora_B["default"].weight.zero_()


def test_only_the_low_rank_matrices_are_trained_and_they_are_counted(factory):
    encoder = factory(4)
    layers = [encoder.get_submodule(name) for name in lora_targets(encoder)]
    expected = sum(2 * (layer.in_features + layer.out_features) for layer in layers)
    add_lora(encoder, 2, 4.0)
    trained = [n for n, p in encoder.named_parameters() if p.requires_grad]
    assert set(trained) == set(lora_parameters(encoder))
    assert sum(p.numel() for p in lora_parameters(encoder).values()) == expected


def test_merged_lora_predicts_the_same_with_the_layers_there_were(factory, tokens):
    encoder = factory(4).eval()
    names = encoder.state_dict().keys()
    add_lora(encoder, 2, 4.0)
    for parameter in lora_parameters(encoder).values():
        parameter.data.normal_(std=0.3)
    adapted = encoder(*tokens).parcels
    plain = factory(4).eval()
    merge_lora(encoder)
    assert encoder.state_dict().keys() == names
    torch.testing.assert_close(encoder(*tokens).parcels, adapted, rtol=1e-4, atol=1e-5)
    plain.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(plain(*tokens).parcels, adapted, rtol=1e-4, atol=1e-5)


def test_layers_whose_weights_a_fused_kernel_reads_are_not_wrapped():
    targets = lora_targets(FACTORIES["dual"](4))
    assert any(name.endswith("mamba.in_proj") for name in targets)
    assert not any(name.endswith(("x_proj", "dt_proj", "out_proj")) for name in targets)


def test_peft_is_imported_when_it_is_used():
    code = "import sys, chasm.models.adapters; assert 'peft' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Sources.


def test_source_features_are_the_spaces_of_the_shared_backbone(factory, tokens):
    encoders = [factory(4).eval(), factory(11).eval()]
    share_backbone(encoders)
    with torch.no_grad():
        expected = encoders[0].features(*tokens)
        responses = torch.cat([encoder(*tokens).parcels for encoder in encoders], 1)
    source = SourceFeatures(encoders).train()
    found = source(*tokens)
    assert tuple(found) == HEAD_SPACES
    assert not source.first.training, "no dropout, no noise"
    assert not any(p.requires_grad for p in source.parameters())
    for space in ("global", "local"):
        assert torch.equal(found[space], expected[space])
    assert torch.equal(found["responses"], responses)


def test_a_ridge_encoder_is_linear_in_the_features(factory, tokens):
    encoder = RidgeEncoder([factory(4), factory(11)], *SIZES, 3)
    head = encoder.head
    for parameter in head.parameters():
        parameter.data.normal_()
    found = encoder.source(*tokens)
    expected = head.bias + sum(
        found[s] @ head.get_submodule(s).projection.weight.T + head.get_submodule(s).projection.bias
        for s in HEAD_SPACES
    )
    torch.testing.assert_close(encoder(*tokens).parcels, expected, rtol=1e-4, atol=1e-4)
    n_features = sum(found[s].shape[1] for s in HEAD_SPACES)
    assert head.n_weights == 3 * (n_features + 1)
    # Its streams and sites are the source's.
    assert torch.equal(
        encoder.from_streams(encoder.streams(*tokens)).parcels, encoder(*tokens).parcels
    )
    assert set(sites_of(encoder)) == set(sites_of(encoder.source.first))
    assert encoder.separable == encoder.source.first.separable
