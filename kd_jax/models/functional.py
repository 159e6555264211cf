"""A model as pure functions of (params, tokens). Only this file splits and merges NNX modules."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from kd_jax.models.attention import Cache
from kd_jax.models.config import ModelConfig
from kd_jax.models.transformer import Transformer

Params = PyTree  # a nested dict of arrays with string keys
# A function from the tree of abstract parameters to a tree of `jax.sharding.Sharding` of the same structure.
Shardings = Callable[[Params], PyTree]
ATTENTION = ("plain", "xla", "cudnn")
FEW_ROWS = 32  # With 2 rows to this number, a CPU's product with a tied head is faster with the head on the left.


@dataclasses.dataclass(frozen=True)
class Model:
    """A language model without its parameters.

    A model is hashable, so jit can close over it or take it as a static argument.

    Args:
      config: the sizes and settings.
      dtype: the type of the computation. Norms, softmax and logits are always float32.
      param_dtype: the type of the parameters that `init` makes. `hidden` accepts any type and casts.
      remat: 'none', or the name of a policy in `jax.checkpoint_policies`. The policy decides which values of a block
        stay in memory for the backward pass; the others are computed again.
      attention: 'plain' for this project's own attention, which holds the scores in memory; or an implementation of
        `jax.nn.dot_product_attention`, 'xla' or 'cudnn'. 'cudnn' is flash attention in half precision, for sequences of
        even length on an NVIDIA GPU of the Ampere generation or later. With a cache, attention is always plain.

    Raises:
      ValueError: the name of the attention is unknown.
    """

    config: ModelConfig
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    remat: str = "none"
    attention: str = "plain"

    def __post_init__(self) -> None:
        if self.attention not in ATTENTION:
            raise ValueError(f"attention={self.attention!r} must be one of {', '.join(ATTENTION)}.")
        # jnp.float32, "float32" and np.dtype("float32") must give equal models, or jit would trace the model three
        # times.
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        object.__setattr__(self, "param_dtype", jnp.dtype(self.param_dtype))

    def init(self, key: Array, shardings: Shardings | None = None) -> Params:
        """Returns random parameters from N(0, 0.02).

        The matrices that write to the residual stream are multiplied by 1 / sqrt(2 num_layers).

        Args:
          key: a key from `jax.random.key`.
          shardings: a function from the abstract parameters to their shardings, which do not change the values.

        Returns:
          A plain nested dict with string keys, such as params["layers"]["0"]["attention"]["query"]["kernel"].
        """
        out_shardings = None if shardings is None else shardings(self.abstract_params())
        return jax.jit(lambda key: _pure(nnx.state(_module(self, key))), out_shardings=out_shardings)(key)

    def abstract_params(self) -> Params:
        """Returns the parameters' tree with a `jax.ShapeDtypeStruct` for each array."""
        return jax.tree.map(lambda leaf: leaf, _split(self)[1])  # a copy, because callers must not edit the cached tree

    def hidden(
        self, params: Params, tokens: Int[Array, "B L"], mask: Bool[Array, "B L"] | Int[Array, "B L"] | None = None
    ) -> Float[Array, "B L D"]:
        """Returns the hidden states after the final norm. Their product with `head`, below the cap, is the logits.

        Args:
          params: the parameters from `init` or `load_pretrained`; matrices may be in int8.
          tokens: the token ids.
          mask: True where there is a token. Padding on the left or right does not change the result at real tokens. At
            padding the values are finite and have no meaning. For packed rows, the mask holds the number of each
            token's segment, and 0 where there is no token. A segment attends only to itself, and its positions start at
            0.

        Raises:
          ValueError: a sequence is longer than the model's learned positions.
        """
        return self._apply(params, tokens, mask, None)[0]

    def hidden_by_layers(
        self, params: Params, layer: Callable[[int], Params], tokens: Int[Array, "B L"], mask: Bool[Array, "B L"]
    ) -> Float[Array, "B L D"]:
        """Returns `hidden` of a model with only one layer in memory at a time. The method cannot be traced.

        Args:
          params: all parameters except the layers; further entries are ignored.
          layer: a function from the number of a layer to the layer's parameters.
          tokens, mask: the arrays that `hidden` takes.
        """
        last = self.config.num_layers - 1

        def after(i: int, x: Array | None) -> Array:
            one = dataclasses.replace(self, config=self.config.with_layers([i]))
            x = _one_layer(one, {**params, "layers": {"0": layer(i)}}, x, tokens, mask, last=i == last)
            return x.block_until_ready()  # wait, so that the next layer is read only when this one is done

        x = after(0, None)
        for i in range(1, last + 1):
            x = after(i, x)
        return x

    def head(self, params: Params) -> Float[Array, "D V"]:
        """Returns the output matrix in the type of the computation; for tied embeddings, the transposed embedding."""
        matrix, tied = self.stored_head(params)
        return matrix.T if tied else matrix

    def stored_head(self, params: Params) -> tuple[Array, bool]:
        """Returns the output matrix as it is stored, and True if it is the tied embedding [V, D]."""
        tied = self.config.tie_embeddings
        return (params["embed"]["embedding"] if tied else params["head"]["kernel"]).astype(self.dtype), tied

    @property
    def logit_cap(self) -> float | None:
        """The cap of the logits, which `project` applies and which every other reader of `head` must apply."""
        return self.config.logit_cap

    def logits(
        self, params: Params, tokens: Int[Array, "B L"], mask: Bool[Array, "B L"] | None = None
    ) -> Float[Array, "B L V"]:
        """Returns the scores of the token after each position, in float32. The arguments are as in `hidden`."""
        return self.project(params, self.hidden(params, tokens, mask))

    def project(self, params: Params, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Returns the logits of hidden states, in float32: cap * tanh(hidden @ head / cap), or hidden @ head without a cap."""
        matrix, tied = self.stored_head(params)
        if tied and hidden.ndim == 2 and 1 < len(hidden) <= FEW_ROWS and jax.default_backend() == "cpu":
            # With the embedding on the left, a CPU reads the embedding without a transposition. Without the barrier
            # XLA would swap the sides back.
            scores = jnp.matmul(matrix, hidden.T, preferred_element_type=jnp.float32)
            scores = jax.lax.optimization_barrier(scores).T
        else:
            scores = jnp.matmul(hidden, matrix.T if tied else matrix, preferred_element_type=jnp.float32)
        cap = self.logit_cap
        return scores if cap is None else cap * jnp.tanh(scores / cap)

    def init_cache(self, batch: int, length: int) -> Cache:
        """Returns an empty cache for `length` tokens, padding included."""
        config = self.config
        heads, layers = (batch, config.num_kv_heads), range(config.num_layers)
        keys = tuple(jnp.zeros((*heads, config.head_dim, length), self.dtype) for _ in layers)
        values = tuple(jnp.zeros((*heads, length, config.head_dim), self.dtype) for _ in layers)
        tokens = None if config.rotary.restart_length is None else jnp.zeros((batch, length), jnp.int32)
        return Cache(keys, values, jnp.zeros((batch, length), bool), jnp.int32(0), tokens)

    def extend(
        self, params: Params, tokens: Int[Array, "B L"], mask: Bool[Array, "B L"] | None, cache: Cache
    ) -> tuple[Float[Array, "B L D"], Cache]:
        """Returns `hidden` of tokens that follow the tokens in the cache, and the cache with the new tokens added."""
        hidden, extended = self._apply(params, tokens, mask, cache)
        assert extended is not None  # because a cache is given
        return hidden, extended

    def _apply(
        self, params: Params, tokens: Array, mask: Array | None, cache: Cache | None
    ) -> tuple[Array, Cache | None]:
        length = tokens.shape[1] if cache is None else cache.mask.shape[1]
        if self.config.learned_positions and length > self.config.max_positions:
            raise ValueError(
                f"a sequence of {length} tokens is longer than the {self.config.max_positions} positions "
                f"that this {self.config.family} model has learned; shorten the sequence."
            )
        return nnx.merge(_split(self)[0], params)(tokens, mask, cache)


def from_config(
    config: ModelConfig,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    remat: str = "none",
    attention: str = "plain",
) -> Model:
    """Returns a model that computes in `dtype` on parameters in `param_dtype`.

    `model.init(key)` makes random parameters. bfloat16 with float32 parameters is the usual choice for training on an
    accelerator. float16 is only for models that are not trained, because small gradients become 0 in float16.

    Args:
      config, dtype, param_dtype, remat, attention: the arguments of `Model`.

    Returns:
      A `Model`, which holds no arrays.

    Example:
      >>> import jax
      >>> config = ModelConfig(family="gpt2", vocab_size=11, hidden_size=8, num_layers=1, num_heads=2)
      >>> model = from_config(config)
      >>> params = model.init(jax.random.key(0))
      >>> model.logits(params, jax.numpy.zeros((1, 3), int)).shape
      (1, 3, 11)
    """
    return Model(config, dtype, param_dtype, remat, attention)


def take_layers(model: Model, params: Params, layers: Sequence[int]) -> tuple[Model, Params]:
    """Returns a student that consists of chosen layers of a teacher, in the chosen order.

    All other parameters stay the same. This is the usual start of a student with fewer layers. The arrays are shared
    with `params`, not copied.

    Args:
      model: the teacher.
      params: the teacher's parameters.
      layers: indices from 0 to num_layers - 1; an index may appear twice.

    Returns:
      The student and the student's parameters.

    Raises:
      ValueError: there is no layer, or an index is outside the range.

    References:
      Sanh et al., "DistilBERT", https://arxiv.org/abs/1910.01108, 2019, section 3.
    """
    depth = model.config.num_layers
    if not layers or any(not 0 <= layer < depth for layer in layers):
        raise ValueError(f"layers={list(layers)} must name at least one layer, each from 0 to {depth - 1}.")
    config = model.config.with_layers(layers)
    chosen = {str(new): params["layers"][str(old)] for new, old in enumerate(layers)}
    return dataclasses.replace(model, config=config), {**params, "layers": chosen}


@functools.partial(jax.jit, static_argnames=("model", "last"))
def _one_layer(model: Model, params: Params, x: Array | None, tokens: Array, mask: Array, last: bool) -> Array:
    module = nnx.merge(_split(model)[0], params)
    first, context, _ = module.begin(tokens, mask, None)
    x, _ = module.layers["0"](first if x is None else x, context)
    return module.end(x) if last else x


def _module(model: Model, key: Array) -> Transformer:
    return Transformer(model.config, model.dtype, model.param_dtype, model.remat, model.attention, nnx.Rngs(key))


@functools.lru_cache(maxsize=64)
def _split(model: Model) -> tuple[nnx.GraphDef[Transformer], Params]:
    graph, state = nnx.split(nnx.eval_shape(lambda: _module(model, jax.random.key(0))))
    return graph, _pure(state)


def _pure(state: nnx.State) -> Params:
    return nnx.to_pure_dict(state)
