"""Contexts that hook models: they act at every site, compose, and leave nothing behind."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from chasm.errors import ConfigError
from chasm.interventions import Intervention, collect, intervene, on_stream, record
from chasm.models.sites import Site, sites_of

INPUTS = {"features.cls", "features.patches"}
NETWORK = INPUTS | {"global.out", "local.out", "gate"}
LINEAR = {"linear.cls", "linear.patches"}
DECODER = {"parcels", "stage2.cls", "stage2.patches", "stage2.visual", "stage2.latent",
           "stage2.holistic", "stage2.residual", "stage2.linear.cls",
           "stage2.linear.patches"}  # fmt: skip
SITES = {
    "stage 1": NETWORK,
    "spatial": NETWORK,
    "published": NETWORK,
    "stage 1 with ridge": NETWORK | LINEAR,
    "stage 2": NETWORK | LINEAR | DECODER,
    "stage 2 (MLP)": NETWORK | {"parcels"},
    "banded ridge": INPUTS | LINEAR,
    "one sequence": INPUTS,
}
SEPARABLE = [name for name in SITES if name != "one sequence"]
KEYS = {"global": "cls", "local": "patches"}

every_model = pytest.mark.parametrize("name", SITES)
every_separable = pytest.mark.parametrize("name", SEPARABLE)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def hooks_on(model):
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())


def given_means(model, stream, means, streams):
    """What a stream's sites are given, replaced by means without any hook."""
    ours = {name for name, site in sites_of(model).items() if site.stream == stream}
    return {
        name: means[name].expand_as(value) if name in ours else value
        for name, value in streams.items()
    }


@every_model
def test_every_site_is_passed_and_left_without_hooks(name, module_of, batch_of):
    model, batch = module_of(name), batch_of()
    clean = model(batch)
    assert set(sites_of(model)) == SITES[name]
    for site in SITES[name]:
        with intervene(model, [Intervention(site, "zero")]), record(model, [site]) as seen:
            changed = model(batch)
        assert not seen[site].any()
        assert (changed - clean).abs().max() > 1e-4, site
        assert hooks_on(model) == 0
    assert torch.equal(model(batch), clean)


@every_model
def test_nothing_is_left_after_an_exception(name, module_of, batch_of):
    model, batch = module_of(name), batch_of()
    clean, sites = model(batch), sorted(SITES[name])
    zeros = [Intervention(site, "zero") for site in sites]
    with pytest.raises(TypeError), record(model, sites), intervene(model, zeros):
        model(batch) + "one"
    # In the middle of the pass, by an operation that lacks what it needs.
    lacking = intervene(model, [Intervention(sites[-1], "mean")])
    with pytest.raises(ConfigError, match=f"{sites[-1]}.*no statistics"), lacking:
        model(batch)
    assert hooks_on(model) == 0
    assert torch.equal(model(batch), clean)


@every_model
def test_zeros_at_an_input_equal_zeros_in_the_batch(name, module_of, batch_of):
    model, batch = module_of(name), batch_of()
    for key in ("cls", "patches"):
        with intervene(model, [Intervention(f"features.{key}", "zero")]):
            found = model(batch)
        assert torch.equal(found, model(batch | {key: torch.zeros_like(batch[key])}))


@every_separable
@pytest.mark.parametrize("stream", KEYS)
def test_interchange_at_a_stream_equals_interchange_at_the_input(name, stream, module_of, batch_of):
    model, batch, other = module_of(name), batch_of(), batch_of(first=50)
    key, donor_streams = KEYS[stream], model.streams(other)
    expected = model(batch | {key: other[key]})
    with intervene(model, on_stream(model, stream, "value"), donors=donor_streams):
        at_streams = model.from_streams(model.streams(batch))
    site = f"features.{key}"
    with intervene(model, [Intervention(site, "resample")], donors={site: other[key]}):
        at_input = model(batch)
    assert torch.equal(at_input, expected)
    torch.testing.assert_close(at_streams, expected, rtol=1e-5, atol=1e-6)
    assert (expected - model(batch)).abs().max() > 1e-3


@every_separable
def test_without_streams_nothing_depends_on_the_image(name, module_of, batch_of):
    model, batch = module_of(name), batch_of()
    reference = collect(model, [batch_of(20, 100)], SITES[name])
    cut = [part for stream in KEYS for part in on_stream(model, stream, "mean")]
    with intervene(model, cut, reference):
        found = model(batch)
    torch.testing.assert_close(found, found[:1].expand_as(found), rtol=0, atol=1e-6)
    assert found.std(1).min() > 0


@every_separable
@pytest.mark.parametrize("stream", KEYS)
def test_a_stream_at_its_mean_equals_means_given_to_the_rest(name, stream, module_of, batch_of):
    model, batch = module_of(name), batch_of()
    reference = collect(model, [batch_of(20, 100)], SITES[name])
    streams = model.streams(batch)
    with intervene(model, on_stream(model, stream, "mean"), reference):
        found = model.from_streams(streams)
    by_hand = model.from_streams(given_means(model, stream, reference.mean, streams))
    torch.testing.assert_close(found, by_hand, rtol=0, atol=1e-6)
    # What is kept is the other stream's: its tokens matter, this stream's do not.
    for key, matters in ((KEYS[stream], False), (*(set(KEYS.values()) - {KEYS[stream]}), True)):
        changed = batch | {key: batch[key].flip(0)}
        with intervene(model, on_stream(model, stream, "mean"), reference):
            assert torch.equal(model(changed), model(batch)) is not matters


