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
say "scenes: 2,000 to train on without their labels, 600 others to ask about"
set -- --size 224 --objects 1 3 --radius 0.13 0.26 --usual-colors
"$PYTHON" data_prep/make_scenes.py --out "$OUT/scenes" --images 2000 "$@"
"$PYTHON" data_prep/make_scenes.py --out "$OUT/new-scenes" --images 600 --seed 1 "$@"
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
say "D3SSL, eight epochs"
"$PYTHON" trainers/d3ssl.py "$@" --preset demo --output "$OUT/d3ssl"
say "what the backbone has learnt, beside one that never saw an image"
score() { # weights, file, task, more flags
    weights=$1 file=$2 task=$3
    shift 3
    OMP_NUM_THREADS=1 "$PYTHON" trainers/evaluate.py "$task" --weights "$weights" --arch resnet10-tiny --size 128 \
        --tile 64 --data "$OUT/new-scenes/instances.json" --count 400 --workers 0 --out "$OUT/scores/$file.json" "$@" \
        >"$OUT/scores/$file.log"
    echo "wrote $OUT/scores/$file.json"
}
measure() { # name, task, more flags: both nets at a time, a core each
    name=$1
    shift
    score random "random-$name" "$@" &
    random=$!
    score "$OUT/d3ssl" "trained-$name" "$@"
    wait "$random"
}
mkdir -p "$OUT/scores"
measure object-knn object-knn
measure object-knn-c3 object-knn --layer c3
measure disturbed-knn disturbed-knn
measure coupling-rate coupling-rate
measure position-similarity position-similarity
"$PYTHON" trainers/report.py --run "$OUT/d3ssl" --data "$OUT/scenes/images" --proposals "$OUT/proposals" \
    --scores "$OUT/scores" --out "$OUT/report.html"
say "done: open $OUT/report.html and $OUT/inspect/inspect.html"
