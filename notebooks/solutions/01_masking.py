# %% exercise 1
def rim_scores(noise, grid, sigma):
    """noise (B, N) -> scores (B, N), higher near the rim."""
    return 2 * noise - glip.gaussian_scores(noise, grid, sigma)  # the noise less the density


# %% exercise 2
my_sigma = 0.2**2  # the variance whose square root is 0.2


# %% exercise 3
flat_sigma = next(s / 2 for s in range(1, 99) if (expected(s / 2, 49) - 0.25).abs().max() < 0.02)
