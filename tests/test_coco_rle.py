import numpy as np
import pytest

from data_prep.coco_rle import rle_of


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (70, 3), (300, 211)])
def test_run_lengths_are_those_of_pycocotools(shape: tuple[int, int], share: float) -> None:
    tools = pytest.importorskip("pycocotools.mask")
    rng = np.random.Generator(np.random.Philox(key=3))
    blocks = np.kron(rng.random((-(-shape[0] // 9), -(-shape[1] // 9))) < share, np.ones((9, 9), bool))
    for mask in (rng.random(shape) < share, blocks[: shape[0], : shape[1]]):
        want = tools.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert rle_of(mask) == {"size": list(want["size"]), "counts": want["counts"].decode()}
