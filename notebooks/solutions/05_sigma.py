# %% exercise 1
my_sigma = 1 / (2 * np.pi)

# %% exercise 2
my_variances = (0.8, 0.05)

# %% exercise 3
my_centre = (-0.75, -0.75)
