"""What a family of directions promises.

A direction is a key. It is never stored: a family draws what is random of it, moves parameters
along it, and sums many of them again from their keys. `Family` is that contract, and all that one
of your own needs; `zo_jax.word_family` is how those of this library keep it.
"""

from typing import Any, ClassVar

import jax
from jax import lax
import jax.numpy as jnp

from zo_jax.layout import Layout
from zo_jax.trees import Subset, is_floating


class Family:
    """Directions z with E[z zᵀ] = I, so that E[⟨g, z⟩ z] = g. Each is named by a key.

    A family of your own is a class with `draw` and `move`, pure functions that work under `jit` and
    `vmap`; `add` is there for the sake of speed. If it holds arrays it is a registered pytree, as
    `jax.tree_util.register_dataclass` makes one.

    Attributes:
      has_dual: whether `add` sums other directions y than the z that `move` moves along, with
        E[z yᵀ] = I: what projections along z tell is then of y.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> class OneCoordinate(zo_jax.Family):
    ...     '''√d e_j for a random coordinate j of a vector [d].'''
    ...     def draw(self, params, key):
    ...         return jax.random.randint(key, (), 0, params.size)
    ...     def move(self, params, j, scale):
    ...         return params.at[j].add(scale * params.size**0.5)
    >>> loss_fn = lambda w: jnp.sum(w * jnp.array([1.0, 2.0, 3.0]))
    >>> est = zo_jax.estimate_gradient(
    ...     loss_fn, jnp.zeros(3), jax.random.key(0), num_queries=999, perturbation=OneCoordinate())
    >>> bool(jnp.allclose(est.gradient, jnp.array([1.0, 2.0, 3.0]), rtol=0.2))
    True
    """

    has_dual: ClassVar[bool] = False

    def draw(self, params: Any, key: jax.Array) -> Any:
        """What is random of the direction that `key` names: a pytree of arrays, drawn once for all
        scales.
        """
        raise NotImplementedError(f"{type(self).__name__} must define draw(params, key)")

    def move(self, params: Any, direction: Any, scale: Any) -> Any:
        """params + scale · z, for a drawn direction; its leaves are arrays, or `Perturbed` ones
        that are not formed.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define move(params, direction, scale)"
        )

    def moves(self, params: Any) -> list[bool]:
        """For each leaf whether `move` may change it; what depends on no such leaf is evaluated
        once for all directions.
        """
        return [True] * len(jax.tree.leaves(params))

    def parts(self, params: Any) -> list[Subset] | None:
        """If each direction moves one part of the parameters alone, the parts: a loss is then
        evaluated as a function of that part, below which nothing is evaluated twice.
        """
        del params
        return None

    def part_of(self, params: Any, key: jax.Array) -> jax.Array:
        """Which of the `parts` the direction moves that `key` names, int32."""
        raise NotImplementedError(f"{type(self).__name__} has parts, and must define part_of")

    def on_part(self, params: Any, part: int) -> "Family":
        """The family, of the parameters of a part, of those directions that move it."""
        raise NotImplementedError(f"{type(self).__name__} has parts, and must define on_part")

    def start(self, params: Any) -> "Family":
        """The family at the first step of a run; one that learns has its state in it from now
        on.
        """
        del params
        return self

    def learn(self, params: Any, keys: jax.Array, projections: jax.Array) -> "Family":
        """The family at the next step, which may depend on the projections of this one.

        Args:
          params: pytree of arrays or their shapes.
          keys: [q], of the step's queries.
          projections: [q], nan where the loss was not finite.
        """
        del params, keys, projections
        return self

    def add(self, params: Any, keys: jax.Array, weights: jax.Array) -> Any:
        """params + Σᵢ weightsᵢ zᵢ, summed in float32 and rounded once: an update without a gradient
        buffer.
        """
        wide = jax.tree.map(widened, params)

        def step(total, key_and_weight):
            key, weight = key_and_weight
            moved = self.move(total, self.draw(params, key), weight)
            form = lambda x: x.form() if hasattr(x, "form") else x
            formed = jax.tree.map(form, moved, is_leaf=lambda x: hasattr(x, "form"))
            return jax.tree.map(lambda x, old: x.astype(old.dtype), formed, total), None

        total, _ = lax.scan(step, wide, (keys, jnp.asarray(weights, jnp.float32)))
        return jax.tree.map(lambda x, p: x.astype(p.dtype) if is_floating(p) else p, total, params)

    def on(self, layout: Layout | None) -> "Family":
        """The same directions, to the bit, for parameters that are placed so."""
        del layout
        return self

    def perturb(self, params: Any, key: jax.Array, scale: Any) -> Any:
        """`move` along the direction that `key` names, for functions under `lazily`."""
        return self.move(params, self.draw(params, key), scale)

    def direction(self, params: Any, key: jax.Array) -> Any:
        """The direction that `key` names, as plain float32 arrays (zeros for leaves that are not
        floating).
        """
        zeros = jax.tree.map(
            lambda x: jnp.zeros_like(x, jnp.float32 if is_floating(x) else None), params
        )
        return self.add(zeros, key[None], jnp.ones(1))

    def combine(self, params: Any, keys: jax.Array, weights: jax.Array) -> Any:
        """Σᵢ weightsᵢ zᵢ, with the shapes and dtypes of `params`, summed in float32.

        Args:
          params: pytree of arrays or their shapes; their values do not matter.
          keys: [q] typed PRNG keys.
          weights: float32 [q].
        """
        return self.add(jax.tree.map(jnp.zeros_like, params), keys, weights)

    def combine_with_norm(
        self, params: Any, keys: jax.Array, weights: jax.Array
    ) -> tuple[Any, jax.Array]:
        """`combine`, and the global norm of the sum, float32."""
        total = self.combine(params, keys, weights)
        return total, jnp.sqrt(sum_of_squares(total))

    def sums(self, params: Any, keys: jax.Array, weights: jax.Array) -> tuple[list[Any], jax.Array]:
        """`combine` leaf by leaf: each sum an array, or a `RowSum` that is made where it is used;
        and ‖·‖² of the arrays among them, float32.
        """
        total, norm = self.combine_with_norm(params, keys, weights)
        return jax.tree.leaves(total), norm**2


def widened(leaf: Any) -> Any:
    """A floating leaf in float32 or better."""
    if not is_floating(leaf):
        return leaf
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def sum_of_squares(tree: Any) -> jax.Array:
    leaves = [widened(x) for x in jax.tree.leaves(tree) if is_floating(x)]
    return sum((jnp.sum(jnp.square(x)) for x in leaves), jnp.zeros(()))
