import json
import os
import random
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest

from data_prep import shards
from data_prep.shard_crew import CrewError, outcomes
from data_prep.shards import Job, JobError, run

from . import crashers

ROOT = Path(__file__).resolve().parent.parent


def job(folder, items, *, work=crashers.square, size=4, about=None, **more):
    names = crashers.numbers(len(items))
    return Job(folder, names, items, work, crashers.encode, about or {"scale": 300}, shard_size=size, **more)


def expected(items, size=4):
    """Each shard's bytes, without a driver."""
    names, shards = crashers.numbers(len(items)), {}
    for first in range(0, len(items), size):
        rows = [[names[i], items[i] ** 2] for i in range(first, min(first + size, len(items)))]
        shards[f"shard-{first // size:05d}.parquet"] = json.dumps(rows).encode()
    return shards


def written(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


def stamps(folder):
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.iterdir()}


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 4, 11])
def test_every_item_is_in_its_shard(tmp_path, workers, count):
    items = list(range(count))
    entries, versions, fresh = run(job(tmp_path / "out", items), workers=workers)
    assert written(tmp_path / "out") == expected(items)
    assert (versions, fresh) == ([{}], count)
    assert [entry["images"] for entry in entries] == [len(range(i, min(i + 4, count))) for i in range(0, count, 4)]
    for entry in entries:
        data = (tmp_path / "out" / entry["file"]).read_bytes()
        assert (entry["bytes"], entry["crc"], entry["failures"]) == (len(data), zlib.crc32(data), [])
        assert "boxes" in entry


def test_running_again_changes_nothing(tmp_path):
    first = run(job(tmp_path, list(range(11))))
    before = stamps(tmp_path)
    assert run(job(tmp_path, list(range(11)), work=crashers.behave)) == first._replace(fresh=0)
    assert stamps(tmp_path) == before


def test_bad_items_are_failures_and_the_others_are_done(tmp_path):
    items = [3, "crash", 4, "unreadable", "hang", 5, "bug", "exit", 6]
    entries, _, _ = run(job(tmp_path, items, work=crashers.behave, size=5), workers=2, timeout=0.5)
    assert [json.loads(data) for _, data in sorted(written(tmp_path).items())] == [
        [["0.jpg", 9], ["2.jpg", 16]],
        [["5.jpg", 25], ["8.jpg", 36]],
    ]
    assert [entry["failures"] for entry in entries] == [
        [
            ["1.jpg", "crash", "ended by SIGSEGV"],
            ["3.jpg", "damaged", "half of it is missing"],
            ["4.jpg", "timeout", "no answer in 0.5 s"],
        ],
        [["6.jpg", "error", "ValueError: no such colour"], ["7.jpg", "crash", "ended with status 3"]],
    ]
    assert [entry["images"] for entry in entries] == [2, 2]


def test_a_process_killed_for_another_reason_costs_nothing(tmp_path):
    items = [1, 2, tmp_path / "marker", 3]
    found = dict(outcomes(crashers.behave, enumerate(items), workers=2, timeout=60))
    assert {number: outcome.failure for number, outcome in found.items()} == dict.fromkeys(range(4))
    assert found[2].value == "marker"


def test_workers_killed_in_mid_run(tmp_path):
    (tmp_path / "ids").mkdir()
    items = [(str(tmp_path / "ids"), i) for i in range(60)]
    killed, found = set(), {}
    for number, outcome in outcomes(crashers.note_and_square, enumerate(items), workers=2, timeout=60):
        found[number] = outcome
        if len(found) in (5, 20, 40):
            fresh = [int(path.name) for path in (tmp_path / "ids").iterdir() if int(path.name) not in killed]
            os.kill(fresh[-1], signal.SIGKILL)
            killed.add(fresh[-1])
    assert {number: outcome.value for number, outcome in found.items()} == {i: i * i for i in range(60)}
    assert len(list((tmp_path / "ids").iterdir())) == 5
    assert not any(alive(int(path.name)) for path in (tmp_path / "ids").iterdir())


def alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_what_cannot_work_stops_the_run(tmp_path):
    with pytest.raises(CrewError, match="No module named 'a_package_that_is_not_there'"):
        run(job(tmp_path, ["no package", 2], work=crashers.behave))
    assert written(tmp_path) == {}
    with pytest.raises(CrewError, match="a process could not start: ended with status 1"):
        list(outcomes(Starts(), [(0, 1)], workers=1, timeout=9))


