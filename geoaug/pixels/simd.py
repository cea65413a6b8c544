"""Vector code for the `njit` passes of resample.py: intrinsics that emit LLVM instructions on raw addresses.

Numba vectorises neither pass by itself. The code is LLVM's portable vector language, so it runs on any little-endian
machine; only the sum of two products names an x86 instruction, because LLVM does not find that one here.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_BYTES16, _BYTES64 = ir.VectorType(_I8, 16), ir.VectorType(_I8, 64)
_SHORTS32, _INTS16 = ir.VectorType(_I16, 32), ir.VectorType(_I32, 16)
_SUMS_OF_PAIRS = (
    ("+avx512bw", 32, "avx512.pmaddw.d.512"),
    ("+avx2", 16, "avx2.pmadd.wd"),
    ("+sse2", 8, "sse2.pmadd.wd"),
)


def _shuffle(b, x, y, lanes):
    return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(_I32, len(lanes)), list(lanes)))


def _pick(b, x, lanes):
    return _shuffle(b, x, ir.Constant(x.type, ir.Undefined), lanes)


def _join(b, parts):
    while len(parts) > 1:
        lanes = range(2 * parts[0].type.count)
        parts = [_shuffle(b, x, y, lanes) for x, y in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _splat(b, value):
    return _pick(b, b.insert_element(ir.Constant(_INTS16, ir.Undefined), value, ir.Constant(_I32, 0)), [0] * 16)


def _plus(b, address, by):
    return b.add(address, ir.Constant(_I64, by))


def _load(b, address, kind):
    return b.load(b.inttoptr(address, kind.as_pointer()), align=1)


def _half(b, bits):
    return _splat(b, b.shl(ir.Constant(_I32, 1), b.sub(bits, ir.Constant(_I32, 1))))


def _store_bytes(b, total, bits, out):
    value = b.trunc(b.lshr(total, _splat(b, bits)), _BYTES16)
    b.store(value, b.inttoptr(out, _BYTES16.as_pointer()), align=1)


def _add_products(context, b, total, x, w):
    """total int32 [16] + the products of x and w, int16 [32], each two neighbours summed."""
    features = context.codegen().magic_tuple()[2].split(",")
    for feature, count, name in _SUMS_OF_PAIRS:
        if feature in features:
            kind = ir.FunctionType(ir.VectorType(_I32, count // 2), [ir.VectorType(_I16, count)] * 2)
            op = b.module.globals.get(f"llvm.x86.{name}") or ir.Function(b.module, kind, f"llvm.x86.{name}")
            parts = [range(at, at + count) for at in range(0, 32, count)]
            return b.add(total, _join(b, [b.call(op, [_pick(b, v, part) for v in (x, w)]) for part in parts]))
    for first in (0, 1):
        total = b.add(total, b.mul(*(b.sext(_pick(b, v, range(first, 32, 2)), _INTS16) for v in (x, w))))
    return total


def _repeat(b, count, carried, body):
    """Emit a loop of `carried = body(index, carried)`, count >= 1 times."""
    before, loop, after = b.block, b.append_basic_block("taps"), b.append_basic_block("rest")
    b.branch(loop)
    b.position_at_end(loop)
    index, values = b.phi(_I64), [b.phi(value.type) for value in carried]
    following, results = _plus(b, index, 1), body(index, values)
    for phi, first, later in zip(
        [index, *values], [ir.Constant(_I64, 0), *carried], [following, *results], strict=True
    ):
        phi.add_incoming(first, before)
        phi.add_incoming(later, b.block)
    b.cbranch(b.icmp_signed("<", following, count), loop, after)
    b.position_at_end(after)
    return results


def _make_across(static):
    # A 16-byte load holds 5 RGB pixels; its pair q becomes (R R' G G' B B' 0 0) in 16 bits each, for 4 outputs at once.
    # Loads are the bottleneck, so two rows share those of the weights.
    zero = ir.Constant(_BYTES64, None)
    pairs_of = [
        [
            lane
            for output in range(4)
            for colour in range(4)
            for pixel in (2 * q, 2 * q + 1)
            for lane in (16 * output + 3 * pixel + colour if colour < 3 else 64, 64)
        ]
        for q in (0, 1)
    ]

    @intrinsic
    def across(typing, row, second_row, offsets, weights, pairs, bits, out, second_out):
        """4 output pixels of two rows of RGB, as RGBX; `static` pairs of taps, or `pairs` (even) where that is 0."""

        def emit(context, b, signature, args):
            *rows, offsets, weights, pairs, bits, out, second_out = args
            places = [b.sext(_load(b, _plus(b, offsets, 4 * k), _I32), _I64) for k in range(4)]

            def add_pairs(totals, skip, weights, count):
                pixels = [_join(b, [_load(b, b.add(b.add(row, at), skip), _BYTES16) for at in places]) for row in rows]
                for q in range(count):
                    w = _load(b, _plus(b, weights, 64 * q), _SHORTS32)
                    x = [b.bitcast(_shuffle(b, four, zero, pairs_of[q]), _SHORTS32) for four in pixels]
                    totals = [_add_products(context, b, total, v, w) for total, v in zip(totals, x, strict=True)]
                return totals

            def add_two_pairs(index, totals):
                skip, jump = (b.mul(index, ir.Constant(_I64, size)) for size in (12, 128))
                return add_pairs(totals, skip, b.add(weights, jump), 2)

            bits = b.trunc(bits, _I32)
            totals = [_half(b, bits)] * 2
            for q in range(0, static, 2):
                totals = add_pairs(totals, ir.Constant(_I64, 6 * q), _plus(b, weights, 64 * q), min(2, static - q))
            if not static:
                totals = _repeat(b, b.lshr(pairs, ir.Constant(_I64, 1)), totals, add_two_pairs)
            _store_bytes(b, totals[0], bits, out)
            _store_bytes(b, totals[1], bits, second_out)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), emit

    return across


across_1, across_2, across_3, across_4, across_any = (_make_across(pairs) for pairs in (1, 2, 3, 4, 0))


@intrinsic
def down(typing, rows, at, weights, pairs, bits, out, plane):
    """16 output pixels from `pairs` of RGBX rows, `at` bytes into each; to 16 bytes of each of three planes."""

    def emit(context, b, signature, args):
        rows, at, weights, pairs, bits, out, plane = args

        def every(value):
            return ir.Constant(_INTS16, [value] * 16)

        def add_pair(index, totals):
            pair = b.add(rows, b.shl(index, ir.Constant(_I64, 4)))
            one, two = (_load(b, b.add(_load(b, _plus(b, pair, k), _I64), at), _INTS16) for k in (0, 8))
            w = b.bitcast(_splat(b, _load(b, b.add(weights, b.shl(index, ir.Constant(_I64, 2))), _I32)), _SHORTS32)
            mixed = b.or_(b.and_(one, every(0xFFFF)), b.shl(two, every(16)))  # R G of one, R G of two
            red, green = b.and_(mixed, every(0xFF00FF)), b.and_(b.lshr(mixed, every(8)), every(0xFF00FF))
            blue = b.or_(b.lshr(one, every(16)), b.and_(two, every(0xFF0000)))  # X is 0, so B stands alone
            colours = (b.bitcast(x, _SHORTS32) for x in (red, green, blue))
            return [_add_products(context, b, total, x, w) for total, x in zip(totals, colours, strict=True)]

        bits = b.trunc(bits, _I32)
        totals = _repeat(b, pairs, [_half(b, bits)] * 3, add_pair)
        for colour, total in enumerate(totals):
            _store_bytes(b, total, bits, b.add(out, b.mul(plane, ir.Constant(_I64, colour))))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), emit


@intrinsic
def pointer(typing, address):
    """An address as a pointer, for numba's `carray`."""
    return types.voidptr(types.int64), lambda context, b, signature, args: b.inttoptr(args[0], _I8.as_pointer())
