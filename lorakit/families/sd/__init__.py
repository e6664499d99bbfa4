"""Stable Diffusion 1.x, 2.x and XL: ``task`` trains, ``plan`` looks ahead, ``generate`` draws."""
