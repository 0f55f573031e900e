"""What guesses the next tokens, one file each."""
