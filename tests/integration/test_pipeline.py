"""All stages on tiny models, through the library: what is on the disk, and whether the numbers are right."""

import json
import math
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file

import ara
import ara.stages.measure as measure
from ara.artifacts.factors import specs_of
from ara.artifacts.ranks import read_allocation
from ara.artifacts.ranks_file import from_table
from ara.config import AllocateConfig, DecomposeConfig, EvalConfig, TruncateConfig
from ara.data.texts import load_documents
from ara.data.tokens import evaluation_windows
from ara.decomposition import DECOMPOSITIONS
from ara.errors import ProblemsError, UsageError, WorkspaceError
from ara.models.checkpoint import read_config
from ara.models.low_rank import low_rank_layers
from ara.models.weights import WeightRef, find_linears
from ara.stages.allocate import allocate
from ara.stages.common import Run
from ara.stages.decompose import decompose
from ara.stages.evaluate import evaluate
from ara.stages.run import run_pipeline
from ara.stages.truncate import truncate
from ara.version import __version__
from ara.workspace.store import Workspace
from tests.damage import contents, listing, stamps
from tests.oracles.perplexity import perplexity
from tests.recorder import Recorder
from tests.tiny import FAMILIES, save_tiny, story, tiny_config, tiny_model, tiny_tokenizer

NAME = "energy-0.70"
CPU = {"device": "cpu", "dtype": "float32"}
# Files of a block in a decomposition.
KINDS = ("layer", "moments")
KEEP = 0.7
# 60 wide, heads of 14, 6 query and 2 key-value heads, 92 in the middle: the tiny llama by hand.
SHAPES = {
    "self_attn.q_proj": (84, 60),
    "self_attn.k_proj": (28, 60),
    "self_attn.v_proj": (28, 60),
    "self_attn.o_proj": (60, 84),
    "mlp.gate_proj": (92, 60),
    "mlp.up_proj": (92, 60),
    "mlp.down_proj": (60, 92),
}


def manifest(root, key):
    view = Workspace.open(root).view(key)
    assert view.state == "done", view.why
    return view.manifest


