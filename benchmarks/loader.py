"""Two 224-pixel views an image: our folder loader against the best plain torchvision pipeline, in alternating epochs.

python benchmarks/loader.py [--images FOLDER] [--workers 2] [--runs 7]

The photographs are re-encoded once so that their longer side is 500 pixels. By default scenes are made. Where FFCV is
installed, the same files are also read from a .beton: by FFCV's own pipelines and by ours (loader_ffcv.py).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import v2

from benchmarks import loader_ffcv
from benchmarks.record import alternate, ratio, save, spread
from geoaug import ViewSpec, open_loader

SPECS = [ViewSpec(224, scale=(0.2, 1.0)), ViewSpec(224, scale=(0.2, 1.0))]


class Photographs(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """What a careful user writes: decode to uint8, crop and resize as uint8 with antialias, two views."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(str(path) for path in folder.rglob("*.jpg"))
        self.view = v2.Compose([v2.RandomResizedCrop(224, scale=(0.2, 1.0), antialias=True), v2.RandomHorizontalFlip()])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = decode_jpeg(read_file(self.files[i]), mode=ImageReadMode.RGB)
        return self.view(image), self.view(image)


class Decoded(Photographs):
    """Decoding alone: no loader of files can be faster."""

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return decode_jpeg(read_file(self.files[i]), mode=ImageReadMode.RGB)[0, 0, 0], torch.zeros(())


def at_side_500(source: Path, target: Path, most: int, repeat: int) -> int:
    """Re-encode up to `most` photographs, each under `repeat` names for long epochs; returns how many files."""
    files = [path for path in sorted(source.rglob("*")) if path.suffix.lower() in {".jpg", ".jpeg"}][:most]
    for i, path in enumerate(files):
        image = Image.open(path).convert("RGB")
        factor = 500 / max(image.size)
        size = (round(image.width * factor), round(image.height * factor))
        image.resize(size, Image.Resampling.LANCZOS).save(target / f"{i:05d}_0.jpg", quality=90)
        for copy in range(1, repeat):
            os.link(target / f"{i:05d}_0.jpg", target / f"{i:05d}_{copy}.jpg")
    return len(files) * repeat


def drain(loader: object) -> None:
    for _ in loader:  # type: ignore[attr-defined]
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, default=None, help="a folder of JPEG photographs; scenes without it")
    parser.add_argument("--most", type=int, default=512, help="use at most so many")
    parser.add_argument("--repeat", type=int, default=4, help="names each photograph gets, for longer epochs")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "The image decoding and encoding capabilities of TorchVision")

    with tempfile.TemporaryDirectory() as made:
        source = args.images
        if source is None:
            source = Path(made) / "scenes"
            script = Path(__file__).resolve().parent.parent / "data_prep" / "make_scenes.py"
            command = [sys.executable, str(script), "--out", str(source), "--images", str(args.most), "--size", "500"]
            subprocess.run(command, check=True)
        folder = Path(made) / "side500"
        folder.mkdir()
        count = at_side_500(source, folder, args.most, args.repeat)
        count -= count % args.batch
        options = {"batch_size": args.batch, "num_workers": args.workers, "drop_last": True, "shuffle": True}
        theirs, decoded = DataLoader(Photographs(folder), **options), DataLoader(Decoded(folder), **options)
        ours = open_loader(folder, SPECS, batch_size=args.batch, seed=0, workers=args.workers)
        trusting = open_loader(folder, SPECS, batch_size=args.batch, seed=0, workers=args.workers, verify=False)
        persistent = DataLoader(Photographs(folder), persistent_workers=True, **options)
        beton: dict[str, Callable[[], object]] = {}
        if loader_ffcv.available():
            loader_ffcv.write(folder, Path(made) / "side500.beton", args.workers)
            beton = loader_ffcv.contenders(Path(made) / "side500.beton", args.batch, args.workers)
        seconds = alternate(
            {
                "geoaug, two tracked views": partial(drain, ours),
                "geoaug, verify=False": partial(drain, trusting),
                "torchvision v2, DataLoader": partial(drain, theirs),
                "torchvision v2, persistent workers": partial(drain, persistent),
                "decoding alone, DataLoader": partial(drain, decoded),
                **beton,
            },
            args.runs,
        )
        measured = []
        if beton:
            arguments = Path(made) / "side500.beton", args.batch, args.workers
            shares = [loader_ffcv.bookkeeping(*arguments) for _ in range(args.runs)]
            measured.append(("geoaug .beton, processor time outside the kernels (%)", spread(shares, 1)))
            checksums = loader_ffcv.checksums(arguments[0])
            measured.append(("CRC-32 of a JPEG, in every figure but those of verify=False (ms)", spread(checksums, 1)))
            measured.append(("geoaug .beton, opening to first batch, new process", loader_ffcv.first_batch(*arguments)))
    rates = {name: [count / s for s in values] for name, values in seconds.items()}
    rows = [(f"{name} (images a second)", spread(values, 1)) for name, values in rates.items()]
    for name in ("torchvision v2, DataLoader", "torchvision v2, persistent workers"):
        rows.append((f"geoaug over {name}", ratio(seconds, name, "geoaug, two tracked views")))
    rows.append(
        ("geoaug over decoding alone", ratio(seconds, "decoding alone, DataLoader", "geoaug, two tracked views"))
    )
    rows += loader_ffcv.ratios(seconds) if beton else []
    rows += measured
    rows.append(("images, batch, workers", f"{count}, {args.batch}, {args.workers}"))
    save("loader", "Loading two 224-pixel views of photographs of side 500", rows, {"seconds": seconds})


if __name__ == "__main__":
    main()
