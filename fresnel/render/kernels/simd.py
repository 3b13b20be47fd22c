"""Explicit SIMD for Numba: vectors of 16 floats or 8 doubles as ordinary values.

LLVM's auto-vectoriser turns the rasteriser's inner loop, with its masks and early exits, into
scalar code. These types let a kernel say what it means: `a * b`, `fma(a, b, c)`, `select(m, a, b)`
become one instruction each on AVX-512, two on AVX2, four on NEON.

Everything is emitted inline through `numba.extending.intrinsic`. No fast-math flags are set, so
results depend on the machine's instructions only, not on how code happened to be vectorised.
"""

# mypy: ignore-errors
import operator

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import lower_builtin, models, register_model

from fresnel.render.kernels.tasks import emits

I1, I32, I64 = ir.IntType(1), ir.IntType(32), ir.IntType(64)


class Vector(types.Type):
    """A SIMD value: `lanes` elements of a Numba scalar type (boolean for masks)."""

    def __init__(self, lanes: int, element: types.Type) -> None:
        self.lanes, self.element = lanes, element
        super().__init__(name=f"Vector({lanes} x {element})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, kind: Vector) -> None:
        floats = {types.float32: ir.FloatType(), types.float64: ir.DoubleType()}
        super().__init__(dmm, kind, ir.VectorType(floats.get(kind.element, I1), kind.lanes))


F16, D8 = Vector(16, types.float32), Vector(8, types.float64)
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


def _broadcast(*args):
    """(vector, *arguments): those that are scalars take its elements' type. None without vector."""
    vector = next((a for a in args if isinstance(a, Vector)), None)
    if vector is None or any(isinstance(a, Vector) and a != vector for a in args):
        return None
    return vector, *(a if isinstance(a, Vector) else vector.element for a in args)


def _splatted(context, builder, kinds, values):
    vector = context.get_value_type(next(k for k in kinds if isinstance(k, Vector)))
    return [_splat(builder, value, vector) for value in values]


def _operator(op, emit, *, compares: bool = False) -> None:
    """Teach Numba the operator `op` on vectors."""

    @infer_global(op)
    class _Template(AbstractTemplate):
        def generic(self, args, kws):
            if kws or (found := _broadcast(*args)) is None:
                return None
            vector, *want = found
            return signature(_MASK[vector.lanes] if compares else vector, *want)

    def lower(context, builder, sig, args):
        return emit(builder, *_splatted(context, builder, sig.args, args))

    for pattern in ((Vector,), (Vector, Vector), (Vector, types.Float), (types.Float, Vector)):
        lower_builtin(op, *pattern)(lower)


for _op in ("add", "sub", "mul"):
    _operator(getattr(operator, _op), lambda b, x, y, f=f"f{_op}": getattr(b, f)(x, y))
_operator(operator.truediv, lambda b, x, y: b.fdiv(x, y))
_operator(operator.neg, lambda b, x: b.fneg(x))
_operator(operator.and_, lambda b, x, y: b.and_(x, y))
for _op, _sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
    _compare = getattr(operator, _op)
    _operator(_compare, lambda b, x, y, s=_sign: b.fcmp_ordered(s, x, y), compares=True)


def _elementwise(emit):
    """An intrinsic on vectors of one type, lane by lane: emit(builder, *vectors)."""

    def splatted(context, builder, sig, *values):
        return emit(builder, *_splatted(context, builder, sig.args, values))

    return emits(_broadcast, emit.__code__.co_argcount - 1)(splatted)


fma = _elementwise(lambda b, x, y, z: _call(b, "fma", x, y, z))  # x * y + z, rounded once
fnma = _elementwise(lambda b, x, y, z: _call(b, "fma", b.fneg(x), y, z))  # z - x * y
absolute = _elementwise(lambda b, x: _call(b, "fabs", x))
root = _elementwise(lambda b, x: _call(b, "sqrt", x))
ceiling = _elementwise(lambda b, x: _call(b, "ceil", x))
floor = _elementwise(lambda b, x: _call(b, "floor", x))
# the hardware's own minimum and maximum, without minnum's care for NaN
minimum = _elementwise(lambda b, x, y: b.select(b.fcmp_ordered("<", x, y), x, y))
maximum = _elementwise(lambda b, x, y: b.select(b.fcmp_ordered(">", x, y), x, y))


@emits(lambda mask, a, b: (_broadcast(a, b)[0], mask, *_broadcast(a, b)[1:]))
def select(context, builder, sig, mask, a, b):
    """Lane by lane: a where the mask is set, else b."""
    return builder.select(mask, *_splatted(context, builder, sig.args[1:], (a, b)))


@emits(lambda mask: (types.int64, mask))
def lanes(context, builder, sig, mask):
    """The mask as an integer, lane 0 in the lowest bit."""
    return builder.zext(builder.bitcast(mask, ir.IntType(sig.args[0].lanes)), I64)


@emits(lambda bits: (types.int64, types.int64))
def lowest_bit(context, builder, sig, bits):
    """Index of the lowest set bit of a non-zero int64."""
    return _llvm(builder, "cttz.i64", I64, bits, ir.Constant(I1, 1))


@emits(lambda value: (F16, types.float32))
def splat(context, builder, sig, value):
    """16 times the same float."""
    return _splat(builder, value, context.get_value_type(F16))


def _pointer(context, builder, sig, array, index, kind):
    """Pointer to a vector that starts at element `index` of the one-dimensional first argument."""
    data = context.make_array(sig.args[0])(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), ir.PointerType(kind))


