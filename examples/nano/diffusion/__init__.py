"""The transformer over both latents and the text: stages `dit` and `distill`."""
