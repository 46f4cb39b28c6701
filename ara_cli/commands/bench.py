"""``ara bench``."""

from __future__ import annotations

from typing import Annotated

from ara.config import BenchConfig
from ara_cli.options import NameOption, WhichCheckpoint, WhichExport
from ara_cli.session import Session
from ara_cli.signature import command_line


@command_line(after={"threads": ("checkpoint", "origin"), "backend": ("export",)})
def command(
    *,
    config: BenchConfig,
    which: Annotated[WhichCheckpoint, "to measure"],
    exported: Annotated[WhichExport, "measures"],
    name: NameOption = None,
    s: Session,
) -> None:
    """Measure speed, memory and size of the compressed model and of the dense one. Both run in turn, in one run."""
    from ara.stages.bench import bench
    from ara.stages.bench_serving import bench_serving
    from ara_cli.render import show_end
    from ara_cli.render_bench import show_bench
    from export.find import find_for_bench
    from export.targets import runtime_of

    find = find_for_bench(config.backend, exported.asked(config.backend))
    if (runtime := runtime_of(config.backend)) is not None:
        view = bench_serving(config, s.run(), runtime, checkpoint=which.asked, name=name)
    else:
        view = bench(config, s.run(), checkpoint=which.asked, name=name, find_export=find)
    show_bench(s.console, view)
    show_end(s.console, view, s.root)
