"""Subject sets: intake, cleaning, captions, prior images, latent and text caches."""
