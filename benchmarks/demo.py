"""How long `make demo` takes once the machine is set up, and what its backbone has learnt.

python benchmarks/demo.py [--out runs/demo]               # runs it, about ten minutes
python benchmarks/demo.py --done runs/demo --seconds 515  # tables a run that was made and timed before
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.record import save

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("c4", "c5")


def table(scores: dict[str, Any]) -> list[tuple[str, str]]:
    """Random beside trained, measure by measure."""
    rows = []
    for name in sorted(key.removeprefix("trained-") for key in scores if key.startswith("trained-")):
        random, trained = (scores[f"{side}-{name}"] for side in ("random", "trained"))
        if "k" in trained:
            k = next(iter(trained["k"]))
            pair = (f"{100 * each['k'][k]['top1']:.1f} %" for each in (random, trained))
            rows.append((f"{name}, Top-1 of {trained['queries']} objects, k = {k}: random, trained", ", ".join(pair)))
            continue
        for layer in LAYERS:
            values = (each["layers"][layer] for each in (random, trained))
            pair = (f"{value['ratio_of_means'] if isinstance(value, dict) else value:.3f}" for value in values)
            rows.append((f"{name}, {layer.upper()}: random, trained", ", ".join(pair)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--done", type=Path, default=None, help="the folder of a run that was made before")
    parser.add_argument("--seconds", type=float, default=None, help="that it took")
    args = parser.parse_args()
    if (args.done is None) != (args.seconds is None):
        parser.error("--done and --seconds go together")
    seconds, folder = args.seconds, args.done
    if folder is None:
        folder, start = args.out, time.perf_counter()
        subprocess.run(["sh", str(ROOT / "demo.sh"), sys.executable, str(folder.resolve())], check=True, cwd=ROOT)
        seconds = time.perf_counter() - start
    scores = {file.stem: json.loads(file.read_text()) for file in sorted((folder / "scores").glob("*.json"))}
    rows = [("demo.sh, from nothing but the installed machine (minutes)", f"{seconds / 60:.1f}"), *table(scores)]
    save("demo", "What `make demo` takes and gives", rows, {"seconds": seconds, "scores": scores})


if __name__ == "__main__":
    main()
