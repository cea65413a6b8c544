"""Pixels: rendering planned views, colour, and composites."""
