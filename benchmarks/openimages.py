"""OpenImage-MINI at Open Images' real size: a file of boxes to a choice, against pandas; and the downloader.

    python benchmarks/openimages.py [--images 1740000] [--runs 5] [--clicks] [--files 6000] [--peers PYTHON]

The file (1.2 GB, with --clicks 2.1 GB) is made in a temporary folder and deleted. Each run is a process of its own;
those of geoaug compile their kernels anew and are measured from the start of Python until the list is written, pandas
without its imports. Other readers are asked through the Python of --peers, an environment with polars, duckdb, pyarrow
and pandas.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import record

ROOT = Path(__file__).resolve().parent.parent
MOST, SEED = 146_000, 0
GATES = {"seconds": 10.0, "GiB": 1.0, "pandas": 2.5, "files": 500.0}
OURS = """
import sys, threading
from pathlib import Path
from data_prep import openimages_classes as c
from data_prep.openimages_boxes import read_boxes
from data_prep.openimages_choice import Rules, choose, compile_kernels, without_repeats
from data_prep.openimages_outputs import hex_ids
classes = c.read_classes(Path(sys.argv[2]))
shared = c.read_shared(c.TABLE, classes, c.published(crowds=True), "kinds")
threading.Thread(target=compile_kernels, daemon=True).start()
read = read_boxes(Path(sys.argv[1]), classes)
kept = without_repeats(read.boxes, read.problems)
choice = choose(read.boxes, kept, shared, Rules(), int(sys.argv[4]), int(sys.argv[5]))
Path(sys.argv[3]).write_text("\\n".join(hex_ids(read.boxes.ids[choice.images])))
"""
PANDAS = """
import sys, time
from pathlib import Path
import pandas, geoaug
from data_prep import openimages_classes as c
from tests.reference_openimages import choose_with_pandas
start = time.perf_counter()
classes = c.read_classes(Path(sys.argv[2]))
shared = c.read_shared(c.TABLE, classes, c.published(crowds=True), "kinds")
names = shared.target.names
category = {mid: names[at] for mid, at in zip(classes.mids, shared.category) if at >= 0}
limits = dict(zip(names, shared.target.objects.tolist()))
chosen = choose_with_pandas(sys.argv[1], classes.mids, category, limits, int(sys.argv[4]), int(sys.argv[5]))
Path(sys.argv[3]).write_text("\\n".join(chosen))
print(time.perf_counter() - start)
"""
READERS = {
    "polars, streaming": """
import polars
numbers = [polars.col(name).cast(polars.Float32) for name in ("XMin", "XMax", "YMin", "YMax")]
flags = [polars.col(name).cast(polars.Int8) for name in ("IsGroupOf", "IsDepiction")]
columns = [polars.col("ImageID"), polars.col("LabelName").cast(polars.Categorical), *numbers, *flags]
polars.scan_csv(sys.argv[1]).select(columns).collect(engine="streaming")
""",
    "duckdb, two threads": """
import duckdb
found = duckdb.connect(config={"threads": 2}).execute(
    "select ImageID, LabelName, XMin::float, XMax::float, YMin::float, YMax::float, IsGroupOf::tinyint, "
    f"IsDepiction::tinyint from read_csv('{sys.argv[1]}')")
for batch in found.to_arrow_reader(100_000): pass
""",
    "pandas": """
import pandas
columns = ["ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax", "IsGroupOf", "IsDepiction"]
pandas.read_csv(sys.argv[1], usecols=columns)
""",
}
ARROW = """
from pathlib import Path
from data_prep import openimages_classes as c
from data_prep.openimages_boxes import read_boxes
read_boxes(Path(sys.argv[1]), c.read_classes(Path(sys.argv[2])))
"""
LOOP = (
    """
