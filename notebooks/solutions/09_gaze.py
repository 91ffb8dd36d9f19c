# %% exercise 1
def my_gaze_scores(noise, grid, gaze, sigma=0.2):
    """noise (B, N), gaze (B, N) -> scores (B, N)."""
    density = glip.gaussian_scores(torch.zeros(1, noise.shape[1]), grid, sigma)[0].sort().values
    rank = gaze.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return noise + density.flip(0)[rank]


# %% exercise 2
def my_target(x, gradient):
    """Tokens and gradients (B, K, D) -> how much each patch matters (B, K)."""
    return gradient.norm(dim=-1)


# %% exercise 3
# The others share what is left nearly as under random masking: the mask stays with its few first
# guesses, but still learns about all places.
density = glip.gaussian_scores(torch.zeros(1, patches), grid, 0.05)[0]
my_safe = sum((density + 1 > d).sum().item() <= k for d in density)  # those that can score higher


# %% exercise 4
def my_gradients(model, masker, learning):
    """The gradients of glip.clip_loss by the model's parameters: {name: tensor}."""
    with masker.learning(model.visual) if learning else contextlib.nullcontext():
        ids_keep, _ = masker(images, noise[: len(images)], model.visual)
        model.zero_grad()
        glip.clip_loss(*model(images, texts, ids_keep)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


# %% exercise 5
# A patch that is never kept has no target. It cannot rise by what it would have shown, so the mask
# confirms its own first guess: GLIP's. The noise lets every patch be tried now and then.
my_places = (k, len(glips[:256].unique()))
