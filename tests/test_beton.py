import json
import os
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep.beton_file import BetonFile, Sample
from geoaug import sample_id
from geoaug.loading import beton_format as form
from geoaug.loading.beton import Beton

SLOTS, PAGE = 3, 2**21


def samples(count: int, least: int, most: int, seed: int = 0) -> list[Sample]:
    """Samples with noise for JPEGs, since neither the file nor its reader looks into them."""
    made, g = [], np.random.default_rng(seed)
    for i in range(count):
        name = f"cats/{i}.jpg" if i % 5 else os.fsdecode(b"caf\xc3\xa9 \xff/%d.jpg" % i)
        boxes, labels = np.zeros((SLOTS, 4), np.float32), np.full(SLOTS, -1)
        boxes[: i % 4], labels[: i % 4] = g.random((i % 4, 4)), g.integers(-1, 80, i % 4)
        jpeg = g.bytes(int(g.integers(least, most)))
        sizes = (5 + i, 700 - i), (10 + 2 * i, 1400 - 2 * i)
        made.append(Sample(name, sample_id(name), i % 3 - 1, jpeg, *sizes, boxes, labels, i % 4))
    return made


def write(path: Path, given: list[Sample], more: int = 2) -> Path:
    with BetonFile(path, len(given) + more, SLOTS, PAGE) as file:
        assert all(file.add(sample) for sample in given)
        file.finish({"made_by": "a test", "classes": ["caf\udcff"]})
    return path


@pytest.fixture(scope="module")
def given() -> list[Sample]:
    return samples(30, 1, 3000)


@pytest.fixture(scope="module")
def path(given: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("beton") / "small.beton", given)


def test_everything_comes_back(given: list[Sample], path: Path) -> None:
    assert [file.name for file in path.parent.iterdir()] == ["small.beton"]
    beton = Beton.open(path)
    assert len(beton) == len(beton.names) == len(given)
    assert beton.manifest == {"made_by": "a test", "classes": ["caf\udcff"]}
    assert (beton.path, beton.slots) == (path, SLOTS)
    assert list(beton.names) == [sample.name for sample in given]
    assert beton.names[-1] == given[-1].name
    assert beton.names[3:1:-1] == [given[3].name, given[2].name]
    for row, sample in enumerate(given):
        assert beton.jpeg(row).tobytes() == sample.jpeg
        assert beton.data[int(beton.starts[row]) :][: int(beton.lengths[row])].tobytes() == sample.jpeg
        assert beton.crcs[row] == zlib.crc32(sample.jpeg)
        assert tuple(beton.sizes[row]) == sample.source
        assert tuple(beton.stored[row]) == sample.stored
        assert (beton.ids[row], beton.labels[row]) == (sample.identity, sample.label)
        boxes, labels = beton.boxes(row)
        assert boxes.shape == (row % 4, 4)
        assert np.array_equal(boxes, sample.boxes[: row % 4])
        assert np.array_equal(labels, sample.box_labels[: row % 4])
    assert beton.damaged(range(len(beton))) == []
    assert not beton.jpeg(0).flags.writeable


def test_samples_stay_within_a_page_and_larger_ones_are_told(tmp_path: Path) -> None:
    given = samples(7, 700_000, 900_000)
    with BetonFile(tmp_path / "x.beton", 9, SLOTS, PAGE) as file:
        assert not file.add(given[0]._replace(jpeg=bytes(PAGE)))
        assert all(file.add(sample) for sample in given)
        file.finish({})
    beton = Beton.open(tmp_path / "x.beton")
    assert [beton.jpeg(row).tobytes() == sample.jpeg for row, sample in enumerate(given)] == [True] * 7
    first, last = beton._boxes_at // PAGE, (beton.starts + beton.lengths - np.uint64(1)) // PAGE
    assert np.array_equal(first, last)
    assert first.max() >= 3  # so there was something to keep apart


def test_leaving_without_finish_leaves_nothing(tmp_path: Path, given: list[Sample]) -> None:
    def stop() -> None:
        with BetonFile(tmp_path / "x.beton", 30, SLOTS, PAGE) as file:
            file.add(given[0])
            raise KeyError

    with pytest.raises(KeyError):
        stop()
    assert list(tmp_path.iterdir()) == []


def opening(file: Path, *, verify: bool = True) -> Beton | str:
    """The opened file, or the one line that refuses it."""
    try:
        return Beton.open(file, verify=verify)
    except ValueError as error:
        line = str(error)
    assert line.startswith(f"Beton.open: {file} ")
    assert "\n" not in line
    return line