class Starts:
    """Cannot be unpickled."""

    def __reduce__(self):
        return int, ("no number",)


SCRIPT = """
import os, sys
sys.path.insert(0, {root!r})
from data_prep.shards import Job, run
from tests import crashers
from pathlib import Path
job = Job(Path(sys.argv[1]), crashers.numbers({count}), list(range({count})), crashers.slow_square, crashers.encode,
          {{"scale": 300}}, shard_size=6)
{extra}
try:
    run(job, workers=2)
except KeyboardInterrupt:
    sys.exit(130)
"""


def start(folder, count, extra=""):
    script = SCRIPT.format(root=str(ROOT), count=count, extra=extra)
    return subprocess.Popen([sys.executable, "-c", script, str(folder)], stderr=subprocess.PIPE, text=True)


def children_of(process):
    return [int(c) for c in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def wait_until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.01)


def test_killed_at_twenty_moments(tmp_path):
    count, folder, g = 1200, tmp_path / "out", random.Random(7)
    done, orphans = {}, []
    for _ in range(20):
        enough = len(done) // 2 + g.choice((0, 0, 1, 2, 4, 6))
        driver = start(folder, count)
        wait_until(lambda enough=enough: len(list(folder.glob("shard-*.json"))) >= enough)
        time.sleep(0.1 * g.random())
        orphans += children_of(driver.pid)
        driver.kill()
        driver.communicate()
        assert driver.returncode == -signal.SIGKILL
        now = stamps(folder) if folder.exists() else {}
        for file, stamp in done.items():
            assert now[file] == stamp  # nothing is made twice
        entries = [path.stem for path in folder.glob("shard-*.json")]
        done = {f"{stem}{suffix}": now[f"{stem}{suffix}"] for stem in entries for suffix in (".json", ".parquet")}
    assert 0 < len(done) < 2 * 200
    entries, _, _ = run(job(folder, list(range(count)), size=6), workers=2)
    assert written(folder) == expected(list(range(count)), 6)  # nothing is lost, byte for byte
    assert sum(entry["images"] for entry in entries) == count
    assert {file: stamps(folder)[file] for file in done} == done
    assert not list(folder.glob("*.part"))
    wait_until(lambda: not any(alive(process) for process in orphans))


@pytest.mark.parametrize("nth", range(1, 6))
def test_ended_between_writing_and_moving(tmp_path, nth):
    dying = f"""
moves, move = [], os.replace
def die(*names):
    moves.append(names)
    os._exit(9) if len(moves) == {nth} else move(*names)
os.replace = die
"""
    driver = start(tmp_path / "out", 30, dying)
    driver.communicate()
    assert driver.returncode == 9
    assert list((tmp_path / "out").glob("*.part"))
    run(job(tmp_path / "out", list(range(30)), size=6))
    assert written(tmp_path / "out") == expected(list(range(30)), 6)
    assert not list((tmp_path / "out").glob("*.part"))


def test_the_keyboard_ends_it_cleanly(tmp_path):
    driver = start(tmp_path / "out", 5000)
    wait_until(lambda: len(list((tmp_path / "out").glob("*.parquet"))) > 2)
    children = children_of(driver.pid)
    assert len(children) == 2
    driver.send_signal(signal.SIGINT)
    _, told = driver.communicate(timeout=20)
    assert (driver.returncode, told) == (130, "")
    assert not any(alive(process) for process in children)


def test_an_orphan_at_a_hanging_item_ends_by_itself(tmp_path):
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from data_prep.shard_crew import outcomes\n"
    script += "from tests import crashers\n"
    script += "list(outcomes(crashers.hang, [(0, sys.argv[1])], workers=1, timeout=1.0))"
    driver = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "marker")])
    wait_until((tmp_path / "marker").exists)
    (child,) = children_of(driver.pid)
    driver.kill()
    driver.wait()
    assert alive(child)
    wait_until(lambda: not alive(child))


def damage_truncate(file):
    file.write_bytes(file.read_bytes()[:-3])
    return "it is cut short, "


def damage_flip(file):
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    return "its checksum is not the one written"


def damage_remove(file):
    file.unlink()
    return "it is missing"


def damage_entry(file):
    file.with_suffix(".json").write_text("{")
    return "its entry cannot be read"


