"""Every mask of the registry; each against its paper's rule, by means that are not its code."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage import filters
from torch import nn
from torch.distributions import MultivariateNormal

import data
import glip
from glip import GLIP, GLIPConfig, InputError, num_keep, patchify
from nanoglip import masks
from nanoglip.config import TrainConfig, check
from nanoglip.gaze import Gaze
from nanoglip.masker import Masker, attend, scaled
from nanoglip.masks import MASKS, sample_mask
from nanoglip.sources import emoji
from nanoglip.sources.order import Batches, ConceptOrder

TINY = GLIPConfig(32, 4, 24, 2, 3, 10, 20, 1, 2)  # 8 x 8 patches


def noise_of(batch, n, seed=0):
    return torch.rand(batch, n, generator=torch.Generator().manual_seed(seed))


def sample_ids_keep(*args, **kwargs):
    return sample_mask(*args, **kwargs)[0]


def inputs_of(batch, grid, seed=0):
    """Whatever a row may declare: pictures of 4-pixel patches, a teacher's attention, a gaze."""
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.rand(batch, 3, 4 * rows, 4 * columns, generator=draw)
    attention = torch.rand(batch, rows * columns, generator=draw).softmax(1)
    gaze = torch.randn(batch, rows * columns, generator=draw)
    return {"pixels": pixels, "attention": attention, "gaze": gaze}


def keep_map(mask, ratio, sigma=0.2, draws=4000, grid=(14, 14), seed=0):
    """How often each patch is kept: (rows, columns)."""
    n = grid[0] * grid[1]
    ids = sample_ids_keep(mask, draws, grid, ratio, sigma=sigma, noise=noise_of(draws, n, seed))
    return torch.bincount(ids.flatten(), minlength=n).view(grid) / draws


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("grid", [8, (14, 14), (3, 7), (1, 5), (6, 1), 1])
@pytest.mark.parametrize("ratio", [0, 0.3, 0.75, 0.918])
@pytest.mark.parametrize("batch", [1, 5])
def test_every_mask_keeps_k_distinct_patches(mask, grid, ratio, batch):
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    noise = noise_of(batch, rows * columns)
    inputs = inputs_of(batch, grid)
    ids, visible = sample_mask(mask, batch, grid, ratio, noise=noise, **inputs)
    varies = "min_mask_ratio" in masks.required_inputs(MASKS[mask])
    computed = max(0, ratio - 0.2) if varies else ratio
    k = rows * columns if mask == "none" else num_keep(rows * columns, computed)
    assert ids.shape == (batch, k) and ids.dtype == torch.int64
    assert all(len(set(row)) == k for row in ids.tolist())
    assert ids.min() >= 0 and ids.max() < rows * columns
    assert visible is None or visible.shape == ids.shape
    again = sample_ids_keep(mask, batch, grid, ratio, noise=noise.clone(), **inputs)
    assert torch.equal(ids, again)


@pytest.mark.parametrize("mask", [m for m in MASKS if m != "none"])
def test_masks_depend_on_their_inputs_and_on_nothing_global(mask):
    inputs, found = inputs_of(4, 8), []
    for seed in (7, 7, 8):
        torch.manual_seed(len(found))
        draw = torch.Generator().manual_seed(seed)
        found.append(sample_ids_keep(mask, 4, 8, 0.5, generator=draw, **inputs))
    assert torch.equal(found[0], found[1])
    if mask in {"random", "gaussian", "gumbel", "grid", "block", "cluster", "pgs", "gaze"}:
        assert not torch.equal(found[0], found[2])
    # A sample's mask does not depend on who else is in the batch.
    noise, inputs = noise_of(6, 64), inputs_of(6, 8)
    part = {name: values[2:4] for name, values in inputs.items()}
    whole = sample_mask(mask, 6, 8, 0.5, noise=noise, threshold=0.1, **inputs)
    alone = sample_mask(mask, 2, 8, 0.5, noise=noise[2:4], threshold=0.1, **part)
    for a, b in zip(whole, alone, strict=True):
        assert a is b is None or torch.equal(a[2:4], b)


@pytest.mark.parametrize(
    ("n", "ratio", "k"),
    [(196, 0.5, 98), (196, 0.75, 49), (196, 0.918, 16), (196, 0.9, 20), (100, 0.9, 10),
     (10, 0.9, 1), (10, 0.99, 1), (64, 0.75, 16), (196, 0, 196), (1, 0.5, 1)],
)  # fmt: skip
def test_num_keep(n, ratio, k):
    assert num_keep(n, ratio) == k


def test_none_keeps_everything_in_reading_order():
    ids = sample_ids_keep("none", 2, (3, 4), 0.5, noise=noise_of(2, 12))
    assert torch.equal(ids, torch.arange(12).expand(2, 12))


