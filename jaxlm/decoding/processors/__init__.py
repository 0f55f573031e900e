"""What changes logits before a token is drawn, one file an idea."""
