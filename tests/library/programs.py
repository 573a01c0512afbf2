"""Small programs on one array, drawn at random: for the property that perturbing lazily changes
nothing.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

from hypothesis import strategies as st
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

Function = Callable[[Any], Any]

SHAPES = [(6,), (4, 6), (6, 4), (8, 3), (2, 4, 6), (3, 6, 4), (4, 2, 6), (2, 2, 4, 4)]
NARROW = ("bfloat16", "float16", "float8_e4m3fn")
INDICES = ([0, 1, 1], [-1, 2, 0, -2], [5, 0, -9], [1, 99])


@dataclasses.dataclass
class Program:
    """A function of an array, and the same without `jax.custom_vjp`, which forward mode needs as a
    reference.

    Attributes:
      words: what it does, for people.
      dtypes: all that its values have.
    """

    shape: tuple[int, ...]
    dtype: str
    run: Function
    plain: Function
    words: list[str]
    dtypes: set[str]
    is_reversible: bool = True

    def __repr__(self):
        return f"{self.dtype}{list(self.shape)}: {', then '.join(self.words)}"


def values(shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


@jax.custom_vjp
def opaque(x):
    return 2 * x


opaque.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))


@st.composite
def programs(draw):
    shape = draw(st.sampled_from(SHAPES))
    dtype = draw(st.sampled_from(["float32", "float32", "bfloat16", "float16"]))
    program = Program(shape, dtype, lambda x: x, lambda x: x, [], {dtype})
    here = jax.ShapeDtypeStruct(shape, dtype)
    for _ in range(draw(st.integers(0, 4))):
        step = draw(st.sampled_from(STEPS))(draw, here)
        if step is not None:
            here = _append(program, here, *step)
    if here.dtype.itemsize == 1:  # which JAX does not combine with others
        here = _append(program, here, "as float32", lambda x: x.astype(jnp.float32))
    name, function, is_reversible = draw(st.sampled_from(USES))(draw, here)
    wrapper = draw(st.sampled_from(list(WRAPPERS)))
    program.is_reversible = is_reversible and wrapper != "while"
    wrapped = lambda function: lambda x: WRAPPERS[wrapper](function, x)
    plain = wrapped(lambda x: function(x, lambda x: 2 * x))
    _append(
        program, here, f"{name} in {wrapper}", wrapped(lambda x: function(x, opaque)), plain=plain
    )
    return program


def _append(program, here, name, function, plain=None):
    run, before, plain = program.run, program.plain, plain or function
    program.run = lambda x: function(run(x))
    program.plain = lambda x: plain(before(x))
    program.words.append(name)
    out = jax.eval_shape(plain, here)
    program.dtypes.add(str(out.dtype))
    return out


# Steps: (name, function of an array) given what there is, or None.


def cast(draw, x):
    dtype = draw(st.sampled_from(["float32", *NARROW]))
    return f"as {dtype}", lambda x: x.astype(dtype)


def cut(draw, x):
    if x.ndim == 0:
        return None
    slices = []
    for size in x.shape:
        start = draw(st.integers(0, size - 1))
        slices.append(
            slice(start, draw(st.integers(start + 1, size)), draw(st.sampled_from([1, 2])))
        )
    return f"{slices}", lambda x: x[tuple(slices)]


def cut_rows(draw, x):
    if x.ndim == 0:
        return None
    stop = draw(st.integers(1, x.shape[0]))
    return f"[:{stop}]", lambda x: x[:stop]


def cut_dynamically(draw, x):
    if x.ndim == 0:
        return None
    starts = [draw(st.integers(-9, 9)) for _ in x.shape]
    sizes = [size if draw(st.booleans()) else max(1, size // 2) for size in x.shape]
    return f"dynamic {starts} {sizes}", lambda x: lax.dynamic_slice(x, jnp.array(starts), sizes)


def pick(draw, x):
    if x.ndim == 0:
        return None
    axis, i = draw(st.integers(0, x.ndim - 1)), draw(st.integers(-1, 1))
    i = min(i, x.shape[axis] - 1)
    if draw(st.booleans()):
        return f"axis {axis} [{i}]", lambda x: lax.index_in_dim(x, i, axis, keepdims=False)
    return f"axis {axis} [traced {i}]", lambda x: jnp.moveaxis(x, axis, 0)[jnp.int32(i)]


def rearrange(draw, x):
    permutation = draw(st.permutations(range(x.ndim)))
    return f"transpose {permutation}", lambda x: jnp.transpose(x, permutation)


def merge(draw, x):
    if x.ndim < 2:
        return None
    i = draw(st.integers(0, x.ndim - 2))
    shape = (*x.shape[:i], x.shape[i] * x.shape[i + 1], *x.shape[i + 2 :])
    return f"reshape {shape}", lambda x: x.reshape(shape)


def divide(draw, x):
    axes = [i for i, size in enumerate(x.shape) if size > 1 and size % 2 == 0]
    if not axes or x.ndim > 3:
        return None
    i = draw(st.sampled_from(axes))
    shape = (*x.shape[:i], *draw(st.permutations([2, x.shape[i] // 2])), *x.shape[i + 1 :])
    return f"reshape {shape}", lambda x: x.reshape(shape)


def expand(draw, x):
    if x.ndim > 3:
        return None
    axis = draw(st.integers(0, x.ndim))
    if draw(st.booleans()):
        return f"expand {axis}", lambda x: jnp.expand_dims(x, axis)
    return f"expand and squeeze {axis}", lambda x: jnp.squeeze(x.reshape(1, *x.shape), 0)


def repeat(draw, x):
    if x.ndim > 3:
        return None
    return "broadcast", lambda x: jnp.broadcast_to(x, (2, *x.shape))


def scale(draw, x):
    functions = {
        "-x": lambda x: -x,
        "x * 1.5": lambda x: x * 1.5,
        "x / 3": lambda x: x / 3,
        "s * x": lambda x: jnp.asarray(0.75, x.dtype) * x,
        "x / s": lambda x: x / jnp.asarray(-1.25, x.dtype),
        "2 / x": lambda x: 2 / (3 + x),
    }
    return draw(st.sampled_from(sorted(functions.items())))


def flip(draw, x):
    if x.ndim == 0:
        return None
    axis = draw(st.integers(0, x.ndim - 1))
    return f"flip {axis}", lambda x: jnp.flip(x, axis)


def split(draw, x):
    axes = [i for i, size in enumerate(x.shape) if size % 2 == 0]
    if not axes:
        return None
    axis, part = draw(st.sampled_from(axes)), draw(st.integers(0, 1))
    return f"half {part} of axis {axis}", lambda x: jnp.split(x, 2, axis)[part]


def look_up(draw, x):
    if x.ndim == 0:
        return None
    indices = jnp.array(draw(st.sampled_from(INDICES)))
    if draw(st.booleans()):
        indices = jnp.stack([indices, indices[::-1]])
    mode = draw(st.sampled_from(["fill", "zeros", "clip", "promise_in_bounds"]))
    axis = draw(st.integers(0, x.ndim - 1)) if x.ndim < 4 else 0
    if mode == "promise_in_bounds":
        indices = jnp.clip(indices, -x.shape[axis], x.shape[axis] - 1)
    fill = dict(mode="fill", fill_value=0) if mode == "zeros" else dict(mode=mode)
    # Not what is no number: it would hide what stands beside it.
    fill = fill | (dict(fill_value=-1) if mode == "fill" else {})
    where = (*(slice(None),) * axis, indices)
    return f"look up {indices.tolist()} {mode} {axis}", lambda x: x.at[where].get(**fill)


def put(draw, x):
    if x.ndim < 1 or x.shape[0] > 4:
        return None
    indices = jnp.array([draw(st.integers(-6, 6)) for _ in range(x.shape[0])])
    mode = draw(st.sampled_from(["drop", "clip"]))
    stack = values((4, *x.shape[1:]), 1)
    function = lambda x: stack.astype(x.dtype).at[indices].set(x, mode=mode)
    return f"put at {indices.tolist()} {mode}", function


def add(draw, x):
    return "x + 1", lambda x: x + 1


STEPS = [
    *(cast, cast, cut, cut_rows, cut_dynamically, pick, rearrange, rearrange, merge, divide),
    *(expand, repeat, scale, scale, flip, split, look_up, look_up, put, add),
]

# Uses: (name, function of an array and of `opaque`, whether it has a backward pass).


def itself(draw, x):
    return "itself", lambda x, opaque: opaque(x), True


def product(draw, x):
    if x.ndim == 0:
        return itself(draw, x)
    axes = draw(st.permutations(range(x.ndim)))
    num_contracted = draw(st.integers(0, x.ndim))
    num_batch = draw(st.integers(0, min(1, x.ndim - num_contracted)))
    contracted, batch = axes[:num_contracted], axes[num_contracted : num_contracted + num_batch]
    others = draw(st.sampled_from([1, 3, 16]))
    # The other operand: its batch axes first, its own axis in the middle.
    shape = (*(x.shape[a] for a in batch), others, *(x.shape[a] for a in contracted))
    other_contracted = tuple(range(num_batch + 1, len(shape)))
    is_rhs = draw(st.booleans())

    def run(x, opaque):
        other = values(shape, 2).astype(x.dtype)
        pairs = [(tuple(contracted), other_contracted), (tuple(batch), tuple(range(num_batch)))]
        if is_rhs:
            numbers = tuple((b, a) for a, b in pairs)
            return lax.dot_general(other, x, numbers)
        return opaque(lax.dot_general(x, other, tuple(pairs)))

    return f"product over {contracted} along {batch}, rhs {is_rhs}", run, True


def gram(draw, x):
    if x.ndim != 2:
        return itself(draw, x)
    return "x @ x.T", lambda x, opaque: x @ opaque(x.T), True


def rows(draw, x):
    """A scan over the leading axis."""
    if x.ndim < 2:
        return itself(draw, x)
    other = values((3, x.shape[1]), 3)

    def run(x, opaque):
        step = lambda carry, row: (carry + 1, jnp.tensordot(other.astype(x.dtype), opaque(row), 1))
        return lax.scan(step, jnp.float32(0), x)[1]

    return "a scan over rows", run, True


def elements(draw, x):
    return "tanh", lambda x, opaque: jnp.tanh(x.astype(jnp.float32)), True


USES = [product, product, product, itself, gram, rows, elements]

WRAPPERS = {
    "nothing": lambda f, x: f(x),
    "jit": lambda f, x: jax.jit(f)(x) + jax.jit(f)(x),
    "checkpoint": lambda f, x: jax.checkpoint(f)(x),
    "cond": lambda f, x: lax.cond(jnp.int32(len(x.shape)) > 0, f, lambda x: 2 * f(x), x),
    "scan": lambda f, x: lax.scan(
        lambda total, i: (total + i * f(x), None), 0 * f(x), jnp.ones(2, f(x).dtype)
    )[0],
    "while": lambda f, x: lax.while_loop(
        lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1] + f(x)), (0, 0 * f(x))
    )[1],
    "carry": lambda f, x: f(lax.fori_loop(0, 2, lambda i, x: x * 1, x)),
    "vmap": lambda f, x: jax.vmap(f, axis_size=2)(jnp.stack([x, x])) if x.ndim < 4 else f(x),
    "jit in scan": lambda f, x: lax.map(lambda i: jax.jit(f)(x) * i.astype(x.dtype), jnp.ones(2)),
}
