"""The full A-CLIP (2212.08653, section 3): two attentively masked views, two more losses.

    picture -> teacher (an EMA of the image tower) -> attention map, a target feature
            -> two random crops, each masked by the map's part under it -> image tower
    loss    =  CLIP's, mean of the views  +  SimCLR between views  +  2 x BYOL to the teacher

`train.py --mask attentive` alone is one view and the contrastive loss; `--aclip` is all of this.
Differences from the published code. Heads have two layers, with LayerNorm instead of BatchNorm, so
that results do not depend on the number of processes. The teacher is the image tower and one head,
without a text tower. It sees the whole picture, not a random crop that encloses both views. Views
are resampled from the picture, without colour augmentation. Patches are kept one by one, not in
cells of 2 x 2. As there, the patch projection is frozen; we train it in the unmasked tuning, which
they do not have.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glip import GLIP, at_least_fp32, clip_loss, gather
from nanoglip.masker import Masker, attend, move_towards, scaled

HIDDEN, OUT = 4096, 256  # the heads' widths

TEMPERATURE, BYOL_WEIGHT = 0.1, 2.0

VIEW_DRAWS = 8  # numbers that two crops use


class AClip(nn.Module):
    """GLIP with the heads of the two image losses; the teacher's head follows as an EMA."""

    def __init__(self, model: GLIP) -> None:
        super().__init__()
        self.model = model
        model.visual.conv1.weight.requires_grad_(False)  # as they do, for stability
        self.contrast = head(model.config.width, OUT)
        self.project = head(model.config.width, OUT)
        self.predict = head(OUT, OUT)
        self.target = copy.deepcopy(self.project).requires_grad_(False)

    def forward(
        self, views: Tensor, tokens: Tensor, ids_keep: Tensor, visible: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Both views (2B, 3, H, W), texts (B, T) -> features, scale, two heads' outputs."""
        features = self.model.visual(views, ids_keep, visible)        # (2B, D)
        image_features = F.normalize(at_least_fp32(features @ self.model.visual.proj), dim=-1)
        return (
            image_features, self.model.encode_text(tokens), self.model.logit_scale.exp(),
            self.contrast(features), self.predict(self.project(features)),
        )  # fmt: skip

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Move the teacher's head towards the online one."""
        move_towards(self.target, self.project, momentum)


def head(width: int, out: int) -> nn.Sequential:
    """Two layers with LayerNorm. (B, width) -> (B, out)."""
    return nn.Sequential(
        nn.Linear(width, HIDDEN), nn.LayerNorm(HIDDEN), nn.GELU(), nn.Linear(HIDDEN, out)
    )


def aclip_loss(
    network: nn.Module, aclip: AClip, masker: Masker, images: Tensor, tokens: Tensor,
    noise: Tensor, draws: Tensor, scale: tuple[float, float],
) -> tuple[Tensor, Tensor, None]:  # fmt: skip
    """The loss of a batch with all its parts, logit_scale, and None: no patch is hidden.

    images (B, 3, H, W): whole pictures, squeezed into the square; tokens (B, T), noise (B, N),
    draws (B, VIEW_DRAWS + 1): the last is a picture's width / height before. `scale`: smallest and
    largest share of the area that a view covers. `network` is `aclip`, in DistributedDataParallel
    if there are several processes.
    """
    config = aclip.model.config
    with torch.no_grad():
        small = scaled(images, masker.settings["teacher_scale"])
        maps, target = attend(masker.teacher, small, features=True)             # (B, R, C), (B, D)
        target = aclip.target(target)
        *halves, aspect = draws.split(VIEW_DRAWS // 2, dim=1)
        boxes = [crop_boxes(half, aspect[:, 0], scale) for half in halves]
        views = torch.cat([crop(scaled(images, 1.0), box, config.pixels) for box in boxes])
        attention = torch.cat([crop(maps[:, None], box, config.grid) for box in boxes])
        ids_keep, visible = masker(
            views, noise.repeat(2, 1), aclip.model.visual, attention=attention.flatten(1)
        )
    image_features, text_features, logit_scale, contrast, predicted = network(
        views, tokens, ids_keep, visible
    )
    first, second = image_features.chunk(2)
    contrastive = (clip_loss(first, text_features, logit_scale)
                   + clip_loss(second, text_features, logit_scale)) / 2  # fmt: skip
    images_alone = simclr_loss(*contrast.chunk(2)) + BYOL_WEIGHT * byol_loss(predicted, target)
    return contrastive + images_alone, logit_scale, None


def simclr_loss(a: Tensor, b: Tensor) -> Tensor:
    """NT-Xent (2002.05709) in fp32 over the joint batch: find the other view. (B, OUT) twice."""
    a, b = (F.normalize(at_least_fp32(x), dim=-1) for x in (a, b))
    with torch.autocast(a.device.type, enabled=False):
        all_a, all_b, own = gather(a, b)
        self_pair = F.one_hot(own, len(all_a)).bool()

        def find(x: Tensor, same: Tensor, other: Tensor) -> Tensor:
            alike = (x @ same.T).masked_fill(self_pair, -torch.inf)
            return F.cross_entropy(torch.cat([x @ other.T, alike], dim=1) / TEMPERATURE, own)

        return (find(a, all_a, all_b) + find(b, all_b, all_a)) / 2


def byol_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """BYOL (2006.07733): the teacher's feature from each view's. (2B, OUT), (B, OUT) -> scalar."""
    target = at_least_fp32(target).repeat(2, 1)
    return (2 - 2 * F.cosine_similarity(at_least_fp32(predicted), target, dim=-1)).mean()


def crop_boxes(draws: Tensor, aspect: Tensor, scale: tuple[float, float]) -> Tensor:
    """Random boxes (top, left, height, width), shares of a picture's sides. (B, 4) -> (B, 4).

    Their own width / height, in pixels of a picture whose is `aspect` (B,), is 3/4 to 4/3; what
    would be wider or higher than the picture is cut.
    """
    area = scale[0] + draws[:, 0] * (scale[1] - scale[0])
    aspect = (3 / 4) ** (1 - 2 * draws[:, 1]) / aspect
    height, width = (area / aspect).sqrt().clamp(max=1), (area * aspect).sqrt().clamp(max=1)
    top, left = draws[:, 2] * (1 - height), draws[:, 3] * (1 - width)
    return torch.stack([top, left, height, width], dim=1)


def crop(images: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut boxes (B, 4) out of pictures or maps, bilinear. (B, C, H, W) -> (B, C, *size)."""
    (rows, columns), (top, left, height, width) = size, boxes[:, :, None].unbind(1)  # (B, 1) each
    y = top + height * (torch.arange(rows, device=boxes.device) + 0.5) / rows   # (B, rows)
    x = left + width * (torch.arange(columns, device=boxes.device) + 0.5) / columns
    points = torch.stack([
        x[:, None, :].expand(-1, rows, -1), y[:, :, None].expand(-1, -1, columns)
    ], dim=-1)  # fmt: skip
    return F.grid_sample(
        images.to(boxes), 2 * points - 1, padding_mode="border", align_corners=False
    )
