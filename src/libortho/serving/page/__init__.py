"""The page for people: one file without anything from elsewhere."""

from libortho.serving.page.page import page

__all__ = ["page"]