class Forged:
    """A file taken apart, to be changed and put together again with right checksums."""

    def __init__(self, path: Path) -> None:
        self.data = np.frombuffer(bytearray(path.read_bytes()), dtype=np.uint8)
        self.header = self.data[: form.HEADER.itemsize].view(form.HEADER)
        self.fields = self.data[form.HEADER.itemsize : form.METADATA_AT].view(form.FIELD)
        at = form.HEADER.itemsize + form.FIELD.fields["arguments"][1]
        self.mark = self.data[at : at + form.MARK.itemsize].view(form.MARK)
        count = int(self.header["samples"][0])
        self.tables_at = int(self.header["allocations_at"][0])
        self.metadata = self.data[form.METADATA_AT :][: count * form.SAMPLE.itemsize].view(form.SAMPLE)
        self.allocations = self.data[self.tables_at :].view(form.ALLOCATION).reshape(count, 4)

    def write(self, path: Path) -> Path:
        tables = (self.header, self.metadata, self.allocations)
        self.mark["tables_crc"] = form.table_crc(*(table.view(np.uint8).data for table in tables))
        start, size = int(self.mark["manifest_at"][0]), int(self.mark["manifest_size"][0])
        self.mark["manifest_crc"] = zlib.crc32(self.data[start : start + size].data)
        path.write_bytes(self.data.tobytes())
        return path


def _set(table: str, field: str, row: int, value: object) -> Callable[[Forged], None]:
    def change(forged: Forged) -> None:
        record = getattr(forged, table)
        for part in field.split("."):
            last, record = record, record[part]
        last[part][row] = value

    return change


def _same_id(forged: Forged) -> None:
    forged.metadata["id"][7] = forged.metadata["id"][3]


def _beyond(forged: Forged) -> None:
    forged.metadata["image"]["at"][4] = forged.allocations["at"][4, 0] = 2**64 - 1


def _too_long(forged: Forged) -> None:
    forged.allocations["size"][4, 0] = 2**63


def _no_object(forged: Forged) -> None:
    start, size = int(forged.mark["manifest_at"][0]), int(forged.mark["manifest_size"][0])
    forged.data[start : start + size] = np.frombuffer(b"7".ljust(size), dtype=np.uint8)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_set("header", "version", 0, 3), "is FFCV version 3, not 2"),
        (_set("mark", "format", 0, 9), "has geoaug's format 9, this version reads 1"),
        (_set("mark", "magic", 0, b"other"), "was not written by geoaug"),
        (_set("header", "page_size", 0, 12345), "is no .beton, or its header is damaged"),
        (_set("header", "fields", 0, 0), "is no .beton, or its header is damaged"),
        (_set("header", "samples", 0, 29), "is cut short or damaged"),
        (_set("header", "samples", 0, 2**64 - 1), "is cut short or damaged"),
        (_set("fields", "name", 2, b"src"), "was written without geoaug's fields crc: write it"),
        (_set("fields", "type", 2, 0), "has damaged descriptors"),
        (_set("mark", "manifest_at", 0, 2**63), "its tables do not follow each other"),
        (_no_object, "has a damaged manifest"),
        (_beyond, "1 samples, first number 4, with bytes outside the file"),
        (_too_long, "1 samples, first number 4, with bytes outside the file"),
        (_set("metadata", "name.at", 2, 50_000), "first number 2, with bytes that the table of allocations"),
        (_set("metadata", "image.mode", 2, 1), "first number 2, with an image that is no JPEG"),
        (_set("metadata", "image.width", 2, 0), "first number 2, with an impossible size"),
        (_set("metadata", "height", 2, -5), "first number 2, with an impossible size"),
        (_set("metadata", "box_count", 2, SLOTS + 1), "with a number of boxes outside 0 to 3"),
        (_set("metadata", "box_count", 2, -1), "with a number of boxes outside 0 to 3"),
        (_set("metadata", "label", 2, -2), "with a negative id or label"),
        (_set("metadata", "crc", 2, 2**32), "with an impossible checksum"),
        (_same_id, "has two samples with one id"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    change: Callable[[Forged], None], says: str, verify: bool, path: Path, tmp_path: Path
) -> None:
    forged = Forged(path)
    change(forged)
    line = opening(forged.write(tmp_path / "forged.beton"), verify=verify)
    assert isinstance(line, str)
    assert says in line


def test_files_of_others(tmp_path: Path, path: Path) -> None:
    stock = np.zeros(2, dtype=form.FIELD)
    stock["type"], stock["name"] = (2, 1), (b"image", b"label")
    header = np.array((2, 2, PAGE, 0, 3000), dtype=form.HEADER)
    file = tmp_path / "stock.beton"
    file.write_bytes(header.tobytes() + stock.tobytes() + bytes(5000))
    missing = "id, crc, height, width, box_count, name, boxes, box_labels, facts_crc"
    with pytest.raises(ValueError, match=f"fields {missing}: write it with"):
        Beton.open(file)
    for content in (b"", b"\xff\xd8\xff", b"\x02\x00", bytes(5000), os.urandom(5000), json.dumps([1] * 999).encode()):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"too short|no \.beton"):
            Beton.open(file)
    with pytest.raises(FileNotFoundError):
        Beton.open(tmp_path / "none.beton")
    with pytest.raises(OSError, match="directory"):
        Beton.open(tmp_path)


