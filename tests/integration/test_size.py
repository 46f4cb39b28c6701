"""``ara allocate --size``: ranks and bits for a size in bytes, and the checkpoint that ``ara quantise`` makes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ara.artifacts.checkpoint import CheckpointResults
from ara.artifacts.factors import FactorsResults, specs_of
from ara.artifacts.ranks import RanksResults, read_allocation
from ara.artifacts.ranks_file import read_few_bits
from ara.layouts.grid import Grid
from ara.workspace.following import next_command
from ara.workspace.store import Workspace
from tests.commands import ara, done, refused
from tests.damage import contents

CPU = ("--device", "cpu", "--dtype", "float32")
FEW = (*CPU, "--samples", 6, "--held-out", 4)


def size(root: Path, share: float) -> str:
    """Return the size at which the factorised layers have this share of their dense bytes."""
    workspace = Workspace.open(root)
    specs = specs_of(workspace.view("decompose/two-sided"), "factors")
    linear = sum(spec.stored_bytes(None) for spec in specs)
    others = CheckpointResults.read(workspace.view("truncate/energy-0.70")).dense_weight_bytes - linear
    return f"{(others + 130 * 6 * len(specs) + share * linear) / 1000:.1f}KB"


def sized(root: Path, *words: Any) -> RanksResults:
    """Choose ranks and bits in a workspace, and return the results."""
    name = json.loads(done("allocate", *FEW, *words, "-w", root, "--json").stdout)["name"]
    return RanksResults.read(Workspace.open(root).view(f"allocate/{name}"))


@pytest.mark.parametrize("layout", ["factors", "pivoted"])
@pytest.mark.parametrize("share", [0.15, 0.22])
def test_the_checkpoint_has_the_size_that_was_asked_for(layout: str, share: float, copied: Path) -> None:
    found = sized(copied, "--size", size(copied, share), "--layout", layout, "--block", 16, "--no-guard")
    assert found.size is not None and found.size.linear + found.size.others <= found.size.limit
    done("truncate", "-w", copied)
    document = json.loads(done("quantise", *FEW, "--tolerance", 9, "-w", copied, "--json").stdout)
    results = CheckpointResults.read(Workspace.open(copied).view(f"quantise/{document['name']}"))
    assert results.rounding is not None and results.rounding.block == 16
    # Tensors are a little less than the files; steps of the last blocks are filled up in both.
    assert 0.8 * results.disk_bytes < results.weight_bytes < results.disk_bytes
    # Headers are a large part of so small a model, and only estimated.
    assert results.disk_bytes <= found.size.limit
    assert results.disk_bytes > 0.85 * found.size.limit


def test_the_size_counts_the_embedding_at_its_bits(copied: Path) -> None:
    words = ("--size", size(copied, 0.2), "--no-guard", "--block", 16)
    plain = sized(copied, *words, "--name", "plain")
    found = sized(copied, *words, "--embedding-bits", 4, "--name", "small")
    assert plain.size is not None and found.size is not None and found.size.embedding_bits == 4
    # Embedding and head, (260, 60) each, on blocks of 16 instead of in float32.
    assert plain.size.others - found.size.others == 2 * (4 * 260 * 60 - Grid(4, 16, True).bytes(260, 60))
    assert found.size.linear > plain.size.linear
    path = copied / "allocate" / "small" / "ranks.json"
    document = json.loads(path.read_text())
    assert document["embedding_bits"] == 4
    done("truncate", "--allocation", "small", "-w", copied)
    done("quantise", *FEW, "--tolerance", 9, "--name", "small", "-w", copied)
    results = CheckpointResults.read(Workspace.open(copied).view("quantise/small"))
    assert results.rounding is not None and results.rounding.embedding_bits == 4
    assert 0.8 * found.size.limit < results.disk_bytes <= found.size.limit
    document["embedding_bits"] = 3
    path = copied.parent / "edited.json"
    path.write_text(json.dumps(document))
    assert "embedding_bits 3, expected 4 or 8" in ara("allocate", "--ranks", path, "-w", copied).stderr
    document["embedding_bits"] = 8
    path.write_text(json.dumps(document))
    done("allocate", "--ranks", path, "--name", "edited", "-w", copied)
    assert read_few_bits(copied / "allocate" / "edited" / "ranks.json").embedding == 8


def test_bits_are_in_the_ranks_file_and_can_be_edited(copied: Path) -> None:
    sized(copied, "--size", size(copied, 0.2), "--no-guard", "--block", 32, "--name", "small")
    workspace = Workspace.open(copied)
    path = copied / "allocate" / "small" / "ranks.json"
    document = json.loads(path.read_text())
    specs = specs_of(workspace.view("decompose/two-sided"), "factors")
    choices = read_allocation(workspace.view("allocate/small"), specs).choices
    chosen = {name: choice.bits for name, choice in choices.items()}
    own = specs[0].bits
    assert document["format_version"] == 2
    assert document["bits"] == {name: bits for name, bits in chosen.items() if bits != own}
    document["bits"][specs[0].name] = 3
    edited = copied.parent / "edited.json"
    edited.write_text(json.dumps(document))
    assert "3 is not 4 or 8" in ara("allocate", "--ranks", edited, "-w", copied).stderr
    document["bits"][specs[0].name] = 4
    edited.write_text(json.dumps(document))
    done("allocate", "--ranks", edited, "--name", "edited", "-w", copied)
    assert read_allocation(workspace.view("allocate/edited"), specs).choices[specs[0].name].bits == 4


def test_the_guard_compares_with_one_width_for_all(copied: Path) -> None:
    found = sized(copied, "--size", size(copied, 0.3))
    assert found.guard is not None
    assert {"joint", "ranks, 8 bits", "ranks, 4 bits"} <= set(found.guard.held_out)
    losses = {name: loss for name, loss in found.guard.held_out.items() if name != "dense" and loss is not None}
    assert losses[found.guard.winner] == min(losses.values())


def test_the_guard_compares_with_dense_layers_at_the_blocks_that_fit(copied: Path) -> None:
    # 4 bits with blocks of 16 do not fit, those with blocks of 32 do; a single width has this one rival.
    words = ("--bits", "4", "--block", "16,32", "--embedding-bits", 16)
    found = sized(copied, "--size", size(copied, 0.165), *words)
    assert found.guard is not None
    assert set(found.guard.held_out) == {"dense", "joint", "dense, 4 bits"}


def test_a_size_that_needs_no_rounding_says_so(copied: Path) -> None:
    sized(copied, "--size", "9MB", "--no-guard")
    done("truncate", "-w", copied)
    refused(ara("quantise", *FEW, "-w", copied), 2, "nothing is to be rounded")
    done("recover", *FEW, "-w", copied)
    (view,) = (one for one in Workspace.open(copied).views("checkpoint") if one.stage == "recover")
    assert "quantise" not in next_command(Workspace.open(copied), view)


def test_another_block_than_that_of_the_size_is_refused(copied: Path) -> None:
    sized(copied, "--size", size(copied, 0.2), "--block", 16, "--no-zero-points", "--no-guard")
    done("truncate", "-w", copied)
    assert "ara allocate" in refused(ara("quantise", *FEW, "--block", 64, "-w", copied), 2, "with blocks of 16")
    view = done("quantise", *FEW, "--block", 16, "--tolerance", 9, "-w", copied, "--json")
    results = CheckpointResults.read(Workspace.open(copied).view(f"quantise/{json.loads(view.stdout)['name']}"))
    assert results.rounding is not None and (results.rounding.block, results.rounding.zero_points) == (16, False)


def test_zero_points_are_those_of_the_size(copied: Path) -> None:
    """The manifest says what was rounded with, also where the command line says nothing."""
    sized(copied, "--size", size(copied, 0.2), "--block", 16, "--no-guard")
    done("truncate", "-w", copied)
    words = ("quantise", *FEW, "--tolerance", 9, "-w", copied)
    assert "ara allocate" in refused(ara(*words, "--no-zero-points"), 2, "chosen with zero points")
    name = json.loads(done(*words, "--json").stdout)["name"]
    manifest = json.loads((copied / "quantise" / name / "manifest.json").read_text())
    assert (manifest["config"]["block"], manifest["config"]["zero_points"]) == (16, True)


def test_a_ranks_file_keeps_the_grid_of_its_size(copied: Path) -> None:
    """Ranks and bits that went through a file give the same checkpoint as those of ara allocate --size."""
    sized(copied, "--size", size(copied, 0.2), "--block", 16, "--no-zero-points", "--no-guard", "--name", "chosen")
    file = copied / "allocate" / "chosen" / "ranks.json"
    document = json.loads(file.read_text())
    assert (document["format_version"], document["block"], document["zero_points"]) == (4, 16, False)
    done("allocate", "--ranks", file, "--name", "given", "-w", copied)
    again = json.loads((copied / "allocate" / "given" / "ranks.json").read_text())
    assert {key: value for key, value in again.items() if key != "about"} == {
        key: value for key, value in document.items() if key != "about"
    }
    found = []
    for name in ("chosen", "given"):
        done("truncate", "--allocation", name, "--name", name, "-w", copied)
        done("quantise", *FEW, "--from", f"truncate/{name}", "--name", name, "--tolerance", 9, "-w", copied)
        found.append(contents(copied / "quantise" / name / "checkpoint", "*.safetensors"))
    assert found[0] == found[1]


def test_sizes_that_cannot_be_met_are_refused(copied: Path) -> None:
    for text in ("1KB", size(copied, 0.001)):
        result = ara("allocate", *FEW, "--size", text, "-w", copied)
        assert result.exit_code == 2 and "the least is" in result.stderr
        # Nothing was measured, and no model loaded.
        assert "loading" not in result.stderr and "table" not in result.stderr
    least = re.search(r"the least is ([\d,]+)", result.stderr)
    assert least is not None
    enough = int(least[1].replace(",", ""))
    assert ara("allocate", *FEW, "--budget-bytes", enough - 1, "-w", copied).exit_code == 2
    done("allocate", *FEW, "--budget-bytes", enough, "--no-guard", "-w", copied)
    for words in (("--size", "small"), ("--size", "60KB", "--bits", "3")):
        assert ara("allocate", *FEW, *words, "-w", copied).exit_code == 2


def test_a_size_has_three_spellings(copied: Path) -> None:
    workspace = Workspace.open(copied)
    parameters = FactorsResults.read(workspace.view("decompose/two-sided")).model_parameters
    limit = int(float(size(copied, 0.3).removesuffix("KB")) * 1000)
    spellings = {
        "size": f"{limit / 1000:.3f}KB",
        "budget-bytes": limit,
        # Half a byte more, so that no rounding of the quotient loses one.
        "bits-per-parameter": repr(8 * (limit + 0.5) / parameters),
    }
    found = {name: sized(copied, f"--{name}", value, "--no-guard") for name, value in spellings.items()}
    assert {one.size.limit for one in found.values() if one.size is not None} == {limit}
    assert len({json.dumps(one.plain()) for one in found.values()}) == 1
    names = {view.name for view in workspace.views("ranks") if view.name.startswith("joint-")}
    assert {f"joint-{limit}B", f"joint-{limit / 1000:.3f}KB"} < names and len(names) == 3
    manifest = workspace.view(f"allocate/joint-{limit}B").manifest
    assert manifest is not None and "size" not in manifest.config and manifest.config["budget_bytes"] == limit


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--keep", 0.5, "--size", "60KB"), "--keep 0.5 and --size 60KB are given together"),
        (("--remove", 0.5, "--budget-bytes", 60000), "--keep 0.5 and --budget-bytes 60000 are given together"),
        (("--size", "60KB", "--bits-per-parameter", 4), "--size 60KB and --bits-per-parameter 4.0 are given together"),
        (("--method", "energy", "--size", "60KB"), "--method energy and --size 60KB are given together"),
        (("--masks", "x", "--budget-bytes", 60000), "--masks x and --budget-bytes 60000 are given together"),
    ],
)
def test_a_second_budget_is_refused(words: tuple[Any, ...], message: str, copied: Path) -> None:
    refused(ara("allocate", *FEW, *words, "-w", copied), 2, message)


def test_a_ranks_file_and_a_size_are_refused(copied: Path) -> None:
    path = copied / "allocate" / "energy-0.70" / "ranks.json"
    result = ara("allocate", "--ranks", path, "--budget-bytes", 60000, "-w", copied)
    assert result.exit_code == 2 and "--ranks FILE and --budget-bytes are both given" in result.stderr


def test_bits_alone_are_chosen_where_all_layers_stay_dense(copied: Path) -> None:
    """The checkpoint of a dense model in 8 and 4 bits, and the same dense model as candidates of the guard."""
    words = ("--size", size(copied, 0.22), "--bits", "8,4", "--block", 16, "--exclude", "*")
    guard = sized(copied, *words, "--name", "guarded").guard
    assert guard is not None and guard.held_out["dense, 4 bits"] == guard.held_out["ranks, 4 bits"]
    found = sized(copied, *words, "--no-guard")
    assert found.size is not None and found.linear_keep == 1 and set(found.size.layers) == {"4", "8"}
    done("truncate", "-w", copied)
    document = json.loads(done("quantise", *FEW, "--tolerance", 9, "-w", copied, "--json").stdout)
    results = CheckpointResults.read(Workspace.open(copied).view(f"quantise/{document['name']}"))
    assert results.rounding is not None and results.low_rank_layers == 0
    assert 0.85 * found.size.limit < results.disk_bytes <= found.size.limit


def test_the_lengths_of_blocks_are_chosen_too(copied: Path) -> None:
    """Between what long blocks and what short ones take for 4 bits, some layers have one and some the other."""
    words = ("--bits", "4", "--exclude", "*", "--no-guard")
    long, short = (
        sized(copied, "--size", size(copied, 0.5), "--block", block, *words, "--name", f"all-{block}").size
        for block in (64, 16)
    )
    assert long is not None and short is not None
    small, large = sorted((long.linear + long.others, short.linear + short.others))
    found = sized(copied, "--budget-bytes", (small + large) // 2, "--block", "16,64", *words, "--name", "both").size
    assert found is not None and found.blocks is not None and set(found.blocks) == {"16", "64"}
    document = json.loads((copied / "allocate" / "both" / "ranks.json").read_text())
    assert document["format_version"] == 4 and document["block"] == 16 and set(document["blocks"].values()) == {64}
    done("truncate", "--allocation", "both", "-w", copied)
    shown = done("quantise", *FEW, "--tolerance", 9, "--name", "both", "-w", copied).stdout
    view = Workspace.open(copied).view("quantise/both")
    rounding = CheckpointResults.read(view).rounding
    assert rounding is not None and rounding.blocks == (16, 64) and rounding.block_words == "16 or 64"
    config = json.loads((view.path / "checkpoint" / "config.json").read_text())["quantization_config"]
    assert {name for name, (_, block, _) in config["rounded"].items() if block == 64} == set(document["blocks"])
    assert "a scale and a zero point per 16 or 64 weights" in " ".join(shown.split())


def test_a_ranks_file_with_impossible_blocks(copied: Path) -> None:
    path = copied / "allocate" / "energy-0.70" / "ranks.json"
    document = json.loads(path.read_text())
    name, other = list(document["ranks"])[:2]
    document |= {"format_version": 3, "bits": {name: 4}, "blocks": {name: 48, other: 32}}
    edited = copied.parent / "blocks.json"
    edited.write_text(json.dumps(document))
    text = ara("allocate", "--ranks", edited, "-w", copied).stderr
    assert f"block of {name}: 48 is none of 16, 32, 64, 128, 256" in text
    assert f"block of {other}: the layer has no few bits" in text
    edited.write_text(json.dumps(document | {"blocks": 3}))
    assert '"blocks" is 3, expected a table' in ara("allocate", "--ranks", edited, "-w", copied).stderr


def test_a_second_size_measures_no_loss_again(copied: Path) -> None:
    words = ("allocate", *FEW, "--no-guard", "-w", copied)
    first = done(*words, "--size", size(copied, 0.3)).stderr
    again = done(*words, "--size", size(copied, 0.2), "--bits", "16,4").stderr
    tables = [text.count("table of rounding errors read from") for text in (first, again)]
    # One for each length of blocks.
    assert tables == [0, 2] and "sensitivity table read from" in again


def test_an_allocation_without_a_size_has_the_settings_of_before(copied: Path) -> None:
    manifest = json.loads((copied / "allocate" / "energy-0.70" / "manifest.json").read_text())
    assert not {"size", "bits", "blocks", "zero_points", "budget_bytes", "bits_per_parameter"} & set(manifest["config"])
