# %% exercise 1
costs = {r: image_flops(paper, glip.num_keep(196, r)) for r in np.arange(0, 1, 0.01)}
even_ratio = min(costs, key=lambda r: abs(costs[r] - text_flops(paper, 77)))  # 0.83


# %% exercise 2
def reordered(ids_keep):
    """The same patches in another order. (B, K) -> (B, K)."""
    return ids_keep.flip(1)


# %% exercise 3
side = 64  # 4 x 4 patches of 16 pixels, and the class token
