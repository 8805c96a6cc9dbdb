"""Sixteen floats at a time in code that numba compiles.

numba leaves it to LLVM to find loops that vectorise; the kernels say it. A value of type
``lanes`` is a vector of 16 float32, which LLVM maps to the registers of the processor:
one, two, or four. Pointers are numba's ``CPointer``; those to uint16 point at bfloat16.
Offsets count elements. Nothing here fails on NaN, and NaN comes out where it goes in.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic as _intrinsic
from numba.extending import register_model

from instance.model.kernels.launch import compiled

# Its own type says how numba calls what it decorates, not how kernels do.
intrinsic: Any = _intrinsic

WIDTH = 16

FLOATS = ir.VectorType(ir.FloatType(), WIDTH)
WORDS = ir.VectorType(ir.IntType(32), WIDTH)
_HALVES = ir.VectorType(ir.IntType(16), WIDTH)
_ELEMENTS = {types.uint16: (ir.IntType(16), _HALVES), types.float32: (ir.FloatType(), FLOATS)}


class _Lanes(types.Type):
    def __init__(self) -> None:
        super().__init__(name="lanes")


lanes = _Lanes()


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, type_: _Lanes) -> None:
        super().__init__(manager, type_, FLOATS)


def splat_ir(builder: Any, value: Any, type_: ir.VectorType) -> Any:
    zero = ir.Constant(ir.IntType(32), 0)
    first = builder.insert_element(ir.Constant(type_, ir.Undefined), value, zero)
    mask = ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), [0] * WIDTH)
    return builder.shuffle_vector(first, first, mask)


def _words(value: int) -> ir.Constant:
    return ir.Constant(WORDS, [value] * WIDTH)


def _call(builder: Any, name: str, result: Any, *args: Any) -> Any:
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def _at(dtype: Any, builder: Any, pointer: Any, offset: Any) -> Any:
    """Sixteen elements from an offset on, as a pointer to a vector."""
    element, vector = _ELEMENTS[dtype]
    at = builder.gep(builder.bitcast(pointer, element.as_pointer()), [offset])
    return builder.bitcast(at, vector.as_pointer())


def _is_pointer(type_: Any) -> bool:
    return isinstance(type_, types.CPointer) and type_.dtype in _ELEMENTS


@intrinsic
def load(context: Any, pointer: Any, offset: Any) -> Any:
    """Sixteen floats from an offset on."""
    if not _is_pointer(pointer):
        return None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = _at(pointer.dtype, builder, *args)
        if pointer.dtype == types.float32:
            return builder.load(at, align=4)
        words = builder.zext(builder.load(at, align=2), WORDS)
        return builder.bitcast(builder.shl(words, _words(16)), FLOATS)

    return lanes(pointer, types.int64), generate


@intrinsic
def prefetch(context: Any, pointer: Any, offset: Any) -> Any:
    """Have the memory at an offset brought near."""
    if not _is_pointer(pointer):
        return None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        word = ir.IntType(32)
        at = builder.bitcast(_at(pointer.dtype, builder, *args), byte)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        # To be read, kept near, as data.
        builder.call(function, [at, word(0), word(3), word(1)])
        return context.get_dummy_value()

    return types.none(pointer, types.int64), generate


@intrinsic
def store(context: Any, pointer: Any, offset: Any, value: Any) -> Any:
    """Write sixteen floats from an offset on, bfloat16 rounded to nearest, ties to even."""
    if not _is_pointer(pointer):
        return None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = _at(pointer.dtype, builder, *args[:2])
        if pointer.dtype == types.float32:
            builder.store(args[2], at, align=4)
            return context.get_dummy_value()
        bits = builder.bitcast(args[2], WORDS)
        odd = builder.and_(builder.lshr(bits, _words(16)), _words(1))
        rounded = builder.add(bits, builder.add(odd, _words(0x7FFF)))
        nan = builder.fcmp_unordered("uno", args[2], args[2])
        kept = builder.select(nan, _words(0x7FC00000), rounded)
        halves = builder.trunc(builder.lshr(kept, _words(16)), _HALVES)
        builder.store(halves, at, align=2)
        return context.get_dummy_value()

    return types.none(pointer, types.int64, lanes), generate


@intrinsic
def copy(context: Any, target: Any, to: Any, source: Any, at: Any) -> Any:
    """Copy sixteen elements between pointers of one type, bit for bit."""
    if not _is_pointer(target) or target != source:
        return None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        size = 4 if target.dtype == types.float32 else 2
        value = builder.load(_at(target.dtype, builder, *args[2:]), align=size)
        builder.store(value, _at(target.dtype, builder, *args[:2]), align=size)
        return context.get_dummy_value()

    return types.none(target, types.int64, source, types.int64), generate


@intrinsic
def splat(context: Any, value: Any) -> Any:
    """One float in all lanes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return splat_ir(builder, args[0], FLOATS)

    return lanes(types.float32), generate