@pytest.mark.parametrize("sigma", [0.05, 0.1, 0.2, 0.8])
@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.918])
def test_gaussian_keeps_the_authors_sets(sigma, ratio):
    """Their score is u - (1 - pdf), the pdf's covariance diag(sigma, sigma), in float64."""
    noise = noise_of(256, 196)
    axis = torch.linspace(-1, 1, 14, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    covariance = torch.eye(2, dtype=torch.float64) * sigma
    density = MultivariateNormal(torch.zeros(2, dtype=torch.float64), covariance)
    scores = noise.double() - (1 - density.log_prob(points).exp())
    wanted = scores.topk(num_keep(196, ratio)).indices.sort().values
    ours = sample_ids_keep("gaussian", 256, 14, ratio, sigma=sigma, noise=noise).sort().values
    same = (wanted == ours).all(dim=1)
    assert same.sum() >= 255  # float32 may break one near-tie in 256


# Keep-probabilities of the authors' rule on 14 x 14, made independently of this code with 4,000
# draws: (sigma or None for random, ratio, 4 centre patches, inner 6 x 6, outer ring, corners).
TABLE = [
    (None, 0.5, 0.50, 0.50, 0.50, 0.51),
    (0.1, 0.5, 1.00, 0.95, 0.34, 0.34),
    (0.2, 0.5, 1.00, 0.86, 0.33, 0.30),
    (0.8, 0.5, 0.57, 0.55, 0.46, 0.43),
    (0.1, 0.75, 1.00, 0.81, 0.06, 0.06),
    (0.2, 0.75, 0.82, 0.62, 0.08, 0.05),
    (0.8, 0.75, 0.32, 0.30, 0.21, 0.18),
    (0.1, 0.918, 1.00, 0.44, 0.000, 0.000),
    (0.2, 0.918, 0.55, 0.36, 0.000, 0.000),
    (0.8, 0.918, 0.15, 0.14, 0.04, 0.01),
]


@pytest.mark.parametrize(("sigma", "ratio", "centre", "inner", "ring", "corners"), TABLE)
def test_keep_probabilities(sigma, ratio, centre, inner, ring, corners):
    often = keep_map("gaussian" if sigma else "random", ratio, sigma or 0.2)
    rim = torch.cat([often[0], often[-1], often[1:-1, 0], often[1:-1, -1]])
    found = (
        often[6:8, 6:8].mean(), often[4:10, 4:10].mean(), rim.mean(), often[::13, ::13].mean(),
    )  # fmt: skip
    # Two Monte Carlo errors of at most 0.004 (4 patches x 4,000 draws) and the table's rounding.
    assert torch.stack(found).tolist() == pytest.approx((centre, inner, ring, corners), abs=0.02)


def test_strong_gaussian_always_keeps_the_centre():
    ids = sample_ids_keep("gaussian", 4000, 14, 0.5, sigma=0.1, noise=noise_of(4000, 196))
    for centre in (90, 91, 104, 105):
        assert (ids == centre).any(dim=1).all()


def test_high_ratio_never_shows_half_of_the_patches():
    """Why masked pre-training at 91.8 % must be tuned: 95 of 196 positions are never trained."""
    assert 80 <= (keep_map("gaussian", 0.918) == 0).sum() <= 110
    assert (keep_map("random", 0.918) == 0).sum() == 0


@pytest.mark.parametrize("flip", range(8))
def test_gaussian_has_the_symmetries_of_the_square(flip):
    def moved(square):  # one of 4 rotations, and of these mirrored
        square = square.rot90(flip % 4, (-2, -1))
        return square.mT if flip >= 4 else square

    noise = noise_of(64, 196)
    ids = sample_ids_keep("gaussian", 64, 14, 0.75, noise=noise)
    kept = torch.zeros(64, 196).scatter_(1, ids, 1)
    noise = moved(noise.view(64, 14, 14)).reshape(64, 196)
    ids = sample_ids_keep("gaussian", 64, 14, 0.75, noise=noise)
    kept_moved = torch.zeros(64, 196).scatter_(1, ids, 1)
    assert torch.equal(moved(kept.view(64, 14, 14)).reshape(64, 196), kept_moved)


def test_infinitely_wide_gaussian_is_flip():
    noise = noise_of(64, 196)
    wide = sample_ids_keep("gaussian", 64, 14, 0.75, sigma=1e9, noise=noise)
    assert torch.equal(wide, sample_ids_keep("random", 64, 14, 0.75, noise=noise))


def test_random_is_uniform():
    often = keep_map("random", 0.75, draws=20_000, grid=(5, 8))
    deviation = (often - 0.25) / math.sqrt(0.25 * 0.75 / 20_000)
    assert deviation.abs().max() < 4.5


def test_two_sigmas_are_rows_and_columns():
    tall = keep_map("gaussian", 0.75, (0.8, 0.1))
    wide = keep_map("gaussian", 0.75, (0.1, 0.8))
    assert (tall - wide.T).abs().max() < 0.05
    assert tall[0].mean() > 2 * tall[:, 0].mean()
    assert torch.equal(keep_map("gaussian", 0.75, (0.2, 0.2)), keep_map("gaussian", 0.75, 0.2))


def test_weighted_sampling_keeps_the_rim_six_times_less_often():
    """As gaussian_scores says."""
    rim = torch.ones(14, 14, dtype=torch.bool)
    rim[1:-1, 1:-1] = False
    added, weighted = (keep_map(mask, 0.5, 0.1)[rim].mean() for mask in ("gaussian", "gumbel"))
    assert 5 < added / weighted < 7
    assert keep_map("gumbel", 0.918)[rim].mean() > 0.005 > keep_map("gaussian", 0.918)[rim].mean()


@pytest.mark.parametrize("ratio", [0.5, 0.9])
def test_gumbel_is_torchs_weighted_sampling_without_replacement(ratio):
    axis = torch.linspace(-1, 1, 8)
    weight = torch.exp(-(axis[:, None] ** 2 + axis[None] ** 2) / (2 * 0.2)).flatten()
    draw = torch.Generator().manual_seed(3)
    k = num_keep(64, ratio)
    theirs = torch.multinomial(weight.expand(20_000, 64), k, generator=draw)
    often = torch.bincount(theirs.flatten(), minlength=64).view(8, 8) / 20_000
    ours = keep_map("gumbel", ratio, 0.2, draws=20_000, grid=(8, 8))
    assert (often - ours).abs().max() < 0.02  # 4 standard errors of a difference


def test_center_crop_is_the_nearest_patches_without_noise():
    ids = sample_ids_keep("center-crop", 3, 8, 0.75, noise=noise_of(3, 64))
    square = [8 * row + column for row in range(2, 6) for column in range(2, 6)]
    assert all(sorted(row) == square for row in ids.tolist())
    noise = noise_of(1, 45)
    moved = sample_ids_keep("center-crop", 1, (5, 9), 0.9, noise=noise, mask_center=(-1, 1))
    assert sorted(moved[0].tolist()) == [6, 7, 8, 17]  # around the upper right corner


@pytest.mark.parametrize("mask", ["gaussian", "gumbel", "center-crop"])
def test_a_moved_centre_moves_the_mask(mask):
    often = {
        centre: torch.zeros(64).scatter_add_(
            0, sample_ids_keep(mask, 2000, 8, 0.75, noise=noise_of(2000, 64),
                               mask_center=centre)
            .flatten(), torch.ones(2000 * 16)).view(8, 8) / 2000
        for centre in ((0.0, 0.0), (-0.5, 0.0), (0.0, 0.5))
    }  # fmt: skip
    middle = {c: ndimage.center_of_mass(m.numpy()) for c, m in often.items()}
    assert middle[0.0, 0.0] == pytest.approx((3.5, 3.5), abs=0.05)
    assert middle[-0.5, 0.0][0] < 2.8 and middle[-0.5, 0.0][1] == pytest.approx(3.5, abs=0.05)
    assert middle[0.0, 0.5][1] > 4.2 and middle[0.0, 0.5][0] == pytest.approx(3.5, abs=0.05)


def kept_maps(mask, ratio, grid, draws=300, **inputs):
    n = grid[0] * grid[1]
    ids = sample_ids_keep(mask, draws, grid, ratio, noise=noise_of(draws, n), **inputs)
    return torch.zeros(draws, n, dtype=torch.int).scatter_(1, ids, 1).view(draws, *grid)


@pytest.mark.parametrize("ratio", [0.75, 0.5, 0.918, 0.3])
@pytest.mark.parametrize("grid", [(8, 8), (14, 14), (6, 10)])
def test_grid_is_as_even_as_k_allows(grid, ratio):
    kept = kept_maps("grid", ratio, grid)
    cells = kept.unfold(1, 2, 2).unfold(2, 2, 2).sum(dim=(-2, -1))             # (draws, R, C)
    assert cells.amax() - cells.amin() <= 1
    if ratio == 0.75:
        assert (cells == 1).all()
    often = kept.float().mean(0)  # and no place in a cell is preferred
    assert (often - often.mean()).abs().max() < 5 * math.sqrt(0.25 / 300)


def test_grid_serves_incomplete_cells():
    kept = kept_maps("grid", 0.6, (5, 7))
    assert (kept[:, :4, :6].unfold(1, 2, 2).unfold(2, 2, 2).sum(dim=(-2, -1)) >= 1).all()


@pytest.mark.parametrize("ratio", [0.75, 0.5, 0.918])
@pytest.mark.parametrize("grid", [(8, 8), (14, 14), (5, 9)])
def test_block_is_contiguous_and_lies_anywhere(grid, ratio):
    kept = kept_maps("block", ratio, grid)
    for square in kept.numpy():
        assert ndimage.label(square, np.ones((3, 3)))[1] == 1
    assert (kept.float().mean(0) > 0).all()
    # Around the patch of the highest noise, whole rings and a part of the last one.
    for square, middle in zip(kept, noise_of(300, grid[0] * grid[1]).argmax(1), strict=True):
        seed = np.zeros(grid)
        seed[divmod(int(middle), grid[1])] = 1
        rings = ndimage.distance_transform_cdt(1 - seed, metric="chessboard")
        inside, outside = rings[square.bool().numpy()], rings[~square.bool().numpy()]
        assert inside.max() <= outside.min()


# --- from pixels --------------------------------------------------------------------------------


def photographs(count=600, size=32):
    """Crops of the training photographs: (count, 3, size, size) bytes."""
    photos, draw = emoji.photographs("train", size), np.random.default_rng(0)
    crops = []
    for i in range(count):
        photo = photos[i % len(photos)]
        y, x = (draw.integers(0, side - size + 1) for side in photo.shape[1:])
        crops.append(photo[:, y : y + size, x : x + size])
    return torch.from_numpy(np.stack(crops))


def test_cluster_hides_what_correlates_with_an_anchor():
    """By numpy's correlation coefficients of the normalised patches, one picture at a time."""
    images, noise = photographs(20), noise_of(20, 64)
    _, hidden = masks.cluster_scores(noise, (8, 8), images, 0.5, threshold=0.4)
    closest = masks.closest_anchor(noise, (8, 8), images)
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in (glip.MEAN, glip.STD))
    for image, u, h, c in zip(images, noise, hidden, closest, strict=True):
        normal = ((image / 255 - mean) / std).numpy()
        patches = [normal[:, 4 * r : 4 * r + 4, 4 * q : 4 * q + 4].ravel()
                   for r in range(8) for q in range(8)]  # fmt: skip
        alike = np.corrcoef(np.array(patches, dtype=np.float64))
        anchors = u.argsort(descending=True)[:2].tolist()  # 3 % of 64, rounded up
        wanted = alike[anchors].max(axis=0)
        others = [i for i in range(64) if i not in anchors]
        np.testing.assert_allclose(c[others], wanted[others], atol=1e-4)
        assert h[anchors].all() and torch.isinf(c[anchors]).all()
        sure = [i for i in others if abs(wanted[i] - 0.4) > 1e-3]
        assert (h[sure].numpy() == (wanted[sure] > 0.4)).all()