import threading
from data_prep.openimages_plain import compile_kernel
threading.Thread(target=compile_kernel, daemon=True).start()
"""
    + ARROW
)
# The end is told by the script: leaving Python takes most of a second. The peak is not the rusage of the process, which
# begins with that of the one it was forked from.
PEAK = """
import time
print(time.monotonic(), open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""
SERVER = """
import asyncio, sys
body = open(sys.argv[1], "rb").read()
answer = b"HTTP/1.1 200 OK\\r\\nContent-Type: image/jpeg\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body) + body
class Connection(asyncio.Protocol):
    def connection_made(self, transport): self.transport, self.rest = transport, b""
    def data_received(self, data):
        *asked, self.rest = (self.rest + data).split(b"\\r\\n\\r\\n")
        for _ in asked: self.transport.write(answer)
async def main():
    server = await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", 0, backlog=256)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


def spent(script, *arguments, python=sys.executable, cache=None):
    """Seconds from the start to the script's end, GiB at the most, and what the process printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **({"NUMBA_CACHE_DIR": str(cache)} if cache else {})}
    start = time.monotonic()  # one clock for all processes
    command = [python, "-c", f"import sys{script}{PEAK}", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    printed = process.stdout.read()
    status = process.wait()
    if status:
        sys.exit(f"benchmarks/openimages.py: a process ended with status {status}")
    *told, end, peak = printed.split()
    return float(end) - start, int(peak) / 2**20, told


def compare(folder, boxes, runs):
    """Seconds and GiB of both programs in turn, which must choose the same."""
    seconds, most = {"geoaug": [], "pandas": []}, {"geoaug": [], "pandas": []}
    given = boxes, folder / "classes.csv"
    for i in range(runs):
        subprocess.run(["cat", boxes], stdout=subprocess.DEVNULL, check=True)  # into the page cache
        took, memory, _ = spent(OURS, *given, folder / "ours", MOST, SEED, cache=folder / f"cache{i}")
        seconds["geoaug"].append(took)
        most["geoaug"].append(memory)
        _, memory, printed = spent(PANDAS, *given, folder / "theirs", MOST, SEED)
        seconds["pandas"].append(float(printed[0]))
        most["pandas"].append(memory)
        assert (folder / "ours").read_text() == (folder / "theirs").read_text()
    return seconds, most, len((folder / "ours").read_text().split())


def read_by_all(folder, boxes, runs, peers):
    """Seconds and GiB of each reader in turn; ours check, group and hash what they read, the others do not."""
    ours = {"here, by Arrow alone": ARROW, "here, plain lines by the loop": LOOP}
    seconds, most = ({reader: [] for reader in ours | (READERS if peers else {})} for _ in range(2))
    for i in range(runs):
        for reader in seconds:
            script, python = (ours[reader], sys.executable) if reader in ours else (READERS[reader], peers)
            cache = folder / f"readers{i}" if reader in ours else None
            took, memory, _ = spent(script, boxes, folder / "classes.csv", python=python, cache=cache)
            seconds[reader].append(took)
            most[reader].append(memory)
    return seconds, most


def download_rate(folder, files, size, runs):
    """Files a second from a server on this machine, over 64 connections, each time into an empty folder."""
    from PIL import Image

    from data_prep.image_download import Wanted, download

    side = round((size / 1.6) ** 0.5)
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "noise.jpg", quality=90)
    rates = []
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, folder / "noise.jpg"], stdout=subprocess.PIPE, text=True
    ) as server:
        address = f"http://127.0.0.1:{int(server.stdout.readline())}"
        ids = [f"{i:016x}" for i in range(files)]
        for i in range(runs):
            start = time.perf_counter()
            got = download(Wanted(ids, "train", folder / f"images{i}", address, connections=64))
            rates.append(files / (time.perf_counter() - start))
            assert got.fetched == files, got.failures
        server.kill()
    return rates, (folder / "noise.jpg").stat().st_size


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=1_740_000, help="of the file of boxes")
    parser.add_argument("--clicks", action="store_true", help="with the columns of V6 and V7")
    parser.add_argument("--runs", type=int, default=5, help="of each program, in turn")
    parser.add_argument("--files", type=int, default=6000, help="to download")
    parser.add_argument("--file-bytes", type=int, default=65536, help="of each of them, about")
    parser.add_argument("--peers", help="a Python that has polars, duckdb and pandas")
    parser.add_argument("--folder", type=Path, help="where there is room for the file (a temporary folder)")
    args = parser.parse_args()
    import openimages_rows

    table, raw = [], {}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        boxes = folder / "train-annotations-bbox.csv"
        images, rows = openimages_rows.write_rows(boxes, args.images, clicks=args.clicks)
        (folder / "classes.csv").write_text("".join(f"{mid},{mid[3:]}\n" for mid in openimages_rows.class_mids()))
        table.append(("file of boxes", f"{rows:,} rows, {images:,} images, {boxes.stat().st_size / 1e9:.2f} GB"))
        seconds, most, chosen = compare(folder, boxes, args.runs)
        raw |= {"seconds": seconds, "GiB": most, "chosen": chosen}
        table.append(("chosen, the same by both", f"{chosen:,} images"))
        for program, note in (("geoaug", "imports and compilation included"), ("pandas", "without its imports")):
            table.append((f"file to choice, {program}, {note}", f"{record.spread(seconds[program], 1)} s"))
            table.append((f"memory at the most, {program}", f"{record.spread(most[program], 1)} GiB"))
        table.append((f"pandas / geoaug (gate {GATES['pandas']:g})", record.ratio(seconds, "pandas", "geoaug")))
        took, held = read_by_all(folder, boxes, args.runs, args.peers)
        raw |= {"reading": took, "reading, GiB": held}
        for reader in took:
            text = f"{record.spread(took[reader], 1)} s, {max(held[reader]):.2f} GiB"
            table.append((f"reading the eight columns, imports included, {reader}", text))
        boxes.unlink()
        rates, size = download_rate(folder, args.files, args.file_bytes, args.runs)
        raw["files a second"] = rates
        text = f"{record.spread(rates, 1)} files/s"
        table.append((f"download, 64 connections, {size:,} bytes each (gate {GATES['files']:g})", text))
    record.save("openimages", "OpenImage-MINI at Open Images' size", table, raw)
    missed = [
        what
        for what, ok in {
            "seconds": statistics.median(seconds["geoaug"]) <= GATES["seconds"],
            "memory": max(most["geoaug"]) <= GATES["GiB"],
            "pandas": statistics.median(seconds["pandas"]) >= GATES["pandas"] * statistics.median(seconds["geoaug"]),
            "download": statistics.median(rates) >= GATES["files"],
        }.items()
        if not ok
    ]
    if missed:
        sys.exit(f"benchmarks/openimages.py: below its gate: {', '.join(missed)}")


if __name__ == "__main__":
    main()
