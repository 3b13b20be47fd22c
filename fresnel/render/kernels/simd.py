"""Explicit SIMD for Numba: vectors of 16 floats or 8 doubles as ordinary values.

LLVM's auto-vectoriser turns the rasteriser's inner loop, with its masks and early exits, into
scalar code. These types let a kernel say what it means: `a * b`, `fma(a, b, c)`, `select(m, a, b)`
become one instruction each on AVX-512, two on AVX2, four on NEON.

Everything is emitted inline through `numba.extending.intrinsic`. No fast-math flags are set, so
results depend on the machine's instructions only, not on how code happened to be vectorised.
"""

# Intrinsics are written as Numba wants them: untyped, with a `typingctx` they rarely use.
# mypy: ignore-errors
from __future__ import annotations

import operator

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

I1, I32, I64 = ir.IntType(1), ir.IntType(32), ir.IntType(64)


class Vector(types.Type):
    """A SIMD value: `lanes` elements of a Numba scalar type (boolean for masks)."""

    def __init__(self, lanes: int, element: types.Type) -> None:
        self.lanes, self.element = lanes, element
        super().__init__(name=f"Vector({lanes} x {element})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type: Vector) -> None:
        floats = {types.float32: ir.FloatType(), types.float64: ir.DoubleType()}
        super().__init__(
            dmm, fe_type, ir.VectorType(floats.get(fe_type.element, I1), fe_type.lanes)
        )


F16 = Vector(16, types.float32)
D8 = Vector(8, types.float64)
_MASK = {16: Vector(16, types.boolean), 8: Vector(8, types.boolean)}


def _constant(vector: ir.VectorType, value) -> ir.Constant:
    values = value if isinstance(value, list) else [value] * vector.count
    return ir.Constant(vector, [ir.Constant(vector.element, v) for v in values])


def _shuffle(builder, a, b, index: list[int]):
    """The lanes of two vectors, one after the other, that `index` names."""
    return builder.shuffle_vector(a, b, _constant(ir.VectorType(I32, len(index)), index))


def _splat(builder, value, vector: ir.VectorType):
    if isinstance(value.type, ir.VectorType):
        return value
    undefined = ir.Constant(vector, ir.Undefined)
    one = builder.insert_element(undefined, value, ir.Constant(I32, 0))
    return _shuffle(builder, one, undefined, [0] * vector.count)


def _llvm(builder, name: str, result, *args):
    """Call the LLVM function of that full name."""
    kind = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}"), args)


def _call(builder, name: str, *args):
    """Call the LLVM intrinsic `name`, overloaded on the type of its first argument."""
    vector = args[0].type
    bits = {"float": 32, "double": 64}[str(vector.element)]
    return _llvm(builder, f"{name}.v{vector.count}f{bits}", vector, *args)


def _vector_of(args) -> Vector | None:
    return next((a for a in args if isinstance(a, Vector)), None)


def _operator(op, emit, *, compares: bool = False) -> None:
    """Teach Numba the operator `op` on vectors; scalars on either side are broadcast."""

    @infer_global(op)
    class _Template(AbstractTemplate):
        def generic(self, args, kws):
            vector = _vector_of(args)
            if vector is None or kws:
                return None
            want = [a if isinstance(a, Vector) else vector.element for a in args]
            if any(isinstance(a, Vector) and a != vector for a in args):
                return None
            return signature(_MASK[vector.lanes] if compares else vector, *want)

    def lower(context, builder, sig, args):
        vector = context.get_value_type(_vector_of(sig.args))
        return emit(builder, *(_splat(builder, a, vector) for a in args))

    for pattern in ((Vector,), (Vector, Vector), (Vector, types.Float), (types.Float, Vector)):
        lower_builtin(op, *pattern)(lower)


_operator(operator.add, lambda b, x, y: b.fadd(x, y))
_operator(operator.sub, lambda b, x, y: b.fsub(x, y))
_operator(operator.mul, lambda b, x, y: b.fmul(x, y))
_operator(operator.truediv, lambda b, x, y: b.fdiv(x, y))
_operator(operator.neg, lambda b, x: b.fneg(x))
_operator(operator.and_, lambda b, x, y: b.and_(x, y))
_operator(operator.gt, lambda b, x, y: b.fcmp_ordered(">", x, y), compares=True)
_operator(operator.ge, lambda b, x, y: b.fcmp_ordered(">=", x, y), compares=True)
_operator(operator.lt, lambda b, x, y: b.fcmp_ordered("<", x, y), compares=True)
_operator(operator.le, lambda b, x, y: b.fcmp_ordered("<=", x, y), compares=True)


def _elementwise(arity: int, emit):
    """An intrinsic on vectors, lane by lane; scalar arguments are broadcast."""

    def typed(typingctx, *args):
        vector = _vector_of(args)
        want = [a if isinstance(a, Vector) else vector.element for a in args]

        def codegen(context, builder, sig, values):
            kind = context.get_value_type(vector)
            return emit(builder, *(_splat(builder, v, kind) for v in values))

        return vector(*want), codegen

    if arity == 1:
        return intrinsic(lambda typingctx, a: typed(typingctx, a))
    if arity == 2:
        return intrinsic(lambda typingctx, a, b: typed(typingctx, a, b))
    return intrinsic(lambda typingctx, a, b, c: typed(typingctx, a, b, c))


