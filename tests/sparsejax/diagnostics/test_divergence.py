import jax.numpy as jnp
import numpy as np

from sparsejax.diagnostics import divergence


def test_divergence_of_predictions_is_that_of_the_definition():
  rng = np.random.default_rng(0)
  full, sparse = rng.standard_normal((2, 2, 11, 6))
  table = rng.standard_normal((9, 6))
  actual = divergence.from_full(*map(jnp.asarray, (full, sparse, table)), chunk_length=4)
  p, q = (np.exp(x @ table.T) for x in (full, sparse))
  p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
  assert actual.shape == (2, 11)
  np.testing.assert_allclose(actual, (p * np.log(p / q)).sum(-1), atol=1e-5)
