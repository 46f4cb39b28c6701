"""Settings of a short training of masks, and what tests do to it."""

from ara.config import CompareConfig
from ara.masks.model import MaskedModel

TRAINING = {
    "keep": (0.8, 0.6),
    "steps": 4,
    "batch": 3,
    "check_every": 2,
    "save_every": 1,
    "samples": 8,
    "held_out": 4,
    "device": "cpu",
    "dtype": "float32",
}
NAME = "priced-0.80-0.60"
TUNING = {"samples": 8, "held_out": 4, "device": "cpu", "dtype": "float32"}


def train_words(root, *more):
    flags = {key: value for key, value in TRAINING.items() if key != "keep"}
    words = [word for key, value in flags.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    return ["train-masks", "--keep", "0.8", "--keep", "0.6", *words, "-w", str(root), *more]


def compare_config(tiny_text, **more):
    return CompareConfig(keep=0.7, tasks=(tiny_text,), eval_seq_len=64, max_windows=3, **{**TUNING, **more})


def break_at(monkeypatch, call, error):
    """Let the training step number ``call`` of this process raise ``error``."""
    real, calls = MaskedModel.gradients, []

    def gradients(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise error
        return real(self, *args, **kwargs)

    monkeypatch.setattr(MaskedModel, "gradients", gradients)