def test_the_mean_keeps_the_offset(module_of, batch_of):
    model, train = module_of("banded ridge"), batch_of(30)
    reference = collect(model, [train], LINEAR)
    for stream in KEYS:
        with intervene(model, on_stream(model, stream, "mean"), reference):
            found = model(train)
        torch.testing.assert_close(found.mean(0), model(train).mean(0), rtol=0, atol=1e-5)
        with intervene(model, on_stream(model, stream, "zero")):
            shift = model(train).mean(0) - found.mean(0)
        assert shift.abs().max() > 0.01


def test_a_held_gate_leaves_the_other_stream_its_share(module_of, batch_of):
    model, batch = module_of("spatial"), batch_of()
    reference = collect(model, [batch_of(20, 100)], NETWORK)
    output = model.encode(batch)
    mean = model.encoder.global_stream.head(reference.mean["global.out"])
    direct = output.gate[..., 0] * mean + output.gate[..., 1] * output.local_parcels
    cut = on_stream(model, "global", "mean")
    with record(model, ["gate"]) as clean:
        model(batch)
    with intervene(model, [*cut, Intervention("gate", "clean")], reference, clean=clean):
        held = model(batch)
    torch.testing.assert_close(held, direct)
    with intervene(model, cut, reference):
        assert not torch.allclose(model(batch), held, atol=1e-4)


def test_four_coalitions_compute_the_streams_once(module_of, batch_of):
    model, batch = module_of("stage 1"), batch_of()
    reference = collect(model, [batch], ["global.out", "local.out"])
    passes, handles = [], []
    for part in (model.encoder.global_stream, model.encoder.local_stream):
        handles.append(part.register_forward_hook(lambda *_: passes.append(1)))
    streams = model.streams(batch)
    found = []
    for cut in ((), ("global",), ("local",), ("global", "local")):
        removed = [part for stream in cut for part in on_stream(model, stream, "mean")]
        with intervene(model, removed, reference):
            found.append(model.from_streams(streams))
    assert len(passes) == 2
    for handle in handles:
        handle.remove()
    assert torch.equal(found[0], model(batch))
    assert all(not torch.allclose(a, b) for a, b in pairwise(found))


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = Site("a"), Site("b")

    def forward(self, value):
        return self.b(2 * self.a(value))


def test_interventions_on_a_site_act_in_order_and_so_do_contexts():
    model, value = Chain(), torch.ones(1, 2)
    put = {"a": torch.tensor([[3.0, 3.0]])}
    half = Intervention("a", "zero", tokens=(0,))
    with intervene(model, [Intervention("a", "value"), half], donors=put):
        assert model(value).tolist() == [[0, 6]]
    with intervene(model, [half, Intervention("a", "value")], donors=put):
        assert model(value).tolist() == [[6, 6]]
    with intervene(model, [Intervention("a", "value")], donors=put):
        with intervene(model, [half]):
            assert model(value).tolist() == [[0, 6]]
        assert model(value).tolist() == [[6, 6]]
        with intervene(model, [Intervention("b", "zero", tokens=(1,))]):
            assert model(value).tolist() == [[6, 0]]
    assert model(value).tolist() == [[2, 2]]
    with intervene(model, []):
        assert model(value).tolist() == [[2, 2]]


def test_what_is_recorded_depends_on_where_the_recorder_is():
    model, value = Chain(), torch.ones(1, 2)
    zero, both = [Intervention("a", "zero")], ["a", "b"]
    with record(model, both) as outside, intervene(model, zero), record(model, both) as inside:
        model(value)
    assert outside["a"].tolist() == [[1, 1]]
    assert inside["a"].tolist() == inside["b"].tolist() == outside["b"].tolist() == [[0, 0]]


def test_an_unknown_site_lists_those_there_are(module_of):
    model = module_of("stage 1")
    listed = r"no such site.*features\.cls, features\.patches, global\.out, local\.out, gate"
    wrong = [Intervention("gate", "zero"), Intervention("stage2.latent", "zero")]
    for context in (record(model, ["gate", "stage2.latent"]), intervene(model, wrong)):
        with pytest.raises(ConfigError, match=rf"stage2\.latent: Stage1Module has {listed}"):
            context.__enter__()
        assert hooks_on(model) == 0
    with pytest.raises(ConfigError, match="Its sites: none"):
        record(nn.Linear(1, 1), ["a"]).__enter__()


def test_an_intervention_that_nothing_passed_is_an_error(module_of, batch_of):
    model, batch = module_of("stage 1"), batch_of()
    streams = model.streams(batch)
    cls, gate = (intervene(model, [Intervention(s, "zero")]) for s in ("features.cls", "gate"))
    with pytest.raises(ConfigError, match=r"features\.cls.*nothing passed.*streams\(batch\)"), cls:
        model.from_streams(streams)
    with pytest.raises(ConfigError, match=r"gate.*nothing passed"), gate:
        model.streams(batch)
    both = intervene(model, [Intervention(s, "zero") for s in ("features.cls", "gate")])
    with pytest.raises(ConfigError, match=r"features\.cls.*nothing passed"), both:
        model.from_streams(streams)
    assert hooks_on(model) == 0


@every_model
def test_batches_of_any_size_give_the_same(name, module_of, batch_of):
    model = module_of(name)
    reference = collect(model, [batch_of(20, 100)], SITES[name])
    whole = batch_of(7)
    parts = [
        Intervention("features.cls", "noise", seed=1),
        Intervention("features.patches", "shuffle_space"),
    ]
    if name != "one sequence":
        parts += on_stream(model, "global", "noise")

    def run(batch):
        with intervene(model, parts, reference, batch=batch):
            return model(batch)

    pieces = [{key: value[rows] for key, value in whole.items()}
              for rows in torch.arange(7).split(3)]  # fmt: skip
    torch.testing.assert_close(
        torch.cat([run(piece) for piece in pieces]), run(whole), rtol=1e-4, atol=1e-5
    )
