"""The windows that ``ara recover`` repairs with, and those that it judges by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ara.artifacts.factors import FactorsSettings, TextPart
from ara.config import RecoverConfig
from ara.errors import UsageError
from ara.models.context import check_window
from ara.models.sources import ModelSource
from ara.recovery import LEVELS, levels_to_run
from ara.recovery.base import Level, RecoveryText
from ara.stages.common import Run, text_parts, warn_without_chat, window_reader
from ara.workspace.store import Workspace
from ara.workspace.view import StageView, ancestors

# Settings of an earlier repair that decide where its windows end.
_DECIDING = ("level", "only", "samples", "steps", "batch")


@dataclass(frozen=True)
class RecoveryTexts:
    """Text of one recovery.

    Attributes:
        spec: what was asked for.
        parts: the texts of the mixture.
        digest: sha256 (hex) of the source.
        seq_len: tokens per window.
        train: name of a level → the windows that it learns from.
        windows: how many different ones that are in all.
        held_out: windows to choose by; at least one window lies between these and those of the levels.
        unseen: windows to judge by, which no level reads. What is chosen on a text looks too good on it.
        fresh: (w, t) int64, windows for the caller that neither the levels nor their judge read.
    """

    spec: str
    parts: tuple[TextPart, ...]
    digest: str
    seq_len: int
    train: Mapping[str, RecoveryText]
    windows: int
    held_out: RecoveryText
    unseen: RecoveryText
    fresh: torch.Tensor

    def check_processes(self, count: int) -> None:
        """Check that every process gets a window of each text.

        Raises:
            UsageError: there are more processes than windows.
        """
        texts = {f"that {name} learns from": text for name, text in self.train.items()}
        texts |= {"to choose by": self.held_out, "to judge by": self.unseen}
        for what, text in texts.items():
            if (windows := len(text.ids)) < count:
                raise UsageError(
                    f"there are {count} processes, and {windows} window{'s' * (windows != 1)} {what}",
                    f"use torchrun --nproc-per-node {windows}, or more windows (--samples, --held-out)",
                )


def recovery_texts(
    config: RecoverConfig,
    levels: Mapping[str, Level],
    checkpoint: StageView | None,
    decomposition: StageView,
    source: ModelSource,
    workspace: Workspace,
    run: Run,
    fresh: int = 0,
) -> RecoveryTexts:
    """Return the windows of a recovery.

    What has been fitted to a window shows too small an error on it. So the levels read windows after those of the
    decomposition, if it has the same text, and each level its own ones: those of a level start where all windows of the
    levels before it end, whether these run or not. Held-out windows follow at the end, also after those of earlier
    repairs of the checkpoint: half to choose by, half to judge by, and after these the caller's. A text that is too
    short is read again from its beginning.

    Args:
        config: text, number and length of windows.
        levels: by name, those that run.
        checkpoint: to repair; ``None`` for a model that was never repaired.
        decomposition: that it was made from.
        source: the model.
        workspace: holds the token cache.
        run: reporter.
        fresh: windows for the caller.

    Raises:
        UsageError: the text or the window length cannot be used.
        DataError: a text has fewer than three windows.
    """
    from ara.data.mixtures import resolved_text
    from ara.data.windows import some

    made = FactorsSettings.read(decomposition)
    tokenizer = source.load_tokenizer()
    spec, seq_len = resolved_text(config.text or made.text, tokenizer), config.seq_len or made.seq_len
    check_window(seq_len, source.config)
    warn_without_chat(spec, tokenizer, run)
    reader = window_reader(spec, source, seq_len, config.seed, workspace, run)
    run.report.fact(f"text: {reader.text.origin}")
    same = spec == resolved_text(made.text, tokenizer) and (seq_len, config.seed) == (made.seq_len, made.seed)
    ranges = _ranges(config, levels)
    earlier = 0 if checkpoint is None else _read_earlier(checkpoint, workspace, spec, seq_len, config.seed)
    needed = max(earlier, *(end for _, end in ranges.values()))
    read, held = reader.further(made.samples if same else 0, needed, 2 * config.held_out + fresh)
    answers = config.loss_on == "answers"
    if answers and read.answers is None:
        raise UsageError(
            f"--loss-on answers needs conversations, and the text {spec} has none",
            "add some, such as --text c4:0.8,chat:0.2, or leave the option out",
        )
    text_read, text_held = (RecoveryText(one.ids, one.answers if answers else None) for one in (read, held))
    chosen = {name: torch.arange(*ends)[: read.windows] % read.windows for name, ends in ranges.items()}
    for name, windows in chosen.items():
        run.report.fact(f"{name}: {len(windows)} windows of {seq_len} tokens")
    # A short text may give a single held-out window. All checks then use it.
    last = -(-held.windows * fresh // (2 * config.held_out + fresh))
    judged = held.ids[: max(1, held.windows - last)]
    choosing = max(1, len(judged) // 2)
    unseen = judged[choosing:] if len(judged) > 1 else judged
    run.report.fact(f"held out: {choosing} windows to choose by, {len(unseen)} to judge by")
    different = torch.tensor(sorted({row for windows in chosen.values() for row in windows.tolist()}))
    return RecoveryTexts(
        spec=spec,
        parts=text_parts(reader.text, some(read, different)),
        digest=reader.text.digest,
        seq_len=seq_len,
        train={name: text_read.rows(windows) for name, windows in chosen.items()},
        windows=len(different),
        held_out=text_held.first(choosing),
        unseen=RecoveryText(unseen),
        fresh=held.ids[held.windows - last :],
    )


def _read_earlier(checkpoint: StageView, workspace: Workspace, spec: str, seq_len: int, seed: int) -> int:
    """Return where the windows end that earlier repairs of a checkpoint have learned from, on the same text."""
    end = 0
    for view in (checkpoint, *map(workspace.view, ancestors(checkpoint, workspace.view))):
        made = {} if view.manifest is None or view.kind != checkpoint.kind else view.manifest.config
        if "level" not in made or [made.get(name) for name in ("text", "seq_len", "seed")] != [spec, seq_len, seed]:
            continue
        try:
            config = RecoverConfig(**{name: made[name] for name in _DECIDING if name in made})
            levels = {name: LEVELS.load(name)() for name in levels_to_run(config.level, config.only)}
        except (UsageError, ValueError):
            # Another version with other levels has made it.
            continue
        end = max(end, *(stop for _, stop in _ranges(config, levels).values()))
    return end


def _ranges(config: RecoverConfig, levels: Mapping[str, Level]) -> dict[str, tuple[int, int]]:
    """Return where the windows of the levels that run start and end, see :func:`recovery_texts`."""
    found: dict[str, tuple[int, int]] = {}
    start = 0
    for name in LEVELS.names():
        level = levels[name] if name in levels else LEVELS.load(name)()
        end = start + level.windows(config)
        if name in levels:
            found[name] = start, end
        start = end
    return found
