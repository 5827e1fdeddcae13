"""The web demo: models, result of one image, page."""