fma = _elementwise(3, lambda b, x, y, z: _call(b, "fma", x, y, z))  # x * y + z, rounded once
fnma = _elementwise(3, lambda b, x, y, z: _call(b, "fma", b.fneg(x), y, z))  # z - x * y
absolute = _elementwise(1, lambda b, x: _call(b, "fabs", x))
root = _elementwise(1, lambda b, x: _call(b, "sqrt", x))
ceiling = _elementwise(1, lambda b, x: _call(b, "ceil", x))
floor = _elementwise(1, lambda b, x: _call(b, "floor", x))
# the hardware's own minimum and maximum, without minnum's care for NaN
minimum = _elementwise(2, lambda b, x, y: b.select(b.fcmp_ordered("<", x, y), x, y))
maximum = _elementwise(2, lambda b, x, y: b.select(b.fcmp_ordered(">", x, y), x, y))


@intrinsic
def select(typingctx, mask, a, b):
    """Lane by lane: a where the mask is set, else b."""
    vector = _vector_of((a, b))
    want = [x if isinstance(x, Vector) else vector.element for x in (a, b)]

    def codegen(context, builder, sig, values):
        kind = context.get_value_type(vector)
        return builder.select(values[0], *(_splat(builder, v, kind) for v in values[1:]))

    return vector(mask, *want), codegen


@intrinsic
def lanes(typingctx, mask):
    """The mask as an integer, lane 0 in the lowest bit."""

    def codegen(context, builder, sig, values):
        bits = builder.bitcast(values[0], ir.IntType(mask.lanes))
        return builder.zext(bits, I64)

    return types.int64(mask), codegen


@intrinsic
def lowest_bit(typingctx, bits):
    """Index of the lowest set bit of a non-zero int64."""

    def codegen(context, builder, sig, values):
        return _llvm(builder, "cttz.i64", I64, values[0], ir.Constant(I1, 1))

    return types.int64(types.int64), codegen


