"""The two autoencoders: frames, stage `vae`, and sound, stage `sound`."""
