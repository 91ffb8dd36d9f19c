# %% exercise 1
my_steps = 10_311 // 256  # 40


# %% exercise 2
def my_recall(images, texts, concept, k):
    """Share of pictures whose right name is among the k likeliest."""
    best = (images @ texts.T).topk(k, dim=1).indices                                 # (M, k)
    return (best == torch.from_numpy(concept)[:, None]).any(dim=1).double().mean()


# %% exercise 3
my_flags = ["--mask", "random", "--mask-ratio", "0.5", "--steps", "100", "--tune-epochs", "0"]
