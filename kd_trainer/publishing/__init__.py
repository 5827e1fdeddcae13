"""A Trainer that pushes the student and its card."""
