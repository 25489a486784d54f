"""The recipe of the bundled base model: data, autoencoder, text encoder, denoiser, evaluation."""
