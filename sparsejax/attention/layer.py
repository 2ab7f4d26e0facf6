"""The attention layer: project, rotate, let the method attend, gate, project back."""

from flax import linen as nn
import jax
import jax.numpy as jnp

from sparsejax import sharding
from sparsejax.attention import make_method, method, rotary
from sparsejax.attention.product import Product


class Attention(nn.Module):
  """Grouped-query attention around any method (parameter names as in Hugging Face Llama).

  Letters: B batch, T tokens, E width, H query heads, K key/value heads, D head size.
  """

  width: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  options: method.Options
  kernel_init: nn.initializers.Initializer
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self,
    x_BTE,
    angles_BTD,
    segments_BT,
    use_full,
    stream: method.Stream,
    past: method.Earlier = None,
  ) -> tuple[jax.Array, jax.Array, method.Earlier]:
    """Returns the layer's output [B, T, E], its method's disagreement, a scalar, and its past.

    That is given while the model decodes or reads a prompt, and comes back with the tokens at
    hand.
    """
    q_BTHD = self._project("q_proj", "heads", self.num_heads)(x_BTE)
    k_BTKD = self._project("k_proj", "kv_heads", self.num_kv_heads)(x_BTE)
    v_BTKD = self._project("v_proj", "kv_heads", self.num_kv_heads)(x_BTE)
    # Before any pooling of keys into blocks, as SSA's released code does.
    q_BTHD, k_BTKD = rotary.rotate(q_BTHD, angles_BTD), rotary.rotate(k_BTKD, angles_BTD)
    q_BTHD = sharding.constrain(q_BTHD, "batch", "length", "heads", None)
    k_BTKD = sharding.constrain(k_BTKD, "batch", "length", "kv_heads", None)
    v_BTKD = sharding.constrain(v_BTKD, "batch", "length", "kv_heads", None)

    # For whoever looks: apply(..., mutable=["intermediates"]).
    self.sow("intermediates", "queries", q_BTHD)
    self.sow("intermediates", "keys", k_BTKD)
    self.sow("intermediates", "values", v_BTKD)

    gate_BTH = self._gate(x_BTE)
    tokens = method.Tokens(segments_BT, gate_BTH, use_full, x_BTE, angles_BTD)
    attend = make_method(self.options, self.kernel_init)
    attended = attend(q_BTHD, k_BTKD, v_BTKD, tokens, stream, past)
    out_BTHD = attended.out_BTHD
    if gate_BTH is not None:
      out_BTHD = out_BTHD * gate_BTH[..., None]
    out_BTE = self._product(
      "o_proj",
      "bthd,hde->bte",
      (self.num_heads, self.head_dim, self.width),
      ("heads", "head_dim", "embed"),
    )(out_BTHD)
    return out_BTE, attended.align, attended.past

  def _project(self, name: str, axis: str, heads: int) -> nn.Module:
    shape = (self.width, heads, self.head_dim)
    return self._product(name, "bte,ehd->bthd", shape, ("embed", axis, "head_dim"))

  def _product(self, name: str, equation: str, shape, axes) -> nn.Module:
    return Product(equation, shape, axes, self.kernel_init, self.dtype, name=name)

  def _gate(self, x_BTE) -> jax.Array | None:
    """A sigmoid per token and query head, of the normed layer input (as SSA's `g_proj`)."""
    if not self.options.gate:
      return None
    shape = self.width, self.num_heads
    return nn.sigmoid(self._product("g_proj", "bte,eh->bth", shape, ("embed", "heads"))(x_BTE))
