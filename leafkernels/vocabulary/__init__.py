"""From logits or hidden states to numbers for each token."""