@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.918])
@pytest.mark.parametrize("name", ["scenes-center", "emoji"])
def test_cluster_shows_the_asked_share_on_the_average(name, ratio):
    """The threshold of one sample, on pictures and noise that were not in it."""
    train, _ = data.load(name, 32)
    config = GLIPConfig(32, 4, 24, 2, 3, 10, 20, 1, 2)
    order = ConceptOrder(train.concept, 64, 0, "pretrain")
    batches = Batches(train, order, config, 0, 1)
    masker, tower = Masker("cluster", ratio), GLIP(config).visual
    masker.find_threshold(batches.sample(), tower)
    shares = []
    for step in range(12):
        images, noise = batches[step].images, batches[step].noise
        ids, visible = masker(images, noise, tower)
        assert ids.shape[1] == num_keep(64, ratio - 0.2)
        shares.append(visible.sum() / (64 * 64))
        _, hidden = masks.cluster_scores(noise, (8, 8), images, ratio, masker.threshold)
        fits = (~hidden).sum(1).clamp(max=ids.shape[1])  # surplus is dropped, the rest is shown
        assert torch.equal(visible.sum(1), fits) and fits.min() >= 1
    assert torch.stack(shares).mean() == pytest.approx(1 - ratio, abs=0.02)
    again = Masker("cluster", ratio)
    again.find_threshold(batches.sample(), tower)
    assert again.threshold == masker.threshold


