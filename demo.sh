#!/bin/sh
# From nothing to a training run, on two cores in a few minutes: `make demo`.
set -eu
PYTHON=${1:-python}
OUT=${2:-runs/demo}
export PYTHONUNBUFFERED=1

say() { printf '\n== %s\n' "$*"; }

rm -rf "$OUT"
mkdir -p "$OUT"
say "what two views share, and every region operator: pictures in $OUT"
for example in two_views boxes_and_regions region_composites; do
    "$PYTHON" examples/$example.py --out "$OUT"
done
"$PYTHON" examples/in_your_own_code.py
say "scenes; no label of theirs is used below"
"$PYTHON" data_prep/make_scenes.py --out "$OUT/scenes" --images 600 --size 224 --objects 1 3
say "proposals by selective search"
"$PYTHON" data_prep/selective_search.py "$OUT/scenes/images" --out "$OUT/proposals" --preset d3ssl
say "what D3SSL's recipe does to these images"
"$PYTHON" -m geoaug.cli inspect "$OUT/scenes/images" --preset d3ssl --proposals "$OUT/proposals" \
    --out "$OUT/inspect" --count 3
"$PYTHON" -m geoaug.cli stats --preset d3ssl --data "$OUT/scenes/images" --proposals "$OUT/proposals"
if "$PYTHON" -c 'import ffcv' 2>/dev/null; then
    say "one .beton of images and proposals"
    "$PYTHON" data_prep/write_beton.py "$OUT/scenes/images" --out "$OUT/scenes.beton" --proposals "$OUT/proposals"
    set -- --data "$OUT/scenes.beton"
else
    say "FFCV is not there, so the folder is read instead of a .beton"
    set -- --data "$OUT/scenes/images" --proposals "$OUT/proposals"
fi
say "D3SSL for 100 steps: to see it run, too short to learn what an object is"
"$PYTHON" trainers/d3ssl.py "$@" --preset demo --output "$OUT/d3ssl" --max-steps 100
"$PYTHON" trainers/report.py --run "$OUT/d3ssl" --data "$OUT/scenes/images" --proposals "$OUT/proposals" \
    --out "$OUT/report.html"
say "done: open $OUT/report.html and $OUT/inspect/inspect.html"
