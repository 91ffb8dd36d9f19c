# %% exercise 1
my_batch = round(math.exp(5.545))  # 256


# %% exercise 2
my_scale = -math.log(math.exp(0.1) - 1)  # 2.25


# %% exercise 3
def my_siglip(images, texts, scale, bias):
    """(B, E), (B, E), (), () -> scalar."""
    logits = scale * images @ texts.T + bias
    sign = 2 * torch.eye(len(images)) - 1
    return -F.logsigmoid(sign * logits).sum() / len(images)