@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.4, 0.6])
def test_cluster_threshold_at_the_limits(ratio):
    """No ratio, and places for no more than the share that is asked."""
    closest = masks.closest_anchor(noise_of(200, 64), (8, 8), photographs(200))
    threshold = masks.similarity_threshold(closest, ratio, min_mask_ratio=ratio)
    seen = masks.below(closest, threshold).sum(1).clamp(max=num_keep(64, ratio))
    if ratio < 0.03:
        assert seen.min() == num_keep(64, ratio)
    else:
        assert (seen.double().mean() / 64).item() == pytest.approx(1 - ratio, abs=0.02)


def test_cluster_is_coherent_in_space():
    images, noise = photographs(), noise_of(600, 64)
    _, hidden = masks.cluster_scores(noise, (8, 8), images, 0.5)
    clustered = hidden.view(-1, 8, 8)
    assert clustered.float().mean() == pytest.approx(0.5, abs=0.06)  # before places run out

    def agreement(squares):
        across = (squares[:, :, 1:] == squares[:, :, :-1]).float().mean()
        return (across + (squares[:, 1:] == squares[:, :-1]).float().mean()) / 2

    scattered = kept_maps("random", 0.5, (8, 8)).bool()
    assert agreement(scattered) == pytest.approx(0.5, abs=0.02)
    assert agreement(clustered) > 0.65


def test_cluster_mixes_in_patch_embeddings():
    """At weight 1 the embeddings alone decide; at 0 they say nothing."""
    images, noise = photographs(8), noise_of(8, 64)
    embeddings = torch.randn(8, 64, 5, generator=torch.Generator().manual_seed(0))
    plain = masks.closest_anchor(noise, (8, 8), images)
    weighted = masks.closest_anchor(noise, (8, 8), images, embeddings, 0.25)
    alone = masks.closest_anchor(noise, (8, 8), images, embeddings, 1.0)
    zero = masks.closest_anchor(noise, (8, 8), images, embeddings, 0.0)
    assert torch.equal(plain, zero) and not torch.allclose(plain, weighted)
    anchors = noise.topk(2, dim=1).indices
    for x, a, found in zip(embeddings, anchors, alone, strict=True):
        wanted = torch.nn.functional.cosine_similarity(x[:, None], x[None, a], dim=-1).amax(1)
        others = ~torch.isinf(found)
        torch.testing.assert_close(found[others], wanted[others], atol=1e-5, rtol=0)


def test_a_picture_that_is_one_cluster_still_shows_something():
    images = torch.full((2, 3, 32, 32), 200, dtype=torch.uint8)
    noise = noise_of(2, 64)
    _, visible = sample_mask("cluster", 2, 8, 0.75, noise=noise, pixels=images, threshold=0.3)
    assert visible.any(dim=1).all()