def factors(root, name="two-sided"):
    tensors = {}
    for path in sorted((root / "decompose" / name).glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def ranks_of(root, name=NAME):
    return json.loads((root / "allocate" / name / "ranks.json").read_text())["ranks"]


def rebuilt(model, ranks, tensors):
    """Return ``model`` with every ranked weight replaced by the dense product of its first factors."""
    for name, rank in ranks.items():
        if rank != "dense":
            product = tensors[f"{name}.B"][:, :rank] @ tensors[f"{name}.A"][:rank]
            WeightRef(name).replace(model, product)
    return model


def logits(model):
    ids = torch.arange(3, 3 + 2 * 37).view(2, 37)
    with torch.inference_mode():
        return model(input_ids=ids).logits


def test_workspace_holds_exactly_these_files(finished):
    files = listing(finished)
    (cache,) = [name for name in files if name.startswith("cache/tokens/") and name.endswith(".safetensors")]
    checkpoint = f"truncate/{NAME}/checkpoint"
    assert files - {cache} == {
        "workspace.json",
        ".lock",
        *(
            f"decompose/two-sided/{name}"
            for name in ("manifest.json", *(f"{kind}-{i:03d}.safetensors" for kind in KINDS for i in range(3)))
        ),
        f"allocate/{NAME}/manifest.json",
        f"allocate/{NAME}/ranks.json",
        f"truncate/{NAME}/manifest.json",
        f"{checkpoint}/README.md",
        f"{checkpoint}/chat_template.jinja",
        f"{checkpoint}/config.json",
        f"{checkpoint}/generation_config.json",
        f"{checkpoint}/model.safetensors",
        f"{checkpoint}/modeling_ara.py",
        f"{checkpoint}/tokenizer.json",
        f"{checkpoint}/tokenizer_config.json",
        f"eval/{NAME}-{story()}/manifest.json",
        f"eval/{NAME}-{story()}/results.json",
        *(
            f"eval/{NAME}-{story()}/{piece}.{row}-{model}.json"
            for piece in ("00-model", "01-story")
            for row, model in enumerate(("dense", "uniform", NAME))
        ),
    }


def test_every_file_of_a_stage_is_in_its_manifest(finished):
    for view in Workspace.open(finished).views():
        # The model card has no checksum: ara report writes it anew.
        card = {"checkpoint/README.md"} if view.stage == "truncate" else set()
        assert listing(view.path) == {*view.manifest.files, *card, "manifest.json"}
        assert not card & set(view.manifest.files)
        Workspace.open(finished).require(view.kind, view.name)


def test_manifests_tell_how_everything_was_made(finished, tiny_settings, tiny_llama):
    made = manifest(finished, "decompose/two-sided")
    for field, value in tiny_settings.items():
        assert made.config[field] == value
    assert made.config["method"] == "two-sided"
    assert len(made.config["text_sha256"]) == 64
    assert made.seed == 0
    assert made.parents == ()
    assert made.model == json.loads((finished / "workspace.json").read_text())["model"]
    assert made.model["location"] == str(tiny_llama)
    assert made.model["architecture"] == "LlamaForCausalLM"
    assert made.versions["ara"] == __version__
    assert made.versions["torch"] == torch.__version__
    model = tiny_model("llama")
    assert made.results["model_parameters"] == sum(p.numel() for p in model.parameters())
    assert made.results["linear_parameters"] == 3 * sum(m * n for m, n in SHAPES.values())
    assert made.results["windows"] == [16, 48]
    found = {(module["layer"], module["kind"]): (module["m"], module["n"]) for module in made.results["modules"]}
    assert found == {(layer, kind): shape for layer in range(3) for kind, shape in SHAPES.items()}
    ids = {
        stage: manifest(finished, f"{stage}/{name}").id
        for stage, name in (("decompose", "two-sided"), ("allocate", NAME), ("truncate", NAME))
    }
    parents = {
        "allocate": ["decompose"],
        "truncate": ["allocate", "decompose"],
        "eval": ["truncate", "decompose"],
    }
    for stage, above in parents.items():
        name = NAME + (f"-{story()}" if stage == "eval" else "")
        made = manifest(finished, f"{stage}/{name}")
        assert [(p.key.partition("/")[0], p.id) for p in made.parents] == [(stage, ids[stage]) for stage in above]


def test_tensor_tables_fit_the_files(finished):
    made = manifest(finished, "decompose/two-sided")
    tensors = factors(finished)
    assert set(made.tensors) == set(tensors)
    for kind, (m, n) in SHAPES.items():
        for layer in range(3):
            name = f"model.layers.{layer}.{kind}"
            assert tensors[f"{name}.A"].shape == (min(m, n), n)
            assert tensors[f"{name}.B"].shape == (m, min(m, n))
            assert tensors[f"{name}.spectrum"].shape == (min(m, n),)
            assert tensors[f"{name}.spectrum"].dtype == torch.float64
            assert made.tensors[f"{name}.A"].shape == (min(m, n), n)
            assert made.tensors[f"{name}.A"].file == f"layer-{layer:03d}.safetensors"
    saved = load_file(finished / "truncate" / NAME / "checkpoint" / "model.safetensors")
    assert set(manifest(finished, f"truncate/{NAME}").tensors) == set(saved)


@pytest.mark.parametrize("name", [entry.name for entry in DECOMPOSITIONS])
def test_full_factors_give_the_weights_back(finished, tiny_settings, tmp_path, name):
    root = finished
    if name != "two-sided":
        root = tmp_path / "ws"
        decompose(DecomposeConfig(**{**tiny_settings, "method": name}), Run(root))
    model = tiny_model("llama")
    tensors = factors(root, name)
    for spec in find_linears(model):
        weight = spec.weight.read(model)
        product = tensors[f"{spec.name}.B"] @ tensors[f"{spec.name}.A"]
        torch.testing.assert_close(product, weight, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["energy", "uniform"])
@pytest.mark.parametrize("keep", [0.2, 0.55, 0.7, 0.9, 1.0])
def test_budget_is_met_within_one_rank_step_and_never_exceeded(copied, method, keep):
    view = allocate(AllocateConfig(keep=keep, method=method), Run(copied))
    specs = specs_of(Workspace.open(copied).view("decompose/two-sided"))
    ranks = ranks_of(copied, view.name)
    assert list(ranks) == [spec.name for spec in specs]
    spent, dense, cheapest = 0, 0, math.inf
    for spec in specs:
        rank = ranks[spec.name]
        spent += spec.m * spec.n if rank == "dense" else rank * (spec.m + spec.n)
        dense += spec.m * spec.n
        if rank != "dense":
            assert 1 <= rank < spec.m * spec.n / (spec.m + spec.n)
            more = (rank + 1) * (spec.m + spec.n)
            cheapest = min(cheapest, min(more, spec.m * spec.n) - rank * (spec.m + spec.n))
    limit = math.floor(keep * dense + 1e-6)
    assert spent <= limit
    assert limit - spent < cheapest
    assert spent == view.manifest.results["linear_parameters"]
    assert view.manifest.results["linear_keep"] == spent / dense
    if keep == 1.0:
        assert set(ranks.values()) == {"dense"}


def test_rank_multiple_and_least_rank_are_kept(copied):
    view = allocate(AllocateConfig(keep=0.6, rank_multiple=4, min_rank=6, method="energy"), Run(copied))
    assert view.name == "energy-0.60-x4"
    ranks = [rank for rank in ranks_of(copied, view.name).values() if rank != "dense"]
    assert ranks
    assert all(rank % 4 == 0 and rank >= 8 for rank in ranks)


def test_checkpoint_computes_what_the_truncated_factors_compute(finished, tiny_llama):
    ranks = ranks_of(finished)
    ranked = {name: rank for name, rank in ranks.items() if rank != "dense"}
    assert ranked
    model = ara.load(finished / "truncate" / NAME / "checkpoint", "cpu")
    assert low_rank_layers(model) == ranked
    expected = logits(rebuilt(tiny_model("llama"), ranks, factors(finished)))
    torch.testing.assert_close(logits(model), expected, atol=2e-4, rtol=1e-4)
    assert (logits(tiny_model("llama")) - expected).abs().max() > 0.05  # the truncation is not nothing


def test_size_on_disk_falls_by_what_the_ranks_say(finished):
    made = manifest(finished, f"truncate/{NAME}").results
    allocated = manifest(finished, f"allocate/{NAME}").results
    saved = allocated["linear_parameters_dense"] - allocated["linear_parameters"]
    assert made["parameters"] == manifest(finished, "decompose/two-sided").results["model_parameters"] - saved
    assert made["weight_bytes"] == 4 * made["parameters"] == made["dense_weight_bytes"] - 4 * saved
    file = finished / "truncate" / NAME / "checkpoint" / "model.safetensors"
    assert made["disk_bytes"] == file.stat().st_size
    assert 0 < made["disk_bytes"] - made["weight_bytes"] < 16_384  # the header
    assert made["linear_keep"] == allocated["linear_keep"] <= KEEP
    card = (file.parent / "README.md").read_text()
    assert f"{allocated['model_parameters']:,}" in card


def test_densified_checkpoint_is_dense_and_computes_the_same(copied):
    view = truncate(TruncateConfig(densify=True), Run(copied))
    assert view.name == f"{NAME}-dense"
    folder = view.path / "checkpoint"
    assert "quantization_config" not in read_config(folder)
    assert not (folder / "modeling_ara.py").exists()
    dense, thin = ara.load(folder, "cpu"), ara.load(copied / "truncate" / NAME / "checkpoint", "cpu")
    assert low_rank_layers(dense) == {}
    assert set(dense.state_dict()) == set(tiny_model("llama").state_dict())
    torch.testing.assert_close(logits(dense), logits(thin), atol=2e-4, rtol=1e-4)
    result = evaluate(EvalConfig(tasks=("python-docs",), seq_len=64, max_windows=1, **CPU), Run(copied))
    assert list(result.manifest.results["variants"]) == ["dense", "uniform", f"{NAME}-dense"]
    assert result.manifest.results["variants"][f"{NAME}-dense"]["model_keep"] == 1


def test_keep_one_is_the_model_itself(copied):
    allocate(AllocateConfig(keep=1.0, method="energy"), Run(copied))
    view = truncate(TruncateConfig(), Run(copied))
    model = ara.load(view.path / "checkpoint", "cpu")
    assert "quantization_config" not in read_config(view.path / "checkpoint")
    assert torch.equal(logits(model), logits(tiny_model("llama")))


def test_half_precision_checkpoint_is_half_as_large(copied):
    before = manifest(copied, f"truncate/{NAME}").results["weight_bytes"]
    view = truncate(TruncateConfig(dtype="bfloat16"), Run(copied), name="half")
    assert view.manifest.results["weight_bytes"] * 2 == before
    tensors = load_file(view.path / "checkpoint" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_large_checkpoint_is_split_into_files(copied):
    view = truncate(TruncateConfig(max_shard_size="200KB"), Run(copied), name="split")
    files = [name for name in view.manifest.files if name.endswith(".safetensors")]
    assert len(files) > 1
    whole = ara.load(copied / "truncate" / NAME / "checkpoint", "cpu")
    assert torch.equal(logits(ara.load(view.path / "checkpoint", "cpu")), logits(whole))


def test_evaluation_agrees_with_an_independent_one(finished, tiny_text):
    results = json.loads((finished / "eval" / f"{NAME}-{story()}" / "results.json").read_text())
    assert results == manifest(finished, f"eval/{NAME}-{story()}").results
    assert list(results["variants"]) == ["dense", "uniform", NAME]
    assert results["chosen"] == NAME
    (task,) = results["tasks"].values()
    assert (task["windows"], task["seq_len"]) == (4, 64)
    documents = load_documents(tiny_text, "evaluation")
    windows = evaluation_windows(documents, tiny_tokenizer(), seq_len=64, max_windows=4).ids
    whole = tiny_tokenizer()("\n\n".join(documents.documents))["input_ids"]
    assert windows.flatten().tolist() == whole[:256]
    for name, model in {
        "dense": tiny_model("llama"),
        NAME: ara.load(finished / "truncate" / NAME / "checkpoint", "cpu"),
    }.items():
        with torch.inference_mode():
            scores = model(input_ids=windows).logits.double().numpy()
        assert task["models"][name]["perplexity"] == pytest.approx(perplexity(scores, windows.numpy()), rel=1e-5)
        assert task["models"][name]["tokens"] == 4 * 63
    for name, row in results["variants"].items():
        assert row["linear_keep"] == (1 if name == "dense" else pytest.approx(KEEP, abs=0.005))
        assert row["parameters"] == (121620 if name == "dense" else pytest.approx(0.78 * 121620, rel=0.02))
        speed = task["models"][name]["tokens_per_second"]
        assert 0 < speed["low"] <= speed["median"] <= speed["high"]


def test_uniform_row_is_the_uniform_checkpoint(copied, tiny_text):
    """What eval shows beside the chosen model is what an allocation by that method would have given."""
    config = EvalConfig(tasks=(tiny_text,), seq_len=64, max_windows=4, **CPU)
    spent = manifest(copied, f"allocate/{NAME}").results["linear_keep"]
    ranks = allocate(AllocateConfig(keep=spent, method="uniform"), Run(copied), name="flat")
    truncate(TruncateConfig(), Run(copied), allocation=ranks.name)
    view = evaluate(config, Run(copied), checkpoint="flat")
    assert list(view.manifest.results["variants"]) == ["dense", "flat"]  # uniform itself is not shown twice
    (mine,) = view.manifest.results["tasks"].values()
    (shown,) = manifest(copied, f"eval/{NAME}-{story()}").results["tasks"].values()
    assert mine["models"]["flat"]["perplexity"] == pytest.approx(shown["models"]["uniform"]["perplexity"], rel=1e-6)


@pytest.mark.parametrize("name", ["dense", "uniform"])
def test_checkpoint_with_the_name_of_another_row_keeps_its_own(copied, tiny_text, name):
    truncate(TruncateConfig(), Run(copied), name=name)
    view = evaluate(EvalConfig(tasks=(tiny_text,), seq_len=64, max_windows=2, **CPU), Run(copied), checkpoint=name)
    results = view.manifest.results
    assert list(results["variants"]) == ["dense", "uniform", f"truncate/{name}"]
    assert results["chosen"] == f"truncate/{name}"
    assert results["variants"]["dense"]["linear_keep"] == 1
    assert results["variants"]["dense"]["parameters"] > results["variants"][f"truncate/{name}"]["parameters"]


def test_continuations_of_a_prompt(copied, tiny_text):
    config = EvalConfig(tasks=(tiny_text,), seq_len=64, max_windows=1, prompt="The baker", max_new_tokens=3, **CPU)
    results = evaluate(config, Run(copied)).manifest.results
    (continued,) = results["continuations"]
    assert continued["prompt"] == "The baker" and list(continued["models"]) == list(results["variants"])
    assert all(isinstance(text, str) for text in continued["models"].values())


def test_continuations_of_the_text_itself(copied, tiny_text):
    config = EvalConfig(tasks=(tiny_text,), seq_len=64, max_windows=1, max_new_tokens=3, continuations=2, **CPU)
    continued = evaluate(config, Run(copied)).manifest.results["continuations"]
    beginnings = [" ".join(text.split()) for text in load_documents(tiny_text, "evaluation").documents]
    assert len(continued) == 2 and all(
        any(text.startswith(row["prompt"]) and len(text) > len(row["prompt"]) for text in beginnings)
        for row in continued
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_pipeline_for_every_family(tmp_path, family, tiny_text):
    """Also: every linear layer of the blocks is found, and truncation is exact for biases, tied heads and Conv1D."""
    folder = save_tiny(tmp_path / "model", family)
    root = tmp_path / "ws"
    views = run_pipeline(
        DecomposeConfig(model=str(folder), text=tiny_text, samples=4, seq_len=40, **CPU),
        [AllocateConfig(keep=KEEP, method="energy")],
        {"truncate": TruncateConfig(), "eval": EvalConfig(tasks=(tiny_text,), seq_len=48, max_windows=2, **CPU)},
        Run(root),
    )
    assert [view.stage for view in views] == ["decompose", "allocate", "truncate", "eval"]
    dense = tiny_model(family)
    specs = find_linears(dense)
    assert len({spec.layer for spec in specs}) == tiny_config(family).num_hidden_layers == 3
    ranks = ranks_of(root)
    assert set(ranks) == {spec.name for spec in specs}
    spent = from_table(ranks, specs).parameters(specs)
    assert 0.68 < spent / sum(spec.dense_cost for spec in specs) <= KEEP
    model = ara.load(views[2].path / "checkpoint", "cpu")
    removed = sum(spec.dense_cost for spec in specs) - spent
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in dense.parameters()) - removed
    expected = logits(rebuilt(dense, ranks, factors(root)))
    torch.testing.assert_close(logits(model), expected, atol=5e-4, rtol=1e-3)
    (task,) = views[3].manifest.results["tasks"].values()
    assert all(math.isfinite(row["perplexity"]) for row in task["models"].values())


@pytest.mark.parametrize("method", [entry.name for entry in DECOMPOSITIONS])
@pytest.mark.parametrize("allocator", ["energy", "uniform"])
def test_whole_pipeline_for_every_method(tmp_path, tiny_settings, tiny_text, method, allocator):
    views = run_pipeline(
        DecomposeConfig(**{**tiny_settings, "method": method}),
        [AllocateConfig(keep=KEEP, method=allocator)],
        {"truncate": TruncateConfig()},
        Run(tmp_path / "ws"),
    )
    prefix = "" if method == "two-sided" else f"{method}-"
    assert [view.key for view in views] == [
        f"decompose/{method}",
        f"allocate/{prefix}{allocator}-0.70",
        f"truncate/{prefix}{allocator}-0.70",
    ]
    assert (tmp_path / "ws" / "cache").exists() == (method != "plain")  # plain reads no text
    model = ara.load(views[-1].path / "checkpoint", "cpu")
    assert torch.isfinite(logits(model)).all()


def test_whitened_factors_lose_less_of_the_output_than_plain_ones(copied, tiny_settings, tiny_text):
    """The point of calibration: at equal ranks, less error of the outputs on the calibration text."""
    for method in ("whitened", "plain"):
        decompose(DecomposeConfig(**{**tiny_settings, "method": method}), Run(copied))
    model = tiny_model("llama")
    name, rank = "model.layers.1.mlp.down_proj", 11
    inputs = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    (cache,) = (copied / "cache" / "tokens").glob("*.safetensors")
    with torch.inference_mode():
        model(input_ids=load_file(cache)["ids"].long())
    handle.remove()
    x, weight = inputs[0].flatten(0, 1), WeightRef(name).read(model)
    errors = {}
    for method in ("whitened", "plain"):
        tensors = factors(copied, method)
        low = tensors[f"{name}.B"][:, :rank] @ tensors[f"{name}.A"][:rank]
        errors[method] = float(((weight - low) @ x.T).double().square().sum(0).mean())
        if method == "whitened":
            left = float(tensors[f"{name}.spectrum"][rank:].sum())
            assert errors[method] == pytest.approx(left, rel=1e-3)
    assert errors["whitened"] < errors["plain"]


def test_many_allocations_leave_the_factors_alone(copied):
    before, bytes_before = stamps(copied / "decompose"), contents(copied / "decompose")
    names = []
    for keep in (0.3, 0.5, 0.8):
        for method in ("energy", "uniform"):
            names.append(allocate(AllocateConfig(keep=keep, method=method), Run(copied)).name)
            truncate(TruncateConfig(), Run(copied))
    assert stamps(copied / "decompose") == before
    assert contents(copied / "decompose") == bytes_before
    assert {view.name for view in Workspace.open(copied).views("ranks")} == {NAME, *names}
    assert {view.state for view in Workspace.open(copied).views()} == {"done"}
    sizes = [manifest(copied, f"truncate/energy-{keep}").results["disk_bytes"] for keep in ("0.30", "0.50", "0.80")]
    assert sizes == sorted(set(sizes))


def test_edited_ranks_are_taken_as_they_are(copied, tmp_path):
    document = json.loads((copied / "allocate" / NAME / "ranks.json").read_text())
    name = "model.layers.0.self_attn.q_proj"
    other = "model.layers.2.mlp.up_proj"
    document["ranks"] |= {name: 3, other: "dense"}
    (tmp_path / "mine.json").write_text(json.dumps(document))
    view = allocate(AllocateConfig(keep=None), Run(copied), ranks=tmp_path / "mine.json")
    assert view.name == "mine"
    assert ranks_of(copied, "mine") == document["ranks"]
    assert len(view.manifest.config["ranks_sha256"]) == 64
    checkpoint = truncate(TruncateConfig(), Run(copied)).path / "checkpoint"
    model = ara.load(checkpoint, "cpu")
    assert low_rank_layers(model)[name] == 3
    assert other not in low_rank_layers(model)
    expected = logits(rebuilt(tiny_model("llama"), document["ranks"], factors(copied)))
    torch.testing.assert_close(logits(model), expected, atol=2e-4, rtol=1e-4)
    # Fed back once more it is the same; another edit is another result.
    again = allocate(AllocateConfig(keep=None), Run(copied), ranks=view.path / "ranks.json", name="again")
    specs = specs_of(Workspace.open(copied).view("decompose/two-sided"))
    assert read_allocation(again, specs) == read_allocation(view, specs)
    (tmp_path / "mine.json").write_text(json.dumps({**document, "ranks": {**document["ranks"], name: 4}}))
    changed = allocate(AllocateConfig(keep=None), Run(copied), ranks=tmp_path / "mine.json")
    assert changed.manifest.id != view.manifest.id
    assert Workspace.open(copied).view("truncate/mine").state == "stale"


def test_wrong_ranks_are_all_told_and_leave_nothing(copied, tmp_path):
    before = contents(copied)
    document = json.loads((copied / "allocate" / NAME / "ranks.json").read_text())
    ranks = document["ranks"]
    first, second, third, fourth = list(ranks)[:4]
    ranks |= {first: 0, second: "half", third: 999, "model.layers.9.mlp.up_proj": 3}
    del ranks[fourth]
    (tmp_path / "wrong.json").write_text(json.dumps(document))
    with pytest.raises(ProblemsError) as caught:
        allocate(AllocateConfig(keep=None), Run(copied), ranks=tmp_path / "wrong.json")
    assert len(caught.value.problems) == 5
    for name in (first, second, third, fourth, "model.layers.9.mlp.up_proj"):
        assert any(problem.startswith(name) for problem in caught.value.problems), name
    assert contents(copied) == before


def test_ranks_over_the_budget_that_is_given_are_refused(copied):
    file = copied / "allocate" / NAME / "ranks.json"
    with pytest.raises(UsageError, match=r"keep 0\.5 allows 45,000"):
        allocate(AllocateConfig(keep=0.5), Run(copied), ranks=file, name="tight")
    assert allocate(AllocateConfig(keep=KEEP), Run(copied), ranks=file, name="fits").state == "done"


def test_settings_of_a_method_are_refused_beside_a_ranks_file(copied):
    file = copied / "allocate" / NAME / "ranks.json"
    config = AllocateConfig(keep=None, method="energy", min_rank=30)
    with pytest.raises(UsageError, match="--ranks FILE and --method, --min-rank are both given"):
        allocate(config, Run(copied), ranks=file)


def test_models_that_do_not_fit_together_are_alone_in_memory(copied, tiny_text, monkeypatch):
    alive: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
    most = []
    original = measure.interleaved_perplexity

    def watched(models, *arguments, **options):
        alive.update(models.values())
        most.append(len(alive))
        return original(models, *arguments, **options)

    monkeypatch.setattr(measure, "interleaved_perplexity", watched)
    monkeypatch.setattr("ara.stages.common.available_bytes", lambda device: 1)
    config = EvalConfig(tasks=(tiny_text,), seq_len=32, max_windows=2, device="cpu", dtype="float32")
    together = manifest(copied, f"eval/{NAME}-{story()}").results
    alone = evaluate(config, Run(copied)).manifest.results
    assert most == [1, 1, 1]
    assert together["interleaved"] and not alone["interleaved"]
    assert list(alone["variants"]) == list(together["variants"])


@pytest.mark.parametrize(("dtype", "fits"), [("bfloat16", True), ("float32", False)])
def test_models_fit_by_the_dtype_in_which_they_are_held(copied, tiny_text, monkeypatch, dtype, fits):
    stored = manifest(copied, f"truncate/{NAME}").results["dense_weight_bytes"]
    # More than three models of half of the bytes need, and less than three as they are stored.
    monkeypatch.setattr("ara.stages.common.available_bytes", lambda device: 3 * stored)
    config = EvalConfig(tasks=(tiny_text,), seq_len=32, max_windows=1, device="cpu", dtype=dtype)
    assert evaluate(config, Run(copied), name="held").manifest.results["interleaved"] == fits


def test_chosen_uniform_is_not_measured_twice(copied, tiny_text):
    allocate(AllocateConfig(keep=0.6, method="uniform", rank_multiple=4), Run(copied))
    truncate(TruncateConfig(), Run(copied))
    config = EvalConfig(tasks=(tiny_text,), seq_len=32, max_windows=1, device="cpu", dtype="float32")
    assert list(evaluate(config, Run(copied)).manifest.results["variants"]) == ["dense", "uniform-0.60-x4"]


def test_same_seed_gives_the_same_bytes(finished, tiny_settings, tmp_path):
    root = tmp_path / "second"
    run_pipeline(
        DecomposeConfig(**tiny_settings),
        [AllocateConfig(keep=KEEP, method="energy")],
        {"truncate": TruncateConfig()},
        Run(root),
    )
    first = {name: sha for name, sha in contents(finished, "*.safetensors").items()}
    # Factors and moments of three blocks, the checkpoint, tokens.
    assert len(first) == 8
    assert contents(root, "*.safetensors") == first
    for key in ("decompose/two-sided", f"allocate/{NAME}", f"truncate/{NAME}"):
        assert manifest(root, key).id == manifest(finished, key).id


@pytest.mark.parametrize("change", [{"moment_memory": 1e-6}, {"batch_size": 3}])
def test_memory_and_batches_change_no_more_than_rounding(finished, tiny_settings, tmp_path, change):
    decompose(DecomposeConfig(**tiny_settings, **change), Run(tmp_path / "ws"))
    mine, theirs = factors(tmp_path / "ws"), factors(finished)
    for name in theirs:
        if name.endswith(".spectrum"):
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=1e-4)


def test_another_batch_size_is_another_decomposition(copied, tiny_settings):
    """Rounding differs, so the bytes do: never called the same, never mixed, and said before anything is replaced."""
    recorder = Recorder()
    decompose(DecomposeConfig(**tiny_settings, batch_size=1), Run(copied, report=recorder))
    (warning,) = [text for text in recorder.warnings if text.startswith("replacing decompose/two-sided")]
    assert "(batch_size)" in warning and "become stale" in warning


def test_a_manifest_that_never_hashed_the_batch_size_stays_valid(finished):
    """The content's id has always left it out: workspaces of earlier versions stay readable."""
    made = manifest(finished, "decompose/two-sided")
    assert made.model_copy(update={"config": {**made.config, "batch_size": 7}}).sealed().id == made.id


def test_other_seed_makes_everything_after_it_stale(copied, tiny_settings, tiny_text):
    workspace = Workspace.open(copied)
    before = contents(copied / "decompose", "*.safetensors")
    decompose(DecomposeConfig(**{**tiny_settings, "seed": 1}), Run(copied, force=True))
    assert contents(copied / "decompose", "*.safetensors") != before
    assert {view.key: view.state for view in workspace.views()} == {
        "decompose/two-sided": "done",
        f"allocate/{NAME}": "stale",
        f"truncate/{NAME}": "stale",
        f"eval/{NAME}-{story()}": "stale",
    }
    with pytest.raises(WorkspaceError, match="is stale"):
        truncate(TruncateConfig(), Run(copied))
    # Each stage done again is current again; nothing needs --force.
    allocate(AllocateConfig(keep=KEEP, method="energy"), Run(copied))
    truncate(TruncateConfig(), Run(copied))
    evaluate(EvalConfig(tasks=(tiny_text,), seq_len=64, max_windows=4, **CPU), Run(copied))
    assert {view.state for view in workspace.views()} == {"done"}
    # Back to the first seed: the very same bytes.
    decompose(DecomposeConfig(**tiny_settings), Run(copied))
    assert contents(copied / "decompose", "*.safetensors") == before


def test_same_settings_forced_again_leave_children_valid(copied, tiny_settings):
    before = stamps(copied / "decompose")
    decompose(DecomposeConfig(**tiny_settings), Run(copied, force=True))
    assert stamps(copied / "decompose") != before
    assert {view.state for view in Workspace.open(copied).views()} == {"done"}


def test_same_settings_do_nothing_again(copied, tiny_settings, tiny_text):
    before = stamps(copied)
    run_pipeline(
        DecomposeConfig(**tiny_settings),
        [AllocateConfig(keep=KEEP, method="energy")],
        {"truncate": TruncateConfig(), "eval": EvalConfig(tasks=(tiny_text,), seq_len=64, max_windows=4, **CPU)},
        Run(copied),
    )
    after = stamps(copied)
    assert {name: after[name] for name in after if "/" in name} == {
        name: before[name] for name in before if "/" in name
    }


def test_token_cache_is_used_and_not_trusted_blindly(copied, tiny_settings):
    before = contents(copied / "decompose", "*.safetensors")
    (cache,) = (copied / "cache" / "tokens").glob("*.safetensors")
    stamp = cache.stat().st_mtime_ns
    decompose(DecomposeConfig(**tiny_settings), Run(copied, force=True))
    assert cache.stat().st_mtime_ns == stamp
    data = bytearray(cache.read_bytes())
    data[-1] ^= 1
    cache.write_bytes(data)
    decompose(DecomposeConfig(**tiny_settings), Run(copied, force=True))
    assert contents(copied / "decompose", "*.safetensors") == before
    shutil.rmtree(copied / "cache")
    decompose(DecomposeConfig(**tiny_settings), Run(copied, force=True))
    assert contents(copied / "decompose", "*.safetensors") == before


def test_excluded_layers_stay_dense_and_uncounted(tmp_path, tiny_settings):
    config = DecomposeConfig(**tiny_settings, exclude=("*.down_proj", "model.layers.0.*"))
    run_pipeline(
        config, [AllocateConfig(keep=KEEP, method="energy")], {"truncate": TruncateConfig()}, Run(tmp_path / "ws")
    )
    assert listing(tmp_path / "ws" / "decompose" / "two-sided") == {
        "manifest.json",
        *(f"{kind}-{i:03d}.safetensors" for kind in KINDS for i in (1, 2)),
    }
    ranks = ranks_of(tmp_path / "ws")
    assert len(ranks) == 12
    model = ara.load(tmp_path / "ws" / "truncate" / NAME / "checkpoint", "cpu")
    assert set(low_rank_layers(model)) <= set(ranks)
