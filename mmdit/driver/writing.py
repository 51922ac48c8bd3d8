"""Pictures drawn and written: each as soon as it is done, while the next are drawn, with what goes beside it."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from mmdit.common.command import give, say
from mmdit.common.files import sweep
from mmdit.driver.output import Saver, preview_path, save_dump
from mmdit.driver.settings import Settings

if TYPE_CHECKING:
    from mmdit.driver.pipeline import Pipeline


def draw(
    pipeline: "Pipeline",
    wanted: Sequence[tuple[Settings, Path]],
    written: bool = True,
    *,
    run: Settings,
    seconds: dict[str, float],
    told: Callable[[Path], object] = give,
) -> None:
    """Draw and write pictures, each with the file that it is to go to; the time of each stage is added to `seconds`.

    written: or only draw them, where another process writes. run: says what is written beside them. told: called with
    every file that is there, in another thread.
    """
    from mmdit.driver.attention import Attention
    from mmdit.driver.loop import Drawing
    from mmdit.driver.preview import Previews
    from mmdit.driver.watch import Trace, Verbose

    pictures, paths = [s for s, _ in wanted], [path for _, path in wanted]
    if not written:
        for _ in Drawing(pipeline, pictures, [], seconds):
            pass
        return
    for folder in {path.parent for path in paths}:
        sweep(folder)
    traces, dump, maps = [] if run.dump is None else [Trace()], run.dump, Attention()
    verbose = [Verbose(say)] if run.verbose else []
    previews = []
    if run.preview is not None:
        previews.append(Previews(run.preview, [preview_path(path) for path in paths], pipeline.preview))
    with Saver(told, once=run.prompts is not None) as save, previews[0] if previews else nullcontext():
        drawing = Drawing(pipeline, pictures, [*traces, *previews, *verbose, maps], seconds)
        for i, image in drawing:
            seen = maps.done.pop(i, None)
            save(image, drawing.settings[i], paths[i], seen and seen.sheet)
    seconds["save"] = seconds.get("save", 0.0) + save.waited
    if dump is not None:
        from safetensors.torch import save_file

        start = time.perf_counter()
        save_dump(lambda path: save_file(traces[0].tensors, path), Path(dump).expanduser())
        seconds["save"] += time.perf_counter() - start
        told(Path(dump).expanduser())