def everything(beton: Beton) -> list[object]:
    rows = [(beton.jpeg(i).tobytes(), *map(np.ndarray.tobytes, beton.boxes(i))) for i in range(len(beton))]
    facts = (beton.ids, beton.labels, beton.sizes, beton.stored, beton.crcs, beton.counts)
    return [rows, list(beton.names), [fact.tobytes() for fact in facts], beton.manifest, beton.slots]


def _damage(data: np.ndarray, g: np.random.Generator, low: int, high: int) -> set[int]:
    """Damage some bytes in [low, high), and say which have changed."""
    start = int(g.integers(low, high))
    size = min(int(g.choice([1, 1, 1, 2, 8, 100])), high - start)
    before = data[start : start + size].copy()
    kind = g.integers(3)
    if kind == 0:
        data[start : start + size] ^= np.uint8(1 << int(g.integers(8)))
    elif kind == 1:
        data[start : start + size] = g.integers(0, 256, size)
    else:
        data[start : start + size] = 0
    return set((start + np.flatnonzero(before != data[start : start + size])).tolist())


def test_damage_is_refused_at_opening_or_reported(path: Path, tmp_path: Path) -> None:
    beton, whole = Beton.open(path), np.frombuffer(path.read_bytes(), dtype=np.uint8)
    intact, layout = everything(beton), Forged(path)
    manifest_at = int(layout.mark["manifest_at"][0])
    metadata_end = form.METADATA_AT + layout.metadata.nbytes
    owner = np.full(len(whole), -1)
    for row in range(len(beton)):
        owner[int(beton._boxes_at[row]) : int(beton.starts[row] + beton.lengths[row])] = row
    owner[:metadata_end], owner[manifest_at:] = -2, -2  # every byte of these is under a checksum
    parts = [0, form.HEADER.itemsize, form.METADATA_AT, metadata_end, manifest_at, layout.tables_at, len(whole)]
    g, outcomes, file = np.random.default_rng(1), Counter[str](), tmp_path / "damaged.beton"
    for trial in range(900):
        data, part = whole.copy(), trial % (len(parts) - 1)
        changed = _damage(data, g, parts[part], parts[part + 1])
        file.write_bytes(data.tobytes())
        owners = {int(owner[at]) for at in changed}
        opened = opening(file)
        if isinstance(opened, str):
            assert -2 in owners, opened
            outcomes["refused"] += 1
        else:
            assert -2 not in owners
            assert set(opened.damaged(range(len(opened)))) == owners - {-1}
            if owners <= {-1}:  # bytes between samples, or none changed
                assert everything(opened) == intact
            outcomes["reported" if owners - {-1} else "harmless"] += 1
        opened = opening(file, verify=False)
        if not isinstance(opened, str):  # nothing is promised but that nothing outside the file is touched
            everything(opened)
            opened.damaged(range(len(opened)))
    assert outcomes["refused"] > 500
    assert outcomes["reported"] > 100


@pytest.mark.parametrize("verify", [True, False])
def test_a_file_cut_short_or_grown_is_refused(path: Path, tmp_path: Path, verify: bool) -> None:
    whole, file = path.read_bytes(), tmp_path / "cut.beton"
    cuts = np.random.default_rng(2).integers(0, len(whole), 200).tolist()
    for cut in (*cuts, *range(30), form.METADATA_AT, len(whole) - 1):
        file.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"cut\.beton (is|has) [^\n]*$"):
            Beton.open(file, verify=verify)
    for more in (1, form.ALLOCATION.itemsize, 4 * form.ALLOCATION.itemsize):
        file.write_bytes(whole + bytes(more))
        with pytest.raises(ValueError, match="should end at byte"):
            Beton.open(file, verify=verify)


def test_many_samples_open_in_a_moment(tmp_path: Path) -> None:
    """100,000 samples; 1.28 million take 13 times as long, so a loop over samples would show."""
    count = 100_000
    with BetonFile(tmp_path / "x.beton", count, SLOTS, PAGE) as file:
        start, metadata, allocations = file._end, file._metadata, file._allocations
        file._file.truncate(start + 128 * count)
        at = start + 128 * np.arange(count, dtype=np.uint64)
        metadata["id"], metadata["height"], metadata["width"] = np.arange(count), 500, 400
        metadata["image"]["height"], metadata["image"]["width"], metadata["image"]["at"] = 500, 400, at + 100
        metadata["name"]["at"], metadata["name"]["size"], metadata["boxes"] = at + 72, 5, at
        metadata["box_labels"] = at + 48
        allocations["sample"] = np.arange(count)[:, None]
        allocations["at"] = at[:, None] + np.array([100, 72, 0, 48], dtype=np.uint64)
        allocations["size"] = 9, 5, 48, 24
        file._count, file._end = count, start + 128 * count
        file.finish({})
    began = time.perf_counter()
    beton = Beton.open(tmp_path / "x.beton")
    assert time.perf_counter() - began < 1
    assert len(beton) == count
