import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import build_openimage_mini as tool
from data_prep import image_download, selective_search, write_beton
from data_prep.image_download import Wanted, download
from data_prep.image_server import FetchError, ImageServer, check_address
from data_prep.shards import JobError, alone
from geoaug import ProposalStore, ViewSpec, open_loader

from .image_servers import picture, serving

ROOT = Path(__file__).resolve().parent.parent
IDS = [f"{i:016x}" for i in (7, 2**63 + 5, 300, 4, 5, 6, 2**64 - 1, 8)]
IMAGES = {identity: picture(i, 20 + i, 31) for i, identity in enumerate(IDS)}


@pytest.fixture(autouse=True)
def _quickly(monkeypatch):
    monkeypatch.setattr(image_download, "_PAUSE", 0.01)
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def wanted(server, folder, **more):
    return Wanted(**{"ids": IDS, "split": "train", "folder": folder, "address": server.address, "timeout": 5.0, **more})


def files(folder):
    return {path.name: path.read_bytes() for path in (folder / "images").iterdir()}


def all_images(images=IMAGES):
    return {f"{identity}.jpg": data for identity, data in images.items()}


def test_every_image_comes_and_is_asked_for_once(tmp_path):
    with serving(IMAGES) as server:
        got = download(wanted(server, tmp_path, connections=3))
        assert files(tmp_path) == all_images()
        assert (got.fetched, got.missing, got.failures, got.stopped) == (len(IDS), [], {}, None)
        for i, identity in enumerate(IDS):
            data = IMAGES[identity]
            expected = len(data), hashlib.sha256(data).hexdigest(), 20 + i, 31, None
            assert tuple(got.images[identity]) == expected
        assert server.connections == 3  # kept open
        again = download(wanted(server, tmp_path))
        assert (again.images, again.fetched) == (got.images, 0)
        assert set(server.asked.values()) == {1}
        assert set(server.asked) == set(IDS)


FAULTS = {
    "stall": "stalled", "reset": "no connection", "nothing": "no connection", "short": "cut short",
    "endless": "cut short", "torn": "cut short", "html": "no JPEG", "empty": "no JPEG", "garbage": "no JPEG",
    "503": "server error", "429": "refused", "drip": "stalled",
}  # fmt: skip


@pytest.mark.parametrize(("fault", "kind"), FAULTS.items())
def test_a_fault_is_tried_again(tmp_path, fault, kind):
    """Once it goes well the second time, once it never does and is listed; the others come anyhow."""
    once, never = IDS[1], IDS[3]
    with serving(IMAGES, {once: [fault], never: [fault] * 9}) as server:
        got = download(wanted(server, tmp_path, retries=2, timeout=0.3))
        assert {kind: [identity for identity, _ in found] for kind, found in got.failures.items()} == {kind: [never]}
        assert got.failures[kind][0][1]
        assert got.missing == []
        assert (server.asked[once], server.asked[IDS[0]]) == (2, 1)
        # A connection kept from an earlier image may have been closed since, so one that ends is asked once more.
        assert server.asked[never] in ((3, 4) if fault in ("reset", "nothing") else (3,))
        assert files(tmp_path) == all_images({k: v for k, v in IMAGES.items() if k != never})
        server.bad.clear()
        assert download(wanted(server, tmp_path)).fetched == 1  # the next run asks for what is missing alone
        assert {server.asked[identity] for identity in IDS if identity not in (once, never)} == {1}
        assert files(tmp_path) == all_images()


@pytest.mark.parametrize(("status", "kind"), [("404", None), ("403", "refused"), ("400", "refused")])
def test_what_the_server_has_not_is_not_asked_for_again(tmp_path, status, kind):
    with serving(IMAGES, {IDS[2]: [status] * 9, IDS[0]: [status] * 9}) as server:
        got = download(wanted(server, tmp_path))
        assert server.asked[IDS[2]] == 1
        if kind is None:
            assert (got.missing, got.failures) == (sorted((IDS[0], IDS[2])), {})
        else:
            assert got.failures == {
                kind: [(identity, f"HTTP {status} Told So") for identity in sorted((IDS[0], IDS[2]))]
            }


def test_the_server_says_when_to_come_again(tmp_path):
    with serving(IMAGES, {IDS[0]: ["429"]}) as server:
        started = time.monotonic()
        assert download(wanted(server, tmp_path, ids=IDS[:1])).fetched == 1
        assert time.monotonic() - started >= 1.0


