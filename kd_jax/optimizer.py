"""Builds the optimiser of a config: an optimiser of optax by name, with gradient clipping and a weight-decay mask.

`with_followers` adds frozen models that follow the student to the state of an optimiser.
"""

import dataclasses
import fnmatch
import inspect
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from kd_jax import resolve

# The names in optax's optimisers of the keyword that chooses the decaying parameters.
MASKS = ("mask", "weight_decay_mask")


def make_optimizer(
    spec: resolve.Spec, learning_rate: optax.Schedule, clip_norm: float = 0.0, frozen: Iterable[str] = ()
) -> optax.GradientTransformation:
    """Builds the gradient transformation that `config.optimizer` and `config.clip_norm` describe.

    Args:
      spec: an optimiser of optax with its keywords. kd_jax adds the keyword `no_decay`, which holds patterns of the
        parameters without weight decay, as in `decays`.
      learning_rate: a function step -> value.
      clip_norm: the largest norm of the gradient; 0 for no clipping.
      frozen: the names of parameters that are not trained, which a pattern of `no_decay` may match alone.

    Raises:
      ValueError: a name or keyword is unknown, a number is out of range, or `no_decay` is given for an optimiser that
        has no mask.

    Example:
      >>> spec = {"name": "adamw", "weight_decay": 0.1, "no_decay": ("*bias",)}
      >>> params = {"kernel": jax.numpy.ones(2), "bias": jax.numpy.ones(2)}
      >>> tx = make_optimizer(spec, lambda step: 1.0)
      >>> updates, _ = tx.update(jax.tree.map(jax.numpy.zeros_like, params), tx.init(params), params)
      >>> {name: round(float(value[0]), 3) for name, value in optax.apply_updates(params, updates).items()}
      {'bias': 1.0, 'kernel': 0.9}
    """
    function, keywords = resolve.look_up(
        spec, optax, positional=False, beside=("no_decay",), learning_rate=learning_rate
    )
    patterns = keywords.pop("no_decay", ())
    if not isinstance(patterns, tuple | list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"optimizer.no_decay={patterns!r} must be a tuple of patterns, such as ('*norm*', '*bias').")
    if patterns:
        masks = [name for name in MASKS if name in inspect.signature(function).parameters]
        if not masks:
            raise ValueError(
                f"optimizer.no_decay={tuple(patterns)} needs an optimiser with a mask for weight decay, which {function.__name__} "
                f"lacks. The optimisers of optax with a mask are {', '.join(_with_masks())}."
            )
        keywords[masks[0]] = lambda params: decays(params, tuple(patterns), frozen)
    tx = function(**resolve.build_nested(keywords, optax))
    if clip_norm:
        tx = optax.chain(optax.clip_by_global_norm(resolve.check_number("clip_norm", clip_norm, 0.0)), tx)
    return tx


@dataclasses.dataclass(frozen=True)
class Follow:
    """The way in which a frozen model follows the student.

    Attributes:
      rate: the share of the student in each update of the follower, above 0 and at most 1. With 1 the follower is a copy
        of the student.
      every: the number of the student's updates between two updates of the follower.
      copy_first: True if the follower becomes a copy of the student after the student's first update, as in OPSD's code.
    """

    rate: float
    every: int = 1
    copy_first: bool = False


class FollowState(NamedTuple):
    """The state of an optimiser with followers: the optimiser's own state, the updates made, the followers' parameters."""

    inner: PyTree
    count: Int[Array, ""]
    followers: dict[str, PyTree]


def with_followers(tx: optax.GradientTransformation, follows: Mapping[str, Follow]) -> optax.GradientTransformation:
    """Returns the optimiser with followers: copies of the parameters at the start, then an exponential average of them.

    An update of a follower is ``(1 - rate) follower + rate student``. The followers are a part of the optimiser's state,
    so that checkpoints hold them, and a step that is skipped does not change them.

    Args:
      tx: the optimiser.
      follows: the followers by name.

    Example:
      >>> tx = with_followers(optax.sgd(1.0), {"teacher": Follow(0.5)})
      >>> params = jnp.array(0.0)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jnp.array(-4.0), state, params)  # the student moves from 0 to 4
      >>> float(state.followers["teacher"])
      2.0

    References:
      Tarvainen & Valpola, `Mean teachers are better role models <https://arxiv.org/abs/1703.01780>`_, 2017.
    """

    def init(params: PyTree) -> FollowState:
        copies = {name: jax.tree.map(jnp.copy, params) for name in follows}
        return FollowState(tx.init(params), jnp.zeros((), jnp.int32), copies)

    def update(updates: PyTree, state: PyTree, params: PyTree | None = None) -> tuple[PyTree, FollowState]:
        if params is None:
            raise ValueError("an optimiser with followers needs the parameters: tx.update(gradient, state, params).")
        updates, inner = tx.update(updates, state.inner, params)
        student, count = optax.apply_updates(params, updates), state.count + 1
        followers = {}
        for name, follow in follows.items():
            is_copy = (count == 1) & follow.copy_first
            rate = jnp.where(is_copy, 1.0, jnp.where(count % follow.every == 0, follow.rate, 0.0))
            mix = lambda old, new, rate=rate: (1 - rate.astype(old.dtype)) * old + rate.astype(old.dtype) * new
            followers[name] = jax.tree.map(mix, state.followers[name], student)
        return updates, FollowState(inner, count, followers)

    return optax.GradientTransformation(init, update)


def decays(params: PyTree, patterns: tuple[str, ...], frozen: Iterable[str] = ()) -> PyTree:
    """Returns a tree like `params` with True for each parameter that weight decay changes, as optax's masks require.

    Args:
      params: a tree of parameters.
      patterns: patterns of the paths of parameters without decay. A path is for example layers/3/attention_norm/scale.
        As in `fnmatch`, * stands for any characters, ? for one character, and [abc] for one of the characters a, b, c.
      frozen: the paths of further parameters that a pattern may match, which are not in the tree.

    Raises:
      ValueError: a pattern matches no parameter. The message lists the paths.
    """
    path = lambda keys: jax.tree_util.keystr(keys, simple=True, separator="/")
    paths = [path(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in (*paths, *frozen)):
            raise ValueError(
                f"optimizer.no_decay={pattern!r} matches no parameter. The parameters are {', '.join(_first_layer(paths))}."
            )
    excluded = lambda name: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    return jax.tree_util.tree_map_with_path(lambda keys, _: not excluded(path(keys)), params)


def _first_layer(paths: list[str]) -> list[str]:
    """Returns the paths of the first layer, and the paths outside the layers."""
    return [name for name in paths if not name.startswith("layers/") or name.startswith("layers/0/")]


def _with_masks() -> list[str]:
    """Returns the names of optax's optimisers that can exclude parameters from weight decay."""
    names = []
    # Deprecated names are not in vars(optax); reading a deprecated name would cause a warning.
    for name, function in vars(optax).items():
        if inspect.isfunction(function):
            parameters = inspect.signature(function).parameters
            if "learning_rate" in parameters and any(mask in parameters for mask in MASKS):
                names.append(name)
    return names
