"""The lottery training step as a careful PyTorch user writes it; only benchmarks import this."""

from collections.abc import Callable

import numpy as np


def lenet_loop(
    images: np.ndarray, labels: np.ndarray, index: np.ndarray, *, hidden, lr: float, density: float | None
) -> Callable[[], None]:
    """A function that runs one optimizer step per row of `index` [T, B] on `images` [N, F] float32, `labels` [N].

    Fused Adam, data in memory, no data loader. With `density` the gradients are multiplied by a random mask of that
    density, as masked training does; with None nothing is masked. Subnormal numbers are flushed to zero, as XLA does:
    without that PyTorch is three times slower here once moments have decayed.
    """
    import torch

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    sizes = [images.shape[1], *hidden, 10]
    layers: list[torch.nn.Module] = []
    for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [torch.nn.Linear(fan_in, fan_out), torch.nn.ReLU()]
    net = torch.nn.Sequential(*layers[:-1])
    masks = [(torch.rand_like(p) < density).float() if density and p.ndim == 2 else None for p in net.parameters()]
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, fused=True)
    x, y = torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))
    blocks = torch.from_numpy(index.astype(np.int64))

    def run() -> None:
        for rows in blocks:
            loss = torch.nn.functional.cross_entropy(net(x[rows]), y[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for p, mask in zip(net.parameters(), masks, strict=True):
                if mask is not None and p.grad is not None:
                    p.grad.mul_(mask)
            optimizer.step()

    return run