def _pointer(context, builder, array_type, array, index, kind):
    """Pointer to a vector that starts at element `index` of a one-dimensional array."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), ir.PointerType(kind))


@intrinsic
def splat(typingctx, value):
    """16 times the same float."""

    def codegen(context, builder, sig, values):
        return _splat(builder, values[0], context.get_value_type(F16))

    return F16(types.float32), codegen


@intrinsic
def load(typingctx, array, index):
    """16 floats (or 8 doubles) of a flat array, from element `index` on."""
    vector = F16 if array.dtype == types.float32 else D8

    def codegen(context, builder, sig, values):
        pointer = _pointer(context, builder, array, *values, context.get_value_type(vector))
        return builder.load(pointer, align=array.dtype.bitwidth // 8)

    return vector(array, types.intp), codegen


@intrinsic
def store(typingctx, array, index, vector):
    """Write a vector to a flat array, from element `index` on."""

    def codegen(context, builder, sig, values):
        pointer = _pointer(context, builder, array, *values[:2], values[2].type)
        builder.store(values[2], pointer, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), codegen


@intrinsic
def prefetch(typingctx, array, index):
    """Ask for the cache line that holds element `index`; harmless for any index."""

    def codegen(context, builder, sig, values):
        pointer = _pointer(context, builder, array, *values, ir.IntType(8))
        _llvm(
            builder, "prefetch.p0", ir.VoidType(), pointer,
            *(ir.Constant(I32, k) for k in (0, 3, 1)),
        )  # fmt: skip
        return context.get_dummy_value()

    return types.void(array, types.intp), codegen


def _columns(stride: int):
    """Read 8 records of `stride` floats each and hand back their columns as doubles."""

    def columns(typingctx, array, first, count):
        total = 8 * stride
        result = types.UniTuple(D8, stride)

        def codegen(context, builder, sig, values):
            data, record, valid = values
            floats, ints = ir.VectorType(ir.FloatType(), total), ir.VectorType(I32, total)
            start = builder.mul(record, ir.Constant(I64, stride))
            pointer = _pointer(context, builder, array, data, start, floats)
            limit = builder.mul(builder.trunc(valid, I32), ir.Constant(I32, stride))
            mask = builder.icmp_signed(
                "<", _constant(ints, list(range(total))), _splat(builder, limit, ints)
            )
            block = _llvm(
                builder, f"masked.load.v{total}f32.p0", floats,
                pointer, ir.Constant(I32, 4), mask, _constant(floats, 0.0),
            )  # fmt: skip
            doubles = context.get_value_type(D8)
            picks = (
                _shuffle(builder, block, block, list(range(c, total, stride)))
                for c in range(stride)
            )
            return context.make_tuple(
                builder, result, [builder.fpext(pick, doubles) for pick in picks]
            )

        return result(array, types.intp, types.intp), codegen

    return intrinsic(columns)


# load_k(array, first, count): records first .. first + 7 of k floats; those past `count` read as 0.
load_1, load_3, load_4 = _columns(1), _columns(3), _columns(4)

# Minimax polynomial of 2^f on [-1/2, 1/2], relative error 7.5e-8 before rounding.
_EXP2 = (1.3276472e-3, 9.6755415e-3, 5.5507133e-2, 2.4022120e-1, 6.9314697e-1, 1.0000000717)


@intrinsic
def exp2(typingctx, x):
    """2^x for 16 floats; meaningless (but harmless) outside [-126, 127]."""

    def codegen(context, builder, sig, values):
        kind, ints = context.get_value_type(F16), ir.VectorType(I32, 16)
        # Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits of the mantissa.
        magic = _constant(kind, 12582912.0)
        shifted = builder.fadd(values[0], magic)
        fraction = builder.fsub(values[0], builder.fsub(shifted, magic))
        power = _constant(kind, _EXP2[0])
        for coefficient in _EXP2[1:]:
            power = _call(builder, "fma", power, fraction, _constant(kind, coefficient))
        exponent = builder.shl(builder.bitcast(shifted, ints), _constant(ints, 23))
        return builder.bitcast(builder.add(builder.bitcast(power, ints), exponent), kind)

    return F16(x), codegen


@intrinsic
def split_exponent(typingctx, x):
    """(m, e) with x = m * 2^e and m in [0.75, 1.5), for 8 positive normal doubles."""
    result = types.UniTuple(D8, 2)

    def codegen(context, builder, sig, values):
        kind, ints = context.get_value_type(D8), ir.VectorType(I64, 8)
        bits = builder.bitcast(values[0], ints)
        # Taking 0.75's bits away moves the break between exponents from 1 to 0.75.
        offset = builder.sub(bits, _constant(ints, 0x3FE8000000000000))
        exponent = builder.ashr(offset, _constant(ints, 52))
        mantissa = builder.sub(bits, builder.shl(exponent, _constant(ints, 52)))
        parts = [builder.bitcast(mantissa, kind), builder.sitofp(exponent, kind)]
        return context.make_tuple(builder, result, parts)

    return result(x), codegen


@intrinsic
def horizontal_sums(typingctx, vectors):
    """Sums over the lanes of up to 16 vectors, as one vector: lane k holds the sum of vector k.

    A butterfly of two-source shuffles: 3 instructions for each pair, 15 pairs at most, where one
    reduction after the other would take 8 for each vector.
    """

    def codegen(context, builder, sig, values):
        zero = _constant(context.get_value_type(F16), 0.0)
        level = [builder.extract_value(values[0], k) for k in range(len(vectors))]
        owners = [[k] * 16 for k in range(len(level))]  # whose sum each lane is a part of
        for half in (8, 4, 2, 1):
            if len(level) % 2:
                level, owners = [*level, zero], [*owners, [-1] * 16]
            # Keep every group of 2 * half lanes' two halves apart and add them.
            low = [i + j for i in range(0, 32, 2 * half) for j in range(half)]
            high = [i + half for i in low]
            level = [
                builder.fadd(_shuffle(builder, a, b, low), _shuffle(builder, a, b, high))
                for a, b in zip(level[::2], level[1::2], strict=True)
            ]
            pairs = (a + b for a, b in zip(owners[::2], owners[1::2], strict=True))
            owners = [[both[i] for i in low] for both in pairs]
        place = [owners[0].index(k if k in owners[0] else -1) for k in range(16)]
        return _shuffle(builder, level[0], level[0], place)

    return F16(vectors), codegen


def _shuffled(sources: int, masks: list[list[int]], doc: str):
    """An intrinsic from `sources` vectors to one for each mask of indices into their lanes."""
    result = types.UniTuple(F16, len(masks))

    def codegen(context, builder, sig, values):
        a, b, c, d = [*values, values[-1]][:4]
        low, high = (_shuffle(builder, *pair, list(range(32))) for pair in ((a, b), (c, d)))
        whole = _shuffle(builder, low, high, list(range(64)))
        picked = [_shuffle(builder, whole, whole, mask) for mask in masks]
        return context.make_tuple(builder, result, picked)

    typed = result(*[F16] * sources), codegen
    if sources == 3:
        shuffle = intrinsic(lambda typingctx, a, b, c: typed)
    else:
        shuffle = intrinsic(lambda typingctx, a, b, c, d: typed)
    shuffle.__doc__ = doc
    return shuffle


swap_quads = _shuffled(
    4,
    [[16 * block + 4 * row + k for block in range(4) for k in range(4)] for row in range(4)],
    "Rows of 16 pixels from four 4 x 4 blocks side by side, and the other way round.",
)
interleave = _shuffled(
    3,
    [[16 * (k % 3) + k // 3 for k in range(16 * part, 16 * part + 16)] for part in range(3)],
    "Red, green and blue of 16 pixels as 48 floats rgbrgb...",
)
deinterleave = _shuffled(
    3,
    [[3 * k + channel for k in range(16)] for channel in range(3)],
    "The other way round.",
)