@pytest.mark.parametrize("mask", MASKS)
def test_nothing_attends_to_what_is_not_seen(mask):
    """Other pixels in hidden patches change no bit of the features; in visible ones they do."""
    torch.manual_seed(0)
    model, images, noise = GLIP(TINY).eval(), photographs(6), noise_of(6, 64)
    inputs = {**inputs_of(6, 8), "pixels": images}
    ids, visible = sample_mask(mask, 6, 8, 0.75, noise=noise, **inputs)
    assert visible is not None or mask != "cluster"
    visible = torch.ones_like(ids, dtype=torch.bool) if visible is None else visible
    assert visible.any(dim=1).all()

    def repainted(chosen):
        where = chosen.view(6, 1, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3)
        return torch.where(where, 255 - images, images)

    seen = torch.zeros(6, 64, dtype=torch.bool).scatter_(1, ids, visible)

    with torch.no_grad():
        plain = model.encode_image(images, ids, visible)
        assert torch.equal(plain, model.encode_image(repainted(~seen), ids, visible))
        assert not torch.equal(plain, model.encode_image(repainted(seen), ids, visible))
        seen_alone = torch.stack([  # and fillers change nothing beside rounding
            model.encode_image(images[i : i + 1], ids[i : i + 1, visible[i]])[0] for i in range(6)
        ])  # fmt: skip
    torch.testing.assert_close(plain, seen_alone, atol=1e-6, rtol=0)


# --- CLIP-PGS -----------------------------------------------------------------------------------


def numpy_pgs(image, u, p, n_candidates, weights=None):
    """(alike to some candidate, strong edges, candidates) of one picture by numpy and scipy."""
    mean, std = (np.reshape(c, (3, 1, 1)) for c in (glip.MEAN, glip.STD))
    side, image = image.shape[1] // p, image.numpy().astype(np.float64)
    cells = [(slice(p * r, p * r + p), slice(p * q, p * q + p))
             for r in range(side) for q in range(side)]  # fmt: skip
    normal, grey = (image / 255 - mean) / std, image.mean(axis=0)
    cosines = np.corrcoef([normal[:, rows, columns].ravel() for rows, columns in cells])
    plan = np.maximum(cosines, 0)
    for _ in range(1000):  # Sinkhorn and Knopp's own: rows, then columns
        plan /= plan.sum(axis=1, keepdims=True)
        plan /= plan.sum(axis=0, keepdims=True)
    gradient = np.hypot(*(ndimage.sobel(grey, axis, mode="nearest") for axis in (0, 1)))
    edge = np.array([gradient[cell].mean() for cell in cells])
    strong = (edge - edge.min()) / (edge.max() - edge.min()) > 0.5
    candidates = np.lexsort((-u.numpy(), strong))[:n_candidates]
    return (cosines + plan)[candidates].max(axis=0), strong, candidates


def test_pgs_keeps_what_is_least_like_the_candidates():
    """By numpy, one picture at a time; float32 may swap patches within a thousandth."""
    images, noise = photographs(20, 64), noise_of(20, 64)
    for ratio, more in ((0.5, 0.0), (0.3, 0.2), (0.75, 0.1)):
        ids, visible = sample_mask(
            "pgs", 20, 8, ratio, noise=noise, pixels=images, mask_range=more
        )
        shown = torch.ones_like(ids, dtype=torch.bool) if visible is None else visible
        for image, u, kept, seen in zip(images, noise, ids, shown, strict=True):
            alike, strong, candidates = numpy_pgs(image, u, 8, 4)
            alike[candidates] = 3
            order = np.where(strong, alike - 6, alike)
            removed = np.setdiff1d(np.arange(64), kept)
            assert len(kept) == num_keep(64, ratio) and len(removed) + len(kept) == 64
            assert order[kept].max() <= order[removed].min() + 2e-3
            assert not set(candidates) & set(kept.tolist()) and not strong[candidates].any()
            # Kept patches are hidden beyond the range, where they are alike and have no edge.
            by_order = kept[np.argsort(order[kept], kind="stable")].tolist()
            least = num_keep(64, ratio + more)
            wanted = {i for i in by_order[least:] if order[i] > 0.5}
            unsure = {i for i in by_order if abs(order[i] - 0.5) < 1e-3
                      or abs(order[i] - order[by_order[least - 1]]) < 2e-3}  # fmt: skip
            assert set(kept[~seen].tolist()) - unsure == wanted - unsure


@pytest.mark.parametrize("grid", [(14, 14), (8, 8), (4, 14)])
def test_edges_are_sobels(grid):
    """scikit-image's and scipy's on the grey picture, averaged over patches, from 0 to 1."""
    size = (4 * grid[0], 4 * grid[1])
    images = photographs(5, 56)[:, :, : size[0], : size[1]]
    for image, found in zip(images, masks.edges(images, grid), strict=True):
        grey = image.double().mean(0).numpy()
        scipys = np.hypot(*(ndimage.sobel(grey, axis, mode="nearest") for axis in (0, 1)))
        for gradient in (scipys, filters.sobel(grey)):
            cells = gradient.reshape(grid[0], 4, grid[1], 4).mean(axis=(1, 3))
            wanted = (cells - cells.min()) / (cells.max() - cells.min())
            np.testing.assert_allclose(found, wanted.ravel(), atol=1e-5)
    flat = torch.full((2, 3, 56, 56), 200, dtype=torch.uint8)
    assert not masks.edges(flat, (14, 14)).any()


