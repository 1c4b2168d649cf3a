"""Regions of feature maps against PyTorch's grid sampling."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mros_jax.models.regions import cut_regions, resize_map, sampled_positions

SCALE = (0.9, 0.25)


def cut_theirs(x, shifts, size, align_corners):
    import torch
    from torch.nn import functional as F

    regions = []
    for shift in shifts.unbind(dim=1):
        theta = torch.zeros(len(x), 2, 3, dtype=x.dtype)
        theta[:, 0, 0], theta[:, 1, 1] = SCALE
        theta = torch.cat([theta[:, :, :2], shift[:, :, None]], dim=2)
        grid = F.affine_grid(theta, x.shape, align_corners=align_corners)
        window = F.grid_sample(x, grid, align_corners=align_corners)
        regions.append(F.interpolate(window, size, mode="bilinear", align_corners=True))
    return torch.stack(regions, dim=1)


@pytest.mark.parametrize("align_corners", [True, False])
def test_regions_and_their_gradients_are_those_of_grid_sample(align_corners, recorded):
    """Inside, over the edge and outside."""
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(2, 20, 8, 3)), rng.normal(size=(2, 5, 6, 7, 3))
    shifts = rng.uniform(-1.3, 1.3, (2, 5, 2))
    shifts[0, 0] = 3.0

    def compute():
        import torch

        maps, moved = torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(shifts)
        for tensor in (maps, moved):
            tensor.requires_grad_()
        regions = cut_theirs(maps, moved, (6, 7), align_corners).permute(0, 1, 3, 4, 2)
        (regions * torch.tensor(weights)).sum().backward()
        return {
            "regions": regions.detach(),
            "by_x": maps.grad.permute(0, 2, 3, 1),
            "by_shift": moved.grad,
        }

    expected = recorded(compute)

    cut = functools.partial(
        cut_regions, scale=SCALE, height=6, width=7, align_corners=align_corners
    )
    with jax.enable_x64(True):
        ours = jax.jit(cut)(x, shifts)
        by_x, by_shift = jax.jit(
            jax.grad(lambda x, s: jnp.sum(cut(x, s) * weights), argnums=(0, 1))
        )(x, shifts)
    np.testing.assert_allclose(ours, expected["regions"], atol=1e-12)
    assert not np.any(ours[0, 0])
    np.testing.assert_allclose(by_x, expected["by_x"], atol=1e-12)
    np.testing.assert_allclose(by_shift, expected["by_shift"], atol=1e-10)


@pytest.mark.parametrize(
    ("align_corners", "ends"), [(True, (4.539, 24.289)), (False, (4.221, 23.971))]
)
def test_rows_of_the_first_region_of_a_new_network(align_corners, ends):
    shift = jnp.array([-0.6351])  # tanh(-0.75)
    rows = sampled_positions(shift, 0.25, 80, align_corners=align_corners)[0]
    np.testing.assert_allclose([rows[0], rows[-1]], ends, atol=5e-4)


def test_gradient_at_a_whole_position_is_towards_the_next_pixel():
    """As PyTorch's; a new network's columns lie on whole positions."""
    x = jnp.array([0.0, 1.0, 3.0, 7.0, 4.0]).reshape(1, 5, 1, 1)

    def middle(shift):
        shifts = jnp.stack([jnp.zeros(()), shift]).reshape(1, 1, 2)
        cut = cut_regions(x, shifts, scale=(1, 1), height=5, width=1, align_corners=True)
        return cut[0, 0, 2, 0, 0]

    value, slope = jax.jit(jax.value_and_grad(middle))(0.0)
    assert float(value) == 3
    assert float(slope) == (7 - 3) * 2  # two pixels for a shift of 1


@pytest.mark.parametrize(("size", "out"), [((6, 5), (12, 9)), ((1, 3), (4, 3)), ((7, 4), (1, 2))])
def test_resize_is_pytorchs(size, out, recorded):
    x = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)

    def compute():
        import torch

        tensor = torch.from_numpy(x).permute(0, 3, 1, 2)
        resized = torch.nn.functional.interpolate(tensor, out, mode="bilinear", align_corners=True)
        return {"resized": resized.permute(0, 2, 3, 1)}

    ours = resize_map(jnp.asarray(x), *out)
    np.testing.assert_allclose(ours, recorded(compute)["resized"], atol=1e-6)
