"""From numbers for each token to one number."""