def test_balance_is_sinkhorns():
    """Sums of 1, alternating normalisation's matrix, and the closed form of two patches."""
    alike = masks.similarity(patchify(photographs(20, 64), (8, 8)).float()).clamp(min=1e-6)
    plan, theirs = masks.balanced(alike), alike.double().numpy()
    for _ in range(1000):
        theirs = theirs / theirs.sum(axis=2, keepdims=True)
        theirs = theirs / theirs.sum(axis=1, keepdims=True)
    for way in (1, 2):
        assert (plan.sum(way) - 1).abs().max() < 1e-3
    np.testing.assert_allclose(plan, theirs, atol=5e-4)
    a, b, c = 0.9, 0.2, 0.4
    found = masks.balanced(torch.tensor([[[a, b], [b, c]]]))[0]
    share = math.sqrt(a * c) / (math.sqrt(a * c) + b)
    torch.testing.assert_close(found, torch.tensor([[share, 1 - share], [1 - share, share]]))


def test_pgs_always_keeps_strong_edges_and_the_papers_share():
    """98 of 196 patches; or 137, of which 98 at least are seen. Edges first where K is less."""
    images, noise = photographs(64, 112), noise_of(64, 196)
    strong = masks.edges(images, (14, 14)) > 0.5
    for ratio, more, most in ((0.5, 0.0, 98), (0.3, 0.2, 137)):
        given = {"noise": noise, "pixels": images, "mask_range": more}
        ids, visible = sample_mask("pgs", 64, 14, ratio, **given)
        assert ids.shape == (64, most) and (visible is None) == (more == 0)
        visible = torch.ones_like(ids, dtype=torch.bool) if visible is None else visible
        seen = torch.zeros(64, 196, dtype=torch.bool).scatter_(1, ids, visible)
        assert seen.sum(1).min() >= 98
        everything = (seen | ~strong).all(dim=1)
        assert torch.equal(everything, strong.sum(1) <= most) and everything.sum() > 60
        assert (strong | ~seen)[~everything].all()
    assert visible.sum(1).max() > visible.sum(1).min()
    assert 0.15 < strong.float().mean() < 0.35


def test_pgs_balance_moves_a_few_patches(monkeypatch):
    """As docs/masks.md says: Sinkhorn's matrix adds little to similarities of up to 1."""
    images, noise = photographs(64, 112), noise_of(64, 196)
    find = partial(sample_ids_keep, "pgs", 64, 14, 0.5, noise=noise, pixels=images)
    kept = torch.zeros(64, 196).scatter_(1, find(), 1)
    monkeypatch.setattr(masks, "balanced", torch.zeros_like)
    plain = torch.zeros(64, 196).scatter_(1, find(), 1)
    assert 0.002 < 1 - (kept * plain).sum() / kept.sum() < 0.02


def test_pgs_under_autocast_and_with_embeddings():
    """Half precision changes no mask; the embeddings' weight rises in eight steps."""
    images, noise = photographs(8, 64), noise_of(8, 64)
    tower, found = GLIP(GLIPConfig(64, 8, 24, 2, 3, 10, 20, 1, 2)).visual, []
    masker = Masker("pgs", 0.5, embedding_weight=0.7)
    for step in range(16):
        masker.before_step(step, 16, tower, sample=None)
        ids, _ = masker(images, noise, tower)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(ids, masker(images, noise, tower)[0])
        found.append(masker.embedding_weight)
    assert found[::2] == found[1::2] == pytest.approx([0.7 * i / 7 for i in range(8)])
    plain = sample_ids_keep("pgs", 8, 8, 0.5, noise=noise, pixels=images)
    assert not torch.equal(ids, plain)
    for kind in (torch.bfloat16, torch.float64):  # pictures without edges, all patches alike
        black = torch.zeros(8, 3, 64, 64, dtype=kind)
        ids = sample_ids_keep("pgs", 8, 8, 0.5, noise=noise, pixels=black)
        assert torch.equal(ids.sort().values, noise.topk(36).indices[:, 4:].sort().values)


# --- from a teacher -----------------------------------------------------------------------------


def test_the_teachers_attention_is_torchs():
    """nn.MultiheadAttention with the blocks' weights, averaged over heads, then over layers."""
    torch.manual_seed(0)
    tower, images = GLIP(TINY).visual, photographs(5)
    with torch.no_grad():
        found, features = attend(tower, images, features=True)
        x, maps = tower.embed(images, (8, 8), None), []
        for block in tower.transformer.resblocks:
            theirs = nn.MultiheadAttention(24, 3, batch_first=True)
            theirs.load_state_dict(block.attn.state_dict())
            y = block.ln_1(x)
            maps.append(theirs(y, y, y, average_attn_weights=True)[1][:, 0, 1:])
            x = block(x)
        torch.testing.assert_close(found.flatten(1), torch.stack(maps).mean(0))
        torch.testing.assert_close(features, tower(images, None, None))
        torch.testing.assert_close(attend(tower, images)[0], found)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_attentive_keeps_what_the_teacher_attends_to(scale):
    torch.manual_seed(0)
    model, images = GLIP(TINY), photographs(5)
    masker = Masker("attentive", 0.75, teacher_scale=scale)
    masker.update_teacher(model.visual, 0.5)
    ids, visible = masker(images, noise_of(5, 64), model.visual)
    small = scaled(images, scale)
    with torch.no_grad():
        attention = attend(model.visual, small)[0]
    assert tuple(attention.shape[1:]) == (8 * scale, 8 * scale) and visible is None
    attention = torch.nn.functional.interpolate(attention[:, None], (8, 8), mode="bilinear")
    wanted = attention.flatten(1).topk(16).indices
    assert torch.equal(ids.sort().values, wanted.sort().values)