@emits(lambda array, index: (F16 if array.dtype == types.float32 else D8, array, types.intp))
def load(context, builder, sig, array, index):
    """16 floats (or 8 doubles) of a flat array, from element `index` on."""
    kind = context.get_value_type(sig.return_type)
    pointer = _pointer(context, builder, sig, array, index, kind)
    return builder.load(pointer, align=sig.args[0].dtype.bitwidth // 8)


@emits(lambda array, index, vectors: (types.void, array, types.intp, vectors))
def store(context, builder, sig, array, index, vectors):
    """Write a vector, or a tuple of them one after the other, to a flat array from `index` on."""
    several = isinstance(sig.args[2], types.UniTuple)
    count = len(sig.args[2]) if several else 1
    for k in range(count):
        vector = builder.extract_value(vectors, k) if several else vectors
        at = builder.add(index, ir.Constant(I64, k * vector.type.count))
        pointer = _pointer(context, builder, sig, array, at, vector.type)
        builder.store(vector, pointer, align=sig.args[0].dtype.bitwidth // 8)
    return context.get_dummy_value()


@emits(lambda array, index: (types.void, array, types.intp))
def prefetch(context, builder, sig, array, index):
    """Ask for the cache line that holds element `index`; harmless for any index."""
    pointer = _pointer(context, builder, sig, array, index, ir.IntType(8))
    hints = (ir.Constant(I32, k) for k in (0, 3, 1))
    _llvm(builder, "prefetch.p0", ir.VoidType(), pointer, *hints)
    return context.get_dummy_value()


def _columns(stride: int):
    """Read 8 records of `stride` floats each and hand back their columns as doubles."""
    total = 8 * stride
    result = types.UniTuple(D8, stride)

    @emits(lambda array, first, count: (result, array, types.intp, types.intp))
    def columns(context, builder, sig, data, record, valid):
        floats, ints = ir.VectorType(ir.FloatType(), total), ir.VectorType(I32, total)
        start = builder.mul(record, ir.Constant(I64, stride))
        pointer = _pointer(context, builder, sig, data, start, floats)
        limit = builder.mul(builder.trunc(valid, I32), ir.Constant(I32, stride))
        places = _constant(ints, list(range(total)))
        mask = builder.icmp_signed("<", places, _splat(builder, limit, ints))
        given = pointer, ir.Constant(I32, 4), mask, _constant(floats, 0.0)
        block = _llvm(builder, f"masked.load.v{total}f32.p0", floats, *given)
        doubles = context.get_value_type(D8)
        picks = [_shuffle(builder, block, block, [*range(c, total, stride)]) for c in range(stride)]
        return context.make_tuple(builder, result, [builder.fpext(p, doubles) for p in picks])

    return columns


# load_k(array, first, count): records first .. first + 7 of k floats; those past `count` read as 0.
load_1, load_3, load_4 = _columns(1), _columns(3), _columns(4)

# Minimax polynomial of 2^f on [-1/2, 1/2], relative error 7.5e-8 before rounding.
_EXP2 = (1.3276472e-3, 9.6755415e-3, 5.5507133e-2, 2.4022120e-1, 6.9314697e-1, 1.0000000717)


@emits(lambda x: (F16, x))
def exp2(context, builder, sig, x):
    """2^x for 16 floats; meaningless (but harmless) outside [-126, 127]."""
    kind, ints = context.get_value_type(F16), ir.VectorType(I32, 16)
    # Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits of the mantissa.
    magic = _constant(kind, 12582912.0)
    shifted = builder.fadd(x, magic)
    fraction = builder.fsub(x, builder.fsub(shifted, magic))
    power = _constant(kind, _EXP2[0])
    for coefficient in _EXP2[1:]:
        power = _call(builder, "fma", power, fraction, _constant(kind, coefficient))
    exponent = builder.shl(builder.bitcast(shifted, ints), _constant(ints, 23))
    return builder.bitcast(builder.add(builder.bitcast(power, ints), exponent), kind)


@emits(lambda x: (types.UniTuple(D8, 2), x))
def split_exponent(context, builder, sig, x):
    """(m, e) with x = m * 2^e and m in [0.75, 1.5), for 8 positive normal doubles."""
    kind, ints = context.get_value_type(D8), ir.VectorType(I64, 8)
    bits = builder.bitcast(x, ints)
    # Taking 0.75's bits away moves the break between exponents from 1 to 0.75.
    offset = builder.sub(bits, _constant(ints, 0x3FE8000000000000))
    exponent = builder.ashr(offset, _constant(ints, 52))
    mantissa = builder.sub(bits, builder.shl(exponent, _constant(ints, 52)))
    parts = [builder.bitcast(mantissa, kind), builder.sitofp(exponent, kind)]
    return context.make_tuple(builder, sig.return_type, parts)


@emits(lambda vectors: (F16, vectors))
def horizontal_sums(context, builder, sig, vectors):
    """Sums over the lanes of up to 16 vectors, as one vector: lane k holds the sum of vector k.

    A butterfly of two-source shuffles: 3 instructions for each pair, 15 pairs at most, where one
    reduction after the other would take 8 for each vector.
    """
    zero = _constant(context.get_value_type(F16), 0.0)
    level = [builder.extract_value(vectors, k) for k in range(len(sig.args[0]))]
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


def _shuffled(sources: int, masks: list[list[int]]):
    """An intrinsic from `sources` vectors to one for each mask of indices into their lanes."""
    result = types.UniTuple(F16, len(masks))

    def emit(context, builder, sig, *values):
        a, b, c, d = [*values, values[-1]][:4]
        low, high = (_shuffle(builder, *pair, list(range(32))) for pair in ((a, b), (c, d)))
        whole = _shuffle(builder, low, high, list(range(64)))
        picked = [_shuffle(builder, whole, whole, mask) for mask in masks]
        return context.make_tuple(builder, result, picked)

    return emits(lambda *vectors: (result, *vectors), sources)(emit)


# Rows of 16 pixels from four 4 x 4 blocks side by side, and the other way round.
swap_quads = _shuffled(
    4, [[16 * block + 4 * row + k for block in range(4) for k in range(4)] for row in range(4)]
)
# Red, green and blue of 16 pixels as 48 floats rgbrgb..., and the other way round.
interleave = _shuffled(
    3, [[16 * (k % 3) + k // 3 for k in range(16 * part, 16 * part + 16)] for part in range(3)]
)
deinterleave = _shuffled(3, [[3 * k + channel for k in range(16)] for channel in range(3)])
