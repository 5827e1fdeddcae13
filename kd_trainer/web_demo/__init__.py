"""The web demo: models, result of one picture, page."""
