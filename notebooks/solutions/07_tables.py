# %% exercise 1
(last,) = [m for m in own if (m["source"], m["data"], m["method"], m["tokens"])
           == ("GLIP", "CC12M", "GLIP", 17)]  # fmt: skip
my_fall = imagenet(last, "masked inference") - imagenet(last, "full picture")

# %% exercise 2
my_pictures = round(1.05 * 1.96**2 * 0.372 * 0.628 / 0.01**2)

# %% exercise 3
my_side = 64
