"""What only live comparisons share: random weights of PyTorch networks that compare well."""

import copy
from typing import Any

import torch


def to_numpy(tensor):
    return tensor.detach().numpy()


def randomise(model, calm=0, seed=0):
    """Random weights, and running statistics that are neither 0 nor 1.

    The last normalisation of each residual branch is scaled down, as it is in a trained network:
    with random weights at full scale, 16 blocks amplify rounding until PyTorch itself is 5e-5 away
    from its own float64 result.

    `calm` keeps all but one in `calm` channels nearly always on or off, so that few inputs of
    ReLUs come near 0 in many steps of training (see `widen_gaps`).
    """
    rng = torch.Generator().manual_seed(seed)

    def uniform(p, low, high):
        p.copy_(torch.rand(p.shape, generator=rng) * (high - low) + low)

    blocks = [m for m in model.modules() if hasattr(m, "bn2")]
    branch_ends = {getattr(block, "bn3", block.bn2) for block in blocks}
    joined = branch_ends | {b.downsample[1] for b in blocks if b.downsample is not None}
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                last = module in branch_ends
                uniform(module.weight, 0.05 if last else 0.5, 0.15 if last else 1.5)
                if module.bias.requires_grad:
                    uniform(module.bias, 0 if module in joined else -0.3, 0.3)
                    if calm:
                        on = torch.rand(module.bias.shape, generator=rng) < 0.7
                        sign = torch.where(on | (module in joined), 1.0, -1.0)
                        sign[::calm] = 0
                        module.bias.add_(sign * module.weight * 4.5)
                uniform(module.running_mean, -0.3, 0.3)
                uniform(module.running_var, 0.5, 2)
            elif isinstance(module, torch.nn.Conv2d):
                fan_in = module.weight[0].numel()
                module.weight.copy_(
                    torch.randn(module.weight.shape, generator=rng) * (2 / fan_in) ** 0.5
                )
                if module.bias is not None:
                    uniform(module.bias, -0.1, 0.1)
            elif isinstance(module, torch.nn.Linear):
                module.weight.copy_(torch.randn(module.weight.shape, generator=rng) * 0.02)
                if module.bias is not None:
                    uniform(module.bias, -0.1, 0.1)
    return model


@torch.no_grad()
def widen_gaps(model, images, monkeypatch):
    """Shift the biases a little, so that no input of a ReLU lies within rounding of 0.

    Among millions of inputs some do. They have gradient 0 in one framework and 1 in the other, each
    moves a channel's gradient by up to 1e-2, and PyTorch in float32 disagrees with PyTorch in
    float64 as much. Here 0 comes to lie in the middle of a wide gap between a channel's values.
    """
    statistics = copy.deepcopy(dict(model.named_buffers()))
    called: list[Any] = []

    def relu(x):
        values = x.transpose(0, 1).flatten(1).sort(dim=1).values  # (C, values)
        middles, gaps = (values[:, 1:] + values[:, :-1]) / 2, values.diff(dim=1)
        near = middles.abs() <= 0.3 * values.std(dim=1, keepdim=True)
        best = torch.where(near, gaps, -1).argmax(dim=1, keepdim=True)
        shift = torch.where(near.any(dim=1), -middles.gather(1, best)[:, 0], 0)
        called[-1].bias += shift
        return torch.relu(x + shift.reshape(-1, *[1] * (x.ndim - 2)))

    hooks = [
        module.register_forward_hook(lambda module, *_: called.append(module))
        for module in model.modules()
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
    ]
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "relu", relu)
        model.train()(images)
    for hook in hooks:
        hook.remove()
    for name, buffer in model.named_buffers():
        buffer.copy_(statistics[name])
