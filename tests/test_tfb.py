"""The training-free posterior around a trained adapter."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cheap import compiled, key_of, normal

from probbp.models import blob, tfb

OUT, IN, RANK = 5, 7, 3
BASE = {"w": normal(0, IN, OUT)}


def network(params, x):
    return x @ params["w"]


def adapter(out=OUT, rank=RANK):
    base = {"w": BASE["w"][:, :out]}
    lora = blob.bayesian_lora(network, base, target="w", example=(jnp.ones((2, IN)),), rank=rank)
    params = {"w_loc": normal(1, rank, IN), "w_B": normal(2, out, rank)}
    return lora, base, params


@pytest.mark.parametrize("out", [OUT, 2])  # 2: fewer outputs than rows of A
def test_the_mean_stays(out):
    lora, base, params = adapter(out)
    x = normal(2, 4, IN)

    @compiled
    def means(params):
        posterior = tfb.training_free(lora, params, 0.3)
        return [
            blob.predict(lora, key_of(0), p, base, x, num_samples=0)
            for p in (params | {"w_g": params["w_loc"]}, posterior)
        ]

    np.testing.assert_allclose(*means(params), rtol=1e-9)


@pytest.mark.parametrize("out", [OUT, 2])
def test_the_noise_of_the_update_is_isotropic(out):
    """B' diag(sigma / d) has columns of length sigma: the covariance of a column is a projector."""
    lora, _, params = adapter(out)
    posterior = compiled(lambda p: tfb.training_free(lora, p, 0.3))(params)
    omega = posterior["w_g"] ** 2
    covariance = (posterior["w_B"] * omega[:, 0] ** 2) @ posterior["w_B"].T
    span = np.linalg.svd(params["w_B"], full_matrices=False)[0]
    np.testing.assert_allclose(covariance, 0.09 * span @ span.T, atol=1e-9)
    np.testing.assert_allclose(omega, np.broadcast_to(omega[:, :1], omega.shape))


def test_unused_directions_stay_quiet():
    lora, _, params = adapter()
    params = params | {"w_B": params["w_B"][:, [0, 1, 0]]}
    posterior = compiled(lambda p: tfb.training_free(lora, p, 0.3))(params)
    assert np.all(np.isfinite(posterior["w_g"]))
    assert (posterior["w_g"][:, 0] == 0).sum() == 1


def test_the_search_finds_what_the_loss_allows():
    for tolerance in (0.003, 0.1):
        sigma = compiled(partial(tfb.search, lambda s: 2 + s, tolerance=tolerance, num_steps=30))()
        # The loss at the lower bound, 1e-4, is the one to compare with.
        np.testing.assert_allclose(2 + sigma, (2 + 1e-4) * (1 + tolerance), rtol=1e-6)
    # A loss that feels nothing leaves the upper bound.
    sigma = compiled(partial(tfb.search, lambda s: 1 + 0 * s, num_steps=30))()
    np.testing.assert_allclose(sigma, 1.0, rtol=1e-6)


def test_bad_input():
    with pytest.raises(ValueError, match="positive and increasing"):
        tfb.search(lambda s: s, bounds=(1.0, 0.1))

    def stacked(params, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, params["w"])[0]

    base = {"w": np.ones((3, IN, IN))}
    lora = blob.bayesian_lora(stacked, base, target="w", example=(np.ones((2, IN)),))
    params = {"w_loc": np.ones((3, 8, IN)), "w_B": np.ones((3, IN, 8))}
    with pytest.raises(ValueError, match="adapt unstacked layers"):
        tfb.training_free(lora, params, 0.1)
