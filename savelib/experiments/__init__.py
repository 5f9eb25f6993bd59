"""Studies and measurements; nothing below imports them."""