def _binary(name: str) -> Any:
    @intrinsic
    def operation(context: Any, a: Any, b: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return getattr(builder, name)(*args)

        return lanes(lanes, lanes), generate

    return operation


add, sub, mul, div = _binary("fadd"), _binary("fsub"), _binary("fmul"), _binary("fdiv")


@intrinsic
def fma(context: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once where the processor can."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _call(builder, f"llvm.fmuladd.v{WIDTH}f32", FLOATS, *args)

    return lanes(lanes, lanes, lanes), generate


@intrinsic
def larger(context: Any, a: Any, b: Any) -> Any:
    """The larger of two in each lane; ``a`` where either is NaN."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered("<", *args), args[1], args[0])

    return lanes(lanes, lanes), generate


@intrinsic
def total(context: Any, value: Any) -> Any:
    """The sum over the lanes, in an order that suits the processor."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType(), FLOATS])
        name = f"llvm.vector.reduce.fadd.v{WIDTH}f32"
        function = cgutils.get_or_insert_function(builder.module, kind, name)
        zero = ir.Constant(ir.FloatType(), -0.0)
        return builder.call(function, [zero, args[0]], fastmath=("reassoc",))

    return types.float32(lanes), generate


@intrinsic
def store_totals(context: Any, pointer: Any, offset: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Write the sums over the lanes of four values from an offset on."""
    if pointer != types.CPointer(types.float32):
        return None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def pick(left: Any, right: Any, lanes: list[int]) -> Any:
            indices = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)
            return builder.shuffle_vector(left, right, indices)

        def merged(left: Any, right: Any, size: int) -> Any:
            """In each run of 2 * size lanes, its halves added: of the left one, then the right."""
            first = [
                at + lane + WIDTH * right
                for at in range(0, WIDTH, 2 * size)
                for right in (0, 1)
                for lane in range(size)
            ]
            second = [lane + size for lane in first]
            return builder.fadd(pick(left, right, first), pick(left, right, second))

        both = merged(merged(args[2], args[3], 1), merged(args[4], args[5], 1), 2)
        # Lanes are now sums of a, b, c and d, over and over.
        for width in (8, 4):
            low, high = list(range(width)), list(range(width, 2 * width))
            both = builder.fadd(pick(both, both, low), pick(both, both, high))
        at = builder.gep(args[0], [args[1]])
        builder.store(both, builder.bitcast(at, both.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.none(pointer, types.int64, lanes, lanes, lanes, lanes), generate


@intrinsic
def lowest_lane(context: Any, value: Any) -> Any:
    """The first of the floats."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.extract_element(args[0], ir.Constant(ir.IntType(32), 0))

    return types.float32(lanes), generate


@intrinsic
def highest(context: Any, value: Any) -> Any:
    """The largest lane; of NaN and a number either may count."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        both = args[0]
        for width in (8, 4, 2, 1):
            low, high = (
                builder.shuffle_vector(
                    both,
                    both,
                    ir.Constant(ir.VectorType(ir.IntType(32), width), list(range(at, at + width))),
                )
                for at in (0, width)
            )
            both = builder.select(builder.fcmp_ordered("<", low, high), high, low)
        return builder.extract_element(both, ir.Constant(ir.IntType(32), 0))

    return types.float32(lanes), generate


@intrinsic
def counted(context: Any) -> Any:
    """0, 1, 2 and so on."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(FLOATS, [float(lane) for lane in range(WIDTH)])

    return lanes(), generate


@intrinsic
def where_below(context: Any, a: Any, b: Any, chosen: Any, other: Any) -> Any:
    """``chosen`` in lanes where a < b, ``other`` elsewhere."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered("<", args[0], args[1]), args[2], args[3])

    return lanes(lanes, lanes, lanes, lanes), generate


@intrinsic
def _two_to(context: Any, shifted: Any) -> Any:
    """2 to the whole number that was added to 1.5 * 2 ** 23, from -126 to 127."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.shl(builder.bitcast(args[0], WORDS), _words(23))
        return builder.bitcast(builder.add(bits, _words(127 << 23)), FLOATS)

    return lanes(lanes), generate


@compiled
def exp(x):
    """e to the power of each lane of -87 to 88, to 2e-7 of itself; lanes below count as -87."""
    least = splat(-87.0)
    x = where_below(x, least, least, x)
    # Adding and taking away 1.5 * 2 ** 23 rounds to whole numbers.
    whole = splat(12582912.0)
    shifted = fma(x, splat(1.4426950408889634), whole)
    power = sub(shifted, whole)
    rest = fma(power, splat(-0.693359375), x)
    rest = fma(power, splat(2.12194440e-4), rest)
    # The series of e ** rest to the sixth power, for rest within half of ln 2.
    result = splat(1 / 720)
    for factor in (1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
        result = fma(result, rest, splat(factor))
    return mul(result, _two_to(shifted))


@compiled
def tanh(x):
    """The hyperbolic tangent of each lane, to 3e-7."""
    limit, one = splat(20.0), splat(1.0)
    x = where_below(limit, x, limit, x)
    grown = exp(add(x, x))
    return div(sub(grown, one), add(grown, one))


@intrinsic
def pointer_to(context: Any, address: Any, like: Any) -> Any:
    """The address as a pointer of the other one's type."""
    if not isinstance(like, types.CPointer):
        return None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(like))

    return like(types.int64, like), generate


@intrinsic
def pointer(context: Any, address: Any, dtype: Any) -> Any:
    """The address as a pointer to elements of a type, which is a constant."""
    if not isinstance(dtype, types.NumberClass):
        return None
    kind = types.CPointer(dtype.instance_type)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(kind))

    return kind(types.int64, dtype), generate


@intrinsic
def scratch(context: Any, count: Any, dtype: Any) -> Any:
    """Uninitialised elements on the stack of the running function; both are constants."""
    if not isinstance(count, types.IntegerLiteral) or not isinstance(dtype, types.NumberClass):
        return None
    kind = types.CPointer(dtype.instance_type)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        element = context.get_data_type(dtype.instance_type)
        # Not cgutils.alloca_once, which fills with zeros in as many instructions.
        with builder.goto_entry_block():
            space = builder.alloca(ir.ArrayType(element, count.literal_value))
        space.align = 64
        return builder.bitcast(space, element.as_pointer())

    return kind(count, dtype), generate


@intrinsic
def take_next(context: Any, counter: Any) -> Any:
    """The counter's value before it is raised by one; several threads may ask at once."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        one = ir.Constant(ir.IntType(64), 1)
        return builder.atomic_rmw("add", args[0], one, "monotonic")

    return types.int64(types.CPointer(types.int64)), generate


@intrinsic
def call(context: Any, address: Any) -> Any:
    """Call the function at an address, without arguments or result."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [])
        return context.get_dummy_value()

    return types.none(types.int64), generate


@intrinsic
def call_with(context: Any, address: Any, argument: Any) -> Any:
    """Call the function at an address with another one."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [args[1]])
        return context.get_dummy_value()

    return types.none(types.int64, types.int64), generate
