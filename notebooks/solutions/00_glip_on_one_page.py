# %% exercise 1
def flip_scores(noise):
    return noise


# %% exercise 2
my_tokens = 512 * (9 + 1), 512 * (36 + 1)


# %% exercise 3
def nearest(name):
    features = model.texts(tokens)
    cosines = features @ features[names.index(name)]
    cosines[names.index(name)] = -1
    return names[cosines.argmax()]
