"""What models and factors take on the disk."""

from __future__ import annotations

import pytest

from ara.layouts import layout_named
from ara.models.disk import disk_use, factor_bytes, rank_to_store
from ara.models.weights import LinearSpec

# LLaMA-2-7B: seven linear layers in each of 32 blocks; 6,738,415,616 parameters in bfloat16.
SHAPES_7B = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
PARAMETERS_7B = 6_738_415_616


def layers(shapes: list[tuple[int, int]], max_keep: float | None) -> list[LinearSpec]:
    return [LinearSpec(f"x.{i}", 0, "x", m, n, stored=rank_to_store(m, n, max_keep)) for i, (m, n) in enumerate(shapes)]


@pytest.mark.parametrize("max_keep", [0.01, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 9), (2, 2), (7, 5), (40, 40), (96, 37), (37, 96)])
def test_the_stored_rank_is_the_largest_affordable_one(m: int, n: int, max_keep: float) -> None:
    affordable = [k for k in range(1, min(m, n) + 1) if k * (m + n) <= max_keep * m * n + 1e-6 and k * (m + n) < m * n]
    expected = max(affordable, default=1)
    assert rank_to_store(m, n, max_keep) == (None if expected == min(m, n) else expected)


def test_at_1_no_rank_that_factors_can_use_is_lost_and_at_none_no_rank_at_all() -> None:
    for m, n in SHAPES_7B:
        assert rank_to_store(m, n, 1.0) == layout_named("factors").top_rank(m, n)
        assert rank_to_store(m, n, None) is None


def test_products_that_are_whole_numbers_are_not_rounded_down() -> None:
    # 0.7 · 100 · 100 / 200 = 35, and slightly less in floating point.
    assert rank_to_store(100, 100, 0.7) == 35


def test_bytes_count_factors_and_all_values_of_the_spectrum() -> None:
    (spec,) = layers([(96, 37)], 0.5)
    assert spec.stored == 13
    assert factor_bytes([spec], 2) == 13 * (96 + 37) * 2 + 37 * 8
    use = disk_use([spec], 4000, 2)
    assert (use.model, use.factors, use.checkpoint) == (8000, factor_bytes([spec], 2), 8000)


@pytest.mark.parametrize(
    ("max_keep", "gigabytes"), [(None, "20.5"), (1.0, "13.0"), (0.9, "11.7"), (0.8, "10.4"), (0.6, "7.8")]
)
def test_the_table_for_llama2_7b_in_the_docs(max_keep: float | None, gigabytes: str) -> None:
    use = disk_use(layers(SHAPES_7B * 32, max_keep), PARAMETERS_7B, 2)
    assert f"{use.factors / 1e9:.1f}" == gigabytes
    assert f"{use.model / 1e9:.1f}" == f"{use.checkpoint / 1e9:.1f}" == "13.5"
    assert (use.factors < use.model) == (max_keep is not None)
