"""What benchmarks/loader.py adds where FFCV is installed: stock FFCV pipelines, decoding alone, our .beton loader."""

from __future__ import annotations

import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import ratio
from geoaug import ViewSpec

VIEW = ViewSpec(224, scale=(0.2, 1.0))
ONE, TWO, DECODING = "FFCV, one pipeline (one view)", "FFCV, two pipelines", "decoding alone, .beton, same decoder"
OURS, WHOLE = "geoaug .beton, {} tracked views", "geoaug .beton, whole images for {} views of a device, loader alone"
ON_DEVICE = "geoaug .beton, {} tracked views rendered on the GPU"


def available() -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import ffcv  # noqa: F401
    except ImportError:
        return False
    return True


def write(folder: Path, file: Path, workers: int) -> None:
    script = Path(__file__).resolve().parent.parent / "data_prep" / "write_beton.py"
    command = [sys.executable, str(script), str(folder), "--out", str(file), "--workers", str(workers)]
    subprocess.run(command, check=True)


def stock(file: Path, batch: int, workers: int, views: int) -> Any:
    """FFCV as its users write it, once a view, so every JPEG is decoded once a view."""
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.memory_managers import OSCacheManager
    from ffcv.pipeline.compiler import Compiler
    from ffcv.pipeline.pipeline_spec import PipelineSpec
    from ffcv.reader import Reader
    from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage

    def compile_reader(self: Any) -> Any:  # its own spoils a type of numba's, and a second loader then waits for ever
        def read(address, state):  # type: ignore[no-untyped-def]
            return state[0][address : address + state[2][np.searchsorted(state[1], address)]]

        return Compiler.compile(read)

    OSCacheManager.compile_reader = compile_reader
    pipelines: dict[str, Any] = {name: None for name in Reader(str(file)).handlers}
    for view in range(views):
        decoder = RandomResizedCropRGBImageDecoder((224, 224), scale=(0.2, 1.0))
        steps = [decoder, RandomHorizontalFlip(), ToTensor(), ToTorchImage()]
        pipelines[f"image{view}" if view else "image"] = PipelineSpec("image", transforms=steps)
    return Loader(
        str(file), batch_size=batch, num_workers=workers, order=OrderOption.RANDOM, os_cache=True, pipelines=pipelines
    )


def drain(loader: Any) -> None:
    for _ in loader:
        pass


def decode_all(loader: Any, workers: int) -> None:
    """The loader's own kernel over all images as one batch, without any view."""
    from geoaug.loading.ffcv import _Hired

    beton = loader.beton
    metadata = np.zeros(len(beton), dtype=loader.pipeline.type)
    fields = metadata["f0"]
    fields["height"], fields["width"] = beton.stored.T
    fields["data_ptr"], fields["size"], fields["crc"] = beton.starts, beton.lengths, beton.crcs
    places, dealt, status = (
        np.zeros((0, 3), dtype=np.int64),
        np.zeros(1, dtype=np.int64),
        np.zeros(len(beton), np.int32),
    )
    area = int(beton.stored.astype(np.int64).prod(axis=1).max())

    def work(worker: Any) -> None:
        worker.bench.make_room(area, 0)
        worker.render(metadata, places, dealt, status)

    with _Hired(loader.pipeline, beton.data, True, workers, work) as hired:
        for worker in hired:
            worker.start()
        for worker in hired:
            worker.join()
    assert not status.any()


def without_rendering(loader: Any) -> None:
    from geoaug.loading import loader as module

    kept, module.render_batch = module.render_batch, lambda padded, plan: []
    try:
        drain(loader)
    finally:
        module.render_batch = kept


def contenders(file: Path, batch: int, workers: int) -> dict[str, Callable[[], object]]:
    import torch

    from geoaug import open_loader

    options: dict[str, Any] = {"batch_size": batch, "seed": 0, "workers": workers}
    ours = {n: open_loader(file, [VIEW] * n, **options) for n in (1, 2, 3, 4)}
    found: dict[str, Callable[[], object]] = {
        ONE: partial(drain, stock(file, batch, workers, 1)),
        TWO: partial(drain, stock(file, batch, workers, 2)),
        DECODING: partial(decode_all, ours[2], workers),
        **{OURS.format(n): partial(drain, loader) for n, loader in ours.items()},
        "geoaug .beton, two tracked views, verify=False": partial(
            drain, open_loader(file, [VIEW] * 2, verify=False, **options)
        ),
    }
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for n in (1, 2, 3, 4):
        whole = open_loader(file, [VIEW] * n, render="device", device=device, **options)
        found[WHOLE.format(n)] = partial(without_rendering, whole)
        if device == "cuda":  # on a CPU it is a check of the arithmetic, tens of images a second
            found[ON_DEVICE.format(n)] = partial(drain, whole)
    return found


def ratios(seconds: dict[str, list[float]]) -> list[tuple[str, str]]:
    two = OURS.format(2)
    rows = [
        (f"{two} over {other}", ratio(seconds, other, two)) for other in (TWO, "torchvision v2, persistent workers")
    ]
    rows += [(f"{OURS.format(n)} over decoding alone", ratio(seconds, DECODING, OURS.format(n))) for n in (1, 2, 3, 4)]
    whole = [WHOLE.format(n) for n in (1, 2, 3, 4)]
    return [*rows, *((f"{name} over decoding alone", ratio(seconds, DECODING, name)) for name in whole)]


def checksums(file: Path) -> list[float]:
    """Milliseconds an image that the CRC-32 of its JPEG takes on one core, over all images, five times."""
    from geoaug.loading.beton import Beton

    beton, taken = Beton.open(file), []
    for _ in range(5):
        start = time.perf_counter()
        for row in range(len(beton)):
            zlib.crc32(beton.jpeg(row).data)
        taken.append(1000 * (time.perf_counter() - start) / len(beton))
    return taken


def bookkeeping(file: Path, batch: int, workers: int) -> float:
    """The share of all processor time of an epoch that is not spent in the pipeline (CRC, decoding, resize), in %."""
    from geoaug import open_loader
    from geoaug.loading import ffcv_ops

    inside: list[float] = []
    plain = ffcv_ops.Worker.run_pipeline

    def timed(self: Any, *arguments: Any) -> Any:
        start = time.thread_time()
        try:
            return plain(self, *arguments)
        finally:
            inside.append(time.thread_time() - start)

    with open_loader(file, [VIEW] * 2, batch_size=batch, seed=0, workers=workers) as loader:
        drain(loader)
        ffcv_ops.Worker.run_pipeline = timed
        try:
            start = time.process_time()
            drain(loader)
            drain(loader)
            total = time.process_time() - start
        finally:
            ffcv_ops.Worker.run_pipeline = plain
    return 100 * (1 - sum(inside) / total)


def first_batch(file: Path, batch: int, workers: int) -> str:
    """Seconds from opening to the first batch, in a process of its own with a warm disk cache; imports not counted."""
    script = (
        "import time, warnings; warnings.simplefilter('ignore'); from geoaug import ViewSpec; import ffcv, torch;"
        "from geoaug import open_loader; start = time.perf_counter();"
        f"loader = open_loader({str(file)!r}, [ViewSpec(224)] * 2, batch_size={batch}, seed=0, workers={workers});"
        "it = iter(loader); next(it); print(f'{time.perf_counter() - start:.2f} s')"
    )
    return subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.strip()