def damage_swap(file):
    file.with_suffix(".json").write_bytes((file.parent / "shard-00000.json").read_bytes())
    return "its entry is of another shard"


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, damage_remove, damage_entry, damage_swap])
def test_damage_is_told_and_repaired(tmp_path, damage):
    items = list(range(11))
    made = run(job(tmp_path, items))
    told = damage(tmp_path / "shard-00001.parquet")
    before = stamps(tmp_path)
    with pytest.raises(JobError, match=rf"damaged: shard shard-00001\.parquet: {told}.*Add --repair"):
        run(job(tmp_path, items))
    assert stamps(tmp_path) == before
    assert run(job(tmp_path, items), repair=True) == made._replace(fresh=4)
    assert written(tmp_path) == expected(items)
    changed = {name for name, stamp in stamps(tmp_path).items() if before.get(name) != stamp}
    assert changed == {"shard-00001.parquet", "shard-00001.json"}


def test_another_job_is_not_continued(tmp_path, capsys):
    items = list(range(6))
    run(job(tmp_path, items, about={"scale": 300, "engine": {"name": "a"}}, versions={"numpy": "2.1"}))
    for change, told in (
        (
            {"about": {"scale": 500, "engine": {"name": "b"}}},
            "about.engine.name was a and is now b; about.scale was 300 ",
        ),
        ({"about": {"scale": 300}}, "about.engine was {'name': 'a'} and is now none"),
        ({"size": 5}, "shard_size was 4 and is now 5"),
    ):
        given = {"about": {"scale": 300, "engine": {"name": "a"}}, **change}
        with pytest.raises(JobError, match=f"was made otherwise and is not continued: {told}"):
            run(job(tmp_path, items, **given))
    with pytest.raises(JobError, match=r"images\.count was 6 and is now 7; images\.hash was"):
        run(job(tmp_path, [*items, 7], about=given["about"] | {"engine": {"name": "a"}}))
    assert capsys.readouterr().err == ""
    same = {"about": {"scale": 300, "engine": {"name": "a"}}}
    made = run(job(tmp_path, items, **same, versions={"numpy": "2.2"}))
    assert made.versions == [{"numpy": "2.1"}, {"numpy": "2.2"}]
    assert "goes on under other versions: numpy was 2.1 and is now 2.2" in capsys.readouterr().err


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(JobError, match=r"is not empty and has no job\.json: it holds letters\.txt"):
        run(job(tmp_path, [1]))
    (tmp_path / "job.json").write_text("[1]")
    with pytest.raises(JobError, match=r"job\.json is damaged"):
        run(job(tmp_path, [1]))


def test_two_runs_do_not_share_a_folder(tmp_path):
    with shards.alone(tmp_path), pytest.raises(JobError, match="is being worked on by another run"):
        run(job(tmp_path, [1]))
    run(job(tmp_path, [1]))


def test_a_hash_knows_names_and_their_order():
    assert shards.hash_of(["a", "bc"]) != shards.hash_of(["ab", "c"])
    assert shards.hash_of(["a", "b"]) != shards.hash_of(["b", "a"])
    assert len(shards.hash_of(["\udcff"])) == 32


def test_a_cluster_makes_the_same_bytes_though_a_worker_is_killed(tmp_path):
    pytest.importorskip("distributed")
    script = f"""
import os, signal, sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from data_prep.shards import Job, run
from tests import crashers
from dask.distributed import LocalCluster

if __name__ == "__main__":
    folder, count = Path(sys.argv[1]), 240
    names, items = crashers.numbers(count), [*range(count - 1), "crash"]
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        def kill():
            while len(list(folder.glob("shard-*.json"))) < 3:
                time.sleep(0.01)
            victim = next(iter(cluster.workers.values()))
            print("killing", victim.pid)
            os.kill(victim.pid, signal.SIGKILL)
        killer = threading.Thread(target=kill)
        killer.start()
        job = Job(folder, names, items, crashers.behave_slowly, crashers.encode, {{}}, shard_size=6)
        entries, _, _ = run(job, cluster=cluster.scheduler_address)
        killer.join()
    print(entries[-1]["failures"], len(entries))
"""
    file = tmp_path / "on_a_cluster.py"
    file.write_text(script)
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, str(file), str(out)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "killing" in done.stdout
    assert done.stdout.splitlines()[-1] == "[['239.jpg', 'crash', 'ended by SIGSEGV']] 40"
    whole = expected(list(range(240)), 6)
    last = whole.pop("shard-00039.parquet")
    found = written(out)
    assert found.pop("shard-00039.parquet") == json.dumps(json.loads(last)[:-1]).encode()
    assert found == whole
