"""4-bit weights and activations after Atom (Zhao et al., 2024), and their relatives W4A8, W8A8 and W4A16."""
