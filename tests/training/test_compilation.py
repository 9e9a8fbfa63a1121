"""torch.compile: the same training, the same checkpoints, and a clear refusal."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from chasm.errors import ConfigError
from chasm.training import compilation
from chasm.training.recipes import Recipe
from chasm.training.runs import fit, load

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
COMPILED = ["--model.init_args.compile", "true"]


def recipe_of(name, toy_dataset, tmp_path, *extra):
    return ["-c", str(EXPERIMENTS / name), "--data.dataset_dir", str(toy_dataset),
            "--trainer.max_epochs", "1", "--runs", str(tmp_path / "runs"), *extra]  # fmt: skip


def assert_equal_training(plain, compiled):
    a, b = (
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for run in (plain, compiled)
    )
    assert a.keys() == b.keys(), "names of weights are those of an uncompiled network"
    for key in a:
        torch.testing.assert_close(b[key], a[key], rtol=0, atol=1e-5)
    tables = [pd.read_csv(run / "metrics.csv") for run in (plain, compiled)]
    pd.testing.assert_frame_equal(*tables, rtol=0, atol=1e-5)


@pytest.fixture
def calls(monkeypatch):
    """Graphs that the back end was given, without a C++ compiler."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(compilation, "BACKEND", backend)
    yield graphs
    torch._dynamo.reset()


def test_a_compiled_fit_equals_a_plain_one(toy_dataset, tmp_path, calls):
    few = ["--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1",
           "--trainer.num_sanity_val_steps", "0"]  # fmt: skip
    recipe = recipe_of("smoke.yaml", toy_dataset, tmp_path, *few)
    plain = fit(Recipe(recipe))
    assert not calls
    compiled = fit(Recipe([*recipe, *COMPILED]))
    assert calls, "the network was traced"
    assert_equal_training(plain, compiled)
    seen = len(calls)
    model, data, _ = load(compiled)
    assert model.encoder._compiled_call_impl is None, "what is loaded is not compiled"
    batch = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    with torch.inference_mode():
        assert model(batch).shape[0] == len(batch["betas"])
    assert len(calls) == seen


@pytest.mark.parametrize("name", ["smoke.yaml", "smoke_stage2.yaml"])
def test_networks_are_traced_whole(toy_dataset, tmp_path, name):
    model = Recipe(recipe_of(name, toy_dataset, tmp_path)).make_model()
    sizes = {"cls_width": 6, "n_cls": 2, "patch_width": 5, "n_patches": 4}
    cls, patches = torch.randn(3, 2, 6), torch.randn(3, 4, 5)
    if name == "smoke.yaml":
        network, inputs = model._factory(*sizes.values(), 7), (cls, patches)
    else:
        from chasm.parcellation import sequential

        network = model._factory(*sizes.values(), sequential(21, 5))
        inputs = (cls, patches.mean(1, keepdim=True), torch.randn(3, 4))
    explained = torch._dynamo.explain(network)(*inputs)
    assert explained.graph_break_count == 0, explained.break_reasons
    torch._dynamo.reset()


def test_without_a_compiler_it_says_so(monkeypatch):
    cpu = torch.device("cpu")
    with monkeypatch.context() as patch:
        patch.setenv("CXX", "no-such-compiler")
        with pytest.raises(ConfigError, match=r"model\.compile.*no-such-compiler.*false"):
            compilation.check_compiler(cpu)
    monkeypatch.setenv("CXX", "sh")  # stands for a compiler that is there
    compilation.check_compiler(cpu)
    monkeypatch.setattr(compilation, "has_triton", lambda: False)
    with pytest.raises(ConfigError, match=r"model\.compile.*Triton"):
        compilation.check_compiler(torch.device("cuda"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smoke.yaml", "smoke_stage2.yaml"])
def test_inductor_gives_the_same_training(toy_dataset, tmp_path, name):
    part = "encoder" if name == "smoke.yaml" else "decoder"
    still = [f"--model.init_args.{part}.init_args.dropout", "0",
             f"--model.init_args.{part}.init_args.token_noise", "0"]  # fmt: skip
    if part == "decoder":
        still += ["--model.init_args.decoder.init_args.d_latent", "0"]
    recipe = recipe_of(name, toy_dataset, tmp_path, *still)
    assert_equal_training(fit(Recipe(recipe)), fit(Recipe([*recipe, *COMPILED])))
