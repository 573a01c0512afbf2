"""What primitives do with perturbed arrays without forming them: a registry of rules, by primitive
and class of array.

The library's own rules are in `zo_jax.entries` (casts, scalars, and what moves entries about),
`zo_jax.lookups` and `zo_jax.products`.
"""

from collections.abc import Callable, Sequence
from typing import Any

from jax.extend import core

from zo_jax.perturbed import Perturbed

Rule = Callable[..., Any]

_rules: dict[tuple[core.Primitive, type[Perturbed]], Rule] = {}


def register_rule(primitive: core.Primitive, kind: type[Perturbed]) -> Callable[[Rule], Rule]:
    """A decorator that makes a function what `primitive` does with perturbed arrays of a class, and
    of classes derived from it.

    The function is called as `rule(*operands, **params)`: the operands as they stand, one of which
    is of that class and the others arrays, and the parameters of the primitive. It returns the
    result, an array or a `Perturbed` one (a sequence of them if the primitive has several results),
    of the shape and dtype that the primitive gives; or NotImplemented, upon which the rule of the
    next class in the order of inheritance is asked, and where there is none the array is formed.
    The rules of the library can be replaced in the same way.

    Args:
      primitive: such as `jax.lax.conv_general_dilated_p`.
      kind: `Dense`, `LowRank`, `Perturbed` (for all), or a class of one's own.

    Raises:
      ValueError: one of the two is something else.

    A convolution over single pixels is a product over channels, for which a low-rank kernel need
    not be formed:

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> from jax import lax
    >>> @zo_jax.register_rule(lax.conv_general_dilated_p, zo_jax.LowRank)
    ... def over_single_pixels(image, kernel, *, dimension_numbers, feature_group_count, **params):
    ...     channels_last = dimension_numbers == ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
    ...     if not channels_last or kernel.shape[:2] != (1, 1) or feature_group_count != 1:
    ...         return NotImplemented
    ...     params |= dict(dimension_numbers=dimension_numbers, feature_group_count=1)
    ...     conv = lambda k: lax.conv_general_dilated_p.bind(image, k.astype(image.dtype), **params)
    ...     change = kernel.scale * (conv(kernel.u) @ kernel.v[0, 0].T)
    ...     return conv(kernel.base) + change.astype(image.dtype)
    >>> loss = lambda kernel, image: jnp.sum(
    ...     lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))
    >>> kernel = zo_jax.low_rank(1).perturb(jnp.ones((1, 1, 4, 8)), jax.random.key(0), 0.5)
    >>> with zo_jax.record_formed() as formed:
    ...     lazy = zo_jax.lazily(loss)(kernel, jnp.ones((1, 3, 3, 4)))
    >>> formed, bool(jnp.allclose(lazy, loss(kernel.form(), jnp.ones((1, 3, 3, 4))), rtol=1e-5))
    ([], True)
    """  # noqa: E501
    if not isinstance(primitive, core.Primitive):
        raise ValueError(
            f"a rule needs a primitive such as jax.lax.dot_general_p, got {primitive!r}; "
            f"jax.make_jaxpr shows "
            "which ones a function uses"
        )
    if not (isinstance(kind, type) and issubclass(kind, Perturbed)):
        raise ValueError(f"a rule needs zo_jax.Perturbed or a class derived from it, got {kind!r}")

    def register(rule: Rule) -> Rule:
        _rules[primitive, kind] = rule
        return rule

    return register


def is_perturbed(x: Any) -> bool:
    return isinstance(x, Perturbed)


def apply_rule(primitive: core.Primitive, operands: Sequence[Any], params: dict[str, Any]) -> Any:
    """What the rules make of the operands, one of them perturbed; or NotImplemented."""
    (kind,) = (type(x) for x in operands if is_perturbed(x))
    for base in kind.__mro__:
        rule = _rules.get((primitive, base))
        result = NotImplemented if rule is None else rule(*operands, **params)
        if result is not NotImplemented:
            return result
    return NotImplemented


def rule_for(
    kinds: type[Perturbed] | tuple[type[Perturbed], ...], *of: core.Primitive
) -> Callable[[Rule], Rule]:
    """`register_rule` for several classes and primitives."""

    def register(rule: Rule) -> Rule:
        for kind in kinds if isinstance(kinds, tuple) else (kinds,):
            for primitive in of:
                register_rule(primitive, kind)(rule)
        return rule

    return register