def test_the_teacher_is_a_moving_average():
    torch.manual_seed(0)
    tower, masker = GLIP(TINY).visual, Masker("attentive", 0.75)
    masker.update_teacher(tower, 0.9)
    first = [p.clone() for p in masker.teacher.parameters()]
    for p in tower.parameters():
        p.data += 1.0
    masker.update_teacher(tower, 0.9)
    for old, now, new in zip(
        first, masker.teacher.parameters(), tower.parameters(), strict=True
    ):
        torch.testing.assert_close(now, 0.9 * old + 0.1 * new)
        assert not now.requires_grad


@pytest.mark.parametrize("mask", MASKS)
def test_a_masker_lives_on_in_its_checkpoint(mask, tmp_path):
    """What was found in training is what masks later: plain values and tensors alone."""
    torch.manual_seed(0)
    model, images, noise = GLIP(TINY), photographs(6), noise_of(6, 64)
    given = {"sigma": (0.1, 0.4), "mask_center": (0.2, 0.0), "embedding_weight": 0.5}
    known = masks.settings_of(MASKS[mask])
    masker = Masker(mask, 0.5, **{name: value for name, value in given.items() if name in known})
    assert masker.missing_inputs() == []
    if masker.needs("threshold"):
        masker.find_threshold([(images, noise)], model.visual)
    if masker.needs("attention"):
        masker.update_teacher(GLIP(TINY).visual, 0.5)
    with masker.learning(model.visual):
        ids_keep, _ = masker(images, noise, model.visual)
        model.encode_image(images, ids_keep).square().sum().backward()
    glip.save_checkpoint(tmp_path / "a.pt", model, mask=masker.state())
    again, _ = glip.load_model(tmp_path / "a.pt")
    restored = Masker.restored(glip.load_checkpoint(tmp_path / "a.pt")["mask"], again.visual)
    for a, b in zip(masker(images, noise, model.visual), restored(images, noise, again.visual),
                    strict=True):  # fmt: skip
        assert a is b is None or torch.equal(a, b)


# --- from a gaze --------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.918])
@pytest.mark.parametrize("sigma", [0.2, (0.1, 0.4)])
def test_a_gaze_starts_as_glip(ratio, sigma):
    torch.manual_seed(0)
    model, images, noise = GLIP(TINY), photographs(6), noise_of(6, 64)
    ours = Masker("gaze", ratio, sigma=sigma)(images, noise, model.visual)
    theirs = Masker("gaussian", ratio, sigma=sigma)(images, noise, model.visual)
    assert torch.equal(ours[0], theirs[0]) and ours[1] is None


@pytest.mark.parametrize("part", ["weights", "optimizer"])
def test_a_gaze_that_is_no_gaze_is_told_in_a_sentence(part):
    tower = GLIP(TINY).visual
    masker = Masker("gaze", 0.5)
    masker.looking(tower)
    for wrong in ({}, {"state": {}, "param_groups": []}, None):
        state = masker.state()
        state["gaze"] = state["gaze"] | {part: wrong}
        with pytest.raises(InputError, match="of another version"):
            Masker.restored(state, tower)


def test_gaze_hands_out_glips_chances_by_rank():
    """Any gaze: its highest patch is kept as often as GLIP keeps the centre, and so on down."""
    n, draws = 49, 20_000
    gaze = torch.randn(n, generator=torch.Generator().manual_seed(5)).expand(draws, n)
    kept = torch.zeros(2, n)
    for row, (mask, inputs) in enumerate({"gaussian": {}, "gaze": {"gaze": gaze}}.items()):
        ids = sample_ids_keep(mask, draws, 7, 0.75, noise=noise_of(draws, n, row), **inputs)
        kept[row] = torch.bincount(ids.flatten(), minlength=n) / draws
    by_density = glip.log_gaussian((7, 7), 0.2, (0.0, 0.0), "cpu")[0].argsort(descending=True)
    by_gaze = gaze[0].argsort(descending=True)
    theirs, ours = kept[0][by_density], kept[1][by_gaze]
    assert (theirs - ours).abs().max() < 4 * (0.25 * 2 / draws) ** 0.5  # 4 deviations


