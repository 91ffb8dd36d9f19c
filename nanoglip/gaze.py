"""Our mask: GLIP's densities go to the patches on which the loss depends most.

    pixels    a small network scores every patch of a picture; the mask ranks the patches by it
    backward  a training step gives the gradient of each kept patch's token; |gradient x token|,
              summed over the width, is how much the loss depends on the patch (to first order)
    update    cross-entropy between these numbers, as shares of their picture, and the softmax of
              the scores; one step of AdamW

The gradient is the training step's own, so there is no teacher and no further pass through a tower.
No gradient of the scores enters the model. The scores start as GLIP's log density, so that the mask
starts as GLIP. Shapes: B pictures, N patches of a (rows, columns) grid, K kept, D tower width.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from glip import ImageTower, at_least_fp32, log_gaussian, patchify

CELLS = 4  # a patch is seen as CELLS x CELLS of its pixels
HIDDEN = 32
LR = 3e-3  # searched, as the features and the start, on a validation vendor


class Gaze(nn.Module):
    """Scores of patches from pixels alone, and the optimizer that teaches them."""

    def __init__(self, grid: tuple[int, int], sigma: float | tuple, device: torch.device) -> None:
        super().__init__()
        self.grid = grid
        with torch.random.fork_rng(devices=[]):  # alike on all ranks; the model's seed is not used
            torch.manual_seed(0)
            self.look = nn.Linear(6 * CELLS**2, HIDDEN)
            self.judge = nn.Linear(HIDDEN, 1, bias=False)
        nn.init.zeros_(self.judge.weight)
        density, _ = log_gaussian(grid, sigma, (0.0, 0.0), torch.device("cpu"))
        self.position = nn.Parameter(density)                                  # (N,)
        self.to(device)
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=LR, fused=True)
        self.asked: list[Tensor] | None = None  # while it learns: scores of what a step keeps

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), bytes or in [0, 1] -> scores (B, N)."""
        height, width = images.shape[2:]
        down, across = (
            ((torch.arange(CELLS * n, device=images.device) + 0.5) / (CELLS * n) * side).long()
            for n, side in zip(self.grid, (height, width), strict=True)
        )  # the middle pixel of each cell
        colours = torch.arange(3, device=images.device)[:, None, None]
        places = (colours * height + down[:, None]) * width + across           # (3, cR, cC)
        places = patchify(places[None], self.grid).flatten()                   # (N 3cc,)
        x = images.flatten(1).gather(1, places.expand(len(images), -1))  # index_select is slower
        scale = 255 if images.dtype == torch.uint8 else 1
        x = x.unflatten(1, (len(self.position), -1)).to(self.position).mul_(4 / scale).sub_(2)
        x = x.unflatten(2, (3, -1))                                            # (B, N, 3, cc)
        contrast = x.sub(x.mean((1, 3), keepdim=True)).abs_()  # to the picture's mean colour
        self.seen = torch.cat([x, contrast], dim=2).flatten(2)                 # (B, N, 6cc)
        return self.judge(F.gelu(self.look(self.seen)))[..., 0].to(self.position) + self.position

    @torch.enable_grad()
    def keep(self, ids_keep: Tensor) -> None:
        """While it learns: score what is kept (B, K) of the pictures seen last, with a graph."""
        if self.asked is not None:
            rows = torch.arange(len(ids_keep), device=ids_keep.device)[:, None] * len(self.position)
            x = F.embedding(rows + ids_keep, self.seen.flatten(0, 1))          # (B, K, 6cc)
            place = F.embedding(ids_keep, self.position[:, None])              # (B, K, 1)
            self.asked.append((self.judge(F.gelu(self.look(x))) + place)[..., 0])
        del self.seen

    @contextlib.contextmanager
    def learning(self, tower: ImageTower) -> Iterator[None]:
        """Within it, forward and backward passes of one training step are learned from."""
        self.asked, found = [], []

        def watch(module: nn.Module, inputs: tuple, tokens: Tensor) -> None:
            x = at_least_fp32(tokens.detach()[:, 1:])                          # (B, K, D)
            if tokens.requires_grad:  # --micro-batch has passes without a graph, too
                tokens.register_hook(lambda grad: found.append(
                    (x * grad[:, 1:]).abs().sum(dim=-1)                        # (B, K)
                ))  # fmt: skip

        handle = tower.ln_pre.register_forward_hook(watch)
        try:
            yield
        finally:
            handle.remove()
            asked, self.asked = self.asked, None
        self.update(torch.cat(asked), torch.cat(found))

    def update(self, scores: Tensor, found: Tensor) -> None:
        """Move the scores (B, K) of kept patches towards what was found of them (B, K)."""
        shares = found / found.sum(dim=1, keepdim=True).clamp(min=1e-30)
        loss = -(shares * scores.log_softmax(dim=1)).sum(dim=1).mean()
        self.optimizer.zero_grad()
        loss.backward()
        if dist.is_initialized():
            grads = [p.grad for p in self.parameters()]
            joint = parameters_to_vector(grads) / dist.get_world_size()
            dist.all_reduce(joint)
            vector_to_parameters(joint, grads)
        self.optimizer.step()

    def state(self) -> dict:
        """Weights and optimizer, for a checkpoint."""
        return {"weights": self.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict) -> "Gaze":
        """The same gaze with a state()'s content."""
        self.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        return self
