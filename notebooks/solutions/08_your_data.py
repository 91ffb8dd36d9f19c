# %% exercise 1
def read_folder(folder):
    paths = sorted(folder.glob("*.png"))
    return [(path, path.with_suffix(".txt").read_text()) for path in paths]


# %% exercise 2
my_words = ["--data", "shapes.csv", "--mask", "none", "--image-size", "24",
            "--tune-image-size", "48"]  # fmt: skip


# %% exercise 3
def best_thing(features):
    texts = encoder.texts([f"a {thing}" for thing in THINGS])
    return THINGS[(texts @ features).argmax()]