def test_other_ways_to_answer_well(tmp_path):
    with serving(IMAGES) as other, serving(IMAGES) as server:
        place = f"{other.address}/train/{IDS[2]}.jpg"
        server.bad = {
            IDS[0]: ["chunks"],
            IDS[1]: ["last"],
            IDS[2]: [f"to {place}"],
            IDS[3]: [f"to /train/{IDS[3]}.jpg"],
        }
        got = download(wanted(server, tmp_path, connections=1, retries=0))
        assert (got.fetched, got.failures) == (len(IDS), {})
        assert files(tmp_path) == all_images()
        assert other.asked == {IDS[2]: 1}


@pytest.mark.parametrize("place", ["file:///etc/passwd", "ftp://a.b/c", ""])
def test_redirects_lead_to_web_servers_alone(tmp_path, place):
    with serving(IMAGES, {IDS[0]: [f"to {place}"]}) as server:
        assert list(download(wanted(server, tmp_path, ids=IDS[:1])).failures) == ["redirected"]
        server.bad[IDS[0]] = [f"to /train/{IDS[0]}.jpg"] * 9
        got = download(wanted(server, tmp_path, ids=IDS[:1]))
        assert got.failures == {"redirected": [(IDS[0], "more than 4 times")]}


def test_a_server_that_is_not_there(tmp_path, monkeypatch):
    with serving(IMAGES) as server:
        pass
    got = download(wanted(server, tmp_path, retries=1))
    assert [identity for identity, _ in got.failures["no connection"]] == sorted(IDS)
    monkeypatch.setattr(image_download, "_IN_A_ROW", 3)
    got = download(wanted(server, tmp_path, retries=0, connections=1))
    assert "3 images in a row were not to be had" in got.stopped


def test_a_proxy_is_taken_from_the_environment(tmp_path, monkeypatch):
    with serving(IMAGES) as server:
        monkeypatch.setenv("http_proxy", server.address.replace("http://", "http://me:secret@"))
        got = download(wanted(server, tmp_path, ids=IDS[:1], address="http://images.invalid/open"))
        assert (got.fetched, server.lines[0].split("\r\n")[0]) == (
            1, f"GET http://images.invalid/open/train/{IDS[0]}.jpg HTTP/1.1"
        )  # fmt: skip
        assert "Proxy-Authorization: Basic bWU6c2VjcmV0" in server.lines[0]
        monkeypatch.setenv("no_proxy", "images.invalid")
        got = download(wanted(server, tmp_path, ids=IDS[1:2], address="http://images.invalid", retries=0))
        assert list(got.failures) == ["no connection"]


def test_larger_images_are_made_smaller_as_they_come(tmp_path):
    images = {IDS[0]: picture(0, 300, 200), IDS[1]: picture(1, 90, 100), IDS[2]: picture(2, 100, 400)}
    with serving(images) as server:
        got = download(wanted(server, tmp_path, ids=IDS[:3], max_side=100))
        for identity, size in zip(IDS, ((100, 67), (90, 100), (25, 100)), strict=False):
            stored = got.images[identity]
            data = (tmp_path / "images" / f"{identity}.jpg").read_bytes()
            assert ((stored.height, stored.width), stored.bytes) == (size, len(data))
            assert stored.sha256 == hashlib.sha256(data).hexdigest()
            assert np.asarray(Image.open(io.BytesIO(data))).shape == (*size, 3)
        assert (tmp_path / "images" / f"{IDS[1]}.jpg").read_bytes() == images[IDS[1]]
        assert download(wanted(server, tmp_path, ids=IDS[:3], max_side=100)).fetched == 0
        assert download(wanted(server, tmp_path, ids=IDS[:3])).fetched == 3  # those are other files


def test_what_lies_there_is_looked_at(tmp_path):
    """Lines that are torn or not there, files half-way, too short, or of something else."""
    with serving(IMAGES) as server:
        first = download(wanted(server, tmp_path))
        images, journal = tmp_path / "images", tmp_path / "downloads.jsonl"
        lines = journal.read_bytes().split(b"\n")
        by_id = {json.loads(line)["id"]: line for line in lines[:-1]}
        kept = [line for identity, line in by_id.items() if identity not in (IDS[0], IDS[1])]
        journal.write_bytes(b"\n".join([b"[]", b'{"id": 3}', *kept, by_id[IDS[0]][:40]]))
        (images / f"{IDS[1]}.jpg").write_bytes(b"<html>")
        (images / f"{IDS[2]}.jpg").write_bytes(IMAGES[IDS[2]][:-1])
        (images / f"{IDS[3]}.jpg").unlink()
        (images / f"{IDS[4]}.jpg.part").write_bytes(b"half")
        (images / "notes.part").write_bytes(b"mine")
        server.asked.clear()
        got = download(wanted(server, tmp_path))
        assert got.images == first.images
        assert server.asked == dict.fromkeys(IDS[1:4], 1)
        assert files(tmp_path) == all_images() | {"notes.part": b"mine"}
        assert download(wanted(server, tmp_path)).fetched == 0  # also from the journal mended so


