#!/bin/sh
# D3SSL from nothing to a judged backbone, on two cores in under ten minutes: `make demo`.
set -eu
PYTHON=${1:-python}
OUT=${2:-runs/demo}
export PYTHONUNBUFFERED=1

say() { printf '\n== %s\n' "$*"; }

rm -rf "$OUT"
mkdir -p "$OUT"
say "scenes: images to train on, and others to be judged on"
"$PYTHON" data_prep/make_scenes.py --out "$OUT/scenes" --images 1600 --seed 0
"$PYTHON" data_prep/make_scenes.py --out "$OUT/held-out" --images 400 --seed 1
say "proposals by selective search; no label is used"
"$PYTHON" data_prep/selective_search.py "$OUT/scenes/images" --out "$OUT/proposals" --preset d3ssl
say "what the recipe does to these images: $OUT/inspect/inspect.html"
"$PYTHON" -m geoaug.cli inspect "$OUT/scenes/images" --preset d3ssl --proposals "$OUT/proposals" --out "$OUT/inspect" --count 2
if "$PYTHON" -c 'import ffcv' 2>/dev/null; then
    say "one .beton of images and proposals"
    "$PYTHON" data_prep/write_beton.py "$OUT/scenes/images" --out "$OUT/scenes.beton" --proposals "$OUT/proposals"
    DATA="--data $OUT/scenes.beton"
else
    say "FFCV is not there, so the folder is read instead of a .beton"
    DATA="--data $OUT/scenes/images --proposals $OUT/proposals"
fi
say "training"
# shellcheck disable=SC2086
"$PYTHON" trainers/d3ssl.py $DATA --preset demo --output "$OUT/d3ssl"
for weights in random trained; do
    from=$weights
    [ "$weights" = trained ] && from="$OUT/d3ssl"
    say "measuring the $weights backbone on the held-out scenes"
    for task in object-knn disturbed-knn coupling-rate position-similarity; do
        "$PYTHON" trainers/evaluate.py $task --weights "$from" --arch resnet10 --data "$OUT/held-out/instances.json" \
            --size 160 --tile 96 --count 200 --k 20 --out "$OUT/scores/$weights-$task.json" | tail -n 1
    done
done
"$PYTHON" trainers/report.py --run "$OUT/d3ssl" --scores "$OUT/scores" --data "$OUT/scenes/images" \
    --proposals "$OUT/proposals" --out "$OUT/report.html"
say "done: open $OUT/report.html"
