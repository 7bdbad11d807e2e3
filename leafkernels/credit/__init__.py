"""From rollouts to one number for each token."""
