"""The contrastive losses over the pairs of all ranks, at once or in parts.

    clip    which of all G texts is this picture's, and which picture is this text's: InfoNCE
    siglip  is this text this picture's, yes or no, for every pair (2303.15343)

Each rank scores its own pairs against all. The mean over ranks of the losses and gradients, which
is what DDP takes, equals that of a single process with the joint batch.

Shapes: B pairs of this rank, R of them at a time, G of all ranks, E joint width.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from glip import at_least_fp32, gather

# --- The losses: some pairs against columns -------------------------------------------------------


def clip_rows(
    images: Tensor, texts: Tensor, all_images: Tensor, all_texts: Tensor, own: Tensor,
    logit_scale: Tensor, logit_bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """CLIP: symmetric InfoNCE of some rows (R, E) against all (G, E), where they stand at `own`."""
    to_text = logit_scale * images @ all_texts.T                               # (R, G)
    to_image = logit_scale * texts @ all_images.T                              # (R, G)
    return (F.cross_entropy(to_text, own) + F.cross_entropy(to_image, own)) / 2


def siglip_rows(
    images: Tensor, texts: Tensor, all_images: None, some_texts: Tensor, own: Tensor,
    logit_scale: Tensor, logit_bias: Tensor,
) -> Tensor:  # fmt: skip
    """SigLIP: some rows (R, E) against texts (B, E); own (R,): where theirs is, -1 if nowhere."""
    logits = logit_scale * images @ some_texts.T + logit_bias                  # (R, B)
    theirs = own[:, None] == torch.arange(logits.shape[1], device=own.device)
    return -F.logsigmoid(torch.where(theirs, logits, -logits)).sum() / len(images)


LOSSES = {"clip": clip_rows, "siglip": siglip_rows}
IN_TURN = {"siglip"}  # sums over pairs: ranks may come one after the other
LOGITS = 2**22  # that exist at once on a CPU under --micro-batch
LOGIT_SHARE = 1 / 64  # of a GPU's memory, for the same
LOGIT_BYTES = 16  # four numbers at the highest, of either loss; see tests/test_runs.py


class Broadcast(torch.autograd.Function):
    """The features of the rank `source`, for all. (B, E) -> (B, E)."""

    @staticmethod
    def forward(ctx: object, features: Tensor, source: int) -> Tensor:
        ctx.source, lent = source, features.clone()
        dist.broadcast(lent, source)
        return lent

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        dist.reduce(grad, ctx.source)
        return grad if dist.get_rank() == ctx.source else torch.zeros_like(grad), None


def together() -> bool:
    """Whether several ranks train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sources_of(loss: str) -> Iterable[int | None]:
    """The sources of columns: all ranks at once (None), or one rank after the other."""
    return range(dist.get_world_size()) if loss in IN_TURN and together() else [None]


def columns(
    images: Tensor, texts: Tensor, loss: str, source: int | None
) -> tuple[Tensor | None, Tensor, Tensor]:
    """A source's images and texts, and the indices of this rank's rows among them, (B,)."""
    if source is None:
        all_images, all_texts, own = gather(images, texts)
        return None if loss in IN_TURN else all_images, all_texts, own
    here = torch.full((len(texts),), -1, device=texts.device)
    if source == dist.get_rank():
        here = torch.arange(len(texts), device=texts.device)
    return None, Broadcast.apply(texts, source), here


# --- All pairs at once, and in parts --------------------------------------------------------------


def contrastive_loss(
    loss: str, image_features: Tensor, text_features: Tensor, logit_scale: Tensor,
    logit_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A row of LOSSES in fp32 over the joint batch. (B, E), (B, E), () -> scalar."""
    images, texts = at_least_fp32(image_features), at_least_fp32(text_features)
    with torch.autocast(images.device.type, enabled=False):
        parts = [
            LOSSES[loss](
                images, texts, *columns(images, texts, loss, source), logit_scale, logit_bias
            )
            for source in sources_of(loss)
        ]
        return torch.stack(parts).sum()


def rows_at_once(micro_batch: int, everybody: int, memory: float) -> int:
    """How many rows of the loss, of `everybody` logits each, exist at once under --micro-batch.

    `memory`: a GPU's in bytes; 0 for a CPU, where results depend on the settings alone.
    """
    if memory:
        return max(1, int(memory * LOGIT_SHARE / LOGIT_BYTES) // everybody)
    return max(1, min(micro_batch, LOGITS // everybody))


def cached_gradients(
    loss: str, image_features: Tensor, text_features: Tensor, logit_scale: Tensor,
    logit_bias: Tensor | None, rows: int,
) -> tuple[Tensor, list[Tensor | None]]:  # fmt: skip
    """contrastive_loss and its gradients by each input, `rows` rows at a time.

    GradCache (2101.06983): features are numbers here, not functions of the model, so that no more
    than (rows, G) logits exist at once.
    """
    leaves = [
        None if x is None else at_least_fp32(x).detach().clone().requires_grad_()
        for x in (image_features, text_features, logit_scale, logit_bias)
    ]
    images, texts, total = *leaves[:2], torch.zeros_like(leaves[2])
    with torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
        for source in sources_of(loss):
            *others, own = columns(images, texts, loss, source)
            held = [None if x is None else x.detach().requires_grad_() for x in others]
            for part in torch.arange(len(own), device=own.device).split(rows):
                share = LOSSES[loss](images[part], texts[part], *held, own[part], *leaves[2:])
                share = share * (len(part) / len(own))
                share.backward()
                total = total + share.detach()
            found = [(x, copy.grad) for x, copy in zip(others, held, strict=True) if x is not None]
            torch.autograd.backward(*zip(*found, strict=True))  # at once: one exchange
    return total, [None if x is None else x.grad for x in leaves]
