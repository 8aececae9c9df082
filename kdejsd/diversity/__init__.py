"""How many different things a generator makes, read off the latent space that a classifier divides into classes."""