def test_a_gaze_learns_from_the_steps_own_gradient(monkeypatch):
    """What it is told equals autograd's gradient by the tokens; the model's gradients stay."""
    torch.manual_seed(0)
    model, images, noise = GLIP(TINY), photographs(6), noise_of(6, 64)
    tokens, told = glip.tokenize(list("abcdef")), []
    masker = Masker("gaze", 0.75)
    monkeypatch.setattr(Gaze, "update", lambda self, *found: told.append(found))
    with masker.learning(model.visual):
        ids_keep, _ = masker(images, noise, model.visual)
        glip.clip_loss(*model(images, tokens, ids_keep)).backward()
    ((scores, found),) = told
    theirs = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    x = model.visual.embed(images, (8, 8), ids_keep)
    alone = model.visual.ln_post(model.visual.transformer(x, glip.Packing(torch.arange(6) * 17)))
    image_features = nn.functional.normalize(alone @ model.visual.proj, dim=-1)
    loss = glip.clip_loss(image_features, model.encode_text(tokens), model.logit_scale.exp())
    (grad,) = torch.autograd.grad(loss, x, retain_graph=True)
    torch.testing.assert_close(found, (x * grad).abs().sum(-1)[:, 1:])
    loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, theirs[name])
    torch.testing.assert_close(scores, masker.gaze(images).gather(1, ids_keep))


def test_a_gaze_finds_what_matters():
    """One bright patch anywhere in a grey picture has all of the gradient: it is found."""
    masker, draw = Masker("gaze", 0.75), torch.Generator().manual_seed(0)
    tower = GLIP(TINY).visual
    gaze = masker.looking(tower)
    bright = torch.randint(64, (300, 16), generator=draw)
    for places in bright:
        pixels = torch.full((16, 64, 48), 128, dtype=torch.uint8)
        pixels[torch.arange(16), places] = 250
        images = pixels.unflatten(1, (8, 8)).unflatten(3, (3, 4, 4)).permute(0, 3, 1, 4, 2, 5)
        images = images.reshape(16, 3, 32, 32)
        gaze.asked = []
        gaze(images)
        gaze.keep(torch.arange(64).expand(16, -1))
        (scores,), gaze.asked = gaze.asked, None
        gaze.update(scores, nn.functional.one_hot(places, 64).float())
    assert (gaze(images).argmax(1) == places).float().mean() > 0.9


# --- the interface ------------------------------------------------------------------------------


def test_rows_may_declare_inputs_and_hide_fillers(monkeypatch):
    def bright(noise, grid, pixels, threshold=0.5):
        return pixels, pixels < threshold

    monkeypatch.setitem(MASKS, "bright", bright)
    pixels = torch.tensor([[0.1, 0.9, 0.6, 0.2]])
    ids, visible = sample_mask("bright", 1, 2, 0.25, pixels=pixels)
    assert ids.tolist() == [[1, 2, 3]] and visible.tolist() == [[True, True, False]]
    with pytest.raises(InputError, match="'bright' needs pixels"):
        sample_mask("bright", 1, 2, 0.25)
    monkeypatch.setitem(MASKS, "deep", lambda noise, grid, depth, threshold: noise)
    assert Masker("deep", 0.5).missing_inputs() == ["depth", "threshold"]
    monkeypatch.setitem(MASKS, "short", lambda noise, grid: noise[:, :3])
    with pytest.raises(InputError, match="'short' gave scores \\(1, 3\\) for \\(1, 4\\) patches"):
        sample_mask("short", 1, 2, 0.25)
    monkeypatch.setitem(MASKS, "short", lambda noise, grid: noise.tolist())
    with pytest.raises(InputError, match="'short' gave scores list for \\(2, 36\\) patches"):
        check(TrainConfig(mask="short"), 1)
    monkeypatch.setitem(MASKS, "short", lambda noise, grid: (noise, noise[0] > 0))
    with pytest.raises(InputError, match="'short' gave hidden \\(36,\\) for \\(2, 36\\) patches"):
        check(TrainConfig(mask="short"), 1)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sample_mask("blok", 1, 4, 0.5), "unknown mask 'blok': choose one of none, random"),
        (lambda: sample_mask("random", 1, 4, 1.0), "outside"),
        (lambda: sample_mask("random", 1, 4, -0.1), "outside"),
        (lambda: sample_mask("random", 2, 4, 0.5, noise=torch.rand(2, 9)), "noise has shape"),
        (lambda: sample_mask("cluster", 1, 4, 0.5), "mask 'cluster' needs pixels"),
        (lambda: sample_mask("gaussian", 1, 4, 0.5, center=(0, 1)), "no mask takes 'center': inp"),
        (lambda: sample_mask("gaussian", 1, 4, 0.5, mask_center=(0, 1, 2)), "a row and a column"),
        (lambda: Masker.restored({"mask": "none", "colour": 1}, None), "of another version"),
        (lambda: sample_mask("attentive", 1, 4, 0.5), "mask 'attentive' needs attention"),
        (lambda: sample_mask("gaze", 1, 4, 0.5), "mask 'gaze' needs gaze"),
        (lambda: sample_mask("gaussian", 1, 4, 0.5, sigma=0.0), "sigma 0.0 must be one or"),
        (lambda: sample_mask("gaussian", 1, 4, 0.5, sigma=(0.2, -1)), "above 0"),
        (lambda: sample_mask("gaussian", 1, 4, 0.5, sigma=float("nan")), "above 0"),
    ],
)
def test_bad_input_is_told(call, words):
    with pytest.raises(InputError, match=words):
        call()


def test_config_refuses_patches_that_do_not_tile():
    with pytest.raises(InputError, match="multiple of the patch size"):
        _ = glip.GLIPConfig(image_size=100).grid
