"""Token ids to log-probabilities and gradients."""
