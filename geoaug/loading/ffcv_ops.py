"""FFCV operations that decode an image once and give all its planned views, and the thread that runs them.

The plan of a batch reaches the compiled code as an argument, in the metadata: the record of each image has more fields
than FFCV's own. (A captured global would keep its first value for ever.) Outputs and scratch do not belong to FFCV's
batch slots: views lie in the memory of the batch that is handed out, the decoded image in that of the thread. FFCV
compiles (njit) what `generate_code` gives, which is a short loop over kernels that are cached on disk.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from .jpeg_kernels import OK, PIXELS, blacken, deal, decode, render_views
from .turbojpeg import Bench, importing_ffcv

try:
    with importing_ffcv():
        from ffcv.fields.rgb_image import RGBImageField, SimpleRGBImageDecoder
        from ffcv.loader.epoch_iterator import EpochIterator
        from ffcv.memory_managers.base import MemoryContext
        from ffcv.pipeline.graph import Graph
        from ffcv.pipeline.pipeline_spec import PipelineSpec
except ImportError as error:
    raise ImportError(
        f"open_loader: a .beton needs FFCV ({error}): sudo apt-get install --no-install-recommends libturbojpeg0-dev "
        "libopencv-dev pkg-config g++ (or: conda install -c conda-forge libjpeg-turbo opencv pkg-config cxx-compiler), "
        "then pip install 'geoaug[ffcv]'"
    ) from None


def record_type(views: int) -> np.dtype[Any]:
    """What the operations read of one image: FFCV's own fields, bytes, CRC-32, and the plan (x0, y0, x1, y1, flip)."""
    own = [("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")]
    more = [("size", "<u8"), ("crc", "<u4"), ("plan", "<i4", (max(views, 1), 5))]
    return np.dtype([("f0", np.dtype([*own, *more], align=True))], align=True)


class RenderViews(SimpleRGBImageDecoder):  # type: ignore[misc]
    """Decode each image once and render its planned views; gives the status int32 [B].

    `storage_state` is (state of the thread, places int64 [V, 3], rows dealt out int64 [1]).
    """

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, None]:
        """Statuses only, and these the thread brings."""
        return replace(previous_state, jit_mode=True, shape=(), dtype=np.dtype("<i4")), None

    def generate_code(self) -> Callable[..., Any]:
        """The loop over the rows that this thread is dealt."""

        def render_rows(batch_indices: Any, status: Any, metadata: Any, storage_state: Any) -> Any:
            state, places, dealt = storage_state
            row = deal(dealt)
            while row < len(batch_indices):
                field = metadata[batch_indices[row]]
                start, length, checksum = np.int64(field["data_ptr"]), np.int64(field["size"]), np.int64(field["crc"])
                height, width = np.int64(field["height"]), np.int64(field["width"])
                code = decode(state, start, length, checksum, height, width, state[PIXELS], 3 * width)
                status[row] = code
                render_views(state, row, height, width, field["plan"].ctypes.data, places, code == OK)
                row = deal(dealt)
            return status

        return render_rows


class PadImages(RenderViews):
    """Decode each image once into uint8 [B, H, W, 3] for rendering on a device; gives the status.

    What is right of an image and below it stays as it was: no plan leads there, so `render_batch` gives it no weight.
    """

    def generate_code(self) -> Callable[..., Any]:
        """The loop over the rows that this thread is dealt."""

        def pad_rows(batch_indices: Any, status: Any, metadata: Any, storage_state: Any) -> Any:
            state, places, dealt = storage_state
            row = deal(dealt)
            while row < len(batch_indices):
                field = metadata[batch_indices[row]]
                start, length, checksum = np.int64(field["data_ptr"]), np.int64(field["size"]), np.int64(field["crc"])
                height, width = np.int64(field["height"]), np.int64(field["width"])
                full_height, full_width = places[0, 1], places[0, 2]
                pitch = 3 * full_width
                out, size = places[0, 0] + row * full_height * pitch, full_height * pitch
                code = decode(state, start, length, checksum, height, width, out, pitch)
                status[row] = code
                if code != OK:
                    blacken(out, size)
                row = deal(dealt)
            return status

        return pad_rows


class Pipeline:
    """One FFCV pipeline of one operation, compiled once; FFCV's graph and iterator see it as their loader."""

    def __init__(self, views: int) -> None:
        """`views` of each image, 0 for whole images."""
        self.type = record_type(views)
        spec = PipelineSpec("image", transforms=[RenderViews() if views else PadImages()])
        # Not FFCV's own reader and cache manager: they spoil a type that numba shares between all functions, and keep
        # Python sets of every sample.
        metadata = np.zeros(0, dtype=self.type)
        graph = Graph({"image": spec}, {"image": RGBImageField()}, {"image": 0}, metadata, None)
        _, code = graph.collect_requirements()
        self.code = graph.codegen_all(code)
        self.node = next(iter(graph.root_nodes)).id


@cache
def pipeline_of(views: int) -> Pipeline:
    """The pipeline for this many views; it holds nothing of any file, so all loaders of a process share it."""
    return Pipeline(views)


class Mapped(MemoryContext):  # type: ignore[misc]
    """The file is mapped for as long as the loader lives, so there is nothing to prepare for a batch or an epoch."""

    state = ()

    def __enter__(self) -> Mapped:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


class Worker(EpochIterator):  # type: ignore[misc]
    """A thread that runs the pipeline over its share of the rows of every batch; made and joined by `Crew`."""

    def __init__(self, pipeline: Pipeline, bench: Bench, work: Callable[[threading.Thread], None]) -> None:
        """`work(self)` is what the thread does; `bench` is what it works with."""
        threading.Thread.__init__(self, daemon=True, name="geoaug loader")
        self.loader, self.bench, self._work = pipeline, bench, work
        self.memory_context, self.cuda_streams = Mapped(), [None]  # nothing here runs on a device

    def run(self) -> None:
        """Nothing is caught here: `work` passes its errors on."""
        work = self._work
        del self._work  # else a circle of references keeps the bench's memory until the garbage collector comes
        work(self)

    def render(
        self,
        metadata: npt.NDArray[np.void],
        places: npt.NDArray[np.int64],
        dealt: npt.NDArray[np.int64],
        status: npt.NDArray[np.int32],
    ) -> None:
        """Take rows of one batch until all are dealt out."""
        self.metadata, self.storage_state = metadata, (self.bench.state, places, dealt)
        operation = {self.loader.node: status[None]}
        self.memory_allocations = {"operation": operation, "shared": {self.loader.node: None}}
        self.run_pipeline(0, np.arange(len(metadata)), 0, None)

    def close(self) -> None:
        """Nothing to do: FFCV's own would leave a memory context that there is none of."""
