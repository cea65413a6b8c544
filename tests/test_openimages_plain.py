"""Plain lines: the compiled loop gives bit by bit what Arrow gives, and leaves all else to it."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import openimages_parser, openimages_plain
from data_prep.openimages_boxes import read_boxes
from data_prep.openimages_classes import Classes
from data_prep.openimages_parser import Parser
from data_prep.openimages_plain import MARGIN, Block, PlainLines

pytest.importorskip("pyarrow")
TITLES = ["ImageID", "Source", "LabelName", "Confidence", "XMin", "XMax", "YMin", "YMax",
          "IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction", "IsInside"]  # fmt: skip
CLASSES = Classes(("/m/a", "/m/0123456", "/m/01234567", "/m/0123456789ab", "/m/" + "x" * 20, "b"), tuple("ABCDEF"))
FLAGS = ["0", "1", "-1"]
SHORT = [mid for mid in CLASSES.mids if len(mid) <= 16]


@pytest.fixture(scope="module", autouse=True)
def _compiled():
    openimages_plain.compile_kernel()
    assert openimages_plain.compiled()


def block_of(text, junk=b"9"):
    """Whatever lies before and behind a block says nothing."""
    text = text.encode("latin-1")
    return Block(bytearray(junk * MARGIN + text + junk * MARGIN), MARGIN + len(text))


def by_arrow(text, titles=TITLES, classes=CLASSES):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openimages_plain, "compiled", lambda: False)
        return Parser(titles, classes)(block_of(text))


def same(rows, parsed):
    assert not parsed.problems.kinds
    (piece,) = parsed.pieces
    for name in rows._fields:
        ours, theirs = getattr(rows, name), getattr(piece, name)
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), name
        assert ours.tobytes() == theirs.tobytes(), name


def line(titles=TITLES, **fields):
    entry = {"ImageID": "0123456789abcdef", "Source": "xclick", "LabelName": "/m/a", "Confidence": "1",
             "XMin": "0.1", "XMax": "0.2", "YMin": "0.3", "YMax": "0.4"}  # fmt: skip
    entry |= fields
    return ",".join(entry.get(title, "0") for title in titles) + "\n"


def sides(draw):
    """Two numbers, the smaller first, in different forms."""
    texts = st.one_of(
        st.sampled_from(["0", "1", "0.0", "1.000000", "0.000001", "0.99999999999999", "0.30000000000000"]),
        st.tuples(st.integers(0, 10**14), st.integers(1, 14)).map(lambda x: f"0.{x[0] % 10 ** x[1]:0{x[1]}d}"),
    )
    low, high = sorted((draw(texts), draw(texts)), key=float)
    return (low, high) if float(low) < float(high) else ("0", "0.5")


@st.composite
def plain_lines(draw):
    titles = draw(st.permutations(TITLES))
    ids = draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=3))
    lines = []
    for _ in range(draw(st.integers(1, 12))):
        (x0, x1), (y0, y1) = sides(draw), sides(draw)
        lines.append(line(
            titles, ImageID=f"{draw(st.sampled_from(ids)):016x}", LabelName=draw(st.sampled_from(SHORT)),
            Source=draw(st.sampled_from(["", "x", "activemil", "\xe4\xff"])), XMin=x0, XMax=x1, YMin=y0, YMax=y1,
            Confidence=draw(st.sampled_from(["1", "0.5", "", "no"])),
            IsGroupOf=draw(st.sampled_from(FLAGS)), IsDepiction=draw(st.sampled_from(FLAGS)),
        ))  # fmt: skip
    return titles, "".join(lines)


@settings(max_examples=150, deadline=None)
@given(plain_lines(), st.sampled_from([b"9", b"\n", b",", b".", b"\0"]))
def test_rows_are_arrows(drawn, junk):
    titles, text = drawn
    rows = PlainLines(titles, CLASSES.mids)(block_of(text, junk))
    assert rows is not None
    same(rows, by_arrow(text, titles))


OTHERS = [
    {"ImageID": "0123456789abcde"}, {"ImageID": "0123456789abcdef0"}, {"ImageID": "0123456789abcdeF"},
    {"ImageID": "../../etc/passwd"}, {"LabelName": "/m/z"}, {"LabelName": ""}, {"LabelName": "/m/a\0"},
    {"LabelName": CLASSES.mids[4]}, {"LabelName": "/m/01234567890123456789"}, {"XMin": ""}, {"XMin": "-0.1"},
    {"XMin": "+0.1"}, {"XMin": "1e-2"}, {"XMin": ".1"}, {"XMin": "0."}, {"XMin": "00.1"}, {"XMin": "0.1x"},
    {"XMin": "nan"}, {"XMin": "0.5"}, {"XMin": "0.2"}, {"XMax": "1.000001"}, {"XMax": "2"}, {"YMax": "0.3"},
    {"YMax": "9.9"}, {"XMin": "0.100000000000000000"}, {"IsGroupOf": "2"}, {"IsGroupOf": ""}, {"IsGroupOf": "-2"},
    {"IsDepiction": "1.0"}, {"IsDepiction": "11"}, {"Source": '"x"'}, {"Source": "a b"}, {"Source": "x\r"},
    {"Source": "x,y"}, {"IsInside": "0\r"}, {"IsInside": "0,0"}, {"IsInside": "0\n"},
]  # fmt: skip


@pytest.mark.parametrize("fields", OTHERS, ids=[f"{k}={v!r}" for each in OTHERS for k, v in each.items()])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_block_with_any_other_line_is_left_to_arrow(fields, place):
    lines = [line(), line(ImageID="00" * 8), line(LabelName="b")]
    plain = PlainLines(TITLES, CLASSES.mids)
    assert plain(block_of("".join(lines))) is not None
    lines[place] = line(**fields)
    assert plain(block_of("".join(lines))) is None


@pytest.mark.parametrize("cut", range(1, len(line()) - 2))  # of the last field nobody reads anything
def test_a_line_cut_short_anywhere_is_no_plain_one(cut):
    plain = PlainLines(TITLES, CLASSES.mids)
    for junk in (b"9", b",", b"\n", b"."):
        assert plain(block_of(line()[:cut] + "\n" + line(), junk)) is None
        assert plain(block_of(line() + line()[:cut] + "\n", junk)) is None


def test_a_side_that_ends_the_block_is_not_sought_behind_it():
    titles = [*TITLES[:7], *TITLES[8:], "YMax"]
    plain = PlainLines(titles, CLASSES.mids)
    for junk in (b".", b"1", b".1"):
        behind = (junk * MARGIN)[:MARGIN]
        text = line(titles, YMax="").encode()
        assert plain(Block(bytearray(behind + text + behind), MARGIN + len(text))) is None
        text = line(titles).encode()
        assert plain(Block(bytearray(behind + text + behind), MARGIN + len(text))) is not None


def test_noise_is_refused_and_never_read_beyond():
    """Of random bytes, and of lines with some bytes exchanged, what is taken is what Arrow takes."""
    chance, plain, taken = random.Random(0), PlainLines(TITLES, CLASSES.mids), 0
    text = "".join(line(ImageID=f"{i:016x}", XMin=f"0.{i:06}") for i in range(6))
    assert plain(block_of("".join(chr(chance.randrange(256)) for _ in range(500)) + "\n")) is None
    for _ in range(2000):
        noisy = list(text)
        noisy[chance.randrange(len(noisy) - 1)] = chance.choice('0123456789abcdefxF,./-\n\r" ')
        rows = plain(block_of("".join(noisy)))
        if rows is not None:
            same(rows, by_arrow("".join(noisy)))
            taken += 1
    assert 200 < taken < 1900


def test_no_lines_and_no_classes():
    plain = PlainLines(TITLES, CLASSES.mids)(block_of(""))
    assert plain is not None
    assert len(plain.ids) == len(plain.classes) == 0
    assert PlainLines(TITLES, ())(block_of(line())) is None
    many = tuple(f"/m/{i}" for i in range(2047))
    rows = PlainLines(TITLES, many)(block_of("".join(line(LabelName=mid) for mid in many)))
    assert rows is not None
    assert rows.classes.tolist() == list(range(2047))
    assert PlainLines(TITLES, (*many, "/m/x"))(block_of(line(LabelName="/m/1"))) is None


def test_a_file_is_the_same_with_and_without_the_loop(tmp_path, monkeypatch):
    """Plain blocks and others in turn, which share images."""
    lines = [line(ImageID=f"{i // 5:016x}", XMin=f"0.{i % 1000:06}", LabelName=SHORT[i % 5]) for i in range(4000)]
    for i in range(700, 4000, 900):
        lines[i] = line(ImageID=f"{i // 5:016x}", XMin="0.9" if i % 200 else "1e-2")  # reversed, or well
    path = tmp_path / "boxes.csv"
    path.write_text(",".join(TITLES) + "\n" + "".join(lines))
    monkeypatch.setattr("data_prep.openimages_boxes._BLOCK", 5000)
    used, plain = [], PlainLines.__call__

    def watched(self, block):
        rows = plain(self, block)
        used.append(rows)  # by several threads
        return rows

    monkeypatch.setattr(PlainLines, "__call__", watched)
    ours = read_boxes(path, CLASSES)
    assert 0 < sum(rows is None for rows in used) < 8 < len(used)
    monkeypatch.setattr(openimages_parser.openimages_plain, "compiled", lambda: False)
    theirs = read_boxes(path, CLASSES)
    assert ours.problems == theirs.problems
    assert ours.problems.kinds
    for name in vars(ours.boxes):
        assert np.array_equal(getattr(ours.boxes, name), getattr(theirs.boxes, name)), name
