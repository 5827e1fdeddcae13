"""A Trainer that saves complete checkpoints and resumes exactly."""
