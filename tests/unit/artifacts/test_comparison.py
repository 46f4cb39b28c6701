"""Which model a comparison of sizes calls the best."""

from __future__ import annotations

from ara.artifacts.comparison import SizedModel, best_in_words


def model(title: str, megabytes: float, *losses: float, size: str | None = None) -> SizedModel:
    """Return a measured model."""
    mean = sum(losses) / len(losses)
    limit = None if size is None else int(float(size.removesuffix("MB")) * 1e6)
    return SizedModel(title, size, limit, int(megabytes * 1e6), {"8": 1}, 1, mean, losses)


def test_dense_models_count_where_they_fit_and_noise_is_named() -> None:
    models = [
        model("dense int8", 60, 3.0, 2.0),
        model("dense int4", 30, 3.5, 2.5),
        model("ranks", 59, 3.1, 1.9, size="60MB"),
        model("joint", 58, 2.9, 1.88, size="60MB"),
        model("joint", 39, 3.3, 2.2, size="40MB"),
        SizedModel("ranks", "20MB", 20_000_000, error="too small"),
    ]
    assert best_in_words(models) == (
        "Best on held-out calibration text: for 60MB joint (perplexity 10.91, 58 MB; no worse within 2 standard "
        "errors: ranks); for 40MB joint (perplexity 15.64, 39 MB); for 20MB nothing fits."
    )