def test_ids_that_are_none_are_refused(tmp_path):
    for bad in ("../../etc/passwd", "0" * 15 + "G", "http://a/b", "0" * 17, ""):
        with pytest.raises(ValueError, match="ids must be 16 hex digits"):
            download(Wanted([bad], "train", tmp_path / "out", "http://127.0.0.1:1"))
    assert not (tmp_path / "out").exists()


def test_one_run_at_a_time(tmp_path):
    (tmp_path / "images").mkdir()
    with serving(IMAGES) as server, alone(tmp_path / "images"), pytest.raises(JobError, match="another run"):
        download(wanted(server, tmp_path))


def test_a_disk_that_takes_no_more_ends_the_run(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with serving(IMAGES) as server, monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            download(wanted(server, tmp_path))


@pytest.mark.parametrize("address", ["http://a.b/", "https://a.b:8080/c/d", "http://127.0.0.1:1"])
def test_addresses(address):
    assert check_address(address) == address.rstrip("/")


@pytest.mark.parametrize(
    "address", ["file:///a", "a.b", "s3://open-images-dataset", "http://", "http://a?b", "http:///a"]
)
def test_addresses_that_are_none(address):
    with pytest.raises(ValueError, match="--address must be"):
        check_address(address)


def test_bodies_have_a_limit(monkeypatch):
    monkeypatch.setattr("data_prep.image_server._MOST", 100)
    with serving(IMAGES, {IDS[0]: ["ok", "chunks"]}) as server:
        for _ in range(2):
            with pytest.raises(FetchError, match="too large: more than 100 bytes"):
                ImageServer(5).get(f"{server.address}/train/{IDS[0]}.jpg")


def boxes_file(folder, ids):
    """A file of boxes with one apple in each image."""
    titles = "ImageID,LabelName,XMin,XMax,YMin,YMax,IsGroupOf,IsDepiction"
    text = "".join(f"{identity},/m/014j1m,0.25,0.75,0.0,0.5,0,0\n" for identity in ids)
    (folder / "train-boxes.csv").write_text(f"{titles}\n{text}")
    (folder / "classes.csv").write_text("/m/014j1m,Apple\n")
    names = {"--boxes": "train-boxes.csv", "--classes": "classes.csv", "--out": "out", "--download": "out"}
    return [part for option, name in names.items() for part in (option, str(folder / name))]


def test_killed_in_mid_download_and_started_again(tmp_path):
    ids = [f"{i:016x}" for i in range(150)]
    images = {identity: picture(i) for i, identity in enumerate(ids)}
    with serving(images, {identity: ["503"] for identity in ids[::10]}, pause=0.03) as server:
        arguments = [*boxes_file(tmp_path, ids), "--address", server.address, "--connections", "4"]
        command = [sys.executable, str(ROOT / "data_prep" / "build_openimage_mini.py"), *arguments]
        folder = tmp_path / "out" / "images"
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not folder.is_dir() or len(os.listdir(folder)) < 25:
            assert run.poll() is None
            time.sleep(0.01)
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.jpg")}
        assert 25 <= len(before) < 140
        (folder / f"{ids[0]}.jpg.part").write_bytes(b"what a kill may leave")
        asked = server.asked.total()
        assert tool.main(arguments) == 0
        assert files(tmp_path / "out") == all_images(images)
        after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.jpg")}
        assert {name: after[name] for name in before} == before
        assert server.asked.total() - asked <= 150 - len(before) + 15
    record = json.loads((tmp_path / "out" / "instances.json").read_bytes())
    assert record["info"]["boxes"] == "pixels"
    assert len(record["images"]) == len(record["annotations"]) == 150


def test_from_boxes_to_a_beton_by_the_commands_it_names(tmp_path, capsys):
    ids = IDS[:4]
    images = {identity: picture(i, 60, 80) for i, identity in enumerate(ids[:3])}
    with serving(images) as server:
        arguments = [*boxes_file(tmp_path, ids), "--address", f"{server.address}/", "--seed", "3"]
        assert tool.main(arguments) == 0
        output = capsys.readouterr()
        assert f"build_openimage_mini: {ids[3]}: missing: not on the server\n" in output.err
        following, last = output.out.strip().split("\n")[-2:]
        out = tmp_path / "out"
        assert last.endswith(f"{out}: 3 images, 3 of them new, 1 not on the server, 0 failures")
        first = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
        server.asked.clear()
        assert tool.main(arguments) == 0
        assert server.asked == {ids[3]: 1}
        assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == first
    manifest = json.loads(first["manifest.json"])
    assert manifest["download"]["missing"] == [ids[3]]
    assert sorted(manifest["download"]["images"]) == sorted(ids[:3])
    entry = manifest["download"]["images"][ids[0]]
    data = images[ids[0]]
    assert (entry["bytes"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert (entry["height"], entry["width"]) == (60, 80)
    record = json.loads(first["instances.json"])
    assert {(image["height"], image["width"]) for image in record["images"]} == {(60, 80)}
    assert [entry["bbox"] for entry in record["annotations"]] == [[20.0, 0.0, 40.0, 30.0]] * 3
    search, write = re.fullmatch(
        r"next: python \S+selective_search.py (.*) && python \S+write_beton.py (.*)", following
    ).groups()
    capsys.readouterr()
    assert selective_search.main([*search.split(), "--workers", "1"]) == 0
    assert write_beton.main([*write.split(), "--workers", "1"]) == 0
    assert len(ProposalStore.open(out / "proposals")) == 3
    assert (out / "openimage_mini.beton").stat().st_size > 1000
    specs = [ViewSpec(32)]
    with open_loader(out / "instances.json", specs, batch_size=3, seed=0, workers=0, order="file") as loader:
        (batch,) = list(loader)
    assert batch.boxes[batch.box_valid].tolist() == [[0.25, 0.0, 0.75, 0.5]] * 3


def test_what_failed_is_told_by_the_status(tmp_path, capsys):
    with serving(IMAGES, {IDS[1]: ["html"] * 9}) as server:
        arguments = [*boxes_file(tmp_path, IDS), "--address", server.address, "--retries", "1"]
        assert tool.main(arguments) == 1
        output = capsys.readouterr()
        assert f"build_openimage_mini: {IDS[1]}: no JPEG: it begins with b'<!doctype html>" in output.err
        assert output.out.endswith("0 not on the server, 1 failed: no JPEG\n")
        manifest = json.loads((tmp_path / "out" / "manifest.json").read_bytes())
        assert [identity for identity, _ in manifest["download"]["failures"]["no JPEG"]] == [IDS[1]]
        assert tool.main(arguments) == 1
        server.bad.clear()
        assert tool.main(arguments) == 0


@pytest.mark.parametrize("split", ["train", "validation"])
def test_real_photographs_by_a_local_server(tmp_path, data, split):
    """The boxes in pixels are those that others made of the same rows."""
    folder = data / "openimages_mini"
    images = {path.stem: path.read_bytes() for path in (folder / "images" / split).glob("*.jpg")}
    with serving(images) as server:
        arguments = {
            "--boxes": folder / "csv" / f"{split}-annotations-bbox.csv", "--out": tmp_path, "--download": tmp_path,
            "--classes": folder / "meta" / "class-descriptions-boxable.csv", "--address": server.address,
        }  # fmt: skip
        assert tool.main([str(part) for pair in arguments.items() for part in pair]) == 0
        assert f"GET /{split}/" in server.lines[0]

    def boxes_of(path):
        record = json.loads(path.read_bytes())
        names = {entry["id"]: entry["file_name"] for entry in record["images"]}
        kinds = {entry["id"]: entry["mid"] for entry in record["categories"]}
        found = {}
        for entry in record["annotations"]:
            what = kinds[entry["category_id"]], entry["iscrowd"], *entry["bbox"]
            found.setdefault(names[entry["image_id"]], []).append(what)
        return {name: sorted(boxes) for name, boxes in found.items()}

    mine, theirs = boxes_of(tmp_path / "instances.json"), boxes_of(folder / "annotations" / f"instances_{split}.json")
    assert 0 < len(mine) <= len(theirs)
    for name, boxes in mine.items():
        assert [box[:2] for box in boxes] == [box[:2] for box in theirs[name]], name
        a, b = (np.array([box[2:] for box in some]) for some in (boxes, theirs[name]))
        assert np.abs(a - b).max() < 0.02, name
