"""What makes this PowerInfer: profiles of neurons, predictors, placements, and how each layer is computed."""
