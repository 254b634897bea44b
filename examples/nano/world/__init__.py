"""The nano world: captions, pictures and voices by formulas."""
